"""The pieces of a sharded tensor (DTensor): which rows lie where, whole bytes for the rank that writes them.

Rows are those of the tensor's first dimension, the only one that `fully_shard` divides.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lowmem.parallel.agree import host_group, waiting
from lowmem.weights import host_parts


class Piece(NamedTuple):
    """Some rows of a tensor, and the first rank that has them."""

    rank: int
    rows: slice


def pieces(tensor: DTensor) -> list[Piece]:
    """All rows of a tensor, in order. Raises ValueError for one that is not divided by its first dimension alone."""
    mesh, divided = tensor.device_mesh.mesh, _divided(tensor)
    if not divided:
        return [Piece(int(mesh.flatten()[0]), slice(0, len(tensor)))]
    if len(divided) > 1 or type(tensor.placements[divided[0]]) is not Shard or tensor.placements[divided[0]].dim != 0:
        raise ValueError(
            f"a tensor is sharded as {tensor.placements}, only shards of the first dimension can be saved and loaded: "
            "shard with fully_shard alone"
        )
    ranks = mesh.movedim(divided[0], 0).flatten(1)[:, 0].tolist() if mesh.dim() > 1 else mesh.tolist()
    height = -(-len(tensor) // len(ranks))
    ends = [min(height * (i + 1), len(tensor)) for i in range(len(ranks))]
    return [Piece(rank, slice(start, end)) for rank, start, end in zip(ranks, [0, *ends], ends, strict=False)]


def _divided(tensor: DTensor) -> list[int]:
    """Dimensions of its mesh over which the tensor is not copied."""
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank has of a tensor, to be read or written in place, and the row of the whole at which it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    divided = _divided(tensor)
    if not divided:
        return tensor.to_local(), 0
    place = tensor.device_mesh.get_local_rank(divided[0])
    return tensor.to_local(), pieces(tensor)[place].rows.start


def local_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory; of one that is not sharded, the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_first_copy(tensor: DTensor) -> bool:
    """Whether what this rank has counts in a sum over all ranks: of equal copies, those of one rank do."""
    copied = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return all(tensor.device_mesh.get_local_rank(i) == 0 for i in copied)


def sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local`, made of what this rank has of `parameter`, row by row, as this rank's rows of a tensor sharded alike."""
    if not isinstance(parameter, DTensor):
        return local
    shape = (*parameter.shape[:1], *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@torch.no_grad()
def hold(parameter: nn.Parameter, local: Tensor) -> None:
    """Let `parameter` have `local`, of any dtype, as what this rank has of it. It stays the same object."""
    if not isinstance(parameter, DTensor):
        parameter.data = local
        return
    before = local_of(parameter).untyped_storage()
    # a DTensor's data cannot be set: its local tensor would stay
    torch.utils.swap_tensors(parameter, nn.Parameter(sharded_like(parameter, local), parameter.requires_grad))
    if before.data_ptr() != local.untyped_storage().data_ptr() and before.resizable():
        before.resize_(0)  # fully_shard has it until it takes note of the new one: all weights would be there twice


def whole_parts(queues: Sequence[Sequence[Tensor]], rank: int) -> Iterator[memoryview]:
    """The bytes of the tensors in this rank's queue, one tensor after the other, as `host_parts` gives them.

    `queues` are the same on all ranks, one for each of them. Every rank must take all that this gives, as it sends its
    pieces of the others' tensors in between. One tensor of each queue is under way at a time, in host memory at most
    as many bytes as the largest has.
    """
    for turn in zip_longest(*queues):
        sent = [_send(tensor, owner) for owner, tensor in enumerate(turn) if owner != rank]
        if turn[rank] is not None:
            yield from _parts(turn[rank], rank)
        with waiting("sending pieces of a checkpoint's tensors"):
            for work in filter(None, sent):
                work.wait()


def _send(tensor: Tensor | None, owner: int) -> dist.Work | None:
    if not isinstance(tensor, DTensor):
        return None  # the owner has it
    rank = dist.get_rank()
    mine = [piece for piece in pieces(tensor) if piece.rank == rank and piece.rows.start < piece.rows.stop]
    if not mine:
        return None
    data = tensor.to_local().detach().cpu().contiguous().view(-1).view(torch.uint8)
    return dist.isend(data, owner, group=host_group())


def _parts(tensor: Tensor, rank: int) -> Iterator[memoryview]:
    if not isinstance(tensor, DTensor):
        yield from host_parts(tensor)
        return
    for piece in pieces(tensor):
        if piece.rank == rank:
            yield from host_parts(tensor.to_local())
        elif piece.rows.start < piece.rows.stop:
            shape = (piece.rows.stop - piece.rows.start, *tensor.shape[1:])
            received = torch.empty(shape, dtype=tensor.dtype)
            with waiting(f"waiting for a piece of a checkpoint's tensor from rank {piece.rank}"):
                dist.recv(received.view(-1).view(torch.uint8), piece.rank, group=host_group())
            yield from host_parts(received)
