"""Query how a model is distributed over ranks: its wrapper, its sharding, and this process's data-parallel rank."""

import sys
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.distributed.collectives import (
    is_rehearsed,
    raise_on_all_ranks,
    rank_and_world_size,
    report_failure,
)
from lowmem.distributed.launcher import launched_processes
from lowmem.errors import UsageError

TENSOR_PARALLEL_MESH = ("data", "tensor")
"""Names of the mesh dimensions under tensor parallelism."""

PIPELINE_MESH = ("data", "pipeline", "tensor")
"""Names of the mesh dimensions if a model is split into stages. The last has one process without tensor parallelism."""

_SMALL = 4096

STAGES = "_lowmem_stages"
"""The attribute in which a model that is split into stages has them (`Stages` in pipeline.py)."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside DistributedDataParallel or a DeepSpeed engine, or the model itself."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model)
    return model.module if is_wrapped else model


def is_adapted(model: nn.Module) -> bool:
    """Whether peft has put adapters into the model's layers (`add_lora`), so that only these are trained and saved."""
    return "peft_config" in vars(unwrapped(model))


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter is in 4 or 8 bits: integers, whose scales are attributes of it."""
    return not parameter.is_floating_point()


def is_large(parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of more than 4,096 elements. Smaller ones take few bytes."""
    return parameter.dim() > 1 and parameter.numel() > _SMALL


def training_layers(model: nn.Module, saver: str) -> list[nn.Module]:
    """Return the layers that transformers marks for checkpointing, outermost ones only, in the order of the model.

    Raises UsageError, which names `saver`, if there are none.
    """
    layers, inner = [], set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            layers.append(module)
            inner.update(module.modules())
    if not layers:
        name = type(unwrapped(model)).__name__
        raise UsageError(f"{saver} needs transformers' layers, {name} has no layers of that kind: remove {saver}")
    return layers


def layer_drop(model: nn.Module) -> str:
    """Return the setting by which the model leaves out random layers in training, such as "layerdrop=0.1", or ""."""
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")
    return next((f"{name}={value}" for name in names if (value := getattr(model.config, name, 0))), "")


def is_engine(model: nn.Module) -> bool:
    """Whether `model` is wrapped by DeepSpeed."""
    return "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def uses_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed shards the weights (ZeRO stage 3), so that each forward has collectives."""
    return is_engine(model) and model.zero_optimization_partition_weights()


class DataParallelRank(NamedTuple):
    """A data-parallel rank. Processes that share a model (tp_size, pp_size) share it too, and get the same rows."""

    rank: int
    size: int
    is_counted: bool
    """Whether sums over all processes count this process: true for one process per data-parallel rank."""
    group: dist.ProcessGroup | None
    """The processes with which this one sums gradients, because they hold the same weights. None: all processes."""

    @property
    def coordinates(self) -> dict[str, int]:
        """The arguments `rank` and `world_size` of `open_stream` and `open_eval`."""
        return {"rank": self.rank, "world_size": self.size}


def data_place(model: nn.Module) -> DataParallelRank:
    """This process's DataParallelRank. Pass its `coordinates` to `open_stream` and `open_eval`."""
    mesh = pipeline_mesh(model) or tensor_mesh(model)
    if mesh is None:
        return DataParallelRank(*rank_and_world_size(), is_counted=True, group=None)
    is_counted = is_rehearsed() or not any(mesh.get_coordinate()[1:])
    return DataParallelRank(mesh.get_local_rank(0), mesh.size(0), is_counted, mesh.get_group(0))


def given_or_only_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the given coordinates. If none are given, return (0, 1) for a single process, and else raise UsageError.

    With several processes, the default would silently give each of them all rows.
    """
    num_processes = max(rank_and_world_size()[1], launched_processes() or 1)  # before init_distributed, the launcher's
    if (rank is None) != (world_size is None):
        raise UsageError(f"found rank={rank} and world_size={world_size}: pass both, **data_place(model).coordinates")
    if rank is None and num_processes > 1:
        what = f"{num_processes} processes need rank and world_size, so that each reads its own rows"
        raise UsageError(f"{what}: pass **data_place(model).coordinates")
    return rank or 0, world_size or 1


def original_class(model: nn.Module) -> type:
    """Return the model's class before fully_shard, which replaces it by a subclass of both it and FSDPModule."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` or ZeRO stage 3 shards the weights, so that each backward sums gradients over ranks."""
    return isinstance(unwrapped(model), FSDPModule) or uses_zero3(model)


def device_of(model: nn.Module) -> torch.device:
    """The device on which the model computes, even if its sharded weights are in host memory."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def has_collectives(model: nn.Module) -> bool:
    """Whether weights are sharded, or layers split or distributed over ranks, so that a forward needs other ranks."""
    return is_sharded(model) or tensor_mesh(model) is not None or pipeline_mesh(model) is not None


def handle_rank_errors(model: nn.Module) -> AbstractContextManager[None]:
    """Tell all ranks of errors in forward or backward: by heartbeat if these run collectives, else by a collective."""
    return report_failure() if has_collectives(model) else raise_on_all_ranks()


def tensor_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh that `apply_tensor_parallelism` used for `model`; None without tensor parallelism."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    return next((mesh for mesh in meshes if mesh.mesh_dim_names == TENSOR_PARALLEL_MESH), None)


def pipeline_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh that `split_into_stages` used for `model`; None without stages."""
    stages = getattr(unwrapped(model), STAGES, None)
    return None if stages is None else stages.mesh
