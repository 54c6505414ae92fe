"""safetensors on disk: written one tensor at a time and hashed on the way, read by the safetensors library.

Format: 8 bytes with the header's length (little endian), a JSON header with dtype, shape and byte range of each
tensor, then the tensors' bytes back to back.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_READ_BYTES = 2**24


# {"bytes": size of a file, "xxh3_128": its hash in hexadecimal}
FileRecord = dict[str, object]


def write_shards(tensors: Mapping[str, Tensor], folder: Path, stem: str, max_shard_bytes: int) -> dict[str, FileRecord]:
    """Write `tensors` under the names that transformers gives them: STEM.safetensors, or several
    STEM-00001-of-00002.safetensors with a STEM.safetensors.index.json that tells which tensor is where."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) <= 1:
        return {f"{stem}.safetensors": write_safetensors(tensors, folder / f"{stem}.safetensors")}
    records, weight_map = {}, {}
    for number, part in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_safetensors(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    index_name = f"{stem}.safetensors.index.json"
    return records | {index_name: write_file(folder / index_name, [to_json(index)])}


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Groups of at most `max_shard_bytes` (or of one larger tensor), in the given order."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> FileRecord:
    """Write one safetensors file, one tensor at a time in host memory. Raises ValueError for a dtype it cannot hold."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # wide types first: each tensor then starts at a multiple of its element size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{path}: tensor {name} is {tensor.dtype}, which no checkpoint holds")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for _, tensor in ordered:
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return write_file(path, parts())


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `parts` one after the other, hashed on the way, and bring them to disk (fsync)."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def to_json(value: object) -> bytes:
    """The bytes of a JSON file that a person can read."""
    return json.dumps(value, indent=2).encode()


def record_file(path: Path) -> FileRecord:
    """The record of a file that is there already."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
        return {"bytes": file.tell(), "xxh3_128": digest.hexdigest()}


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries (new names, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file; nothing is read before `read`."""

    file: safe_open
    name: str

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    @property
    def dtype(self) -> str:
        """As safetensors writes it: "F32", "BF16" and so on."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def open_shards(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Every tensor that `write_shards` wrote, by name."""
    index = folder / f"{stem}.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {f"{stem}.safetensors"}
    files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    return {name: StoredTensor(file, name) for file in files for name in file.keys()}


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as safetensors writes it."""
    return _DTYPE_NAMES[dtype]
