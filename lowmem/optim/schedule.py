"""The length of a run, its learning rate as a function of the step, and the steps at which it evaluates or saves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lowmem.errors import UsageError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def set_learning_rate(optimizer: "Optimizer", learning_rate: float) -> None:
    """Set each group's learning rate: `learning_rate` times the group's "lr_scale", if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run, its learning rate at each step, and the steps at which it logs, evaluates or saves."""

    total_steps: int
    rows_per_step: int
    rows_per_epoch: float
    peak: float
    warmup_steps: int
    schedule: str
    options: Mapping[str, object]
    """See `learning_rate_at`."""

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
        options: Mapping[str, object],
        **shape: object,
    ) -> "Schedule":
        """Make the schedule of a run. Raises UsageError if its steps are fewer than those of warm-up and decay."""
        total_steps = max_steps or math.ceil(epochs * rows_per_epoch / rows_per_step)
        warmup_steps = math.ceil(total_steps * warmup_ratio) if warmup_ratio else warmup_steps or 0
        decay_steps = options.get("num_decay_steps", 0)
        if decay_steps and warmup_steps + decay_steps > total_steps:
            found = f"num_decay_steps={decay_steps} and {warmup_steps} steps of warm-up"
            raise UsageError(f"{found} are more than the {total_steps} steps of the run: lower them")
        rows = {"rows_per_step": rows_per_step, "rows_per_epoch": rows_per_epoch}
        return cls(total_steps=total_steps, warmup_steps=warmup_steps, options=options, **rows, **shape)

    def __call__(self, step: int) -> float:
        shape = {"peak": self.peak, "warmup_steps": self.warmup_steps, "schedule": self.schedule}
        return learning_rate_at(step, total_steps=self.total_steps, **shape, **self.options)

    def is_due(self, step: int, every: int | str) -> bool:
        """Return whether `step` is the last step or a multiple of `every`, or ("epoch") the first after an epoch."""
        if every == "epoch":
            is_due = self._epochs_at(step) > self._epochs_at(step - 1)
        else:
            is_due = step % every == 0
        return is_due or step == self.total_steps

    def num_due(self, step: int, every: int | str) -> int:
        """Return how many of the steps after `step` are due, or one more."""
        if every == "epoch":
            return self._epochs_at(self.total_steps) - self._epochs_at(step) + 1
        return math.ceil((self.total_steps - step) / every)

    def _epochs_at(self, step: int) -> int:
        return int(step * self.rows_per_step // self.rows_per_epoch)


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    peak: float,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    **options: object,
) -> float:
    """Return the learning rate of the update that follows `step` updates, like transformers' schedule of the same name.

    It rises from 0 to `peak` over `warmup_steps` (with "constant" too), then follows the schedule until `total_steps`.
    `options` are those of the schedule in transformers, such as `num_cycles`. Raises ValueError for an unknown schedule
    and TypeError for an option that it does not have.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown: use one of {', '.join(_SCHEDULES)}")
    if step < warmup_steps and schedule != "warmup_stable_decay":
        return peak * step / warmup_steps
    return peak * _SCHEDULES[schedule](_Point(step, total_steps, warmup_steps, peak), **options)


class _Point(NamedTuple):
    """A step of a run."""

    step: int
    total_steps: int
    warmup_steps: int
    peak: float

    @property
    def progress(self) -> float:
        """The fraction done of the steps after warm-up."""
        return min(1.0, (self.step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))


def _constant(at: _Point) -> float:
    return 1.0


def _linear(at: _Point) -> float:
    return 1.0 - at.progress


def _cosine(at: _Point) -> float:
    return _shape("cosine", at.progress)


def _cosine_with_restarts(at: _Point, *, num_cycles: int = 1) -> float:
    return _shape("cosine", num_cycles * at.progress % 1.0) if at.progress < 1.0 else 0.0


def _cosine_with_min_lr(
    at: _Point, *, min_lr: float | None = None, min_lr_rate: float = 0.0, num_cycles: float = 0.5
) -> float:
    least = min_lr_rate if min_lr is None else min_lr / at.peak
    return least + (1.0 - least) * _shape("cosine", 2.0 * num_cycles * at.progress)


def _polynomial(at: _Point, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    least = lr_end / at.peak
    return least + (1.0 - least) * (1.0 - at.progress) ** power


def _inverse_sqrt(at: _Point, *, timescale: float | None = None) -> float:
    timescale = timescale or at.warmup_steps or 10_000
    return 1.0 / math.sqrt((at.step - at.warmup_steps + timescale) / timescale)


def _warmup_stable_decay(
    at: _Point,
    *,
    num_decay_steps: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    after = at.step - (at.total_steps - num_decay_steps)
    if at.step < at.warmup_steps:
        factor = _shape(warmup_type, 1.0 - at.step / at.warmup_steps)
    elif after < 0:
        return 1.0
    elif after < num_decay_steps:
        factor = _shape(decay_type, after / num_decay_steps * (2.0 * num_cycles if decay_type == "cosine" else 1.0))
    else:
        factor = 0.0
    return min_lr_ratio + (1.0 - min_lr_ratio) * factor


def _shape(name: str, progress: float) -> float:
    """Return a value that falls from 1 to 0 as `progress` rises from 0 to 1."""
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if name == "1-sqrt" else progress)


_SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
