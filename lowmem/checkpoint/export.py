"""What the command `export` does: a checkpoint's model, or any, as a folder for `from_pretrained` in another dtype."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lowmem.checkpoint.manifest import checkpoints, read_manifest, verify_checkpoint
from lowmem.errors import SaveError, UsageError
from lowmem.optim.formats import merge_halves
from lowmem.storage.atomic_folder import whole_or_absent
from lowmem.storage.files import free_bytes, to_json, write_file
from lowmem.storage.tensor_files import StoredTensor, host_parts, open_shards, split_shards, write_index

_ROW_ELEMENTS = 2**22  # converted at a time
# Weights in other formats: they would be another model than the exported one, and some are pickles.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"}


class _Source:
    """A tensor as it will be exported: read, joined with its low half, converted, a slice of rows at a time."""

    def __init__(self, name: str, stored: StoredTensor, low: StoredTensor | None, dtype: torch.dtype | None):
        try:
            saved_as = stored.torch_dtype
        except StopIteration:
            raise UsageError(
                f"tensor {name} is {stored.dtype}, which is not exported: take a model without it"
            ) from None
        self.name, self._stored = name, stored
        self.dtype = dtype if dtype is not None and saved_as.is_floating_point else saved_as
        # The bf16 half by itself is the master rounded to bf16.
        self._low = None if self.dtype == torch.bfloat16 else low

    @property
    def is_master(self) -> bool:
        return self._low is not None

    def outline(self) -> Tensor:
        """Shape and dtype, without data."""
        return torch.empty(self._stored.shape, dtype=self.dtype, device="meta")

    def parts(self) -> Iterator[memoryview]:
        """Its bytes. Raises UsageError if a number is too large for the dtype."""
        if not self._stored.shape:
            yield from host_parts(self._converted(None))
            return
        num_rows, *rest = self._stored.shape
        height = max(1, _ROW_ELEMENTS // max(1, torch.Size(rest).numel()))
        for first in range(0, num_rows, height):
            yield from host_parts(self._converted(slice(first, first + height)))

    def _converted(self, rows: slice | None) -> Tensor:
        values = self._stored.read(rows)
        if self._low is not None:
            values = merge_halves(values, self._low.read(rows))
        converted = values.to(self.dtype)
        if converted.is_floating_point() and (converted.isinf() & ~values.isinf()).any():
            largest = values[~values.isinf()].abs().max().item()
            told = str(self.dtype).removeprefix("torch.")
            raise UsageError(
                f"tensor {self.name} holds {largest:g}, too large for {told}: export in bfloat16 or float32"
            )
        return converted


def export(path: str | Path, out: str | Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> str:
    """Write the model of `path`, a checkpoint (verified first) or a model's folder, into the new folder `out`.

    `dtype` is that of all floating-point tensors, None leaves them as they are. From a checkpoint in memory=exact,
    float32 and float16 come from its fp32 master. At most 16 MiB of a tensor (or a row of it) are in memory at a time,
    and `out` is whole or absent. Returns a line that says what was done. Raises UsageError for what cannot be exported
    and SaveError if `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: export into a new folder")
    if checkpoints(out.parent):
        raise UsageError(f"{out} lies among checkpoints: export elsewhere")
    if of_run := checkpoints(path / "checkpoints"):
        raise UsageError(f"{path} is a run: name one of its checkpoints, such as {of_run[-1]}, or {path / 'model'}")
    folder, lows, files = path, {}, None
    if not (path / "config.json").is_file():
        verify_checkpoint(path)
        names = read_manifest(path)["files"]
        folder, lows = path / "model", open_shards(path, "optimizer", names)
        files = [path / name for name in names if name.startswith("model/")]
    config = _read_config(folder, dtype)
    stored = _open_model(folder, files and [file.relative_to(folder).as_posix() for file in files])
    sources = {name: _Source(name, x, lows.get(f"{name}.weight_low"), dtype) for name, x in stored.items()}
    shards = split_shards({name: source.outline() for name, source in sources.items()}, "model", max_shard_bytes)
    needed = sum(shard.num_bytes for shard in shards)
    try:
        if needed > (free := free_bytes(out)):
            raise SaveError(f"{out} needs {needed:,} bytes, {free:,} are free: make room, or choose another disk")
        with whole_or_absent(out) as unfinished:
            for shard in shards:
                parts = chain.from_iterable(sources[name].parts() for name in shard.tensors)
                write_file(unfinished / shard.name, chain([shard.header], parts))
            write_index(shards, unfinished, "model")
            write_file(unfinished / "config.json", [to_json(config)])
            _copy_others(folder, files, unfinished)
    except OSError as error:
        raise SaveError(f"{out} could not be written ({error.strerror}): nothing is left of it, try again") from error
    return _told(out, sources, needed, len(shards))


def _read_config(folder: Path, dtype: torch.dtype | None) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'config.json'} cannot be read ({error}): name a model's folder") from error
    if dtype is None:
        return config
    if "quantization_config" in config:
        raise UsageError(f"{folder} holds quantised weights, which are not converted: set --dtype=None, or take others")
    config.pop("torch_dtype", None)  # its older name
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _open_model(folder: Path, files: list[str] | None) -> Mapping[str, StoredTensor]:
    try:
        return open_shards(folder, "model", files)
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} lacks weights in safetensors ({error}); .bin files are pickles, which are never opened: convert "
            "them where you trust them"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(f"the weights in {folder} cannot be read ({error}): take another folder") from error


def _copy_others(folder: Path, files: list[Path] | None, target: Path) -> None:
    """Tokenizer, generation config, chat templates, lowmem.json: `files`, or what lies in the model's folder."""
    if files is None:
        templates = folder / "additional_chat_templates"
        files = [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    for path in files:
        is_weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        copy = target / path.relative_to(folder)
        if not path.is_file() or path.name.startswith(".") or is_weights or copy.exists():
            continue
        copy.parent.mkdir(exist_ok=True)
        write_file(copy, [path.read_bytes()])


def _told(out: Path, sources: Mapping[str, _Source], num_bytes: int, num_files: int) -> str:
    masters = sum(source.is_master for source in sources.values())
    dtypes = ", ".join(sorted({str(source.dtype).removeprefix("torch.") for source in sources.values()}))
    origin = f", {masters} of them from the fp32 master" if masters else ""
    files = f"{num_files} files" if num_files > 1 else "one file"
    return f"{out}: {len(sources)} tensors in {dtypes}{origin}; {num_bytes:,} bytes in {files}"
