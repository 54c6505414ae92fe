"""`train_step` for a model wrapped in DeepSpeed's engine, which reduces, clips and applies gradients itself."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from lowmem.data.batch import Batch
from lowmem.distributed.reduce import all_reduce_sum
from lowmem.distributed.seeds import seed_of
from lowmem.distributed.zero import backward, update
from lowmem.errors import UsageError
from lowmem.memory.gradients import BeforeUpdate
from lowmem.memory.out_of_memory import guarded
from lowmem.model.metrics import LossFunction, MetricSums, loss_and_metrics
from lowmem.optim.schedule import set_learning_rate
from lowmem.step import StepResult, TrainState, agree_to_start, finish, not_finite, why_no_update


def deepspeed_step(
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
    """Update `state` in place as `train_step` does. `state.model` must come from `distributed.zero.wrap`.

    Ignores `max_grad_norm`, because the engine clips to the value in its own config. Where `train_step` raises
    StepTooLarge, this raises OutOfMemory, because the engine cannot repeat a step. Raises UsageError for
    `before_update`.
    """
    if before_update:
        raise UsageError("before_update needs the gradients, which DeepSpeed's engine keeps: remove one of the two")
    num_tokens, denominator, preempted = agree_to_start(state, batches, preempted)
    set_learning_rate(state.optimizer, learning_rate)
    loss, grad_norm = torch.zeros(2, device=accelerator.device).unbind()
    losses: list[torch.Tensor] = []
    metrics = MetricSums(accelerator.device, state.metric_names)
    with guarded("computing gradients", state.model, state.optimizer, together=False):
        for index, batch in enumerate(batches if denominator else ()):
            torch.manual_seed(seed_of(state.seed, state.step, accelerator.process_index, index))
            batch_loss, of_batch = loss_and_metrics(loss_fn, state.model, batch.to(accelerator.device))
            batch_loss = batch_loss / denominator
            metrics.add(of_batch)
            losses.append(batch_loss.detach())
            is_last = index == len(batches) - 1
            if is_last:
                loss = sum(losses)
                totals = metrics.totals()
                all_reduce_sum([loss, *totals] if accelerator.num_processes > 1 else [])
                # the engine checks only gradients: if the loss is not finite, NaN gradients make it skip the update
                batch_loss = batch_loss * torch.where(loss.isfinite(), 1.0, math.nan)
            backward(state.model, batch_loss, world_size=accelerator.num_processes, is_last=is_last)
        state.metric_names = metrics.names
        updated = False
        if denominator:
            grad_norm, updated = update(state.model)
        reason = "" if updated else why_no_update(loss, grad_norm, losses, batches, num_tokens, denominator)
    if reason and denominator and nonfinite == "stop":
        raise not_finite(state, reason)
    counted = (torch.tensor(num_tokens), denominator)
    return finish(state, StepResult(loss, grad_norm, *counted, not reason, reason, preempted, metrics=metrics.means()))
