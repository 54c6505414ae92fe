"""The command `export`: copy the model of a checkpoint or of a model folder, and change its dtype if wanted."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.checkpoint.manifest import checkpoints, verify_checkpoint
from lowmem.checkpoint.saved import read_manifest
from lowmem.errors import SaveError, UsageError
from lowmem.optim.formats import merge_halves
from lowmem.storage.atomic_folder import atomic_folder
from lowmem.storage.files import free_bytes, read_json, to_json, write_file
from lowmem.storage.tensor_files import StoredTensor, host_parts, open_shards, split_shards, write_index

_ROW_ELEMENTS = 2**22  # tensors are converted in slices of about this many elements
# Files with these suffixes are not copied: their weights would differ from the exported ones, and some are pickles.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"}


class _Source(NamedTuple):
    """A tensor to export. `parts` reads rows of `stored`, adds `low` (low halves of fp32) if set, and converts."""

    stored: StoredTensor
    low: StoredTensor | None
    dtype: torch.dtype

    def parts(self) -> Iterator[memoryview]:
        """Iterate over the bytes of the converted tensor. Raises UsageError if a value is too large for the dtype."""
        num_rows, *rest = self.stored.shape or [1]
        height = max(1, _ROW_ELEMENTS // max(1, math.prod(rest)))
        return host_parts(self._converted(slice(first, first + height)) for first in range(0, num_rows, height))

    def _converted(self, rows: slice) -> Tensor:
        values = self.stored.read(rows)
        if self.low is not None:
            values = merge_halves(values, self.low.read(rows))
        converted = values.to(self.dtype)
        if converted.is_floating_point() and (converted.isinf() & ~values.isinf()).any():
            largest = values[~values.isinf()].abs().max().item()
            found = f"tensor {self.stored.name} holds {largest:g}, too large for {_name(self.dtype)}"
            raise UsageError(f"{found}: export in bfloat16 or float32")
        return converted


def export(path: str | Path, out: str | Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> str:
    """Write the model in `path`, a checkpoint (verified first) or a model folder, into the new folder `out`.

    Converts floating-point tensors to `dtype` (None: does not convert). If there is an fp32 master, float32 and float16
    are made from it. Returns a summary. Raises UsageError if the export is impossible, SaveError if writing fails.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: export to a new folder")
    if checkpoints(out.parent):
        raise UsageError(f"{out} is in a folder of checkpoints: export to another folder")
    if of_run := checkpoints(path / "checkpoints"):
        raise UsageError(f"{path} is a run: export one of its checkpoints, such as {of_run[-1]}, or {path / 'model'}")
    folder, lows, files = path, {}, None
    if not (path / "config.json").is_file():
        verify_checkpoint(path)
        names = read_manifest(path)["files"]
        folder, lows = path / "model", open_shards(path, "optimizer", names)
        files = [name.removeprefix("model/") for name in names if name.startswith("model/")]
    config = _read_config(folder, dtype)
    stored = _open_model(folder, files)
    sources = {name: _source(tensor, lows.get(f"{name}.weight_low"), dtype) for name, tensor in stored.items()}
    outlines = {name: torch.empty(x.stored.shape, dtype=x.dtype, device="meta") for name, x in sources.items()}
    shards = split_shards(outlines, "model", max_shard_bytes)
    needed = sum(shard.num_bytes for shard in shards)
    try:
        if needed > (free := free_bytes(out)):
            raise SaveError(f"{out} needs {needed:,} bytes, but only {free:,} are free: free space or use another disk")
        with atomic_folder(out) as unfinished:
            for shard in shards:
                parts = chain.from_iterable(sources[name].parts() for name in shard.tensors)
                write_file(unfinished / shard.name, chain([shard.header], parts))
            write_index(shards, unfinished, "model")
            write_file(unfinished / "config.json", [to_json(config)])
            _copy_others(folder, files, unfinished)
    except OSError as error:
        raise SaveError(f"{out} could not be written ({error.strerror}) and was removed: try again") from error
    masters = sum(source.low is not None for source in sources.values())
    origin = f", {masters} of them from the fp32 master" if masters else ""
    dtypes = ", ".join(sorted({_name(source.dtype) for source in sources.values()}))
    in_files = f"{len(shards)} files" if len(shards) > 1 else "one file"
    return f"{out}: {len(sources)} tensors in {dtypes}{origin}; {needed:,} bytes in {in_files}"


def _source(stored: StoredTensor, low: StoredTensor | None, dtype: torch.dtype | None) -> _Source:
    saved_as = stored.torch_dtype
    if saved_as is None:
        raise UsageError(f"tensor {stored.name} is {stored.dtype}, which is not supported: use a model without it")
    to = dtype if dtype is not None and saved_as.is_floating_point else saved_as
    return _Source(stored, None if to == torch.bfloat16 else low, to)  # with `low`, `stored` holds the bf16 weights


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_config(folder: Path, dtype: torch.dtype | None) -> dict[str, object]:
    config = read_json(folder / "config.json", advice="pass a model folder")
    if not isinstance(config, dict):
        raise UsageError(f"{folder / 'config.json'} is not an object: pass a model folder")
    if dtype is None:
        return config
    if "quantization_config" in config:
        raise UsageError(f"{folder} has quantized weights, which cannot be converted: set --dtype=None")
    config.pop("torch_dtype", None)  # transformers' former name for `dtype`
    return config | {"dtype": _name(dtype)}


def _open_model(folder: Path, files: list[str] | None) -> Mapping[str, StoredTensor]:
    try:
        return open_shards(folder, "model", files)
    except FileNotFoundError as error:
        found = f"no safetensors weights ({error}), and .bin files are pickles, which are never opened"
        raise UsageError(f"{folder} has {found}: convert them to safetensors if you trust them") from error


def _copy_others(folder: Path, files: list[str] | None, target: Path) -> None:
    """Copy `files` of `folder` (None: top level and chat templates) to `target`, except weights and hidden files."""
    in_folder = chain(folder.iterdir(), folder.glob("additional_chat_templates/*"))
    for path in in_folder if files is None else [folder / name for name in files]:
        is_weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        copy = target / path.relative_to(folder)
        if path.is_file() and not (path.name.startswith(".") or is_weights or copy.exists()):
            copy.parent.mkdir(exist_ok=True)
            write_file(copy, [path.read_bytes()])
