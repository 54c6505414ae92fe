"""torch's `fully_shard`, and all that we use of its private names, in torch 2.11 and 2.13."""

import warnings
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

# It warns of every layer that returns a view, as T5's do, because of what could be done to that in place: nothing is.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def shard_layers(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool, cpu_offload: bool) -> None:
    """Shard the model over `mesh` in place, with or without data, each layer a group."""
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32), "offload_policy": offload}
    for module, is_kept in _groups(model):
        fully_shard(module, reshard_after_forward=reshard_after_forward and not is_kept, **options)
        # sums instead of means: the step divides by the targets of all ranks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies by a factor


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules whose weights are all-gathered together, inner ones first; True: once for the whole step.

    That is the output head, which the chunked loss uses after the model's forward, and what is in no other group.
    """
    yield from ((module, False) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    if isinstance(model, PreTrainedModel):
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if isinstance(head, nn.Linear) and embeddings is not None and embeddings.weight is not head.weight:
            yield embeddings, False
            yield head, True
    yield model, True


def has_gathered(model: nn.Module) -> bool:
    """Whether `fully_shard` has all-gathered weights once: from then on it expects them in the same dtypes."""
    return isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None


def notice_new_parameters(model: nn.Module) -> None:
    """Make `fully_shard` use the parameters as they are now, and free the tensors that they were before."""
    model._apply(lambda tensor: tensor)  # `model.to` would also move buffers to the host with offloaded weights


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """For forwards without a backward, which would do it: reshard all weights at the end of this block."""
    groups = _sharded_modules(model)
    if groups:
        model._get_fsdp_state()._lazy_init()  # or the first layer called, an encoder's, would take itself for the root
        model.unshard()  # the root's own, as an encoder may be called without the model around it
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


def gathered_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter as the model computes with it, sharded ones all-gathered, always in the same storage."""
    groups = _sharded_modules(model)
    for group in groups:
        group.unshard()
        yield from (parameter for parameter in group.parameters() if not isinstance(parameter, DTensor))
        group.reshard()
    if not groups:
        yield from map(local_of, model.parameters())
