"""Checkpoints that are whole or absent: safetensors and JSON in a folder that appears under its name when it is done.

step-00000500/
  model/            as transformers saves it: `from_pretrained` loads it as it stands
  optimizer.safetensors (or shards of it): "<parameter>.<state>" for every tensor of the optimizer's state
  state.json        step, best, seed, position of the stream
  manifest.json     size and xxh3_128 of every other file; written last
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from lowmem.commit import remove, verify_checkpoint, whole_or_absent, write_manifest
from lowmem.config import UsageError, parse_bytes
from lowmem.parallel.agree import on_main_rank
from lowmem.parallel.sharding import unwrapped
from lowmem.step import TrainState
from lowmem.weights import (
    FileRecord,
    StoredTensor,
    dtype_name,
    open_shards,
    record_file,
    sync,
    to_json,
    write_file,
    write_shards,
)

_MOST_DIFFERENCES = 10


def save_checkpoint(
    state: TrainState,
    folder: str | Path,
    accelerator: Accelerator,
    *,
    tokenizer=None,
    config: Mapping[str, object] | None = None,
    keep: int | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write `folder`/step-XXXXXXXX and return it; then remove older ones, so that `keep` are left (None: all stay).

    Called by every rank; rank 0 writes, with one tensor at a time in host memory. `config` is kept as
    model/lowmem.json. If it fails, on every rank, the older checkpoints are as they were.
    """
    path = Path(folder) / f"step-{state.step:08d}"

    max_shard_bytes = parse_bytes(max_shard_size)

    def write() -> None:
        with whole_or_absent(path) as unfinished:
            records = _write_model(unfinished / "model", state.model, tokenizer, config, max_shard_bytes)
            records |= write_shards(_optimizer_tensors(state), unfinished, "optimizer", max_shard_bytes)
            training_state = {
                "step": state.step,
                "best": state.best,
                "seed": state.seed,
                "stream": state.stream and state.stream.state_dict(),
                "optimizer": type(state.optimizer).__name__,
            }
            records["state.json"] = write_file(unfinished / "state.json", [to_json(training_state)])
            write_manifest(unfinished, state.step, records)
        if keep:
            # Later ones are damaged, or another branch's: they neither count nor go.
            older = [old for old in _checkpoints(path.parent) if old.name < path.name]
            for old in older[: len(older) + 1 - keep]:
                remove(old)

    on_main_rank(write)
    return path


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer=None,
    config: Mapping[str, object] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write only what `from_pretrained` loads, in place of what stood at `folder` before. Called by every rank.

    What stood there goes only after the new folder is on disk.
    """
    path = Path(folder)

    def write() -> None:
        with whole_or_absent(path, replace=True) as unfinished:
            _write_model(unfinished, model, tokenizer, config, parse_bytes(max_shard_size))

    on_main_rank(write)
    return path


def load_checkpoint(state: TrainState, path: str | Path, accelerator: Accelerator) -> None:
    """Put what `path` holds into `state`, in place, on every rank.

    Everything is checked before anything is changed: sizes and hashes, then names, shapes and dtypes of the weights
    and of the optimizer's state (in torch's optimizers before their first step: whose state it is).
    Raises UsageError, naming the file or up to 10 differing tensors.
    """
    path = Path(path)
    on_main_rank(lambda: verify_checkpoint(path))
    saved = json.loads((path / "state.json").read_text())
    stored_weights, stored_state = open_shards(path / "model", "model"), open_shards(path, "optimizer")
    weights = _model_tensors(unwrapped(state.model))
    kind = type(state.optimizer).__name__
    if saved["optimizer"] != kind:
        raise UsageError(
            f"{path} holds the state of {saved['optimizer']}, the optimizer is {kind}: make the same, same memory too"
        )
    differences = _differences(stored_weights, weights) + _missing_state(stored_state, state)
    if differences:
        more = f" and {len(differences) - _MOST_DIFFERENCES} more" if len(differences) > _MOST_DIFFERENCES else ""
        told = "; ".join(differences[:_MOST_DIFFERENCES])
        raise UsageError(
            f"{path} does not fit: {told}{more}. Build the model that was saved, and its optimizer in the same memory"
        )
    if state.stream is not None:
        if saved["stream"] is None:
            raise UsageError(f"{path} was saved without a stream, so there is no position to go on from: start anew")
        state.stream.load_state_dict(saved["stream"])
    for name, tensor in weights.items():
        tensor.detach().copy_(stored_weights[name].read())
    _load_optimizer(state, stored_state)
    state.step, state.best, state.seed = saved["step"], saved["best"], saved["seed"]


def saved_settings(path: str | Path) -> tuple[dict, dict]:
    """What `path` holds beside tensors: its state.json, and the `config` that it was saved with (empty if none)."""
    config = Path(path) / "model" / "lowmem.json"
    state = json.loads((Path(path) / "state.json").read_text())
    return state, json.loads(config.read_text()) if config.exists() else {}


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint under `folder` that `verify_checkpoint` accepts; a line tells why one was passed over."""
    for path in reversed(_checkpoints(Path(folder))):
        try:
            verify_checkpoint(path)
        except UsageError as error:
            print(f"passed over a checkpoint: {error}", flush=True)
        else:
            return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or damaged, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


def _write_model(folder: Path, model: nn.Module, tokenizer, config, max_shard_bytes: int) -> dict[str, FileRecord]:
    base = unwrapped(model)
    folder.mkdir(exist_ok=True)
    records = write_shards(_model_tensors(base), folder, "model", max_shard_bytes)
    if hasattr(base, "config"):
        model_config = copy.deepcopy(base.config)
        model_config.architectures = [type(base).__name__]
        model_config.dtype = base.dtype
        model_config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None:
        # not its save_pretrained: that raises for settings that pretrained models really come with
        write_file(folder / "generation_config.json", [base.generation_config.to_json_string().encode()])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config is not None:
        write_file(folder / "lowmem.json", [to_json(dict(config))])
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if name not in records:  # written by transformers
            sync(path)
            records[name] = record_file(path)
    return {f"{folder.name}/{name}": record for name, record in records.items()}


def _model_tensors(base: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one once, under its first name."""
    seen: set[int] = set()
    tensors = base.state_dict(keep_vars=True).items()
    return {name: x for name, x in tensors if id(x) not in seen and not seen.add(id(x))}


def _parameter_names(state: TrainState) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in unwrapped(state.model).named_parameters()}
    return [names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(_parameter_names(state), parameters, strict=True):
        for key, value in state.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            elif value is not None:
                raise UsageError(f"the optimizer keeps {key}={value!r} for {name}: only tensors can be saved")
    return tensors


def _load_optimizer(state: TrainState, stored: Mapping[str, StoredTensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = tensor.read()
    names = enumerate(_parameter_names(state))
    state.optimizer.load_state_dict(
        {
            "state": {index: by_parameter[name] for index, name in names if name in by_parameter},
            "param_groups": state.optimizer.state_dict()["param_groups"],
        }
    )


def _differences(stored: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor]) -> list[str]:
    differences = [f"{name} is in the checkpoint only" for name in stored.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in stored:
            differences.append(f"{name} is here only")
        elif stored[name].shape != list(tensor.shape) or stored[name].dtype != dtype_name(tensor.dtype):
            was, now = f"{stored[name].dtype}{stored[name].shape}", f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            differences.append(f"{name} was {was} and is {now}")
    return sorted(differences)


def _missing_state(stored: Mapping[str, StoredTensor], state: TrainState) -> list[str]:
    """A memory tier has all of its state at once, which must be what was saved; torch's optimizers make theirs in the
    first step, so until then whose state it is is all that can be compared."""
    if here := _optimizer_tensors(state):
        return _differences(stored, here)
    had, has = {name.rpartition(".")[0] for name in stored}, set(_parameter_names(state))
    return sorted(f"{name} is trained {'now' if name in has else 'then'} only" for name in had ^ has) if had else []
