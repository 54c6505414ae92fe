"""If memory runs out, report what used the memory and which settings need less, and free memory."""

import gc
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed import heartbeat
from lowmem.distributed.collectives import raise_on_all_ranks, rank_and_world_size, report_failure
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.placement import has_collectives
from lowmem.errors import OutOfMemory, StepTooLarge, is_out_of_memory


@contextmanager
def guarded(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    together: bool,
    completed: AbstractContextManager[None] | None = None,
) -> Iterator[None]:
    """Run a phase of a step. If it fails on one rank, every rank stops.

    Use `together` for a phase without update whose collectives `completed` completes on a failing rank, after memory
    has been freed: all ranks raise an error at the end of the phase, StepTooLarge if memory ran out. Without
    `together`, the failing rank reports its error by heartbeat, and raises it, or OutOfMemory if memory ran out.
    """
    errors = raise_on_all_ranks() if together else report_failure()
    explained = _explained(StepTooLarge if together else OutOfMemory, model, optimizer)
    with phase(name), errors, completed or nullcontext(), explained:
        yield


@contextmanager
def _explained(kind: type[OutOfMemory], model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """If memory runs out, free what the failed calls held, and raise `kind` with the memory use and advice."""
    explanation, outer = "", sys.exception()
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        explanation = f"tried to allocate {size[1]}" if size else f"{type(error).__name__}: {str(error)[:200]}"
        while error is not None and error is not outer:  # the frames of an error and of its causes hold activations
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
    if explanation:
        rank, _ = rank_and_world_size()
        at = f"rank {rank} ran out of memory at {heartbeat.status()} ({explanation})"
        raise kind(f"{at}. {_memory_use(model, optimizer)}", rank) from None


def free_failed_step() -> None:
    """Free what a failed step still holds: queued autograd nodes, reference cycles, the allocator's cache."""
    # after a failed backward on CPU, autograd's queue keeps nodes, and so their graphs, until the next backward
    (torch.zeros((), requires_grad=True) * 1).backward()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_use(model: nn.Module, optimizer: Optimizer) -> str:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = (x for held in optimizer.state.values() for x in held.values() if isinstance(x, Tensor))
    memory = getattr(optimizer, "memory", "off")
    held = {"weights": _num_bytes(model.parameters()), "optimizer state": _num_bytes(state)}
    held["gradients"] = _num_bytes(trained) * (2 if memory == "exact" else 1)  # "exact" sums bf16 gradients in fp32
    known = ", ".join(f"{name} {num_bytes / 2**20:,.1f} MiB" for name, num_bytes in held.items())
    device = next(model.parameters()).device
    of_all = f" of {torch.cuda.mem_get_info(device)[1] / 2**20:,.0f} MiB" if device.type == "cuda" else ""
    rank, world_size = rank_and_world_size()
    less = {
        "--recompute=full": not (
            hasattr(optimizer, "layered") or any(getattr(x, "gradient_checkpointing", False) for x in model.modules())
        ),
        "--loss=chunked": True,
        "--offload_activations=True": True,
        "a smaller --batch_size": True,
        "--memory=exact or lean (with --mixed_precision=bf16)": memory == "off",
        "--memory=lean": memory == "exact",
        "--sharding_strategy=FULL_SHARD": world_size > 1 and not has_collectives(model),
        "--offload_weights=host or a folder": world_size == 1 and memory != "off" and offloaded_of(model) is None,
    }
    helps = ", ".join(flag for flag, is_left in less.items() if is_left)
    rest = f"activations, logits and temporaries used the rest{of_all}"
    return f"Rank {rank} holds at most {known}; {rest}. Settings that use less memory, if not set yet: {helps}"


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    local = [local_of(tensor.detach()) for tensor in tensors]
    return sum(x.nbytes for x in local if 0 not in x.stride() or not x.numel())  # offloaded weights expand one element
