"""Every tensor of a training state under its name: the model's own, and "<parameter>.<state>" for the optimizer's."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowmem.distributed.dtensor import pieces
from lowmem.distributed.placement import is_engine, unwrapped
from lowmem.distributed.zero import Divided, as_whole
from lowmem.errors import UsageError
from lowmem.storage.tensor_files import bytes_of, dtype_name


def model_tensors(model: nn.Module) -> dict[str, Tensor | Divided]:
    """Parameters and persistent buffers, a tied one once, under its first name. Sharded: DTensors or Divided."""
    seen: set[int] = set()
    tensors = unwrapped(model).state_dict(keep_vars=True).items()
    return {name: as_whole(x) for name, x in tensors if id(x) not in seen and not seen.add(id(x))}


def named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of `optimizer` by their names in `model`, in the optimizer's order.

    Raises UsageError for a model in DeepSpeed's engine, whose optimizer knows no parameters.
    """
    if is_engine(model):
        raise UsageError(
            "a checkpoint was asked for, but ZeRO lays all weights end to end and no checkpoint holds its optimizer's "
            "state: save the weights alone, with save_model, or train without DeepSpeed"
        )
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    return {names[id(x)]: x for group in optimizer.param_groups for x in group["params"]}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state. Raises UsageError if there is any that is not a tensor."""
    tensors = {}
    for name, parameter in named_parameters(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            elif value is not None:
                raise UsageError(f"the optimizer keeps {key}={value!r} for {name}: only tensors can be saved")
    return tensors


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise UsageError for a tensor that cannot be saved: of a dtype that files do not hold, or of other shards."""
    try:
        dtype_name(tensor.dtype)
        if isinstance(tensor, DTensor):
            pieces(tensor)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"tensor {name} cannot be saved ({error}): give it another dtype, or register it as a buffer that is not "
            "persistent"
        ) from error


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Of all tensors, sharded ones counted as a whole."""
    return sum(map(bytes_of, tensors.values()))


def optimizer_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state, also before torch's optimizers make it, in their first step."""
    if known := num_bytes(optimizer_tensors(model, optimizer)):
        return known
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.grad is None for parameter in parameters)  # or the step below would train
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.zeros_like(probe)
    optimizer.add_param_group({"params": [probe]})
    try:
        optimizer.step()  # of the probe alone: nothing else has a gradient
        kept = optimizer.state.pop(probe, {}).values()
    finally:
        optimizer.param_groups.pop()
    like_weights = sum(isinstance(value, Tensor) and value.shape == probe.shape for value in kept)
    return like_weights * sum(map(bytes_of, parameters))
