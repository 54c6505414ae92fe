"""Tensor parallelism (Shoeybi et al., 2019): shard linear layers by the plan that transformers has for the model.

Sharded weights are DTensors only to record which part a rank has; computation uses local tensors. All other weights are
replicated, including the embedding and the output head. Ranks that share a model must get the same batches and dropout
masks. Each rank then computes complete gradients of replicated weights; only those of per-head norms must be summed.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowmem.distributed.placement import TENSOR_PARALLEL_MESH
from lowmem.errors import UsageError

Exchange = Callable[[Tensor, ProcessGroup], Tensor]


def make_tensor_mesh(kind: str, world_size: int, tp_size: int) -> DeviceMesh:
    """Make a mesh of shape (data ranks, `tp_size`), in which adjacent ranks share a model."""
    if world_size % tp_size:
        raise UsageError(f"tp_size={tp_size} was set, but it does not divide {world_size} processes: set a divisor")
    return init_device_mesh(kind, (world_size // tp_size, tp_size), mesh_dim_names=TENSOR_PARALLEL_MESH)


def apply_tensor_parallelism(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the layers in the model's plan over the second dimension of `mesh`, in place. Raises like `check_plan`."""
    check_plan(model, mesh.size(1))
    group = mesh.get_group(1)
    for name, style in _planned(model).items():
        if style in _STYLES:
            if next(_part(model, name).parameters(), None) is not None:  # else it is of another stage of a pipeline
                _shard_linear(_part(model, name), _STYLES[style], mesh)
        else:
            for parameter in (x for x in _part(model, name).parameters() if x.requires_grad):
                # torch calls the hook on each gradient before adding it to `grad`
                parameter.register_hook(partial(_summed, group=group))


def check_plan(model: PreTrainedModel, tp_size: int) -> None:
    """Raise UsageError if the model has no plan, an unsupported one, or sizes that `tp_size` does not divide."""
    request, kind, planned = f"tp_size={tp_size} was set, but", type(model).__name__, _planned(model)
    if not planned:
        raise UsageError(f"{request} transformers has no plan to shard {kind}: use another model or set tp_size=1")
    for name, style in planned.items():
        if style not in (*_STYLES, _REPLICATED):
            found = f"the plan of {kind} has {_generic(name)} as {style}, which is not supported"
            raise UsageError(f"{request} {found}: use a dense model or set tp_size=1")
        if style in _STYLES and type(_part(model, name)) is not nn.Linear:
            other = type(_part(model, name)).__name__
            raise UsageError(f"{request} {_generic(name)} of {kind} is a {other}, not nn.Linear: set tp_size=1")
    if left_out := _left_out(model, planned):
        found = f"the plan of {kind} leaves out {', '.join(left_out)}, which would get only a part of its gradient"
        raise UsageError(f"{request} {found}: use another model or set tp_size=1")
    if uneven := _uneven(model, planned, tp_size):
        raise UsageError(f"{request} {kind} has {', '.join(uneven)}: set a tp_size that divides all of them")


def _left_out(model: PreTrainedModel, planned: dict[str, str]) -> list[str]:
    """Parameters that the plan leaves out although it shards other parameters of the same module."""
    sharded = {name.rpartition(".")[0] for name, style in planned.items() if style == "colwise"}
    inside = {f"{name}.{x}" for name in sharded for x, _ in model.get_submodule(name).named_parameters()}
    return sorted({_generic(name) for name in inside if name.rpartition(".")[0] not in planned})


def _uneven(model: PreTrainedModel, planned: dict[str, str], tp_size: int) -> list[str]:
    """Sizes that are not multiples of `tp_size`. Numbers of heads are checked too, because no head may be split."""
    config, found = model.config.get_text_config(), {}
    for name, style in planned.items():
        if style == "colwise" and "att" in name:
            found |= {field: getattr(config, field, None) for field in ("num_attention_heads", "num_key_value_heads")}
        if style in _STYLES:
            dim = _STYLES[style].dim
            found[f"{_generic(name)}.weight.shape[{dim}]"] = _part(model, name).weight.shape[dim]
    return [f"{what}={size}" for what, size in found.items() if size is not None and size % tp_size]


def _planned(model: PreTrainedModel) -> dict[str, str]:
    """The style of every module and parameter that the plan names, except the embedding and the output head."""
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {name for name, module in model.named_modules() if any(module is x for x in whole)}
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name not in left_out]
    return {name: model.tp_plan[_generic(name)] for name in names if _generic(name) in model.tp_plan}


def _part(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    parent, _, own = name.rpartition(".")
    return getattr(model.get_submodule(parent), own)


def _generic(name: str) -> str:
    """The name as plans write it, with a star instead of the layer number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _shard_linear(linear: nn.Linear, style: "_Style", mesh: DeviceMesh) -> None:
    group = mesh.get_group(1)
    # a bias is sharded if its weight is sharded by rows, and replicated if its weight is sharded by columns
    for name, whole in [(name, x) for name, x in linear.named_parameters() if x.dim() > style.dim]:
        # src_data_rank=None: do not broadcast, because weights may be on meta on some ranks
        shard = distribute_tensor(whole.detach(), mesh, [Replicate(), Shard(style.dim)], src_data_rank=None)
        setattr(linear, name, nn.Parameter(shard, requires_grad=whole.requires_grad))

    def forward(x: Tensor) -> Tensor:
        bias = linear.bias
        if style.before:
            x = _Exchange.apply(x, group, *style.before)
        local_bias = None if bias is None or style.dim == 1 else bias.to_local()
        result = F.linear(x, linear.weight.to_local(), local_bias)
        if style.after:
            result = _Exchange.apply(result, group, *style.after)
        return result + bias if bias is not None and style.dim == 1 else result  # add the bias once, after the sum

    linear.forward = forward


def _summed(gradient: Tensor, *, group: ProcessGroup) -> Tensor:
    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)


class _Exchange(torch.autograd.Function):
    """Apply `function(tensor, group)` in forward, and `of_gradient(gradient, group)` in backward."""

    @staticmethod
    def forward(ctx, x, group, function, of_gradient):
        ctx.group, ctx.of_gradient = group, of_gradient
        return function(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.of_gradient(gradient, ctx.group), None, None, None


def _same(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # a copy, because recompute_cheap keeps x and sums it again
    dist.all_reduce(total, group=group)
    return total


def _all_gather_columns(x: Tensor, group: ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _own_columns(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim=-1)[group.rank()].contiguous()


class _Style(NamedTuple):
    """How a linear layer is sharded: the sharded `dim` of its weight, and what `_Exchange` does to input and output."""

    dim: int
    before: tuple[Exchange, Exchange] | None
    after: tuple[Exchange, Exchange] | None


# keys: the names that transformers' plans have for these styles
_STYLES = {
    "colwise": _Style(0, (_same, _sum), None),
    "colwise_gather_output": _Style(0, (_same, _sum), (_all_gather_columns, _own_columns)),
    "rowwise": _Style(1, None, (_sum, _same)),
    "rowwise_split_input": _Style(1, (_own_columns, _all_gather_columns), (_sum, _same)),
}
_REPLICATED = "replicated_with_grad_allreduce"  # per-head norm layers: a rank's gradient covers only its heads
