"""Where a model's weights live, and the one reduction of its gradients a step."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.parallel.agree import waiting

_BUCKET_BYTES = 32 * 2**20


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def parallelize(model: nn.Module, accelerator: Accelerator, *, sharding_strategy: str = "NO_SHARD") -> nn.Module:
    """Put the model on this rank's device with rank 0's weights and buffers. State keys stay the model's own.

    NO_SHARD keeps a whole copy on every rank and wraps nothing. FULL_SHARD divides weights, gradients and optimizer
    state over the ranks (torch's fully_shard, a group for each layer): parameters become DTensors, and every backward
    adds to sharded sums over ranks, reduced in fp32. Raises ValueError for another strategy.
    """
    if sharding_strategy not in ("NO_SHARD", "FULL_SHARD"):
        raise ValueError(f"sharding_strategy={sharding_strategy} is not built yet: use NO_SHARD or FULL_SHARD")
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        with waiting("spreading the weights of rank 0"):
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)
        if sharding_strategy == "FULL_SHARD":
            _shard(model, accelerator)
    return model


def _shard(model: nn.Module, accelerator: Accelerator) -> None:
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # Sums, where its default is means: the step divides by the targets of all ranks.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies by a factor


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are divided over ranks, so that each forward and backward talks to the other ranks."""
    return isinstance(unwrapped(model), FSDPModule)


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all ranks, in place. Small ones travel together in buckets of about 32 MiB.

    What is narrower than fp32 is summed in fp32 and rounded once. Every rank passes tensors of the same shapes in the
    same order; the sums have the same bits on every rank.
    """
    bucket: list[Tensor] = []
    room = _BUCKET_BYTES
    for piece in (piece for tensor in tensors for piece in _pieces(tensor)):
        num_bytes = piece.numel() * max(4, piece.dtype.itemsize)
        if bucket and (num_bytes > room or piece.dtype != bucket[0].dtype):
            _reduce_bucket(bucket)
            bucket, room = [], _BUCKET_BYTES
        bucket.append(piece)
        room -= num_bytes
    if bucket:
        _reduce_bucket(bucket)


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor itself where it can be reduced in place, else parts of it whose copies in fp32 fill a bucket."""
    if tensor.dtype.itemsize >= 4 or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(_BUCKET_BYTES // 4)


def _reduce_bucket(bucket: list[Tensor]) -> None:
    sum_dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].dtype == sum_dtype:
        _reduce(bucket[0])  # large enough to travel alone, without a copy
        return
    flat = torch.cat([tensor.reshape(-1).to(sum_dtype) for tensor in bucket])
    _reduce(flat)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _reduce(tensor: Tensor) -> None:
    with waiting("summing tensors"):
        dist.all_reduce(tensor)
