"""Shard with torch's `fully_shard`. Only this file uses private names of FSDP. Tested with torch 2.11 and 2.13."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.distributed.dtensor import local_of

# fully_shard warns that T5's layers return views, which must not be modified in place. No code modifies them.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def shard_layers(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool, cpu_offload: bool) -> None:
    """Shard the model over `mesh` in place, in the groups that `_groups` yields. The model may be on meta."""
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32), "offload_policy": offload}
    for module, is_kept in _groups(model):
        fully_shard(module, reshard_after_forward=reshard_after_forward and not is_kept, **options)
        # sum gradients instead of averaging them, because the step divides by the number of targets on all ranks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies by a factor


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield each module to shard as one group, inner ones first, and whether it stays all-gathered after forward.

    The output head stays because the chunked loss uses it after forward. The last group (all other weights) stays too;
    it has every weight that several modules share, such as a head that is tied to the decoder's embeddings.
    """
    groups = [(module, False) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if isinstance(model, PreTrainedModel):
        groups += [(model.get_input_embeddings(), False), (model.get_output_embeddings(), True)]
    uses = _uses(model)
    for module, is_kept in groups:
        own = _uses(module) if isinstance(module, nn.Module) else {}
        if own and all(uses[name] == count for name, count in own.items()):
            yield module, is_kept
    yield model, True


def _uses(module: nn.Module) -> Counter[int]:
    """Count how often each parameter is in the module, by id."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def has_gathered(model: nn.Module) -> bool:
    """Whether the sharded model has run (or entered `forward_only`). From then on, weights must keep their dtypes."""
    return isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None


def notice_new_parameters(model: nn.Module) -> None:
    """Make `fully_shard` use the current parameters, and free the previous tensors."""
    model._apply(lambda tensor: tensor)  # not `model.to`, which would move buffers to the host if weights are offloaded


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that are sharded as one group each, `model` included."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class Shards:
    """This rank's parts of a sharded model's parameters, as `fully_shard` all-gathers them."""

    def __init__(self, model: nn.Module):
        groups = (module._get_fsdp_state()._fsdp_param_group for module in sharded_modules(model))
        self._of = {each.sharded_param: each for group in groups if group for each in group.fsdp_params}

    def numel(self, parameter: nn.Parameter) -> int:
        """Return the elements of a part, which are as many on all ranks: a smaller part is padded at its end."""
        return self._of[parameter].padded_sharded_param_size.numel()

    def gather_from(self, parameter: nn.Parameter, part: Tensor) -> None:
        """Let the next all-gather take this rank's part from `part`, a padded vector on the device."""
        self._of[parameter]._sharded_param_data = part


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode, without gradients. At its end, reshard all weights, because no backward does."""
    was_training, groups = model.training, sharded_modules(model)
    if groups:
        model._get_fsdp_state()._lazy_init()  # make the model the root, even if its encoder is called first
        model.unshard()  # all-gather the root's own weights, because a call of the encoder alone would not
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for group in groups:
            group.reshard()
        model.train(was_training)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within this block, the sharded model's forward and backward run no collectives; the caller must unshard weights.

    At the end of the block, all weights are sharded again.
    """
    groups = sharded_modules(model)
    model._get_fsdp_state()._lazy_init()  # make the model the root, even if a layer is unsharded first
    states = [group._get_fsdp_state() for group in groups]
    kept = [(hooks, dict(hooks)) for group in groups for hooks in (group._forward_pre_hooks, group._forward_hooks)]
    for hooks, _ in kept:
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) in states]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
        for group in groups:
            group.reshard()


def reshards_after_forward(model: nn.Module) -> bool:
    """Whether layers are all-gathered again for backward (all strategies but SHARD_GRAD_OP)."""
    groups = (module._get_fsdp_state()._fsdp_param_group for module in sharded_modules(model))
    return any(group._reshard_after_forward for group in groups if group)  # a stage has no weights outside layers


def unsharded_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter as forward uses it: all-gathered if FSDP shards it. Each call yields the same storages."""
    groups = sharded_modules(model)
    for group in groups:
        group.unshard()
        yield from (parameter for parameter in group.parameters() if not isinstance(parameter, DTensor))
        group.reshard()
    if not groups:
        yield from map(local_of, model.parameters())
