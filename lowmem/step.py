"""One optimizer step: the micro-batches' gradients summed, reduced over ranks once, clipped, applied."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowmem.data.batch import Batch, UnreadableStep
from lowmem.data.stream import Stream
from lowmem.distributed import zero
from lowmem.distributed.collectives import gather_bytes, raise_error_of_any_rank, report_failure, sum_over_ranks
from lowmem.distributed.dtensor import is_first_copy, local_of
from lowmem.distributed.heartbeat import at_step, phase
from lowmem.distributed.placement import data_place, failing, is_divided, is_engine, is_sharded
from lowmem.distributed.reduce import all_reduce_sum, gradient_norm
from lowmem.distributed.seeds import seed_of
from lowmem.errors import OutOfMemory, StepTooLarge
from lowmem.memory.out_of_memory import explain_out_of_memory
from lowmem.memory.release import Released
from lowmem.optim.tiers import TieredOptimizer

# autocast would keep a bf16 copy of every weight until the loss is taken; without recompute autograd keeps them anyway,
# with it each weight is cast once in forward and once in backward
_UNCACHED = AutocastKwargs(cache_enabled=False)

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass
class TrainState:
    """All that the next step depends on: if the process died and one of these were lost, the run would differ."""

    model: nn.Module
    optimizer: Optimizer
    stream: Stream | None = None
    step: int = 0
    """Optimizer steps done."""
    best: dict[str, float] | None = None
    """The best evaluation so far: {"step", "eval_loss"}."""
    seed: int = 0
    """Seeds dropout, together with step, rank and micro-batch, and the rounding of memory tiers."""

    def note_best(self, eval_loss: float | None) -> None:
        """Let `best` be this step if its loss is the lowest so far. None, or what is not finite, never is."""
        is_a_number = eval_loss is not None and math.isfinite(eval_loss)
        if is_a_number and (self.best is None or eval_loss < self.best["eval_loss"]):
            self.best = {"step": self.step, "eval_loss": eval_loss}


@dataclass(frozen=True)
class StepResult:
    """Scalars of one step, on the device: read them with `.item()`, and only when logging."""

    loss: Tensor
    """Mean over the target tokens of all micro-batches and ranks, fp32."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping."""
    num_tokens: Tensor
    """Target tokens over all micro-batches and ranks, int64, on the host."""
    updated: bool
    """False if the update was left out: loss or gradient not finite, or no target at all."""
    reason: str = ""
    """Why it was left out, the same on every rank."""
    preempted: bool = False
    """Some rank said so when this step began."""


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
) -> StepResult:
    """Update `state` in place with the gradient of the mean loss over all targets of `batches` on all ranks.

    The mean is one sum over one count, so any split of the same rows into micro-batches and ranks gives the same
    gradient. `model` may be bare (from `parallelize`) or wrapped by DDP; its own reduction is never used. A trainable
    parameter that no loss reached has a gradient of zero. If loss or gradient norm is not finite, all ranks see it
    alike before the update: with `nonfinite="stop"` they raise FloatingPointError, with "skip" they leave the update
    out. A step without any target updates nothing either. One host sync of our own a step, for that check. If a rank
    could not read its rows, or failed in forward or backward, all ranks raise what it tells and none updates: a
    StepTooLarge if it ran out of memory (`fitting_step` then tries smaller pieces).
    OutOfMemory is raised where that cannot be agreed on or taken back: of a model that is divided over ranks, within
    `release`, and in the update itself. Whether `preempted` is true on some rank all ranks learn by the result; the
    step itself is done as ever. Raises ValueError for an Accelerator in fp16, which needs loss scaling, or in any
    precision of its own beside a memory tier, and for an optimizer that accelerate has wrapped.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError("this Accelerator is in fp16, which needs loss scaling, not done here: use bf16 or no")
    optimizer = state.optimizer
    in_tier = isinstance(optimizer, TieredOptimizer)
    if isinstance(optimizer, AcceleratedOptimizer) or (in_tier and accelerator.mixed_precision != "no"):
        raise ValueError(
            "pass the optimizer as make_optimizer made it (accelerator.prepare hides its tier), and beside a tier an "
            f"Accelerator with mixed_precision no (this one: {accelerator.mixed_precision}), as its weights are bf16"
        )
    at_step(state.step + 1)  # as it will be counted when it is done, in metrics.jsonl and checkpoints
    place = data_place(state.model)
    # Known before the first backward, so that every micro-batch is scaled by the same number.
    num_tokens, preempted = _begun_by_all_ranks(batches, preempted, is_counted=place.is_counted)
    by_engine = is_engine(state.model)
    if not by_engine:  # which keeps buffers there
        optimizer.zero_grad()  # of a step that an exception ended
    released = Released.of(optimizer)
    if released is not None:
        released.begin(len(batches), max_grad_norm, nonfinite)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if by_engine:
        loss, grad_norm, reason = _by_engine(state, batches, loss_fn, accelerator, num_tokens)
        if reason and num_tokens and nonfinite == "stop":
            raise FloatingPointError(f"step {state.step + 1}: {reason}. {_advice(None)}")
        return _done(state, StepResult(loss, grad_norm, torch.tensor(num_tokens), not reason, reason, preempted))
    if in_tier:
        optimizer.seed = state.seed
    # copies of a sharded model add up the same sums, so they must round them alike; other ranks have their own
    key = (state.step,) if is_sharded(state.model) else (state.step, place.rank)
    is_final = released is not None or is_divided(state.model)
    too_large = explain_out_of_memory(OutOfMemory if is_final else StepTooLarge, state.model, optimizer)
    try:
        with phase("computing gradients"), failing(state.model), too_large:
            with optimizer.summing(len(batches), *key) if in_tier else nullcontext():
                pieces = batches if num_tokens else ()
                losses = _add_gradients(state, pieces, loss_fn, accelerator, num_tokens, place.rank)
            gradients = _gradients(state.model, released)
    except OutOfMemory:
        optimizer.zero_grad()
        raise

    loss = sum(losses, torch.zeros((), device=accelerator.device))
    if accelerator.num_processes > 1:
        # backward has summed those of a sharded model already
        all_reduce_sum([loss, *(() if is_sharded(state.model) else map(local_of, gradients))], place.group)
    divided = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norms = [gradient_norm(gradient) for gradient in gradients if not isinstance(gradient, DTensor)]
    norms += [*(released.norms if released else []), *([_norm(divided, accelerator)] if divided else [])]
    grad_norm = torch.linalg.vector_norm(torch.stack(norms))
    finite = torch.isfinite(loss + grad_norm).item()  # the step's one sync
    reason = "" if num_tokens else "no rank has a target token"
    if not finite:
        reason = _not_finite(loss, grad_norm, losses, batches)
        if nonfinite == "stop":
            optimizer.zero_grad()
            raise FloatingPointError(f"step {state.step + 1}: {reason}. {_advice(released)}")
    updated = not reason
    if updated:
        with phase("updating weights"), report_failure(), explain_out_of_memory(OutOfMemory, state.model, optimizer):
            if max_grad_norm:
                _clip(gradients, max_grad_norm, grad_norm)
            optimizer.step()
    optimizer.zero_grad()
    return _done(state, StepResult(loss, grad_norm, torch.tensor(num_tokens), updated, reason, preempted))


def _add_gradients(
    state: TrainState,
    batches: Sequence[Batch],
    loss_fn: LossFunction,
    accelerator: Accelerator,
    num_tokens: int,
    rank: int,
) -> list[Tensor]:
    """Each micro-batch's part of the mean loss, whose gradients are added up where the parameters have them."""
    losses: list[Tensor] = []
    for index, batch in enumerate(batches):
        # on all devices, so that dropout masks are a function of (seed, step, rank, micro-batch)
        torch.manual_seed(seed_of(state.seed, state.step, rank, index))
        with _without_reducer(state.model):
            with accelerator.autocast(_UNCACHED):
                batch_loss = loss_fn(state.model, batch.to(accelerator.device)) / num_tokens
            batch_loss.backward()
        losses.append(batch_loss.detach())
    return losses


def _done(state: TrainState, result: StepResult) -> StepResult:
    state.step += 1
    if state.stream is not None:
        state.stream.advance()
    return result


def _by_engine(
    state: TrainState, batches: Sequence[Batch], loss_fn: LossFunction, accelerator: Accelerator, num_tokens: int
) -> tuple[Tensor, Tensor, str]:
    """The loss of a step that DeepSpeed's engine reduces, clips and applies, its gradient norm, and why it did not."""
    engine, world_size = state.model, accelerator.num_processes
    losses: list[Tensor] = []
    loss, grad_norm = torch.zeros(2, device=accelerator.device).unbind()
    if not num_tokens:
        return loss, grad_norm, "no rank has a target token"
    told = explain_out_of_memory(OutOfMemory, engine, state.optimizer)
    with phase("computing gradients"), report_failure(), told:
        for index, batch in enumerate(batches):
            torch.manual_seed(seed_of(state.seed, state.step, accelerator.process_index, index))
            batch_loss = loss_fn(engine, batch.to(accelerator.device)) / num_tokens
            losses.append(batch_loss.detach())
            is_last = index == len(batches) - 1
            if is_last:
                loss = sum(losses)
                all_reduce_sum([loss] if world_size > 1 else [])
                # the engine leaves out an update whose gradient is not finite, so a loss that is not must reach it
                batch_loss = batch_loss * torch.where(loss.isfinite(), 1.0, math.nan)
            zero.backward(engine, batch_loss, world_size=world_size, is_last=is_last)
        grad_norm, updated = zero.update(engine)
    return loss, grad_norm, "" if updated else _not_finite(loss, grad_norm, losses, batches)


def _begun_by_all_ranks(batches: Sequence[Batch], preempted: bool, *, is_counted: bool) -> tuple[int, bool]:
    """Targets of all ranks, and whether one is preempted. One small collective, which also tells whether each rank
    could read its rows; if not, all raise why."""
    error = batches.error if isinstance(batches, UnreadableStep) else None
    num_targets = 0 if error or not is_counted else sum(batch.num_targets for batch in batches)
    num_targets, num_failed, num_preempted = sum_over_ranks(num_targets, error is not None, preempted)
    if num_failed:
        raise_error_of_any_rank(error)
    return num_targets, num_preempted > 0


def _without_reducer(model: nn.Module) -> AbstractContextManager[None]:
    """For a backward whose gradients no DDP wrapper sums over ranks."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _gradients(model: nn.Module, released: Released | None) -> list[Tensor]:
    """Gradients of all trainable parameters, less those used up already, in the same order on every rank."""
    used_up = released.parameters if released else ()
    trainable = [x for x in model.parameters() if x.requires_grad and x not in used_up]
    for parameter in trainable:
        if parameter.grad is None:  # another rank's rows may have reached it
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return [parameter.grad for parameter in trainable]


def _norm(divided: Sequence[DTensor], accelerator: Accelerator) -> Tensor:
    """Of gradients of which each rank has a part, fp32, the same on every rank. One small collective."""
    squares = torch.zeros((), device=accelerator.device)
    for gradient in filter(is_first_copy, divided):
        squares += gradient_norm(local_of(gradient)).square().to(squares.device)
    all_reduce_sum([squares])
    return squares.sqrt()


def _clip(gradients: Sequence[Tensor], max_grad_norm: float, grad_norm: Tensor) -> None:
    """As torch.nn.utils.clip_grads_with_norm_, which does not take whole and divided ones together."""
    factor = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    parts = [local_of(gradient) for gradient in gradients]
    torch._foreach_mul_(parts, factor.to(parts[0].device))


def _not_finite(loss: Tensor, grad_norm: Tensor, losses: Sequence[Tensor], batches: Sequence[Batch]) -> str:
    """Told alike on every rank: what was not finite, on which rank, and the rows of those micro-batches there.

    Collectives and syncs, which only a step pays that goes wrong.
    """
    bad = [batch for batch_loss, batch in zip(losses, batches, strict=True) if not batch_loss.isfinite()]
    rows = sorted(row_id for batch in bad or batches for row_id in batch.row_ids)
    of_ranks = [json.loads(told) for told in gather_bytes(json.dumps([len(bad), rows]).encode())]
    has_bad_loss = any(num_bad for num_bad, _ in of_ranks)
    told = [
        f"rank {rank} with rows {rows}" for rank, (num_bad, rows) in enumerate(of_ranks) if num_bad or not has_bad_loss
    ]
    where = "the loss was not finite on" if has_bad_loss else "the loss of every micro-batch was finite:"
    return f"loss {loss.item()}, gradient norm {grad_norm.item()}; {where} {', '.join(told)}"


def _advice(released: Released | None) -> str:
    outcome = "Nothing was updated" if released is None else "Released gradients have updated the weights already"
    remedy = "set nonfinite to skip" if released is None else "go on from the last checkpoint without release"
    return f"{outcome}: lower the learning rate, look at the rows, or {remedy}"
