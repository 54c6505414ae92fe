"""Distribute a model over ranks: replicated, sharded, or with its layers split by tensor parallelism."""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowmem.config.train_config import choices
from lowmem.distributed.fill import Unfilled, fill_weights
from lowmem.distributed.fully_sharded import shard_layers
from lowmem.distributed.pipeline import make_pipeline_mesh, mesh_within_stage, split_into_stages
from lowmem.distributed.placement import TENSOR_PARALLEL_MESH, is_quantized, layer_drop
from lowmem.distributed.tensor_parallel import apply_tensor_parallelism, make_tensor_mesh
from lowmem.errors import UsageError


def parallelize(
    model: nn.Module,
    accelerator: Accelerator,
    *,
    sharding_strategy: str = "NO_SHARD",
    shard_size: int | None = None,
    cpu_offload: bool = False,
    tp_size: int = 1,
    pp_size: int = 1,
    fill: bool = True,
) -> nn.Module:
    """Move the model to this rank's device, with rank 0's weights and buffers. Its state dict keys do not change.

    NO_SHARD replicates the model on every rank. The other strategies use torch's `fully_shard`, one group per layer,
    to shard weights by rows and sum gradients over ranks in fp32. FULL_SHARD all-gathers a layer's weights for forward
    and again for backward; SHARD_GRAD_OP keeps them in between. HYBRID_SHARD is FULL_SHARD in groups of `shard_size`
    adjacent ranks (None: the ranks of a machine), with one replica per group. `cpu_offload` keeps the shards in host
    memory and updates them there. With `tp_size`, that many adjacent ranks split layers by tensor parallelism and need
    the same rows (see `data_place`). With `pp_size`, each layer is on one of that many stages of `tp_size` ranks, which
    all need the same rows; FULL_SHARD and SHARD_GRAD_OP then shard a stage over its data-parallel ranks. A model on
    meta (`load_model(..., on_meta=True)`) is filled from its files. With `fill=False`, `make_optimizer` moves or fills
    the weights, one at a time, so that a memory tier never has all of them in fp32; the model cannot run before that.
    Raises UsageError for options that do not fit the processes or the model, such as quantized weights with sharding.
    """
    if sharding_strategy not in (strategies := choices("sharding_strategy")):
        raise UsageError(f"sharding_strategy={sharding_strategy} is unknown: set one of {', '.join(strategies)}")
    if accelerator.deepspeed_plugin is not None:
        if pp_size > 1:
            raise UsageError(f"pp_size={pp_size} does not combine with DeepSpeed: remove one of the two")
        return model  # DeepSpeed's engine moves the model; at stage 3, no device holds the whole model
    if tp_size > 1 and sharding_strategy != "NO_SHARD":
        raise UsageError(f"tp_size={tp_size} was set with {sharding_strategy}, but they do not combine: remove one")
    if pp_size > 1 and (sharding_strategy == "HYBRID_SHARD" or shard_size is not None):
        raise UsageError(f"pp_size={pp_size} does not combine with HYBRID_SHARD or shard_size: use FULL_SHARD")
    is_sharded = tp_size > 1 or sharding_strategy != "NO_SHARD"
    is_split = is_sharded or pp_size > 1
    _check_quantized(model, accelerator.device, is_split)
    if cpu_offload and not is_sharded:
        raise UsageError("cpu_offload needs a sharded model, got NO_SHARD: set FULL_SHARD or remove cpu_offload")
    if is_split and (dropped := layer_drop(model)):
        found = f"ranks would drop different layers ({dropped})"
        raise UsageError(f"with a sharded model, {found}: set it to 0.0 in the model's config.json")
    weights = Unfilled(model, is_split=is_split)
    mesh = None
    if pp_size > 1:
        whole = make_pipeline_mesh(accelerator.device.type, accelerator.num_processes, pp_size, tp_size)
        split_into_stages(model, whole)
        mesh = mesh_within_stage(whole)
    elif is_sharded:
        mesh = make_mesh(accelerator, sharding_strategy, shard_size, tp_size)
    if is_sharded:
        shard(model, mesh, sharding_strategy=sharding_strategy, cpu_offload=cpu_offload)
    weights.place(model, accelerator.device, on_host=cpu_offload and tp_size == 1)
    if fill:
        fill_weights(model)
    return model


def _check_quantized(model: nn.Module, device: torch.device, is_sharded: bool) -> None:
    """Raise UsageError if the model has quantized weights, and they would be split or moved."""
    quantized = next(filter(is_quantized, model.parameters()), None)
    if quantized is None:
        return
    if is_sharded:
        advice = "set NO_SHARD, tp_size=1 and pp_size=1, or remove quantization"
        raise UsageError(f"quantized weights cannot be sharded: {advice}")
    if quantized.device != (wanted := torch.empty(0, device=device).device):  # with the index, if `device` has none
        found = f"quantized weights are on {quantized.device}, and their scales cannot be moved to {wanted}"
        raise UsageError(f"{found}: call load_model with device=accelerator.device")


def make_mesh(accelerator: Accelerator, sharding_strategy: str, shard_size: int | None, tp_size: int) -> DeviceMesh:
    """Make a mesh of all ranks: (data ranks, tp_size) if tp_size > 1, (copies, shards) for HYBRID_SHARD, else 1-D."""
    world_size, kind = accelerator.num_processes, accelerator.device.type
    if tp_size > 1:
        return make_tensor_mesh(kind, world_size, tp_size)
    if not dist.is_initialized():  # a single process
        dist.init_process_group(dist.get_default_backend_for_device(kind), store=dist.HashStore(), rank=0, world_size=1)
    if sharding_strategy != "HYBRID_SHARD":
        if shard_size not in (None, world_size):
            found = f"{sharding_strategy} shards one replica over all {world_size} processes"
            raise UsageError(f"shard_size={shard_size} was set, but {found}: set HYBRID_SHARD or remove shard_size")
        return init_device_mesh(kind, (world_size,))
    shard_size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if shard_size >= world_size or world_size % shard_size:
        found = f"shard_size={shard_size} for {world_size} processes"
        raise UsageError(f"HYBRID_SHARD needs several equal groups, got {found}: set another shard_size or FULL_SHARD")
    return init_device_mesh(kind, (world_size // shard_size, shard_size), mesh_dim_names=("copies", "shards"))


def shard(model: nn.Module, mesh: DeviceMesh, *, sharding_strategy: str, cpu_offload: bool) -> None:
    """Shard the model over `mesh` in place, as `parallelize` does. The model may be on meta."""
    if mesh.mesh_dim_names == TENSOR_PARALLEL_MESH:
        apply_tensor_parallelism(model, mesh)
    else:
        reshards = sharding_strategy != "SHARD_GRAD_OP"
        shard_layers(model, mesh, reshard_after_forward=reshards, cpu_offload=cpu_offload)
