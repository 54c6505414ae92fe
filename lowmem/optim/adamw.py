"""AdamW (Loshchilov and Hutter, 2019) for the memory tiers, defined in tensor operations that round once each.

This file, `formats.py` and `philox.py` are the definition and the fallback. The kernels for CPU and CUDA give the same
bits in one pass over memory. No operation here is fused (as in a * b + c with one rounding), because not every device
and instruction set has one; so the bits are not those of torch's AdamW, which fuses some, depending on the device.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lowmem.optim.formats import read, write
from lowmem.optim.philox import Origin, random_halves, shuffled

DEFINITION = 2
"""Number of the definition of the tiers' bits, which checkpoints record. 1 used torch's AdamW and its generators."""


class Numbers(NamedTuple):
    """The numbers of one parameter's update, each rounded to fp32 where it is used."""

    decay: float
    """1 - lr * weight_decay."""
    beta1_rest: float
    """1 - beta1."""
    beta2: float
    beta2_rest: float
    """1 - beta2."""
    step_size: float
    """lr / (1 - beta1**step)."""
    inverse_bias: float
    """1 / sqrt(1 - beta2**step)."""
    eps: float

    @classmethod
    def of(
        cls, step: int, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, **_: object
    ) -> "Numbers":
        """Return the numbers of the update `step`, which counts from 1; other options of a group are ignored."""
        beta1, beta2 = betas
        step_size, inverse_bias = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        return cls(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, inverse_bias, eps)


class Update(NamedTuple):
    """The update of one parameter, or of a rank's part of it."""

    tensors: dict[str, Tensor]
    """"weight", "exp_avg" and "exp_avg_sq" in their formats, as matrices."""
    gradient: Tensor
    """bf16 or fp32, (rows, columns), contiguous."""
    numbers: Numbers
    key: int
    """The key of the random bits, 64 bits."""
    origin: Origin


def is_rounded(tensors: dict[str, Tensor]) -> bool:
    """Whether the weight or a moment is rounded stochastically."""
    return "weight_low" not in tensors or tensors["exp_avg"].itemsize < 4


def adamw(update: Update, slices: Iterable[slice], clip_factor: Tensor | None) -> None:
    """Update weight and moments, some rows at a time. `clip_factor`, an fp32 scalar, multiplies the gradient."""
    for rows in slices:
        weight, exp_avg, exp_avg_sq = (read(update.tensors, name, rows) for name in ("weight", "exp_avg", "exp_avg_sq"))
        gradient = update.gradient[rows].float()
        _adamw(weight, gradient if clip_factor is None else gradient * clip_factor, exp_avg, exp_avg_sq, update.numbers)
        random = other = None
        if is_rounded(update.tensors):
            random = random_halves(update.key, update.origin, rows, weight.shape[1], weight.device)
            # use other bits: the update divides the first moment by the second, so their errors must not correlate
            other = shuffled(random)
        write(update.tensors, "weight", rows, weight, random)
        write(update.tensors, "exp_avg_sq", rows, exp_avg_sq, random)
        write(update.tensors, "exp_avg", rows, exp_avg, other)


def _adamw(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Numbers) -> None:
    """Update fp32 tensors in place.

    weight = weight * decay
    exp_avg = exp_avg + (gradient - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + gradient * gradient * (1 - beta2)
    weight = weight - exp_avg * step_size / (sqrt(exp_avg_sq) * inverse_bias + eps)
    """
    weight.mul_(numbers.decay)
    exp_avg.add_((gradient - exp_avg).mul_(numbers.beta1_rest))
    exp_avg_sq.mul_(numbers.beta2).add_((gradient * gradient).mul_(numbers.beta2_rest))
    root = exp_avg_sq.double().sqrt_().float()  # in fp32, torch's CPU kernel does not always round to nearest
    denominator = root.mul_(numbers.inverse_bias).add_(numbers.eps)
    weight.sub_((exp_avg * numbers.step_size).div_(denominator))
