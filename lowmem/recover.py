"""Retry a step that ran out of memory, with smaller micro-batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from accelerate import Accelerator

from lowmem.data.batch import Batch
from lowmem.errors import OutOfMemory, StepTooLarge
from lowmem.memory.out_of_memory import free_failed_step
from lowmem.model.metrics import LossFunction
from lowmem.step import StepResult, TrainState, train_step


class Halving(NamedTuple):
    """How micro-batches became smaller after a step ran out of memory; str() formats a log line."""

    step: int
    rank: int
    """The lowest rank that ran out of memory."""
    batch_size: int
    """Rows per micro-batch until now. Each step now has `micro_batches` micro-batches of at most `smaller` rows."""
    smaller: int
    micro_batches: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: rank {self.rank} ran out of memory with micro-batches of {self.batch_size} rows. Each "
            f"process continues with {self.micro_batches} micro-batches of at most {self.smaller} rows. The rows are "
            f"the same; so is the gradient, up to rounding and dropout. Set --batch_size={self.smaller} to avoid this"
        )


def fitting_step(
    state: TrainState,
    batches: Sequence[Batch],
    loss_fn: LossFunction,
    accelerator: Accelerator,
    *,
    tell: Callable[[Halving], object],
    **options,
) -> StepResult:
    """Run `train_step`. If forward or backward runs out of memory on any rank, retry with smaller micro-batches.

    `batches` must be what `state.stream` returned last. Before a retry, the stream halves its micro-batches and each
    rank calls `tell`; except for rounding and dropout, the gradient is the same. Raises OutOfMemory if it cannot retry.
    """
    while True:
        try:
            return train_step(state, batches, loss_fn, accelerator, **options)
        except StepTooLarge as error:
            stream, rank, too_large = state.stream, error.rank, str(error)
        if stream is None:
            why = "because TrainState.stream is None: make smaller batches, or more of them"
            raise OutOfMemory(f"{too_large}. The micro-batches cannot be split, {why}", rank)
        batch_size = stream.batch_size
        if not stream.halve():
            raise OutOfMemory(f"{too_large}. At batch_size={batch_size} micro-batches cannot be made smaller", rank)
        free_failed_step()
        tell(Halving(state.step + 1, rank, batch_size, stream.batch_size, stream.micro_batches))
        batches = next(stream)
