"""The length of a run, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run, its learning rate at each step, and the steps at which it logs, evaluates or saves."""

    total_steps: int
    peak: float
    warmup_steps: int
    schedule: str
    """cosine, linear or constant: see `learning_rate_at`."""

    @classmethod
    def of_run(
        cls,
        rows_per_epoch: float,
        rows_per_step: int,
        *,
        epochs: float | None,
        max_steps: int | None,
        warmup_ratio: float | None,
        warmup_steps: int | None,
        **shape: object,
    ) -> "Schedule":
        total_steps = max_steps or math.ceil(epochs * rows_per_epoch / rows_per_step)
        warmup_steps = math.ceil(total_steps * warmup_ratio) if warmup_ratio else warmup_steps or 0
        return cls(total_steps=total_steps, warmup_steps=warmup_steps, **shape)

    def __call__(self, step: int) -> float:
        return learning_rate_at(step, **vars(self))

    def is_due(self, step: int, every: int) -> bool:
        """Return whether `step` is the last step or a multiple of `every`."""
        return step == self.total_steps or step % every == 0

    def num_due(self, step: int, every: int) -> int:
        return math.ceil((self.total_steps - step) / every)


def learning_rate_at(
    step: int, *, total_steps: int, peak: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """Return the learning rate of the update that follows `step` updates, like transformers' schedule of the same name.

    It rises linearly from 0 to `peak` over `warmup_steps`. Then it falls to 0 at `total_steps` ("constant": it stays).
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
    raise ValueError(f"schedule {schedule!r} is unknown: use cosine, linear or constant")
