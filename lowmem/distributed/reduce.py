"""Sums over ranks in fp32, and norms of gradients that are whole, sharded or both."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem.distributed.collectives import collective

_BUCKET_BYTES = 32 * 2**20
_NORM_ELEMENTS = 2**20  # of a bf16 gradient, converted to fp32 at a time


def all_reduce_sum(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum each tensor over the ranks of `group` (None: all), in place, in 32 MiB buckets, in at least fp32.

    Every rank passes the same shapes in the same order, and gets the same bits.
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
    """The tensor itself if it can be reduced in place, else slices that fill a bucket when converted to fp32."""
    if tensor.dtype.itemsize >= 4 or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(_BUCKET_BYTES // 4)


def _reduce_bucket(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    sum_dtype = torch.promote_types(bucket[0].dtype, torch.float32)
    if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].dtype == sum_dtype:
        _reduce(bucket[0], group)  # alone in its bucket: no copy needed
        return
    flat = torch.cat([tensor.reshape(-1).to(sum_dtype) for tensor in bucket])
    _reduce(flat, group)
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    with collective("summing tensors"):
        dist.all_reduce(tensor, group=group)


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm of one gradient in fp32 (or wider), a scalar, without a copy of a large bf16 one."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.device.type != "cpu":  # GPU kernels sum in trees, and convert as they read
        return torch.linalg.vector_norm(gradient, dtype=wide)
    # per row, then over rows in fp64: the CPU kernel adds sequentially, and 16M squares in one fp32 sum lose 1e-3
    rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient.reshape(1, -1)
    pieces = [rows] if rows.dtype == wide else rows.split(max(1, _NORM_ELEMENTS // max(1, rows.shape[1])))
    of_rows = [torch.linalg.vector_norm(piece, dim=1, dtype=wide) for piece in pieces]
    return torch.linalg.vector_norm(torch.cat(of_rows), dtype=torch.float64).to(wide)
