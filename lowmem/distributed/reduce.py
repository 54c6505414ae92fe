"""Sum tensors over ranks in fp32, in buckets, each as soon as backward has computed it."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowmem.distributed.collectives import collective, rank_and_world_size, report_failure
from lowmem.distributed.dtensor import local_of
from lowmem.errors import RankError

_BUCKET_BYTES = 32 * 2**20
_MOST_COPIES = 2  # of buckets in memory at a time
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13


def all_reduce_sum(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum each tensor in place over the ranks of `group` (None: all), in fp32 or wider. Ranks get bitwise equal sums.

    Ranks must pass the same shapes in the same order.
    """
    tensors = list(tensors)
    BucketedSum(tensors, group).finish(tensors)


class BucketedSum:
    """`all_reduce_sum` for tensors that become ready one after the other. Launches each bucket when it is complete.

    Tensors share buckets of up to 32 MiB in fp32, in the order of `like`, which has their shapes. All ranks launch all
    buckets in this order, whichever tensors are ready first. A bucket that is not one whole fp32 slice takes a copy;
    at most two copies exist at a time: the third waits for the first.
    """

    def __init__(self, like: Sequence[Tensor], group: dist.ProcessGroup | None = None):
        self._group, self._buckets = group, deque(_buckets(like))
        self._ready: dict[int, Tensor] = {}  # as vectors
        self._begun: set[int] = set()
        self._strided: list[tuple[Tensor, Tensor]] = []
        self._in_flight: deque[_InFlight] = deque()

    def add(self, index: int, tensor: Tensor) -> None:
        """Sum `tensor` in place, which has the shape of `like[index]`. It must not be used before `finish` returns.

        It may be added again until its bucket is complete. After that, raises ValueError.
        """
        if index in self._begun:
            found = f"the gradient of shape {[*tensor.shape]} changed after its sum over ranks had begun"
            raise ValueError(f"{found}: if checkpoints share a parameter, set use_reentrant=False in them")
        vector = tensor.detach().contiguous().view(-1)
        if not tensor.is_contiguous():
            self._strided.append((tensor, vector))
        self._ready[index] = vector
        # look at the last part first, because it is usually the last to be ready
        while self._buckets and all(part.index in self._ready for part in reversed(self._buckets[0].parts)):
            self._launch(self._buckets[0])
            self._buckets.popleft()

    def finish(self, tensors: Sequence[Tensor]) -> None:
        """Add those of `tensors` whose sums have not begun, and wait for all. (A GPU's stream waits, not the host.)"""
        for index, tensor in enumerate(tensors):
            if index not in self._begun:
                self.add(index, tensor)
        self._wait(0)
        for tensor, vector in self._strided:
            tensor.copy_(vector.view_as(tensor))

    @contextmanager
    def completed(self) -> Iterator[None]:
        """If this block fails, launch the buckets that are left, so that no rank waits for them for ever.

        Their sums are then garbage on every rank: the ranks must agree to drop them.
        """
        try:
            yield
        except RankError:  # another rank has gone, so no collective can complete
            raise
        except Exception:
            self._ready.clear()
            with report_failure():
                self._wait(0)
                for bucket in self._buckets:
                    self._reduce(torch.zeros(bucket.numel, dtype=bucket.dtype, device=bucket.device), ())
                    self._wait(0)
            raise

    def _launch(self, bucket: "_Bucket") -> None:
        self._begun.update(part.index for part in bucket.parts)
        pieces = [self._ready[part.index][part.start : part.stop] for part in bucket.parts]
        if len(pieces) == 1 and pieces[0].dtype == bucket.dtype:
            self._reduce(pieces[0], ())
            return
        self._wait(_MOST_COPIES - 1)
        flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
        torch._foreach_copy_(flat.split([len(piece) for piece in pieces]), pieces)
        self._reduce(flat, pieces)

    def _reduce(self, flat: Tensor, pieces: Sequence[Tensor]) -> None:
        with collective("summing tensors"):
            work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._in_flight.append(_InFlight(work, flat, pieces))

    def _wait(self, copies: int) -> None:
        """Wait for the oldest buckets until at most `copies` copies are left, or until nothing is, if that is 0."""
        while self._in_flight and (not copies or sum(bool(x.pieces) for x in self._in_flight) > copies):
            work, flat, pieces = self._in_flight.popleft()
            with collective("summing tensors"):
                work.wait()
            if pieces:
                torch._foreach_copy_(pieces, flat.split([len(piece) for piece in pieces]))


class LayerSum:
    """The sum over ranks of the complete gradients of a layer. On a GPU, it overlaps with what is computed next.

    If parameters are sharded, each rank gets the sum of its part. Sums are in fp32; the results have the dtypes of
    `gradients`, which must not be used until `finish` has returned.
    """

    def __init__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], group: dist.ProcessGroup | None = None
    ):
        self._gradients, self._stream = gradients, None
        is_sharded = isinstance(parameters[0], DTensor)
        self._results = list(map(_empty_part, parameters, gradients)) if is_sharded else list(gradients)
        with self._on_side_stream(gradients[0].device):
            if is_sharded:
                scatter_sum(parameters, gradients, self._results)
            elif rank_and_world_size()[1] > 1:
                all_reduce_sum(gradients, group)

    def finish(self) -> list[Tensor]:
        """Return the sums, in the order of the parameters."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._gradients = []
        return self._results

    @contextmanager
    def _on_side_stream(self, device: torch.device) -> Iterator[None]:
        # if an error drops this object before `finish`, the stream may still use the tensors; such a run ends
        if device.type != "cuda":
            yield
            return
        self._stream = _stream_of(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def scatter_sum(parameters: Sequence[DTensor], gradients: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Sum whole gradients over ranks, in fp32 or wider, in buckets; `results` get this rank's parts of the sums.

    The parameters are sharded by rows over the same mesh, as `fully_shard` does it.
    """
    mesh = parameters[0].device_mesh
    ranks, group = mesh.size(-1), mesh.get_group(mesh.ndim - 1)
    whole, mine = [x.contiguous().view(-1) for x in gradients], [x.view(-1) for x in results]
    sizes = [-(-len(x) // ranks) * x[:1].numel() for x in gradients]  # of the largest part
    like = [x.new_empty(size, device="meta") for x, size in zip(gradients, sizes, strict=True)]
    for bucket in _buckets(like, _BUCKET_BYTES // ranks):
        flat = torch.zeros((ranks, bucket.numel), dtype=bucket.dtype, device=gradients[0].device)
        total, lengths = torch.empty_like(flat[0]), [part.stop - part.start for part in bucket.parts]
        given, places, sums, targets = [], [], [], []
        split = zip(bucket.parts, flat.split(lengths, dim=1), total.split(lengths), strict=True)
        for (index, start, stop), rows, total_of_part in split:
            for rank, row in enumerate(rows):
                first = rank * sizes[index]
                given.append(whole[index][first + start : first + stop])  # shorter, or empty, at the end
                places.append(row[: len(given[-1])])
            targets.append(mine[index][start:stop])
            sums.append(total_of_part[: len(targets[-1])])
        torch._foreach_copy_(places, given)
        with collective("summing gradients of a layer"):
            _reduce_scatter(total, flat.view(-1), group=group)
            if mesh.ndim > 1:  # HYBRID_SHARD: the same part of each copy of the model
                dist.all_reduce(total, group=mesh.get_group(0))
        torch._foreach_copy_(targets, sums)


def _empty_part(parameter: DTensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(local_of(parameter), dtype=gradient.dtype, device=gradient.device)


class _Part(NamedTuple):
    index: int
    """Of the tensor in `like`."""
    start: int
    stop: int


@dataclass
class _Bucket:
    dtype: torch.dtype
    device: torch.device
    parts: list[_Part] = field(default_factory=list)
    numel: int = 0


class _InFlight(NamedTuple):
    work: dist.Work
    flat: Tensor
    pieces: Sequence[Tensor]
    """Where to copy the sums. Empty if `flat` is no copy."""


def _buckets(like: Sequence[Tensor], num_bytes: int = _BUCKET_BYTES) -> Iterator[_Bucket]:
    bucket = None
    for index, tensor in enumerate(like):
        # a rank may hold bf16 where others hold fp32, so buckets must not depend on that
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        most = num_bytes // dtype.itemsize
        for start in range(0, tensor.numel(), most):
            stop = min(start + most, tensor.numel())
            if bucket is None or bucket.dtype != dtype or bucket.numel + stop - start > most:
                if bucket:
                    yield bucket
                bucket = _Bucket(dtype, tensor.device)
            bucket.parts.append(_Part(index, start, stop))
            bucket.numel += stop - start
    if bucket:
        yield bucket
