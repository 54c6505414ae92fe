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
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.placement import is_divided
from lowmem.errors import OutOfMemory
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
def explain_out_of_memory(kind: type[OutOfMemory], model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Within it, running out of memory raises `kind`: where, what filled memory as far as known, and what takes less.

    What the calls that failed held is let go, so that whoever catches it has that memory again; gradients stay.
    """
    told, outer = "", sys.exception()
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = _told(error)
        while error is not None and error is not outer:  # frames hold activations, also those of errors behind it
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
    if told:
        rank, _ = rank_and_world_size()
        told = f"rank {rank} ran out of memory at {heartbeat.place()} ({told}). {_filled(model, optimizer)}"
        raise kind(told, rank) from None


def give_back() -> None:
    """Free what is left of a failed step: queued nodes of autograd, cycles of references, the allocator's pieces."""
    # A backward that failed on CPU leaves the nodes that it had not come to, and through them whole graphs, in its
    # thread's queue until another backward drops them.
    (torch.zeros((), requires_grad=True) * 1).backward()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _told(error: Exception) -> str:
    """Its own words, without the page of advice behind them."""
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
