"""List, measure, compare and load optimizer state, as tensors named "<parameter>.<key>".

AdamW's state can also be loaded into a smaller memory tier, which may round it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.dtensor import ShardedRecord
from lowmem.distributed.fill import read_local
from lowmem.distributed.zero import ZeroTensor, allocate_state, link_state
from lowmem.errors import UsageError
from lowmem.optim.formats import read
from lowmem.optim.tiers import TieredOptimizer
from lowmem.storage.records import Record
from lowmem.storage.tensor_files import StoredTensor, bytes_of, tensor_differences

TIERS = ("off", "exact", "lean")
"""In order of decreasing memory use. A tier can load AdamW's state from all tiers before it."""

Parameters = Mapping[str, nn.Parameter | ZeroTensor]
State = Tensor | Record | ShardedRecord | ZeroTensor


def optimizer_tensors(parameters: Parameters, optimizer: Optimizer) -> dict[str, State]:
    """Return the optimizer's state. Raises UsageError for a value that is neither a tensor nor None."""
    if engine := _engine_of(parameters):
        link_state(engine)
    tensors = {}
    for name, parameter in parameters.items():
        state = parameter.state() if isinstance(parameter, ZeroTensor) else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, State):
                tensors[f"{name}.{key}"] = value
            elif value is not None:
                found = f"the optimizer state of {name} has {key}={value!r}, which is not a tensor and cannot be saved"
                raise UsageError(f"{found}: use an optimizer whose state is tensors")
    return tensors


def optimizer_bytes(parameters: Parameters, optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's state; if it is not allocated yet, only those of weight-shaped tensors."""
    if known := sum(map(bytes_of, optimizer_tensors(parameters, optimizer).values())):
        return known
    first = _first_state(optimizer, optimizer.param_groups[0], dims=2)
    like_weights = sum(value.shape == (2, 2) for value in first.values())
    return like_weights * sum(map(bytes_of, parameters.values()))


def _first_state(optimizer: Optimizer, group: Mapping[str, object], *, dims: int) -> dict[str, Tensor]:
    """Return the state after one step of a parameter of shape (2,) * `dims`, with the options of `group`."""
    probe = nn.Parameter(torch.zeros((2,) * dims))
    probe.grad = torch.zeros_like(probe)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [probe], "capturable": False}]  # True needs a GPU
    try:
        optimizer.step()
        state = optimizer.state.pop(probe, {})
    finally:
        optimizer.param_groups = groups
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _groups(parameters: Parameters, optimizer: Optimizer) -> list[tuple[Mapping[str, object], Parameters]]:
    """Return each group's options and parameters, by name; under ZeRO, whose groups flatten them, one group of all."""
    if _engine_of(parameters):
        return [(optimizer.param_groups[0], parameters)]
    names = {parameter: name for name, parameter in parameters.items()}
    return [(group, {names[parameter]: parameter for parameter in group["params"]}) for group in optimizer.param_groups]


def _torch_differences(stored: Mapping[str, StoredTensor], parameters: Parameters, optimizer: Optimizer) -> list[str]:
    by_parameter = _by_parameter(stored)
    differences = [f"{name} has state only in the checkpoint" for name in by_parameter.keys() - parameters.keys()]
    for group, members in _groups(parameters, optimizer):
        first: dict[int, dict[str, Tensor]] = {}  # by number of dimensions
        for name, parameter in members.items():
            if name not in by_parameter:
                continue
            dims, expected, whole = len(parameter.shape), optimizer.state.get(parameter), parameter.shape
            if not expected:
                if dims not in first:
                    first[dims] = _first_state(optimizer, group, dims=dims)
                expected, whole = first[dims], (2,) * dims
            expected = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
            saved = by_parameter[name]
            if saved.keys() != expected.keys() or any(
                tensor.torch_dtype is None
                or len(tensor.shape) != expected[key].dim()
                or (expected[key].shape == whole and tensor.shape != [*parameter.shape])
                for key, tensor in saved.items()
            ):
                shapes = {key: tensor.shape for key, tensor in sorted(saved.items())}
                differences.append(f"the state of {name} was {shapes}, and {type(optimizer).__name__} has another")
    if _engine_of(parameters):
        for key, values in _scalars(by_parameter).items():
            if len(values) > 1:
                found = ", ".join(map(str, sorted(values)))
                differences.append(f"{key} was {found} for different weights, and ZeRO has one {key} for all")
    return sorted(differences)


def _engine_of(parameters: Parameters) -> nn.Module | None:
    """Return DeepSpeed's engine if it has these parameters."""
    return next((x.engine for x in parameters.values() if isinstance(x, ZeroTensor)), None)


def _scalars(by_parameter: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, dict[float, Tensor]]:
    """Return {key: {value: tensor}} of all different values of each key whose tensors are all scalars."""
    arrays = {key for state in by_parameter.values() for key, tensor in state.items() if tensor.shape}
    scalars: dict[str, dict[float, Tensor]] = {}
    for state in by_parameter.values():
        for key in state.keys() - arrays:
            value = state[key].read()
            scalars.setdefault(key, {})[value.item()] = value
    return scalars


def needs_rounding(path: Path, saved_kind: str, saved_memory: str | None, optimizer: Optimizer) -> bool:
    """Return whether `round_state` must load the saved state. Raises UsageError if its class or tier does not fit."""
    kind, memory = type(optimizer).__name__, getattr(optimizer, "memory", "off")
    saved_memory = saved_memory or memory
    if (saved_kind, saved_memory) == (kind, memory):
        return False
    if {kind, saved_kind} <= {"AdamW", "TieredAdamW"} and TIERS.index(saved_memory) < TIERS.index(memory):
        return True
    found = f"{path} has the state of {saved_kind} with memory={saved_memory}"
    advice = "use the same optimizer and memory (adamw's state also loads into a smaller tier: off > exact > lean)"
    raise UsageError(f"{found}, but the optimizer is {kind} with memory={memory}: {advice}")


def state_differences(
    stored: Mapping[str, StoredTensor], parameters: Parameters, optimizer: Optimizer, *, rounds: bool
) -> list[str]:
    """List how `stored` differs from a tier's state, by name; for an optimizer of torch, from that of a first step."""
    if not isinstance(optimizer, TieredOptimizer):
        is_of_torch = type(optimizer).__module__.startswith("torch.optim")
        return _torch_differences(stored, parameters, optimizer) if is_of_torch else []
    tensors = optimizer_tensors(parameters, optimizer)
    if rounds:  # compare names and shapes, not dtypes, for the parameters with stored state (others had no gradient)
        updated = _by_parameter(stored)
        tensors = {name: x for name, x in _values(tensors).items() if name.rpartition(".")[0] in updated}
        stored = _values(stored)
    return tensor_differences(stored, tensors, any_dtype=rounds)


def fill_state(optimizer: Optimizer, parameters: Parameters, stored: Mapping[str, StoredTensor]) -> None:
    """Load stored state into the optimizer. Allocates the state of torch's optimizers as their first step would."""
    by_parameter = _by_parameter(stored)
    if engine := _engine_of(parameters):
        scalars = {key: next(iter(values.values())) for key, values in _scalars(by_parameter).items()}
        keys = {key for state in by_parameter.values() for key in state} - scalars.keys()
        allocate_state(engine, scalars, keys)
    elif not isinstance(optimizer, TieredOptimizer):
        optimizer.state.clear()
        for group, members in _groups(parameters, optimizer):
            on_host = not (group.get("fused") or group.get("capturable"))  # with these, the device counts steps
            for name, parameter in members.items():
                if name in by_parameter:
                    of_parameter = by_parameter[name].items()
                    made = {key: _empty(tensor, parameter, counts_on_host=on_host) for key, tensor in of_parameter}
                    optimizer.state[parameter] = made
    for name, tensor in optimizer_tensors(parameters, optimizer).items():
        if name in stored:  # else ZeRO has zeros for a weight that had no gradient
            read_local(tensor, stored[name])


def round_state(
    optimizer: TieredOptimizer,
    parameters: Parameters,
    weights: Mapping[str, StoredTensor],
    stored: Mapping[str, StoredTensor],
    *,
    seed: int,
) -> None:
    """Load the weights and state of a larger tier. Rounding, where needed, is stochastic, seeded by `seed`."""
    optimizer.seed = seed
    by_parameter = _by_parameter(stored)
    for name, parameter in parameters.items():
        state = by_parameter.get(name, {})  # empty if the parameter has had no gradient yet
        formats = {"weight": weights[name], **state}
        optimizer.round_from(parameter, _values(formats).keys() - {"step"}, partial(_read_values, formats))
        if state:
            state["step"].copy_part(optimizer.state[parameter]["step"])


def _read_values(formats: Mapping[str, StoredTensor], name: str, rows: slice) -> Tensor:
    keys = (name, f"{name}_low", f"{name}_scale")
    return read({key: formats[key].read(rows) for key in keys if key in formats}, name, slice(None))


def _values(tensors: Mapping[str, object]) -> dict[str, object]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("_low", "_scale"))}


def _by_parameter(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Group {"<parameter>.<key>": tensor} as {parameter: {key: tensor}}."""
    by_parameter: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = tensor
    return by_parameter


def _empty(stored: StoredTensor, parameter: Tensor, *, counts_on_host: bool) -> Tensor:
    if stored.shape == [*parameter.shape]:  # state is sharded as its parameter is
        return torch.empty_like(parameter, dtype=stored.torch_dtype, requires_grad=False)
    device = "cpu" if counts_on_host and not stored.shape else parameter.device
    return torch.empty(stored.shape, dtype=stored.torch_dtype, device=device)
