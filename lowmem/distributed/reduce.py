"""Sum tensors over ranks in fp32."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.distributed.collectives import collective

_BUCKET_BYTES = 32 * 2**20


def all_reduce_sum(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum each tensor in place over the ranks of `group` (None: all), in fp32 or wider. Ranks get bitwise equal sums.

    Small tensors share 32 MiB buckets. Ranks must pass the same shapes and dtypes in the same order.
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
    """Return slices that each fit a bucket in fp32, or the whole tensor if it is fp32, wider or not contiguous."""
    if tensor.dtype.itemsize >= 4 or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(_BUCKET_BYTES // 4)


def _reduce_bucket(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    sum_dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].dtype == sum_dtype:
        _reduce(bucket[0], group)  # a single tensor that has `sum_dtype` already needs no copy
        return
    flat = torch.cat([tensor.reshape(-1).to(sum_dtype) for tensor in bucket])
    _reduce(flat, group)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    with collective("summing tensors"):
        dist.all_reduce(tensor, group=group)
