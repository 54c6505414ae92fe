"""DeepSpeed's ZeRO, which shards optimizer state (stage 1), gradients (2) and weights (3). Imported only when used."""

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


class Divided:
    """A weight that stage 3 has sharded."""

    def __init__(self, parameter: nn.Parameter):
        self._parameter = parameter
        self.shape: torch.Size = parameter.ds_shape
        self.dtype: torch.dtype = parameter.dtype

    def numel(self) -> int:
        return self.shape.numel()

    def whole(self) -> Tensor:
        """A copy of the whole on the host. A collective: every rank calls it."""
        import deepspeed

        with collective("all-gathering a weight"), deepspeed.zero.GatheredParameters([self._parameter]):
            return self._parameter.detach().to("cpu", copy=True)


def make_accelerator(config: Mapping[str, object], *, on_cpu: bool, **options: object) -> "Accelerator":
    """An Accelerator that uses DeepSpeed with a whole `config`, precision included. Raises UsageError if it refuses."""
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
        # or it compiles collectives over shared memory for a minute, which gloo has
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # with DeepSpeed accelerate sees one process; with DeepSpeed and cpu=True it leaves DeepSpeed out
        PartialState(cpu=True)
    # DeepSpeed calls collectives by names that newer torch deprecates, in every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # the launcher's settings are in `config`, and the plugin refuses both
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(hf_ds_config=dict(config), zero3_init_flag=False)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", **options)
    unset_hf_deepspeed_config()  # or transformers would build and load sharded models
    return accelerator


def wrap(model: nn.Module, optimizer: Optimizer, accelerator: "Accelerator") -> nn.Module:
    """Return DeepSpeed's engine around both, with the weights of rank 0; `optimizer` steps ZeRO's parts of them."""
    import deepspeed

    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage == 3:
        if plugin.deepspeed_config["bf16"]["enabled"]:
            model.to(torch.bfloat16)  # as the engine does for other stages
        # shards each weight as it comes to the device; the engine alone would first move them all
        deepspeed.zero.Init(module=model, config_dict_or_path=plugin.deepspeed_config)
    engine, _ = accelerator.prepare(model, optimizer)
    return engine


def backward(engine: nn.Module, loss: Tensor, *, world_size: int, is_last: bool) -> None:
    """Add the gradient of `loss` to the step's, a sum over ranks; `is_last` reduces it."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * world_size)  # it takes the mean over ranks


def update(engine: nn.Module) -> tuple[Tensor, bool]:
    """Clip and update unless the gradient is not finite. Returns its norm before clipping, and whether it updated."""
    engine.step()
    updated = engine.was_step_applied()
    norm = engine.get_global_grad_norm() if updated else math.nan  # it would be that of the step before
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device), updated
