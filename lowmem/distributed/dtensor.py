"""Sharded tensors (DTensors): find which rank has which part, and read or replace this rank's part."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lowmem.errors import UsageError
from lowmem.storage.records import Record


class ShardedRecord(NamedTuple):
    """A sharded tensor, of which this rank's part is in a record."""

    record: Record
    like: DTensor
    """Has the shape, dtype and placements of the tensor, but not its data."""

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def numel(self) -> int:
        return self.like.numel()


class StagedTensor(NamedTuple):
    """A tensor of a model that is split into stages, as every process knows it."""

    local: "Tensor | None"
    """The tensor, or the part of it, that this process has. None: its stage does not have the tensor."""
    shape: torch.Size
    dtype: torch.dtype
    pieces: "list[Piece]"
    """Where its parts are, on the first stage that has it."""

    def numel(self) -> int:
        return self.shape.numel()


class Piece(NamedTuple):
    """The part of a tensor from `start` to `stop` in dimension `dim`; `rank` is the first rank that has this part."""

    rank: int
    dim: int
    start: int
    stop: int

    def shape(self, whole: torch.Size) -> tuple[int, ...]:
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])


def pieces(tensor: DTensor | ShardedRecord | StagedTensor) -> list[Piece]:
    """All parts of a tensor, in order. Raises UsageError if it is sharded, but neither by rows nor by columns."""
    if isinstance(tensor, StagedTensor):
        return tensor.pieces
    tensor = tensor.like if isinstance(tensor, ShardedRecord) else tensor
    mesh, sharded = tensor.device_mesh.mesh, _sharded_dims(tensor)
    if not sharded:
        return [Piece(int(mesh.flatten()[0]), 0, 0, len(tensor))]
    if len(sharded) > 1 or type(tensor.placements[sharded[0]]) is not Shard or tensor.placements[sharded[0]].dim > 1:
        raise UsageError(f"tensors sharded as {tensor.placements} cannot be saved: shard the first or second dimension")
    dim = tensor.placements[sharded[0]].dim
    ranks = mesh.movedim(sharded[0], 0).reshape(mesh.size(sharded[0]), -1)[:, 0].tolist()
    size = -(-tensor.shape[dim] // len(ranks))
    ends = [min(size * (i + 1), tensor.shape[dim]) for i in range(len(ranks))]
    return [Piece(rank, dim, start, end) for rank, start, end in zip(ranks, [0, *ends], ends, strict=False)]


def _sharded_dims(tensor: DTensor) -> list[int]:  # returns mesh dimensions, not tensor dimensions
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def local_part(tensor: Tensor | Record | ShardedRecord) -> tuple[Tensor | Record, int, int]:
    """The local part of a tensor, as a view, and the row and the column where it begins in the full tensor."""
    if isinstance(tensor, ShardedRecord):
        return tensor.record, *local_part(tensor.like)[1:]
    if not isinstance(tensor, DTensor) or not (sharded := _sharded_dims(tensor)):
        return local_of(tensor), 0, 0
    piece = pieces(tensor)[tensor.device_mesh.get_local_rank(sharded[0])]
    return tensor.to_local(), *((piece.start, 0) if piece.dim == 0 else (0, piece.start))


def local_of(tensor: Tensor | Record | ShardedRecord | StagedTensor) -> Tensor | Record | None:
    """The local part of a DTensor, as a view, of a ShardedRecord or a StagedTensor; any other tensor unchanged."""
    if isinstance(tensor, ShardedRecord):
        return tensor.record
    if isinstance(tensor, StagedTensor):
        return local_of(tensor.local)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the first that holds its part. Sums over ranks skip later copies, so a part counts once."""
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(i) == 0 for i, placement in enumerate(tensor.placements) if placement.is_replicate())


def is_in_columns(tensor: Tensor) -> bool:
    """Whether the tensor is sharded along its second dimension."""
    return isinstance(tensor, DTensor) and any(placement.is_shard(1) for placement in tensor.placements)


def sharded_like(parameter: Tensor, local: Tensor | Record) -> Tensor | Record | ShardedRecord:
    """Wrap `local` as a DTensor sharded like `parameter`. Ranks may resize the sharded dimension, but all equally."""
    if not isinstance(parameter, DTensor):
        return local
    if isinstance(local, Record):
        no_data = torch.empty((), dtype=local.dtype, device=parameter.device).expand(local.shape)
        return ShardedRecord(local, sharded_like(parameter, no_data))
    mesh, placements, part = parameter.device_mesh, parameter.placements, local_of(parameter)
    shape = list(local.shape)
    for i in _sharded_dims(parameter):
        dim = placements[i].dim
        has_its_size = local.shape[dim] == part.shape[dim]
        shape[dim] = parameter.shape[dim] if has_its_size else local.shape[dim] * mesh.size(i)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def is_shared(tensor: Tensor) -> bool:
    """Whether another tensor has this tensor's memory, such as a view.

    Autograd keeps a view as `.grad` without a copy: for `hidden + parameter[None]`, of the gradient of `hidden`.
    """
    storage = tensor.untyped_storage()  # kept, because some versions of torch count it only while it exists
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor and `storage`


@torch.no_grad()
def set_local_(parameter: nn.Parameter, local: Tensor) -> None:
    """Replace the local part of `parameter` by `local`. The dtype may change; `parameter` remains the same object."""
    if not isinstance(parameter, DTensor) and parameter.is_meta == local.is_meta:
        parameter.data = local
        return
    is_sharded, before = isinstance(parameter, DTensor), local_of(parameter).untyped_storage()
    # assigning to `data` would not replace the local tensor of a DTensor, and fails to and from meta
    torch.utils.swap_tensors(parameter, nn.Parameter(sharded_like(parameter, local), parameter.requires_grad))
    parameter._backward_hooks = parameter._backward_hooks  # register the hooks with the new tensor
    if is_sharded and before._cdata != local.untyped_storage()._cdata and before.resizable():
        before.resize_(0)  # otherwise fully_shard would hold the old storage until it next uses the parameter
