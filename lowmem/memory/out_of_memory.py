"""Memory is full: how that shows, what filled it, and what takes less."""

import gc
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed import heartbeat
from lowmem.distributed.collectives import raise_on_all_ranks, rank_and_world_size, report_failure
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.placement import is_divided
from lowmem.errors import OutOfMemory, StepTooLarge
from lowmem.optim.tiers import TieredOptimizer

# What torch, its libraries and the system call it, beside torch.OutOfMemoryError and MemoryError.
_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in told for words in _WORDS)


@contextmanager
def guarded(name: str, model: nn.Module, optimizer: Optimizer, *, together: bool) -> Iterator[None]:
    """Run a phase of a step: if it fails on one rank no rank goes on, and if memory ran out gradients are cleared.

    `together`: nothing is updated and no collective is met within it, so all ranks agree at its end, raise the same
    error, and could do the step again: StepTooLarge if a rank ran out of memory. Otherwise a rank that fails can agree
    with nobody: its heartbeat reports the error, and running out of memory is OutOfMemory.
    """
    errors = raise_on_all_ranks() if together else report_failure()
    try:
        with phase(name), errors, _explained(StepTooLarge if together else OutOfMemory, model, optimizer):
            yield
    except OutOfMemory:
        optimizer.zero_grad()
        raise


@contextmanager
def _explained(kind: type[OutOfMemory], model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Within it, running out of memory raises `kind`: where, what filled memory as far as known, and what takes less.

    What the failed calls held is freed first, so that whoever catches it has that memory again.
    """
    explanation, outer = "", sys.exception()
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        explanation = _reason(error)
        while error is not None and error is not outer:  # frames hold activations, also those of errors behind it
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
    if explanation:
        rank, _ = rank_and_world_size()
        at = f"rank {rank} ran out of memory at {heartbeat.place()} ({explanation})"
        raise kind(f"{at}. {_filled(model, optimizer)}", rank) from None


def give_back() -> None:
    """Free what is left of a failed step: queued nodes of autograd, cycles of references, the allocator's pieces."""
    # A backward that failed on CPU leaves the nodes that it had not come to, and through them whole graphs, in its
    # thread's queue until another backward drops them.
    (torch.zeros((), requires_grad=True) * 1).backward()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """What it says itself, without the page of advice behind it."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    return f"tried to allocate {asked[1]}" if asked else f"{type(error).__name__}: {str(error)[:200]}"


def _filled(model: nn.Module, optimizer: Optimizer) -> str:
    """What this rank holds, in bytes, and the flags that make it fewer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = (x for held in optimizer.state.values() for x in held.values() if isinstance(x, Tensor))
    memory = optimizer.memory if isinstance(optimizer, TieredOptimizer) else "off"
    held = {
        "weights": _num_bytes(model.parameters()),
        "optimizer state": _num_bytes(state),
        # exact sums those of several micro-batches in fp32
        "gradients": _num_bytes(trained) * (2 if memory == "exact" else 1),
    }
    known = ", ".join(f"{name} {num_bytes / 2**20:,.1f} MiB" for name, num_bytes in held.items())
    device = next(model.parameters()).device
    of_all = f" of {torch.cuda.mem_get_info(device)[1] / 2**20:,.0f} MiB" if device.type == "cuda" else ""
    _, world_size = rank_and_world_size()
    less = {
        "--recompute=full": not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "--loss=chunked": True,
        "--offload_activations=True": True,
        "a smaller --batch_size": True,
        "--memory=exact or lean (with --mixed_precision=bf16)": memory == "off",
        "--memory=lean": memory == "exact",
        "--sharding_strategy=FULL_SHARD": world_size > 1 and not is_divided(model),
    }
    helps = ", ".join(flag for flag, is_left in less.items() if is_left)
    return (
        f"It holds {known} at most; the rest{of_all} was activations, logits and temporaries. If they are not set yet, "
        f"these take less: {helps}"
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local_of(tensor.detach()).nbytes for tensor in tensors)
