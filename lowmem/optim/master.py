"""Read the weights that an optimizer updates in fp32, for averages of them (EMA, SWA)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.dtensor import local_of, sharded_like
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.placement import is_engine, unwrapped
from lowmem.distributed.zero import ZeroTensor
from lowmem.optim.formats import merge_halves
from lowmem.storage.records import Record


@torch.no_grad()
def master_weights(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, weight in fp32) for each weight that `optimizer` updates, in the order of the model.

    In the tier "exact", and for small weights in "lean", the values are those of bf16 weight and low half together.
    Each tensor is the caller's own copy, made when it is yielded. A sharded weight is yielded as a DTensor with this
    rank's part, an offloaded one is in host memory; under DeepSpeed, whole weights, gathered to host memory.
    Call it between steps, and exhaust it on every rank.
    """
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    offloaded = offloaded_of(model)
    if offloaded is not None:
        offloaded.let_go()  # raises the error of a failed write
    for name, parameter in unwrapped(model).named_parameters():
        if is_engine(model):
            if parameter.requires_grad:
                yield name, ZeroTensor(model, parameter).gather_to_host()
        elif parameter in updated:
            record = None if offloaded is None else offloaded.record_of(parameter)
            weight = _read(local_of(parameter.detach()) if record is None else record)
            low = optimizer.state[parameter].get("weight_low") if parameter in optimizer.state else None
            if low is None:
                value = weight.to(torch.float32, copy=True)
            else:
                value = merge_halves(weight, _read(local_of(low)).to(weight.device))
            yield name, sharded_like(parameter, value)


def _read(tensor: Tensor | Record) -> Tensor:
    return tensor.to_host() if isinstance(tensor, Record) else tensor
