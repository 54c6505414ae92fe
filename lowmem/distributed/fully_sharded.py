"""torch's `fully_shard`, and what it keeps to itself: all that we take of its private names is here.

Tried with torch 2.11 and 2.13: `_get_fsdp_state`, `_lazy_init`, `_is_root`, and `nn.Module._apply`, by which it
notices that parameters were replaced.
"""

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
    """Divide the model over `mesh` in place, data or none, a layer in a group. `parallelize` does it, and fills it."""
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    for module, is_kept in _groups(model):
        fully_shard(module, reshard_after_forward=reshard_after_forward and not is_kept, **options)
        # Sums, where its default is means: the step divides by the targets of all ranks.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies by a factor


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules whose weights are gathered together, inner ones first; True: gathered once for the whole step.

    That is so of the output head, which the chunked loss takes after the model's forward, and of all that is in no
    other group: norms, and embeddings that share their weights with the head.
    """
    yield from ((module, False) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    embeddings, head = (
        (model.get_input_embeddings(), model.get_output_embeddings())
        if isinstance(model, PreTrainedModel)
        else (None, None)
    )
    if isinstance(head, nn.Linear) and embeddings is not None and embeddings.weight is not head.weight:
        yield embeddings, False
        yield head, True
    yield model, True


def has_gathered(model: nn.Module) -> bool:
    """Whether `fully_shard` has gathered weights for a forward: from then on it expects them in the same dtypes."""
    return isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None


def notice_new_parameters(model: nn.Module) -> None:
    """Let `fully_shard` take the parameters as they are now, and let go of the tensors that they were before.

    (`model.to` would do it too, but take buffers to the host if weights are offloaded to it.)
    """
    model._apply(lambda tensor: tensor)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that `fully_shard` gathers weights for, each for its own; none in a model that it does not divide."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """For forwards without a backward, which would do it: weights that were gathered within are let go at its end.

    The root's own are gathered all the while, as an encoder may be called without the model around it.
    """
    groups = _sharded_modules(model)
    if groups:
        model._get_fsdp_state()._lazy_init()  # or the first layer called, an encoder's, would take itself for the root
        model.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


def gathered_weights(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter as the model computes with it: of a sharded one the whole, which is there while it is looked at.

    Its storage stays the same object all through a run.
    """
    groups = _sharded_modules(model)
    for group in groups:
        group.unshard()
        yield from (parameter for parameter in group.parameters() if not isinstance(parameter, DTensor))
        group.reshard()
    if not groups:
        yield from map(local_of, model.parameters())
