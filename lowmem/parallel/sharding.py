"""Where a model's weights live, and the one reduction of its gradients a step."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.config import CHOICES, UsageError
from lowmem.parallel.agree import failing_alone, failing_together, rank_and_world_size, waiting
from lowmem.parallel.deepspeed import divides_weights, is_engine
from lowmem.parallel.fill import filled
from lowmem.parallel.pieces import local_of
from lowmem.parallel.tensor import divide_layers, make_tensor_mesh, tensor_mesh

_BUCKET_BYTES = 32 * 2**20


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside a wrapper of DistributedDataParallel or DeepSpeed, or the model itself."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model)
    return model.module if is_wrapped else model


def parallelize(
    model: nn.Module,
    accelerator: Accelerator,
    *,
    sharding_strategy: str = "NO_SHARD",
    shard_size: int | None = None,
    cpu_offload: bool = False,
    tp_size: int = 1,
) -> nn.Module:
    """Put the model on this rank's device with rank 0's weights and buffers. State keys stay the model's own.

    NO_SHARD keeps a whole copy on every rank and wraps nothing. The others are torch's `fully_shard`, in groups of a
    layer each: parameters become DTensors, of which a rank has some rows, and every backward adds to sharded sums over
    ranks, reduced in fp32. FULL_SHARD gathers a layer's weights for its forward and again for its backward,
    SHARD_GRAD_OP keeps them in between, HYBRID_SHARD is FULL_SHARD among `shard_size` neighbouring ranks (None: those
    of this machine), with a copy for each such set. `cpu_offload` keeps what is sharded in host memory, where its
    optimizer steps.

    `tp_size` neighbouring ranks share a model's layers by tensor parallelism, see `divide_layers`: they must be given
    the same rows, those of `data_place`.

    A model that will be divided may come without data (`load_model(..., on_meta=True)`): see `filled`. Raises
    UsageError for what does not fit the processes or the model.
    """
    if sharding_strategy not in (strategies := CHOICES["sharding_strategy"]):
        raise UsageError(f"sharding_strategy={sharding_strategy} was asked for: take one of {', '.join(strategies)}")
    if accelerator.deepspeed_plugin is not None:
        return model  # its engine puts it where it belongs; at stage 3 a device never holds the whole
    if tp_size > 1:
        if sharding_strategy != "NO_SHARD":
            raise UsageError(f"tp_size={tp_size} was asked for with {sharding_strategy}: use one of them")
        mesh = make_tensor_mesh(accelerator.device.type, accelerator.num_processes, tp_size)
        with filled(model, accelerator.device, on_host=False):
            divide_layers(model, mesh)
        return model
    if sharding_strategy != "NO_SHARD":
        mesh = make_mesh(accelerator, sharding_strategy, shard_size)
        with filled(model, accelerator.device, on_host=cpu_offload):
            shard(model, mesh, reshard_after_forward=sharding_strategy != "SHARD_GRAD_OP", cpu_offload=cpu_offload)
        return model
    if cpu_offload:
        raise UsageError("cpu_offload was asked for with sharding_strategy=NO_SHARD: use FULL_SHARD, or leave it")
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        with waiting("spreading the weights of rank 0"):
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)
    return model


def make_mesh(accelerator: Accelerator, sharding_strategy: str, shard_size: int | None) -> DeviceMesh:
    """All ranks in a row, or, of HYBRID_SHARD, as rows of `shard_size`: (copies, shards of one copy)."""
    world_size, kind = accelerator.num_processes, accelerator.device.type
    if not dist.is_initialized():  # a single process, which shards to keep weights in host memory
        dist.init_process_group(dist.get_default_backend_for_device(kind), store=dist.HashStore(), rank=0, world_size=1)
    if sharding_strategy != "HYBRID_SHARD":
        if shard_size not in (None, world_size):
            raise UsageError(
                f"shard_size={shard_size} was asked for, {sharding_strategy} divides one copy over all {world_size} "
                "processes: set sharding_strategy=HYBRID_SHARD, or leave it"
            )
        return init_device_mesh(kind, (world_size,))
    shard_size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if shard_size >= world_size or world_size % shard_size:
        raise UsageError(
            f"HYBRID_SHARD was asked for with {shard_size} processes to a copy, there are {world_size} in all: set "
            "shard_size to a smaller divisor of that, or use FULL_SHARD"
        )
    return init_device_mesh(kind, (world_size // shard_size, shard_size), mesh_dim_names=("copies", "shards"))


# It warns of every layer that returns a view, as T5's do, because of what could be done to that in place: nothing is.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def shard(model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool, cpu_offload: bool) -> None:
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


class DataPlace(NamedTuple):
    """Where a rank stands among those whose rows differ: ranks that share a model (tp_size) share a place."""

    rank: int
    size: int
    is_counted: bool
    """Of the ranks at a place one is, in sums over all ranks."""
    group: dist.ProcessGroup | None
    """This rank and those at other places whose gradients belong to the same weights; None: all ranks."""


def data_place(model: nn.Module) -> DataPlace:
    """This rank's, whose `rank` and `size` are what `open_stream` and `open_eval` want to know."""
    mesh = tensor_mesh(model)
    if mesh is None:
        return DataPlace(*rank_and_world_size(), is_counted=True, group=None)
    return DataPlace(mesh.get_local_rank(0), mesh.size(0), mesh.get_local_rank(1) == 0, mesh.get_group(0))


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard`, or DeepSpeed's stage 3, divides its weights, so that each backward sums over ranks."""
    return isinstance(unwrapped(model), FSDPModule) or divides_weights(model)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes, also while its sharded weights lie in host memory."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def has_gathered(model: nn.Module) -> bool:
    """Whether `fully_shard` has gathered weights for a forward: from then on it expects them in the same dtypes."""
    return isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None


def is_divided(model: nn.Module) -> bool:
    """Whether ranks share its layers or its weights, so that they talk to one another within forward and backward."""
    return is_sharded(model) or tensor_mesh(model) is not None


def failing(model: nn.Module) -> AbstractContextManager[None]:
    """How an error within forward or backward is told: the collectives of a divided one would meet an agreement's."""
    return failing_alone() if is_divided(model) else failing_together()


def _gathering(model: nn.Module) -> list[FSDPModule]:
    """The modules that `fully_shard` gathers weights for, each for its own; none in a model that it does not divide."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """For forwards without a backward, which would do it: weights that were gathered within are let go at its end.

    The root's own are gathered all the while, as an encoder may be called without the model around it.
    """
    groups = _gathering(model)
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
    groups = _gathering(model)
    for group in groups:
        group.unshard()
        yield from (parameter for parameter in group.parameters() if not isinstance(parameter, DTensor))
        group.reshard()
    if not groups:
        yield from map(local_of, model.parameters())


def all_reduce_sum(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum each tensor over the ranks of `group` (None: all), in place.

    Small ones travel together in buckets of about 32 MiB. What is narrower than fp32 is summed in fp32 and rounded
    once. Every rank passes tensors of the same shapes in the same order; the sums have the same bits on every rank.
    """
    bucket: list[Tensor] = []
    room = _BUCKET_BYTES
    for piece in (piece for tensor in tensors for piece in _pieces(tensor)):
        num_bytes = piece.numel() * max(4, piece.dtype.itemsize)
        if bucket and (num_bytes > room or piece.dtype != bucket[0].dtype):
            _reduce_bucket(bucket, group)
            bucket, room = [], _BUCKET_BYTES
        bucket.append(piece)
        room -= num_bytes
    if bucket:
        _reduce_bucket(bucket, group)


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor itself where it can be reduced in place, else parts of it whose copies in fp32 fill a bucket."""
    if tensor.dtype.itemsize >= 4 or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(_BUCKET_BYTES // 4)


def _reduce_bucket(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    sum_dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].dtype == sum_dtype:
        _reduce(bucket[0], group)  # large enough to travel alone, without a copy
        return
    flat = torch.cat([tensor.reshape(-1).to(sum_dtype) for tensor in bucket])
    _reduce(flat, group)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    with waiting("summing tensors"):
        dist.all_reduce(tensor, group=group)
