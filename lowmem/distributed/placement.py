"""How a model is placed on the ranks: what wraps it, which ranks share it, and whose rows count."""

import sys
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lowmem.distributed.collectives import raise_on_all_ranks, rank_and_world_size, report_failure

TENSOR_PARALLEL_MESH = ("data", "tensor")
"""Names of the mesh's dimensions under tensor parallelism."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside a wrapper of DistributedDataParallel or DeepSpeed, or the model itself."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model)
    return model.module if is_wrapped else model


def is_engine(model: nn.Module) -> bool:
    """Whether `model` is wrapped by DeepSpeed."""
    return "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def divides_weights(model: nn.Module) -> bool:
    """Whether `model` is wrapped by DeepSpeed at stage 3, so that each forward has collectives."""
    return is_engine(model) and model.zero_optimization_partition_weights()


class DataParallelRank(NamedTuple):
    """A rank's number among those whose rows differ: ranks that share a model (tp_size) share it."""

    rank: int
    size: int
    is_counted: bool
    """Whether sums over all ranks count this one, of the ranks that share a number."""
    group: dist.ProcessGroup | None
    """The ranks whose gradients belong to the same weights as this one's; None: all."""

    @property
    def coordinates(self) -> dict[str, int]:
        """`rank` and `world_size` as `open_stream` and `open_eval` take them."""
        return {"rank": self.rank, "world_size": self.size}


def data_place(model: nn.Module) -> DataParallelRank:
    """This rank's DataParallelRank: its `coordinates` are what `open_stream` and `open_eval` take."""
    mesh = tensor_mesh(model)
    if mesh is None:
        return DataParallelRank(*rank_and_world_size(), is_counted=True, group=None)
    return DataParallelRank(mesh.get_local_rank(0), mesh.size(0), mesh.get_local_rank(1) == 0, mesh.get_group(0))


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard`, or DeepSpeed's stage 3, shards its weights, so that each backward sums over ranks."""
    return isinstance(unwrapped(model), FSDPModule) or divides_weights(model)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes, also while its sharded weights are in host memory."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def is_divided(model: nn.Module) -> bool:
    """Whether ranks share its layers or its weights, so that forward and backward have collectives."""
    return is_sharded(model) or tensor_mesh(model) is not None


def failing(model: nn.Module) -> AbstractContextManager[None]:
    """How to pass on an error in forward or backward, where a divided model has collectives of its own."""
    return report_failure() if is_divided(model) else raise_on_all_ranks()


def tensor_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh that `divide_layers` sharded the model over; None if it did not."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    return next((mesh for mesh in meshes if mesh.mesh_dim_names == TENSOR_PARALLEL_MESH), None)
