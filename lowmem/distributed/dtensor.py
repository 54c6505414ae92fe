"""The pieces of a sharded tensor (DTensor): which part lies where, whole bytes for the rank that writes them.

`fully_shard` divides a tensor's first dimension, tensor parallelism the first or the second.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


class Piece(NamedTuple):
    """A part of a tensor, from `start` to `stop` in one dimension and all of the others; the first rank that has it."""

    rank: int
    dim: int
    start: int
    stop: int

    def shape(self, whole: torch.Size) -> tuple[int, ...]:
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])


def pieces(tensor: DTensor) -> list[Piece]:
    """All parts of a tensor, in order. Raises ValueError for one divided twice, or by a later dimension."""
    mesh, divided = tensor.device_mesh.mesh, _divided(tensor)
    if not divided:
        return [Piece(int(mesh.flatten()[0]), 0, 0, len(tensor))]
    if len(divided) > 1 or type(tensor.placements[divided[0]]) is not Shard or tensor.placements[divided[0]].dim > 1:
        raise ValueError(
            f"a tensor is sharded as {tensor.placements}, only shards of the first or second dimension can be saved "
            "and loaded: shard with fully_shard or tensor parallelism alone"
        )
    dim = tensor.placements[divided[0]].dim
    ranks = mesh.movedim(divided[0], 0).flatten(1)[:, 0].tolist() if mesh.dim() > 1 else mesh.tolist()
    size = -(-tensor.shape[dim] // len(ranks))
    ends = [min(size * (i + 1), tensor.shape[dim]) for i in range(len(ranks))]
    return [Piece(rank, dim, start, end) for rank, start, end in zip(ranks, [0, *ends], ends, strict=False)]


def _divided(tensor: DTensor) -> list[int]:
    """Dimensions of its mesh over which the tensor is not copied."""
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def local_part(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this rank has of a tensor, to be read or written in place: it, its first row and column in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, 0
    divided = _divided(tensor)
    if not divided:
        return tensor.to_local(), 0, 0
    piece = pieces(tensor)[tensor.device_mesh.get_local_rank(divided[0])]
    return tensor.to_local(), *((piece.start, 0) if piece.dim == 0 else (0, piece.start))


def local_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory; of one that is not sharded, the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_first_copy(tensor: DTensor) -> bool:
    """Whether what this rank has counts in a sum over all ranks: of equal copies, those of one rank do."""
    copied = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return all(tensor.device_mesh.get_local_rank(i) == 0 for i in copied)


def is_in_columns(tensor: Tensor) -> bool:
    """Whether ranks have columns of it, the parts of its second dimension."""
    return isinstance(tensor, DTensor) and any(placement.is_shard(1) for placement in tensor.placements)


def sharded_like(parameter: Tensor, local: Tensor) -> Tensor:
    """`local`, made of what this rank has of `parameter`, as this rank's part of a tensor divided alike.

    It is as large in each dimension, or (blocks of columns) all ranks' parts are as large as this one.
    """
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements, part = parameter.device_mesh, parameter.placements, local_of(parameter)
    shape = list(local.shape)
    for i in _divided(parameter):
        dim = placements[i].dim
        is_alike = local.shape[dim] == part.shape[dim]
        shape[dim] = parameter.shape[dim] if is_alike else local.shape[dim] * mesh.size(i)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@torch.no_grad()
def set_local_(parameter: nn.Parameter, local: Tensor) -> None:
    """Let `parameter` have `local`, of any dtype, as what this rank has of it. It stays the same object."""
    if not isinstance(parameter, DTensor):
        parameter.data = local
        return
    before = local_of(parameter).untyped_storage()
    # a DTensor's data cannot be set: its local tensor would stay
    torch.utils.swap_tensors(parameter, nn.Parameter(sharded_like(parameter, local), parameter.requires_grad))
    if before._cdata != local.untyped_storage()._cdata and before.resizable():
        before.resize_(0)  # fully_shard has it until it takes note of the new one: all weights would be there twice
