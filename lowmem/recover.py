"""A step that ran out of memory, again in smaller pieces."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from accelerate import Accelerator
from torch import nn

from lowmem.data.batch import Batch
from lowmem.distributed.placement import unwrapped
from lowmem.errors import OutOfMemory, StepTooLarge
from lowmem.memory.out_of_memory import give_back
from lowmem.step import LossFunction, StepResult, TrainState, train_step


class Halving(NamedTuple):
    """What was done about a step that ran out of memory. As text it is a line for a person."""

    step: int
    rank: int
    """The first one that ran out."""
    batch_size: int
    """Rows of the micro-batches that were too large."""
    smaller: int
    micro_batches: int
    changes_masks: bool

    def __str__(self) -> str:
        masks = "; dropout masks are others than without this" if self.changes_masks else ""
        return (
            f"step {self.step}: rank {self.rank} ran out of memory with micro-batches of {self.batch_size} rows. It is "
            f"done again, and all later ones, with {self.micro_batches} of at most {self.smaller} rows a process: the "
            f"same rows and gradient{masks}. --batch_size={self.smaller} begins so"
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
    """`train_step` with its `options`; if forward or backward runs out of memory on any rank, again in smaller pieces.

    `batches` must be what `state.stream` gave last. All ranks drop what they have of the step, the stream cuts its rows
    into micro-batches of half as many, for this step and all later ones, and `tell` is called on each rank, as often as
    that happens. Rows, position and, but for rounding, the gradient of the step stay; so do dropout masks not. Raises
    OutOfMemory, with nothing updated, if micro-batches cannot be made smaller, and what `train_step` raises.
    """
    while True:
        try:
            return train_step(state, batches, loss_fn, accelerator, **options)
        except StepTooLarge as error:
            stream, rank, too_large = state.stream, error.rank, str(error)
        if stream is None:
            raise OutOfMemory(f"{too_large}. There is no stream (TrainState.stream) to cut its rows anew", rank)
        batch_size = stream.batch_size
        if not stream.halve():
            raise OutOfMemory(f"{too_large}. At batch_size={batch_size} micro-batches cannot be made smaller", rank)
        give_back()
        has_dropout = _has_dropout(unwrapped(state.model))
        tell(Halving(state.step + 1, rank, batch_size, stream.batch_size, stream.micro_batches, has_dropout))
        batches = next(stream)


def _has_dropout(model: nn.Module) -> bool:
    """Whether a module says so, or the config of a transformers model, whose attention may draw masks by itself."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    of_config = (value for name, value in config.items() if "dropout" in name or name.endswith("pdrop"))
    of_modules = (module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    return any(isinstance(p, float) and p > 0 for p in (*of_config, *of_modules))
