"""What a checkpoint holds, put into a state: each rank reads the rows that it keeps, a few at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from lowmem.checkpoint.manifest import check_hashes, check_sizes, checkpoints, read_manifest, verify_checkpoint
from lowmem.checkpoint.tensors import model_tensors, named_parameters, optimizer_tensors
from lowmem.distributed.collectives import raise_on_all_ranks, rank_and_world_size
from lowmem.distributed.dtensor import is_in_columns, local_part
from lowmem.distributed.heartbeat import phase
from lowmem.errors import UsageError
from lowmem.optim.formats import read
from lowmem.optim.tiers import TieredOptimizer
from lowmem.step import TrainState
from lowmem.storage.tensor_files import StoredTensor, dtype_name, open_shards

_MOST_DIFFERENCES = 10
TIERS = ("off", "exact", "lean")
"""From the one that keeps most of AdamW's state to the one that keeps least: those before one can fill it."""


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint under `folder` that `verify_checkpoint` accepts; a line tells why one was passed over."""
    return first_accepted(reversed(checkpoints(Path(folder))), verify_checkpoint)


def first_accepted(paths: Iterable[Path], verify: Callable[[Path], None], *, silent: bool = False) -> Path | None:
    """The first of `paths` for which `verify` raises no UsageError; unless `silent` a line tells of each before it."""
    for path in paths:
        try:
            verify(path)
        except UsageError as error:
            if not silent:
                print(f"passed over a checkpoint: {error}", flush=True)
        else:
            return path
    return None


def verify_together(path: str | Path) -> None:
    """`verify_checkpoint`, called by every rank: each takes the hashes of a share of the files, all raise alike."""
    path, (rank, world_size) = Path(path), rank_and_world_size()
    with raise_on_all_ranks():
        records = read_manifest(path)["files"]
        check_sizes(path, records)
        by_size = sorted(records, key=lambda name: -records[name]["bytes"])
        check_hashes(path, {name: records[name] for name in by_size[rank::world_size]})


@phase("loading a checkpoint")
def load_checkpoint(state: TrainState, path: str | Path, accelerator: Accelerator, *, verify: bool = True) -> None:
    """Put what `path` holds into `state`, in place, on every rank.

    Saved on any number of processes, sharded or not, it loads on any other; each rank reads its own part of a tensor,
    16 MiB at a time. AdamW's state loads into a memory tier that keeps no more than its own: off into exact (no bit
    lost), these into lean (rounded). Everything is checked before anything is changed: sizes and hashes (unless
    `verify_together` was called just before: `verify` False), then names, shapes and dtypes of the weights and of the
    optimizer's state (of torch's optimizers, which make theirs in the first step: what it was of).
    Raises UsageError, naming the file or up to 10 differing tensors.
    """
    path = Path(path)
    if verify:
        verify_together(path)
    with raise_on_all_ranks():
        saved, _ = saved_settings(path)
        files = read_manifest(path)["files"]
        of_model = [name.removeprefix("model/") for name in files if name.startswith("model/")]
        weights, moments = open_shards(path / "model", "model", of_model), open_shards(path, "optimizer", files)
        is_rounded = _is_rounded(path, saved, state.optimizer)
        if is_rounded and any(map(is_in_columns, state.model.parameters())):
            raise UsageError(
                f"{path} is of a tier that keeps more, which rounds into whole rows: load it with tp_size=1"
            )
        _check_fit(path, weights, moments, state, saved.get("parameters"), is_rounded)
        if state.stream is not None:
            if saved["stream"] is None:
                raise UsageError(
                    f"{path} was saved without a stream, so there is no position to go on from: start anew"
                )
            state.stream.load_state_dict(saved["stream"])
    parameters = named_parameters(state.model, state.optimizer)
    with raise_on_all_ranks(), torch.no_grad():
        for name, tensor in model_tensors(state.model).items():
            if not (is_rounded and name in parameters):
                _fill(tensor, weights[name])
        if is_rounded:
            state.optimizer.seed = saved["seed"]
            _round(state.optimizer, parameters, weights, moments)
        else:
            for name, tensor in _room_for(moments, state).items():
                _fill(tensor, moments[name])
    state.step, state.best, state.seed = saved["step"], saved["best"], saved["seed"]


def saved_settings(path: str | Path) -> tuple[dict, dict]:
    """What `path` holds beside tensors: its state.json, and the `config` that it was saved with (empty if none)."""
    config = Path(path) / "model" / "lowmem.json"
    state = json.loads((Path(path) / "state.json").read_text())
    return state, json.loads(config.read_text()) if config.exists() else {}


def _is_rounded(path: Path, saved: Mapping[str, object], optimizer: Optimizer) -> bool:
    """Whether `path` has the state of a tier that keeps more. Raises UsageError if it cannot fill `optimizer`."""
    kind, memory = type(optimizer).__name__, getattr(optimizer, "memory", "off")
    then_kind, then_memory = saved["optimizer"], saved.get("memory", memory)
    if (then_kind, then_memory) == (kind, memory):
        return False
    if {kind, then_kind} <= {"AdamW", "TieredAdamW"} and TIERS.index(then_memory) < TIERS.index(memory):
        return True
    raise UsageError(
        f"{path} holds the state of {then_kind} with memory={then_memory}, the optimizer is {kind} with "
        f"memory={memory}: make the same (adamw's state also loads into a tier that keeps less, off > exact > lean)"
    )


def _check_fit(
    path: Path,
    weights: Mapping[str, StoredTensor],
    moments: Mapping[str, StoredTensor],
    state: TrainState,
    parameters: list[str] | None,
    is_rounded: bool,
) -> None:
    has = set(named_parameters(state.model, state.optimizer))
    had = has if parameters is None else set(parameters)  # early checkpoints do not tell
    differences = _differences(weights, model_tensors(state.model), any_dtype=is_rounded)
    differences += sorted(f"{name} is trained {'now' if name in has else 'then'} only" for name in had ^ has)
    if isinstance(state.optimizer, TieredOptimizer):  # torch's make their state in the steps that reach a parameter
        here = optimizer_tensors(state.model, state.optimizer)
        if is_rounded:  # values of the same names and shapes, in other forms
            reached = _by_parameter(moments)
            moments = _values(moments)
            here = {name: x for name, x in _values(here).items() if name.rpartition(".")[0] in reached}
        differences += _differences(moments, here, any_dtype=is_rounded)
    if differences:
        more = f" and {len(differences) - _MOST_DIFFERENCES} more" if len(differences) > _MOST_DIFFERENCES else ""
        told = "; ".join(differences[:_MOST_DIFFERENCES])
        raise UsageError(
            f"{path} does not fit: {told}{more}. Build the model that was saved, and its optimizer in the same memory"
        )


def _values(tensors: Mapping[str, object]) -> dict[str, object]:
    """The values that `tensors` hold in whatever form, without what is only part of a form."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("_low", "_scale"))}


def _differences(stored: Mapping[str, StoredTensor], here: Mapping[str, Tensor], *, any_dtype: bool) -> list[str]:
    differences = [f"{name} is in the checkpoint only" for name in stored.keys() - here.keys()]
    for name, tensor in here.items():
        if name not in stored:
            differences.append(f"{name} is here only")
        elif stored[name].shape != [*tensor.shape] or not (any_dtype or stored[name].dtype == dtype_name(tensor.dtype)):
            was, now = f"{stored[name].dtype}{stored[name].shape}", f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            differences.append(f"{name} was {was} and is {now}")
    return sorted(differences)


def _fill(tensor: Tensor, stored: StoredTensor) -> None:
    local, row, column = local_part(tensor)
    stored.copy_part(local, row, column)


def _room_for(moments: Mapping[str, StoredTensor], state: TrainState) -> dict[str, Tensor]:
    """The optimizer's state by name; of torch's optimizers made here, uninitialised, as their steps would make it."""
    if not isinstance(state.optimizer, TieredOptimizer):
        stored = _by_parameter(moments)
        names = {parameter: name for name, parameter in named_parameters(state.model, state.optimizer).items()}
        state.optimizer.state.clear()
        for group in state.optimizer.param_groups:
            on_host = not (group.get("fused") or group.get("capturable"))  # else kernels read counts of steps too
            for parameter in (parameter for parameter in group["params"] if names[parameter] in stored):
                of_parameter = stored[names[parameter]].items()
                made = {key: _empty(tensor, parameter, counts_on_host=on_host) for key, tensor in of_parameter}
                state.optimizer.state[parameter] = made
    return optimizer_tensors(state.model, state.optimizer)


def _by_parameter(moments: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """{parameter: {state: tensor}} of {"<parameter>.<state>": tensor}."""
    by_parameter: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in moments.items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = tensor
    return by_parameter


def _empty(stored: StoredTensor, parameter: Tensor, *, counts_on_host: bool) -> Tensor:
    if stored.shape == [*parameter.shape]:  # sharded if the parameter is
        return torch.empty_like(parameter, dtype=stored.torch_dtype, requires_grad=False)
    device = "cpu" if counts_on_host and not stored.shape else parameter.device
    return torch.empty(stored.shape, dtype=stored.torch_dtype, device=device)


def _round(
    optimizer: TieredOptimizer,
    parameters: Mapping[str, Tensor],
    weights: Mapping[str, StoredTensor],
    moments: Mapping[str, StoredTensor],
) -> None:
    """Fill weights and state from those of a tier that keeps more, as fp32 values."""
    by_parameter = _by_parameter(moments)
    for name, parameter in parameters.items():
        kept = by_parameter.get(name, {})  # none if no loss has reached it yet
        forms = {"weight": weights[name], **kept}

        def values(value: str, rows: slice, forms: dict[str, StoredTensor] = forms) -> Tensor:
            of_value = {key: forms[key].read(rows) for key in (value, f"{value}_low", f"{value}_scale") if key in forms}
            return read(of_value, value, slice(None))

        optimizer.round_from(parameter, _values(forms).keys() - {"step"}, values)
        if kept:
            kept["step"].copy_part(optimizer.state[parameter]["step"])
