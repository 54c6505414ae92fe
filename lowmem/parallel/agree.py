"""Ranks decide together. Everything here runs on the host and pickles nothing: integers and bytes in tensors."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from lowmem.config import RankError, UsageError

Result = TypeVar("Result")


def sum_over_ranks(*counts: int) -> list[int]:
    """The sum of each count over all ranks, on every rank. One small collective on the host."""
    if not _is_distributed():
        return list(counts)
    totals = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(totals, group=_host_group())
    return totals.tolist()


def gather_bytes(payload: bytes) -> list[bytes]:
    """Every rank's payload, in the order of ranks, on every rank."""
    if not _is_distributed():
        return [payload]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(payload)]), group=_host_group())
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyone, mine, group=_host_group())
    return [bytes(data[: int(size)].numpy()) for data, size in zip(everyone, sizes, strict=True)]


def on_main_rank(function: Callable[[], Result]) -> Result | None:
    """Run `function` on rank 0 while the others wait for it; its result on rank 0, None elsewhere.

    If it raises there, every rank raises: the others a UsageError or a RankError that carries rank 0's message.
    """
    result, error = None, None
    if not _is_distributed() or dist.get_rank() == 0:
        try:
            result = function()
        except Exception as caught:
            error = caught
    _raise_any(error)
    return result


@contextmanager
def failing_together() -> Iterator[None]:
    """Every rank enters it, and if one leaves it with an error, all do: see `raise_together`.

    One small collective at its end, so within it there must be none that a failing rank would miss.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    (num_failed,) = sum_over_ranks(error is not None)
    if num_failed:
        raise_together(error)


def raise_together(error: Exception | None) -> NoReturn:
    """Called by every rank once all know that one of them failed: raise `error`, or, on a rank that had none, what
    the first failing one tells, as a UsageError or a RankError."""
    _raise_any(error)
    raise AssertionError("raise_together was called, but no rank has an error")


def _raise_any(error: Exception | None) -> None:
    told = error and [isinstance(error, UsageError), f"{type(error).__name__}: {error}"]
    told = [json.loads(message) for message in gather_bytes(json.dumps(told).encode())]
    if error is not None:
        raise error
    for rank, failed in enumerate(told):
        if failed is not None:
            is_usage_error, message = failed
            raise (UsageError if is_usage_error else RankError)(f"rank {rank} failed with {message}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _host_group() -> dist.ProcessGroup:
    """The default group if it can reach host tensors, else one on gloo beside it."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


@cache
def _gloo_beside(_default_group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")  # a new one for each default group
