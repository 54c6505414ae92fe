"""A step that ran out of memory, again in smaller pieces."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from accelerate import Accelerator

from lowmem.data.batch import Batch
from lowmem.errors import OutOfMemory, StepTooLarge
from lowmem.memory.out_of_memory import give_back
from lowmem.step import LossFunction, StepResult, TrainState, train_step


class Halving(NamedTuple):
    """What was done about a step that ran out of memory; str() makes a line for a person."""

    step: int
    rank: int
    """The first rank that ran out."""
    batch_size: int
    """Rows of the micro-batches that were too large."""
    smaller: int
    micro_batches: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: rank {self.rank} ran out of memory with micro-batches of {self.batch_size} rows. "
            f"It and all later steps run with {self.micro_batches} of at most {self.smaller} rows a process: the same "
            f"rows and, but for dropout, the same gradient. Set --batch_size={self.smaller} to start so"
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
    """Run `train_step` with its `options`; if forward or backward runs out of memory on any rank, in smaller pieces.

    `batches` must be the last ones of `state.stream`, which then halves its micro-batches; `tell` runs on each rank.
    Rows, position and, but for rounding and dropout, the gradient stay. Raises OutOfMemory if one row is too large.
    """
    while True:
        try:
            return train_step(state, batches, loss_fn, accelerator, **options)
        except StepTooLarge as error:
            stream, rank, too_large = state.stream, error.rank, str(error)
        if stream is None:
            raise OutOfMemory(f"{too_large}. Without TrainState.stream its rows cannot be split", rank)
        batch_size = stream.batch_size
        if not stream.halve():
            raise OutOfMemory(f"{too_large}. At batch_size={batch_size} micro-batches cannot be made smaller", rank)
        give_back()
        tell(Halving(state.step + 1, rank, batch_size, stream.batch_size, stream.micro_batches))
        batches = next(stream)
