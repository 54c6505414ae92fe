"""The tensors of a model that a checkpoint saves, by name."""

from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.placement import is_engine, unwrapped
from lowmem.distributed.zero import Zero3Weight
from lowmem.errors import UsageError
from lowmem.storage.tensor_files import bytes_of


def model_tensors(model: nn.Module) -> dict[str, Tensor | Zero3Weight]:
    """Return parameters and persistent buffers by name (if tied: the first). Wraps ZeRO-3 weights in Zero3Weight."""
    seen: set[int] = set()
    tensors = unwrapped(model).state_dict(keep_vars=True).items()
    once = {name: x for name, x in tensors if id(x) not in seen and not seen.add(id(x))}
    return {name: Zero3Weight(x) if hasattr(x, "ds_shape") else x for name, x in once.items()}


def named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return {name in `model`: parameter} in `optimizer`'s order. Raises UsageError under DeepSpeed."""
    if is_engine(model):
        raise UsageError("ZeRO's optimizer state cannot be saved: save the weights alone, with save_model")
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    return {names[id(x)]: x for group in optimizer.param_groups for x in group["params"]}


def num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(map(bytes_of, tensors.values()))
