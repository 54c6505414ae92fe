"""safetensors on disk: written in parts and hashed on the way, read a few rows at a time by the safetensors library.

Format: 8 bytes with the header's length (little endian), a JSON header with dtype, shape and byte range of each
tensor, then the tensors' bytes back to back.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowmem.storage.files import FileRecord, to_json, write_file

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
_PART_BYTES = 2**24  # of a tensor that is in host memory at a time, written or read
_MAPPED_BYTES = 2**25  # safetensors maps files, whose pages count as ours until a file is closed: after so many


class Shard(NamedTuple):
    """One safetensors file to be written."""

    name: str
    tensors: dict[str, Tensor]
    """In the order of their bytes in the file. Sharded ones (DTensor) stand for the whole ones that it will hold."""

    @property
    def num_bytes(self) -> int:
        return sum(bytes_of(tensor) for tensor in self.tensors.values())

    @property
    def header(self) -> bytes:
        """What stands in the file before the tensors' bytes. Raises ValueError for a dtype that files do not hold."""
        fields, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPE_NAMES:
                raise ValueError(f"{self.name}: tensor {name} is {tensor.dtype}, which no file holds: take another")
            start, end = end, end + bytes_of(tensor)
            fields[name] = {"dtype": dtype_name(tensor.dtype), "shape": [*tensor.shape], "data_offsets": [start, end]}
        encoded = json.dumps(fields, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


def split_shards(tensors: Mapping[str, Tensor], stem: str, max_shard_bytes: int) -> list[Shard]:
    """Divide `tensors`, in the given order, over files of at most `max_shard_bytes` (or of one larger tensor).

    They have the names that transformers gives them: STEM.safetensors or STEM-00001-of-00002.safetensors.
    """
    groups: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if groups[-1] and bytes_of(tensor) > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = tensor
        room -= bytes_of(tensor)
    # wide types first: each tensor then starts at a multiple of its element size
    groups = [dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups]
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    return [Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_shards(tensors: Mapping[str, Tensor], folder: Path, stem: str, max_shard_bytes: int) -> dict[str, FileRecord]:
    """Write `tensors`, none of them sharded, into the files of `split_shards` and their index: the files' records."""
    shards = split_shards(tensors, stem, max_shard_bytes)
    records = {}
    for shard in shards:
        parts = chain.from_iterable(map(host_parts, shard.tensors.values()))
        records[shard.name] = write_file(folder / shard.name, chain([shard.header], parts))
    return records | write_index(shards, folder, stem)


def write_index(shards: list[Shard], folder: Path, stem: str) -> dict[str, FileRecord]:
    """Write STEM.safetensors.index.json, which tells which of several files a tensor is in; of one file nothing."""
    if len(shards) == 1:
        return {}
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    name = f"{stem}.safetensors.index.json"
    return {name: write_file(folder / name, [to_json(index)])}


def host_parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, on the host, 16 MiB at a time."""
    flat = tensor.detach().contiguous().view(-1)
    for part in flat.split(_PART_BYTES // flat.dtype.itemsize):
        yield part.cpu().view(torch.uint8).numpy().data


class StoredTensor:
    """A tensor in a safetensors file; nothing of it is read before `read`."""

    def __init__(self, reader: "_Reader", path: Path, name: str, dtype: str, shape: list[int]):
        self._reader, self._path, self._name = reader, path, name
        self.shape = shape
        self.dtype = dtype
        """As safetensors writes it: "F32", "BF16" and so on."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(dtype for dtype, name in _DTYPE_NAMES.items() if name == self.dtype)

    def read(self, *part: slice) -> Tensor:
        """The tensor, or some rows (and columns) of it, on the host. It lies in the file's memory map: copy it."""
        return self._reader.read(self._path, self._name, part if self.shape else ())

    def copy_part(self, target: Tensor, first: int = 0, column: int = 0) -> None:
        """Copy what begins at a row and column into `target`, which is of any device, 16 MiB at a time."""
        if target.dim() == 0:
            target.copy_(self.read())
        if target.dim() == 0 or target.numel() == 0:
            return
        row_bytes = max(1, bytes_of(target) // max(1, len(target)))
        columns = [slice(column, column + width) for width in target.shape[1:2] if width != self.shape[1]]
        for part in target.split(max(1, _PART_BYTES // row_bytes)):
            part.copy_(self.read(slice(first, first + len(part)), *columns))
            first += len(part)


class _Reader:
    """Has one file open at a time, and opens it again after some reading: pages of its map count as our memory."""

    def __init__(self):
        self._path: Path | None = None
        self._file: safe_open | None = None
        self._left = 0

    def read(self, path: Path, name: str, part: tuple[slice, ...]) -> Tensor:
        if path != self._path or self._left <= 0:
            self._path, self._file, self._left = path, safe_open(path, framework="pt"), _MAPPED_BYTES
        tensor = self._file.get_slice(name)[part] if part else self._file.get_tensor(name)
        self._left -= bytes_of(tensor)
        return tensor


def open_shards(folder: Path, stem: str, files: Collection[str] | None = None) -> dict[str, StoredTensor]:
    """Every tensor that `write_shards` wrote, by name. Only `files` (None: all) count, whatever else lies there."""
    index = folder / f"{stem}.safetensors.index.json"
    is_sharded = index.exists() if files is None else index.name in files
    names = set(json.loads(index.read_text())["weight_map"].values()) if is_sharded else {f"{stem}.safetensors"}
    tensors, reader = {}, _Reader()
    for path in (folder / name for name in sorted(names)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                stored = file.get_slice(name)
                tensors[name] = StoredTensor(reader, path, name, stored.get_dtype(), stored.get_shape())
    return tensors


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as safetensors writes it."""
    return _DTYPE_NAMES[dtype]


def bytes_of(tensor: Tensor) -> int:
    """Of its elements; a sharded one (DTensor) counts as the whole."""
    return tensor.numel() * tensor.dtype.itemsize
