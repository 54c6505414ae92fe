"""Mixed precision: torch's autocast, and the loss scale that keeps fp16's gradients in its range."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lowmem.config.groups import AUTOCAST_DTYPES

_MOST = 2.0**24  # so that the scaled loss is finite in fp32
_GROWTH_STEPS = 2000


@dataclass
class LossScale:
    """What the loss is multiplied by before backward in fp16, whose smallest number is 6e-8 (Micikevicius et al. 2018).

    It is a power of two, so that scaling back is exact.
    """

    value: float = 2.0**16
    finite_steps: int = 0
    """Updates since the value last changed."""

    def grow(self) -> None:
        """Count an update; after 2,000 of them, double the value."""
        self.finite_steps += 1
        if self.finite_steps >= _GROWTH_STEPS:
            self.value, self.finite_steps = min(2 * self.value, _MOST), 0

    def shrink(self) -> bool:
        """Halve the value after gradients that are not finite; return False if it is 1 already."""
        can_shrink = self.value > 1
        self.value, self.finite_steps = max(1.0, self.value / 2), 0
        return can_shrink


def autocast(accelerator: Accelerator, *, cached: bool = False) -> AbstractContextManager[None]:
    """Enter torch's autocast if `accelerator` has mixed precision.

    With `cached`, it holds a copy of every weight until the block ends. Without, activation checkpointing keeps no
    copies and casts weights again in backward; without checkpointing, autograd keeps the copies.
    """
    # `accelerator.autocast()` does nothing in fp16 on a CPU. With AutocastKwargs, it also clears os.environ for a
    # moment: a tokenizer that reads the environment in another thread at that moment crashes the process
    if accelerator.mixed_precision == "no":
        return nullcontext()
    dtype = getattr(torch, AUTOCAST_DTYPES[accelerator.mixed_precision])
    return torch.autocast(accelerator.device.type, dtype, cache_enabled=cached)
