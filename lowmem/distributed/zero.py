"""DeepSpeed's ZeRO: its engine around model and optimizer, and the parts of one step that it does itself.

The engine divides optimizer state (stage 1), gradients (2) and weights (3) over the ranks, and perhaps moves them to
the host. DeepSpeed is imported only where an engine is made.
"""

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
    """A weight that stage 3 has divided, in place of the whole one, which `whole` makes."""

    def __init__(self, parameter: nn.Parameter):
        self._parameter = parameter
        self.shape: torch.Size = parameter.ds_shape
        self.dtype: torch.dtype = parameter.dtype

    def numel(self) -> int:
        return self.shape.numel()

    def whole(self) -> Tensor:
        """A copy on the host. A collective: every rank calls it."""
        import deepspeed

        with collective("gathering a weight"), deepspeed.zero.GatheredParameters([self._parameter]):
            return self._parameter.detach().to("cpu", copy=True)


def as_whole(tensor: Tensor) -> Tensor | Divided:
    """The tensor itself, or what stands for the whole one if stage 3 has divided it."""
    return Divided(tensor) if hasattr(tensor, "ds_shape") else tensor


def make_accelerator(config: Mapping[str, object], *, on_cpu: bool, **options: object) -> "Accelerator":
    """An Accelerator that drives DeepSpeed as `config` says, a whole one, precision included.

    Raises UsageError for a config that DeepSpeed refuses.
    """
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
        # it would compile collectives over shared memory, for a minute and with a compiler; gloo has them
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # accelerate, told to use DeepSpeed and not the CPU, sees one process; told the CPU too it leaves DeepSpeed out
        PartialState(cpu=True)
    # DeepSpeed calls collectives by names that newer torch deprecates, in every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # what the launcher was told is in `config`, and the plugin takes no config beside it
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    plugin = DeepSpeedPlugin(hf_ds_config=dict(config), zero3_init_flag=False)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no", **options)
    unset_hf_deepspeed_config()  # or transformers would build and load models that are divided already
    return accelerator


def wrap(model: nn.Module, optimizer: Optimizer, accelerator: "Accelerator") -> nn.Module:
    """DeepSpeed's engine around both, with the weights of rank 0 on every device.

    `optimizer`, made over the weights as they are here, stays the one that steps; it then has ZeRO's parts of them.
    """
    import deepspeed

    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage == 3:
        if plugin.deepspeed_config["bf16"]["enabled"]:
            model.to(torch.bfloat16)  # as the engine does for other stages; of a divided one it leaves fp32 as it is
        # divides each weight as it comes to the device; the engine alone would first bring them all
        deepspeed.zero.Init(module=model, config_dict_or_path=plugin.deepspeed_config)
    engine, _ = accelerator.prepare(model, optimizer)
    return engine


def backward(engine: nn.Module, loss: Tensor, *, world_size: int, is_last: bool) -> None:
    """Add the gradient of `loss` to the step's, as a sum over ranks; the last one of a step is reduced at its end."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * world_size)  # it takes the mean over ranks


def update(engine: nn.Module) -> tuple[Tensor, bool]:
    """Clip, and update the weights unless the gradient is not finite. Returns its norm before, and whether it was."""
    engine.step()
    updated = engine.was_step_applied()
    norm = engine.get_global_grad_norm() if updated else math.nan  # it would be that of the step before
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device), updated
