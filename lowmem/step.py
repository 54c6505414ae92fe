"""One optimizer step: accumulate the micro-batches' gradients, all-reduce them once, clip, update the weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.data.batch import Batch, UnreadableStep, check_batches
from lowmem.distributed.collectives import (
    gather_json,
    is_rehearsed,
    raise_error_of_any_rank,
    rank_and_world_size,
    sum_over_ranks,
)
from lowmem.distributed.heartbeat import at_step
from lowmem.distributed.placement import data_place, has_collectives, is_engine
from lowmem.errors import OutOfMemory, UsageError
from lowmem.memory.gradients import BeforeUpdate, Gradients
from lowmem.memory.out_of_memory import guarded
from lowmem.memory.precision import LossScale
from lowmem.model.metrics import LossFunction
from lowmem.optim.schedule import set_learning_rate


@dataclass
class TrainState:
    """Everything that a checkpoint needs so that the run resumes exactly."""

    model: nn.Module
    optimizer: Optimizer
    stream: Iterator[Sequence[Batch]] | None = None
    """What `open_stream` returns. A step calls its `advance()`; saving calls its `state_dict()`. None: the caller makes
    the batches of each step; if they are a function of `step`, a run that loads a checkpoint continues exactly."""
    step: int = 0
    """Optimizer steps done."""
    updates: int = 0
    """Steps that updated the weights; the other steps were skipped."""
    best: dict[str, float] | None = None
    """The best evaluation so far: {"step", "eval_loss"}."""
    evaluated_step: int = 0
    """The step of the last evaluation that `note_best` was called for."""
    evaluations_since_best: int = 0
    """The evaluations since then that were not better."""
    seed: int = 0
    """The seed of dropout (together with step, rank and micro-batch) and of the memory tiers' stochastic rounding."""
    loss_scale: LossScale | None = None
    """Set by the first step in fp16."""
    metric_names: Sequence[str] | None = None
    """Set by the first step: the names of the metrics that the loss function returns on any rank. Not saved."""

    def note_best(self, eval_loss: float | None) -> None:
        """Set `best` to this step if its loss is the lowest so far; None, NaN and infinity are not.

        A second call for one step, such as by a run that resumes from it, changes nothing.
        """
        is_finite = eval_loss is not None and math.isfinite(eval_loss)
        if is_finite and (self.best is None or eval_loss < self.best["eval_loss"]):
            self.best, self.evaluations_since_best = {"step": self.step, "eval_loss": eval_loss}, 0
        elif self.evaluated_step != self.step:
            self.evaluations_since_best += 1
        self.evaluated_step = self.step

    @property
    def is_best(self) -> bool:
        """Whether this step's evaluation is the best so far."""
        return self.best is not None and self.best["step"] == self.step


@dataclass(frozen=True)
class StepResult:
    """The result of one step. `loss` and `grad_norm` stay on the device; call `.item()`, which syncs, only to log."""

    loss: Tensor
    """Mean loss per target token over all micro-batches and ranks, fp32; weighted if batches have weights."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping."""
    num_tokens: Tensor
    """Target tokens over all micro-batches and ranks, int64, on the host."""
    denominator: float
    """What the summed loss is divided by: `num_tokens` or, if batches have weights, the sum of the targets' weights."""
    updated: bool
    """False if the update was skipped because the loss or gradient was not finite, or because there was no target."""
    reason: str = ""
    """Why the update was skipped, the same text on every rank."""
    preempted: bool = False
    """True on every rank if any rank passed `preempted=True`."""
    loss_scale: float | None = None
    """What the loss of this step was multiplied by for backward; None without fp16."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sum / count over all micro-batches and ranks of each metric that the loss function returns, fp32, on the device;
    NaN if nothing was counted."""


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    loss_fn: LossFunction,
    accelerator: Accelerator,
    *,
    learning_rate: float,
    max_grad_norm: float | None = None,
    nonfinite: str = "stop",
    preempted: bool = False,
    before_update: BeforeUpdate | None = None,
) -> StepResult:
    """Update `state` in place with the gradient of the mean loss over all targets of `batches` on all ranks.

    All losses are divided by one number, so any split of the same rows into micro-batches and ranks gives the same
    gradient, except for rounding and dropout. If loss or gradient is not finite, no rank updates weights (but `release`
    already has): every rank raises FloatingPointError if `nonfinite` is "stop", or only counts the step if it is
    "skip". In fp16, if the loss is finite but the gradient is not, and `state.loss_scale` is above 1, every rank halves
    the scale and only counts the step, whatever `nonfinite` is. A step without any target is only counted. If a rank
    cannot read its rows or fails in forward or backward, every rank raises that error, or StepTooLarge if memory ran
    out (see `fitting_step`). In a sharded model, with `release` or in the update, only the failing rank raises its
    error, or OutOfMemory. DDP may wrap `state.model`.
    `before_update(gradients)` is called on every rank, in a step with a target, with {parameter name: gradient}: summed
    over micro-batches and ranks, divided by the number of targets, not clipped and perhaps not finite; in fp32, or in
    the tier's bf16; of a sharded parameter, a DTensor. It changes them in place. `grad_norm` is the norm after it. A
    rank of a pipeline passes the gradients of its stage. All stages of a weight must change its gradient equally.
    Raises ValueError if `Gradients` does, and UsageError on every rank if ranks of a sharded model have different
    numbers of micro-batches, or ranks that share a model have different rows. Cost: two small host collectives, one
    gradient reduction, one device sync.
    """
    num_tokens, denominator, preempted = agree_to_start(state, batches, preempted)
    set_learning_rate(state.optimizer, learning_rate)
    scale = None
    if accelerator.mixed_precision == "fp16":
        state.loss_scale = state.loss_scale or LossScale()
        scale = state.loss_scale.value
    options = {"denominator": denominator, "seed": state.seed, "step": state.step, "loss_scale": scale or 1.0}
    options["metric_names"] = state.metric_names
    gradients = Gradients(state.model, state.optimizer, accelerator, **options)
    gradients.check(len(batches), max_grad_norm, nonfinite, before_update)
    try:
        options = {"together": gradients.can_be_dropped, "completed": gradients.completed()}
        with guarded("computing gradients", state.model, state.optimizer, **options):
            losses = gradients.accumulate(batches, loss_fn)
    except OutOfMemory:
        gradients.clear()
        raise
    loss = gradients.all_reduce(losses)
    state.metric_names = gradients.metrics.names
    if before_update and denominator:
        with guarded("running before_update", state.model, state.optimizer, together=False):
            gradients.change(before_update)
    grad_norm = gradients.norm()
    with guarded("updating weights", state.model, state.optimizer, together=False):
        updated = denominator > 0 and gradients.update(max_grad_norm, grad_norm, if_finite=loss + grad_norm)
    # the scale changes only gradients, so a loss that is not finite has another cause
    may_overflow = scale is not None and not updated and denominator > 0
    overflowed = may_overflow and loss.isfinite().item() and state.loss_scale.shrink()
    reason = ""
    if overflowed:
        reason = f"the gradient overflowed with a loss scale of {scale:g}, which is now halved"
    elif not updated:
        reason = why_no_update(loss, grad_norm, losses, batches, num_tokens, denominator)
    elif scale:
        state.loss_scale.grow()
    if reason and denominator and nonfinite == "stop" and not overflowed:
        gradients.clear()
        raise not_finite(state, reason, is_released=gradients.released is not None)
    gradients.clear()
    counted, metrics = (torch.tensor(num_tokens), denominator), gradients.metrics.means()
    return finish(state, StepResult(loss, grad_norm, *counted, updated, reason, preempted, scale, metrics))


def agree_to_start(state: TrainState, batches: Sequence[Batch], preempted: bool) -> tuple[int, float, bool]:
    """Return the number of targets in all ranks' `batches`, the denominator, and whether any rank is preempted.

    Runs one small collective before the first forward, so that every loss is divided by the same number. If a rank
    could not read its rows, every rank raises that rank's error. Raises UsageError if forward or backward runs
    collectives, and ranks have different numbers of micro-batches, or ranks that share a model have different rows.
    """
    at_step(state.step + 1)  # the number that metrics.jsonl and checkpoints give this step
    error = batches.error if isinstance(batches, UnreadableStep) else check_batches(batches)
    place, world_size = data_place(state.model), rank_and_world_size()[1]
    is_counted = error is None and place.is_counted
    counted = batches if is_counted else ()
    sums = sum(batch.num_targets for batch in counted), sum(batch.denominator for batch in counted)
    here = len(batches) if error is None else 0
    rows, share_rows = 0, place.size < world_size and not is_rehearsed()
    if share_rows and error is None:
        rows = crc32(repr([(batch.row_ids, batch.num_targets) for batch in batches]).encode())
    rows = rows, rows * is_counted
    sums = sum_over_ranks(*sums, here, here**2, *rows, error is not None, preempted, dtype=torch.float64)
    num_targets, denominator, micro_batches, squares, rows, counted_rows, num_failed, num_preempted = sums
    if num_failed:
        raise_error_of_any_rank(error)
    # the sum of squares is at its least only if all ranks have the same number
    are_equal = micro_batches**2 == squares * world_size
    if not are_equal and (has_collectives(state.model) or is_engine(state.model)):
        found = f"the ranks have {', '.join(map(str, gather_json(here)))} micro-batches"
        raise UsageError(f"ranks that share a model run the same forwards, but {found}: make equally many")
    if rows * place.size != counted_rows * world_size:
        found = "ranks that share a model (pp_size or tp_size) need the same rows, but have different ones"
        raise UsageError(f"{found}: pass **data_place(model).coordinates to open_stream")
    return int(num_targets), denominator, num_preempted > 0


def why_no_update(
    loss: Tensor,
    grad_norm: Tensor,
    losses: Sequence[Tensor],
    batches: Sequence[Batch],
    num_tokens: int,
    denominator: float,
) -> str:
    """Return why this step did not update the weights; the text is the same on every rank.

    If the loss or gradient is not finite, the text names ranks and rows, which needs more collectives and syncs. It
    names those of each micro-batch whose loss is not finite, or of all micro-batches if each loss is finite.
    """
    if not num_tokens:
        return "no rank has a target token"
    if not denominator:
        return "all target tokens have the weight 0"
    bad = [batch for batch_loss, batch in zip(losses, batches, strict=True) if not batch_loss.isfinite()]
    rows = sorted(row_id for batch in bad or batches for row_id in batch.row_ids)
    of_ranks = gather_json([len(bad), rows])
    has_bad_loss = any(num_bad for num_bad, _ in of_ranks)
    named = [(rank, rows) for rank, (num_bad, rows) in enumerate(of_ranks) if num_bad or not has_bad_loss]
    where = "the loss was not finite on" if has_bad_loss else "the loss of every micro-batch was finite:"
    ranks = ", ".join(f"rank {rank} with rows {rows}" for rank, rows in named)
    return f"loss {loss.item()}, gradient norm {grad_norm.item()}; {where} {ranks}"


def not_finite(state: TrainState, reason: str, *, is_released: bool = False) -> FloatingPointError:
    """Make the error for a loss or gradient that is not finite; `reason` is what `why_no_update` returned."""
    outcome, remedy = "Nothing was updated", "set nonfinite=skip"
    if is_released:
        outcome = "Released gradients have updated the weights already"
        remedy = "resume from the last checkpoint without release"
    return FloatingPointError(
        f"step {state.step + 1}: {reason}. {outcome}: lower the learning rate, inspect the rows, or {remedy}"
    )


def finish(state: TrainState, result: StepResult) -> StepResult:
    """Count the step, and advance the stream past its rows."""
    state.step += 1
    state.updates += result.updated
    if state.stream is not None:
        state.stream.advance()
    return result
