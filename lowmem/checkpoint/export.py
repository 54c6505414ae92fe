"""The command `export`: copy the model of a checkpoint or folder, change its dtype, merge adapters into it."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lowmem.adapters.lora import adapter_tensors, base_digest
from lowmem.checkpoint.manifest import checkpoints, verify_checkpoint
from lowmem.checkpoint.saved import read_manifest, saved_settings
from lowmem.config.groups import AUTOCAST_DTYPES, holds_adapters, settings_of
from lowmem.errors import SaveError, UsageError
from lowmem.model.build import model_from
from lowmem.model.load import load_model
from lowmem.model.quantized import dequantized, replace_linear
from lowmem.optim.formats import merge_halves
from lowmem.storage.atomic_folder import atomic_folder
from lowmem.storage.files import free_bytes, read_json, to_json, write_file
from lowmem.storage.tensor_files import StoredTensor, host_parts, open_shards, split_shards, write_index

_ROW_ELEMENTS = 2**22  # tensors are converted in slices of about this many elements
# Files with these suffixes are not copied: their weights would differ from the exported ones, and some are pickles.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"}


class _Source(NamedTuple):
    """A tensor to export: `values` returns its rows, some at a time, and `parts` converts them."""

    name: str
    shape: list[int]
    dtype: torch.dtype
    values: Callable[[], Iterator[Tensor]]
    is_master: bool = False
    """Whether the values are those of an fp32 master."""

    def parts(self) -> Iterator[memoryview]:
        """Iterate over the bytes of the converted tensor. Raises UsageError if a value is too large for the dtype."""
        return host_parts(map(self._converted, self.values()))

    def _converted(self, values: Tensor) -> Tensor:
        converted = values.to(self.dtype)
        if converted.is_floating_point() and (converted.isinf() & ~values.isinf()).any():
            largest = values[~values.isinf()].abs().max().item()
            found = f"tensor {self.name} holds {largest:g}, too large for {_name(self.dtype)}"
            raise UsageError(f"{found}: export in bfloat16 or float32")
        return converted


def export(
    path: str | Path, out: str | Path, *, dtype: torch.dtype | None, max_shard_bytes: int, merge: bool = False
) -> str:
    """Write the model in `path`, a checkpoint (verified first) or a model folder, into the new folder `out`.

    Converts floating-point tensors to `dtype` (None: does not convert). If there is an fp32 master, float32 and float16
    are made from it. With `merge`, adapters are merged into their model, in fp32; without, they remain adapters.
    Returns a summary. Raises UsageError if the export is impossible, SaveError if writing fails.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: export to a new folder")
    if checkpoints(out.parent):
        raise UsageError(f"{out} is in a folder of checkpoints: export to another folder")
    if of_run := checkpoints(path / "checkpoints"):
        raise UsageError(f"{path} is a run: export one of its checkpoints, such as {of_run[-1]}, or {path / 'model'}")
    folder, lows, files = path, {}, None
    if not ((path / "config.json").is_file() or holds_adapters(path)):
        verify_checkpoint(path)
        names = read_manifest(path)["files"]
        folder, lows = path / "model", open_shards(path, "optimizer", names)
        files = [name.removeprefix("model/") for name in names if name.startswith("model/")]
    copied, stem, changes = [(folder, files)], "model", {}
    if merge:
        saved = None if files is None else saved_settings(path)[0].get("base")
        base, sources = _merged_sources(folder, lows, dtype, saved)
        changes = {"config.json": _read_config(base, dtype)}
        if settings := settings_of(folder):
            changes["lowmem.json"] = settings | {"quantization": None, "lora_rank": None}
        copied += [(base, None)]
    else:
        stem = "adapter_model" if holds_adapters(folder) else "model"
        changes = {"config.json": _read_config(folder, dtype)} if stem == "model" else {}
        stored = _open_model(folder, stem, files)
        sources = {name: _source(tensor, lows.get(f"{name}.weight_low"), dtype) for name, tensor in stored.items()}
    outlines = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in sources.items()}
    shards = split_shards(outlines, stem, max_shard_bytes if stem == "model" else sys.maxsize)  # peft reads no index
    needed = sum(shard.num_bytes for shard in shards)
    try:
        if needed > (free := free_bytes(out)):
            raise SaveError(f"{out} needs {needed:,} bytes, but only {free:,} are free: free space or use another disk")
        with atomic_folder(out) as unfinished:
            for shard in shards:
                parts = chain.from_iterable(sources[name].parts() for name in shard.tensors)
                write_file(unfinished / shard.name, chain([shard.header], parts))
            write_index(shards, unfinished, stem)
            for name, content in changes.items():
                write_file(unfinished / name, [to_json(content)])
            for source, names in copied:
                _copy_others(source, names, unfinished, but={"adapter_config.json"} if merge else set())
    except OSError as error:
        raise SaveError(f"{out} could not be written ({error.strerror}) and was removed: try again") from error
    masters = sum(source.is_master for source in sources.values())
    origin = f", {masters} of them from the fp32 master" if masters else ""
    dtypes = ", ".join(sorted({_name(source.dtype) for source in sources.values()}))
    in_files = f"{len(shards)} files" if len(shards) > 1 else "one file"
    return f"{out}: {len(sources)} tensors in {dtypes}{origin}; {needed:,} bytes in {in_files}"


def _source(stored: StoredTensor, low: StoredTensor | None, dtype: torch.dtype | None) -> _Source:
    to = _dtype_of(stored, dtype)
    low = None if to == torch.bfloat16 else low  # with `low`, `stored` holds the bf16 weights
    num_rows, *rest = stored.shape or [1]
    height = max(1, _ROW_ELEMENTS // max(1, math.prod(rest)))

    def values() -> Iterator[Tensor]:
        for first in range(0, num_rows, height):
            rows = slice(first, first + height)
            yield stored.read(rows) if low is None else merge_halves(stored.read(rows), low.read(rows))

    return _Source(stored.name, stored.shape, to, values, is_master=low is not None)


def _merged_sources(
    folder: Path, lows: Mapping[str, StoredTensor], dtype: torch.dtype | None, saved: str | None
) -> tuple[Path, dict[str, _Source]]:
    """Return the folder of the model that the adapters in `folder` belong to, and its tensors with them merged.

    `saved` is the `base_digest` in a checkpoint. Raises UsageError if the model's weights have changed since.
    """
    if not holds_adapters(folder):
        raise UsageError(f"{folder} has no adapters to merge: remove --merge")
    from lowmem.adapters.merge import merged_weights  # imports peft

    model, _ = load_model(folder, on_meta=True)
    if saved and saved.split()[0] != base_digest(model).split()[0]:  # the hash, without dtypes of quantized weights
        found = f"the weights in {model.name_or_path} have changed since {folder} was saved"
        raise UsageError(f"{found}: restore them, or set base_model_name_or_path in its adapter_config.json")
    for name, tensor in adapter_tensors(model).items():
        if low := lows.get(f"{name}.weight_low"):
            tensor.data = merge_halves(tensor.to(torch.bfloat16), low.read())
    stored, changed = merged_weights(model, Path(model.name_or_path), _rounding(model.config, settings_of(folder)))
    sources = {name: _source(tensor, None, dtype) for name, tensor in stored.items()}
    for name, merged in changed.items():
        sources[name] = sources[name]._replace(values=partial(_in_slices, merged))
    return Path(model.name_or_path), sources


def _rounding(config: PretrainedConfig, settings: Mapping[str, object]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what the run with these settings made of each weight that it quantized: {name: function}."""
    if (quantization := settings.get("quantization")) is None:
        return {}
    dtype = getattr(torch, AUTOCAST_DTYPES.get(settings.get("mixed_precision"), "float32"))
    model = model_from(config, dtype, on_meta=True)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    layers = {*replace_linear(model, quantization)}
    names = [f"{name}.weight" for name, module in model.named_modules() if module in layers]

    def rounded(weight: Tensor, is_transposed: bool) -> Tensor:  # (outputs, inputs), but of GPT-2 (inputs, outputs)
        values = dequantized((weight.T if is_transposed else weight).to(dtype).contiguous(), quantization)
        return values.T.contiguous() if is_transposed else values

    return {name: partial(rounded, is_transposed=name in transposed) for name in names}


def _in_slices(tensor: Callable[[], Tensor]) -> Iterator[Tensor]:
    whole = tensor()
    return iter(whole.split(max(1, _ROW_ELEMENTS // max(1, whole[:1].numel()))))


def _dtype_of(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a tensor is exported."""
    if stored.torch_dtype is None:
        raise UsageError(f"tensor {stored.name} is {stored.dtype}, which is not supported: use a model without it")
    return dtype if dtype is not None and stored.torch_dtype.is_floating_point else stored.torch_dtype


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


def _open_model(folder: Path, stem: str, files: list[str] | None) -> Mapping[str, StoredTensor]:
    try:
        return open_shards(folder, stem, files)
    except FileNotFoundError as error:
        found = f"no safetensors weights ({error}), and .bin files are pickles, which are never opened"
        raise UsageError(f"{folder} has {found}: convert them to safetensors if you trust them") from error


def _copy_others(folder: Path, files: list[str] | None, target: Path, *, but: Set[str]) -> None:
    """Copy `files` of `folder` (None: top level and chat templates) to `target`, except weights and hidden files.

    Does not copy those in `but`, or those that `target` has.
    """
    in_folder = chain(folder.iterdir(), folder.glob("additional_chat_templates/*"))
    for path in in_folder if files is None else [folder / name for name in files]:
        is_weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        copy = target / path.relative_to(folder)
        if path.is_file() and not (path.name in but or path.name.startswith(".") or is_weights or copy.exists()):
            copy.parent.mkdir(exist_ok=True)
            write_file(copy, [path.read_bytes()])
