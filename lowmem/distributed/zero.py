"""DeepSpeed's ZeRO: shards optimizer state (stage 1), gradients (2) and weights (3). Imports DeepSpeed only if used."""

import copy
import math
import os
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.collectives import collective, rank_and_world_size, report_failure
from lowmem.errors import UsageError
from lowmem.storage.tensor_files import StoredTensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class ZeroTensor(NamedTuple):
    """A tensor of a model in DeepSpeed's engine, as a checkpoint has it: whole, and in fp32 if it is floating-point.

    ZeRO keeps trained weights twice: as fp32 master weights, and as copies in the model, which compute (in bf16, if
    the config enables it). This is the master weight or, with `key`, that tensor of its optimizer state.
    """

    engine: nn.Module
    tensor: Tensor
    """The parameter (at stage 3 without its data) or buffer in the engine's model."""
    key: str | None = None

    @property
    def shape(self) -> torch.Size:
        return getattr(self.tensor, "ds_shape", self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tensor.is_floating_point() else self.tensor.dtype

    def numel(self) -> int:
        return self.shape.numel()

    def gather_to_host(self) -> Tensor:
        """Return a copy on the host, gathered from all ranks. Call it on every rank."""
        import deepspeed

        with report_failure(), collective("gathering a tensor for a checkpoint"):
            if self.key is not None:
                return deepspeed.utils.safe_get_full_optimizer_state(self.tensor, self.key).to("cpu", self.dtype)
            if self.tensor.requires_grad:
                return deepspeed.utils.safe_get_full_fp32_param(self.tensor).to("cpu", self.dtype)
            with deepspeed.zero.GatheredParameters([self.tensor]):  # does nothing if every rank has it whole
                return self.tensor.detach().to("cpu", self.dtype, copy=True)

    def read_part(self, stored: StoredTensor) -> None:
        """Fill this rank's part from `stored`, without a collective.

        Leaves out the copies in the model, and the frozen weights of stage 3: `refresh_weights` fills these.
        """
        from deepspeed import utils

        is_partitioned = hasattr(self.tensor, "ds_id")
        if not self.tensor.requires_grad:
            if not is_partitioned:
                stored.copy_part(self.tensor.data)
            return
        whole = stored.read()  # memory-mapped, so only the pages of this rank's part are read
        if not is_partitioned:
            if self.key is None:
                utils.safe_set_full_fp32_param(self.tensor, whole)
            else:
                utils.safe_set_full_optimizer_state(self.tensor, whole, self.key)
            return
        # stage 3 pads a weight so that parts are equal, but its functions for whole tensors only fit unpadded ones
        size, rank = self.tensor.ds_tensor.ds_numel, self.tensor.ds_zero_partition_rank
        part = whole.flatten()[rank * size : (rank + 1) * size]
        part = nn.functional.pad(part, (0, size - len(part)))
        if self.key is None:
            utils.safe_set_local_fp32_param(self.tensor, part)
        else:
            utils.safe_set_local_optimizer_state(self.tensor, part, self.key)

    def state(self) -> dict[str, "Tensor | ZeroTensor"]:
        """Return the optimizer state of this weight by key, {} before the first update. Call `link_state` first.

        ZeRO updates flattened weights, one vector for each group of weights. All have the same scalars, such as `step`.
        """
        of_vector = next(iter(self.engine.optimizer.optimizer.state.values()), {})
        return {
            key: self._replace(key=key) if isinstance(value, Tensor) and value.dim() else value
            for key, value in of_vector.items()
        }


def make_accelerator(config: Mapping[str, object], *, on_cpu: bool, **options: object) -> "Accelerator":
    """Make an Accelerator for DeepSpeed. `config` must include the precision. Raises UsageError if it is invalid."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from transformers.integrations import unset_hf_deepspeed_config

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (DeepSpeedConfigError, ValueError) as error:
        raise UsageError(f"DeepSpeed refuses its config: {' '.join(str(error).split())}") from error
    if on_cpu:
        # do not spend a minute compiling DeepSpeed's shared-memory collectives, because gloo has its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # choose the CPU: otherwise accelerate would see one process, and Accelerator(cpu=True) would ignore DeepSpeed
        PartialState(cpu=True)
    # DeepSpeed calls deprecated collectives, so torch would warn in every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # the plugin rejects this variable together with a config, and `config` already has the launcher's settings
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(hf_ds_config=dict(config), zero3_init_flag=False)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", **options)
    unset_hf_deepspeed_config()  # otherwise transformers would shard the models that it builds and loads
    return accelerator


def wrap(model: nn.Module, optimizer: Optimizer, accelerator: "Accelerator") -> nn.Module:
    """Wrap model and optimizer in DeepSpeed's engine, with rank 0's weights. `optimizer` then updates ZeRO's shards."""
    import deepspeed

    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage == 3:
        if plugin.deepspeed_config["bf16"]["enabled"]:
            model.to(torch.bfloat16)  # the engine does this only at other stages
        # Init shards each weight as soon as it reaches the device; the engine alone would first move all weights there
        deepspeed.zero.Init(module=model, config_dict_or_path=plugin.deepspeed_config)
    engine, _ = accelerator.prepare(model, optimizer)
    return engine


def allocate_state(engine: nn.Module, scalars: Mapping[str, Tensor], keys: Collection[str]) -> None:
    """Replace the optimizer's state, as its first step would make it: zeros for `keys`, and these scalars."""
    zero = engine.optimizer
    optimizer = zero.optimizer
    optimizer.state.clear()
    vectors = [vector for group in optimizer.param_groups for vector in group["params"]]
    if engine.zero_optimization_partition_weights():  # its groups are empty between updates
        vectors = zero.fp32_partitioned_groups_flat
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for vector in vectors if keys or scalars else ():
        state = {key: torch.zeros_like(vector, requires_grad=False) for key in keys}
        device = vector.device if on_device else "cpu"
        optimizer.state[vector] = state | {key: x.to(device, copy=True) for key, x in scalars.items()}
    link_state(engine)


def link_state(engine: nn.Module) -> None:
    """Give each weight views of its optimizer state, which `ZeroTensor` reads and fills.

    DeepSpeed 0.19.8 does this after it has updated the first group of weights, when other groups have no state yet.
    """
    zero = engine.optimizer
    if zero.optimizer.state and not engine.zero_optimization_partition_weights():  # stage 3 has no views
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def refresh_weights(engine: nn.Module, tensors: Mapping[str, ZeroTensor], stored: Mapping[str, StoredTensor]) -> None:
    """Update the copies in the model to the master weights, which `read_part` has filled from `stored`."""
    import deepspeed

    if not engine.zero_optimization_partition_weights():
        with collective("all-gathering the weights"):
            engine.optimizer.update_lp_params()
        return
    rank, _ = rank_and_world_size()
    for name, tensor in tensors.items():
        if hasattr(tensor.tensor, "ds_id"):
            with report_failure(), collective("sharding a weight of rank 0"):
                with deepspeed.zero.GatheredParameters([tensor.tensor], modifier_rank=0):
                    if rank == 0:
                        stored[name].copy_part(tensor.tensor.data)


def backward(engine: nn.Module, loss: Tensor, *, world_size: int, is_last: bool) -> None:
    """Add the gradient of `loss` to the step's gradient. The call with `is_last` completes the sum over all ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * world_size)  # the engine divides the sum by world_size


def update(engine: nn.Module) -> tuple[Tensor, bool]:
    """If the gradient is finite, clip it and update weights. Returns the unclipped norm, and whether it is finite."""
    engine.step()
    updated = engine.was_step_applied()
    norm = engine.get_global_grad_norm() if updated else math.nan  # DeepSpeed keeps the norm of the last update
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device), updated
