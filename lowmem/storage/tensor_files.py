"""Write safetensors files in parts, and read them a few rows at a time with the safetensors library."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowmem.errors import UsageError
from lowmem.storage.files import FileRecord, to_json, write_file
from lowmem.storage.shard_files import index_name, open_shard, shard_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PART_BYTES = 2**24  # bytes of a tensor to write or read at a time, in host memory
_MAPPED_BYTES = 2**25  # a file is reopened after reading this many bytes, because its mapped pages count as our memory


class Shard(NamedTuple):
    """One safetensors file to be written."""

    name: str
    tensors: dict[str, Tensor]
    """In the order of the file. For a sharded tensor (DTensor), the file contains the full tensor."""

    @property
    def num_bytes(self) -> int:
        return sum(bytes_of(tensor) for tensor in self.tensors.values())

    @property
    def header(self) -> bytes:
        """The bytes before the tensor data: the header length (8 bytes, little endian) and JSON. Checks the dtypes."""
        fields, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in self.tensors.items():
            check_dtype(name, tensor)
            start, end = end, end + bytes_of(tensor)
            fields[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        encoded = json.dumps(fields, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise UsageError if checkpoints do not support the tensor's dtype."""
    if tensor.dtype not in _NAMES:
        found = f"checkpoints do not support {tensor.dtype}"
        raise UsageError(f"tensor {name} cannot be saved ({found}): give it another dtype or make it non-persistent")


def split_shards(tensors: Mapping[str, Tensor], stem: str, max_shard_bytes: int) -> list[Shard]:
    """Distribute `tensors`, in order, over files of at most `max_shard_bytes`; a larger tensor gets its own file."""
    groups: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if groups[-1] and bytes_of(tensor) > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = tensor
        room -= bytes_of(tensor)
    # sort wide types first, so that each tensor starts at a multiple of its element size
    groups = [dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups]
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    return [Shard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def write_index(shards: list[Shard], folder: Path, stem: str) -> dict[str, FileRecord]:
    """If there are several files, write STEM.safetensors.index.json, which maps tensors to files. Return its record."""
    if len(shards) == 1:
        return {}
    weight_map = {name: Path(shard.name).name for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    name = index_name(stem)
    return {name: write_file(folder / name, [to_json(index)])}


def host_parts(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """Copy tensors to the host and yield their bytes, in element order, at most 16 MiB of one tensor at a time.

    While a part from a CUDA device is in use, the next one is copied into pinned memory. No buffer is used again while
    a yielded part refers to it: torch takes a pinned block back when its tensor is freed and its copy has ended.
    """
    copying: tuple[Tensor, torch.cuda.Event] | None = None
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        for part in flat.split(PART_BYTES // flat.dtype.itemsize):
            previous, copying = copying, _start_copy(part) if part.is_cuda else None
            if previous:
                yield _copied(*previous)
            if not part.is_cuda:
                yield _bytes(part.cpu())
        del tensor, flat, part  # free a tensor that was received from another rank before receiving the next one
    if copying:
        yield _copied(*copying)


def _start_copy(part: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    with torch.cuda.device(part.device):
        host = torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


def _copied(host: Tensor, event: torch.cuda.Event) -> memoryview:
    event.synchronize()
    return _bytes(host)


def _bytes(host: Tensor) -> memoryview:
    return host.view(torch.uint8).numpy().data


class _Reader:
    """Keeps one file open at a time, and reopens it after reading `_MAPPED_BYTES`, to free its mapped pages."""

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


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file. Only `read` and `copy_part` read its data."""

    reader: _Reader
    path: Path
    name: str
    dtype: str
    """As safetensors writes it: "F32", "BF16" and so on."""
    shape: list[int]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The tensor's dtype in torch, or None if checkpoints do not support it (8-bit floats, for example)."""
        return _DTYPES.get(self.dtype)

    def read(self, *part: slice) -> Tensor:
        """Read all or some rows (and columns). While the memory-mapped result is held, its pages count as memory."""
        return self.reader.read(self.path, self.name, part if self.shape else ())

    def copy_part(self, target: Tensor, first: int = 0, column: int = 0) -> None:
        """Fill `target`, on any device, with the part starting at row `first` and column `column`, 16 MiB at a time."""
        if target.dim() == 0:
            target.copy_(self.read())
        if target.dim() == 0 or target.numel() == 0:
            return
        row_bytes = max(1, bytes_of(target) // max(1, len(target)))
        columns = [slice(column, column + width) for width in target.shape[1:2] if width != self.shape[1]]
        for part in target.split(max(1, PART_BYTES // row_bytes)):
            part.copy_(self.read(slice(first, first + len(part)), *columns))
            first += len(part)


def open_shards(folder: Path, stem: str, files: Collection[str] | None = None) -> dict[str, StoredTensor]:
    """Return every tensor in the files of `stem`, by name. `files` has the names in `folder` (None: look there).

    Raises UsageError naming a damaged file, FileNotFoundError for a missing one.
    """
    tensors, reader = {}, _Reader()
    for path in shard_files(folder, stem, files):
        with open_shard(path, "pt") as file:
            for name in file.keys():
                stored = file.get_slice(name)
                tensors[name] = StoredTensor(reader, path, name, stored.get_dtype(), stored.get_shape())
    return tensors


def tensor_differences(
    stored: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor], *, any_dtype: bool
) -> list[str]:
    """List why `stored` cannot fill `tensors`: one clause for each tensor that differs, sorted."""
    differences = [f"{name} is only in the checkpoint" for name in stored.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        then, now = stored.get(name), (_NAMES.get(tensor.dtype, tensor.dtype), [*tensor.shape])
        if then is None:
            differences.append(f"{name} is not in the checkpoint")
        elif then.shape != now[1] or not (any_dtype or then.dtype == now[0]):
            differences.append(f"{name} was {then.dtype}{then.shape} and is {now[0]}{now[1]}")
    return sorted(differences)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of all elements; for a sharded tensor (DTensor), those of the full tensor."""
    return tensor.numel() * tensor.dtype.itemsize
