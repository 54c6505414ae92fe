"""DeepSpeed's ZeRO: shards optimizer state (stage 1), gradients (2) and weights (3). Imports DeepSpeed only if used."""

import copy
import math
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.collectives import collective
from lowmem.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Zero3Weight:
    """A weight sharded by ZeRO stage 3."""

    def __init__(self, parameter: nn.Parameter):
        self._parameter = parameter
        self.shape: torch.Size = parameter.ds_shape
        self.dtype: torch.dtype = parameter.dtype

    def numel(self) -> int:
        return self.shape.numel()

    def gather_to_host(self) -> Tensor:
        """Return an all-gathered copy on the host. Call it on every rank."""
        import deepspeed

        with collective("all-gathering a weight"), deepspeed.zero.GatheredParameters([self._parameter]):
            return self._parameter.detach().to("cpu", copy=True)


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
