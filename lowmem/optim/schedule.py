"""The learning rate as a function of the step."""

import math


def learning_rate_at(
    step: int, *, total_steps: int, peak: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of the update after `step` finished ones, as transformers' schedules of the same name.

    Linear from 0 to `peak` over `warmup_steps`; then "cosine" or "linear" to 0 at `total_steps`, or "constant".
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    remaining = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining)))
    if schedule == "linear":
        return peak * remaining
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule {schedule!r} was asked for, there are cosine, linear and constant: choose one")
