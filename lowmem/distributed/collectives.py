"""Ranks decide together. Everything here runs on the host and pickles nothing: integers and bytes in tensors."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from lowmem.distributed import heartbeat
from lowmem.errors import OutOfMemory, RankError, SaveError, StepTooLarge, UsageError

Result = TypeVar("Result")

# What every rank raises as it is; of any other error the ranks that did not have it raise a RankError.
_RAISED_ALIKE = {kind.__name__: kind for kind in (UsageError, SaveError)}


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Around a collective: this rank waits for the others at the phase `name`, "summing gradients".

    Raises RankError if the collective breaks, with step and phase, and the ranks that are silent or have failed.
    """
    with heartbeat.phase(name):
        try:
            yield
        except RuntimeError as error:  # torch's, of a connection that was closed or timed out
            raise _broken(heartbeat.suspects() or heartbeat.places(), error) from error


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among all; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)


def sum_over_ranks(*counts: int) -> list[int]:
    """The sum of each count over all ranks, on every rank. One small collective on the host."""
    if not _is_distributed():
        return list(counts)
    totals = torch.tensor(counts, dtype=torch.int64)
    with collective("agreeing"):
        dist.all_reduce(totals, group=host_group())
    return totals.tolist()


def any_rank(condition: object) -> bool:
    """Whether `condition` is true on any rank, on every rank. One small collective on the host."""
    return sum_over_ranks(bool(condition)) != [0]


def gather_bytes(payload: bytes) -> list[bytes]:
    """Every rank's payload, in the order of ranks, on every rank."""
    if not _is_distributed():
        return [payload]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with collective("hearing the other ranks"):
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=host_group())
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
        everyone = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everyone, mine, group=host_group())
    return [bytes(data[: int(size)].numpy()) for data, size in zip(everyone, sizes, strict=True)]


def on_main_rank(function: Callable[[], Result]) -> Result | None:
    """Run `function` on rank 0 while the others wait for it; its result on rank 0, None elsewhere.

    If it raises there, every rank raises: see `raise_error_of_any_rank`.
    """
    result, error = None, None
    is_main = not _is_distributed() or dist.get_rank() == 0
    with heartbeat.phase("working for all ranks" if is_main else "waiting for rank 0"):
        if is_main:
            try:
                result = function()
            except Exception as caught:
                error = caught
        _raise_any(error)
    return result


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Every rank enters it, and if one leaves it with an error, all do: see `raise_error_of_any_rank`.

    One small collective at its end, so within it there must be none that a failing rank would miss.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    (num_failed,) = sum_over_ranks(error is not None)
    if num_failed:
        raise_error_of_any_rank(error)


@contextmanager
def report_failure() -> Iterator[None]:
    """For what has collectives within, as a sharded model's forward: a rank that fails there can agree with nobody.

    Its heartbeat tells the others, which end a few seconds later with its error in their message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankError):  # which tells of the others already
            raise
        # torch's RuntimeError of a collective that broke looks like any other, so it is others that we look at
        may_be_broken = isinstance(error, RuntimeError) and not isinstance(error, OutOfMemory)
        if may_be_broken and (told := heartbeat.suspects()):
            raise _broken(told, error) from error
        heartbeat.failed(_named(error))
        raise


def raise_error_of_any_rank(error: Exception | None) -> NoReturn:
    """Called by every rank once all know that one of them failed: raise `error`, or, on a rank that had none, what
    the first failing one tells, as a UsageError or SaveError if it is one, else as a RankError. If each one that failed
    did so with StepTooLarge, all raise the first one's; beside another error it does not count."""
    _raise_any(error)
    raise AssertionError("raise_error_of_any_rank was called, but no rank has an error")


def watch_one_another(limit_seconds: float, on_abort: Callable[[str], None] | None = None) -> None:
    """Start a heartbeat, if there are several ranks: within `limit_seconds` a silent one ends all of them, by name.

    Called by every rank. When this rank is ended, its last words are given the message, which stderr has too.
    """
    if not _is_distributed():
        return
    address, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=max(60.0, limit_seconds))
    rank, is_server = dist.get_rank(), dist.get_rank() == 0
    # A store of our own: the group's goes when rank 0 leaves the group, and may keep what an earlier group wrote.
    store = on_main_rank(lambda: dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience))
    port = int(gather_bytes(str(store.port if is_server else 0).encode())[0])
    with raise_on_all_ranks():
        if is_server:
            for other in range(dist.get_world_size()):
                store.set(str(other), heartbeat.FIRST)  # or reading it would wait
        else:
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    heartbeat.start(
        store,
        address=f"{address}:{port}",
        rank=rank,
        world_size=dist.get_world_size(),
        limit_seconds=limit_seconds,
        is_over=lambda: not dist.is_initialized(),
        on_abort=on_abort,
    )


def _raise_any(error: Exception | None) -> None:
    told = None
    if isinstance(error, StepTooLarge):
        told = [StepTooLarge.__name__, str(error)]
    elif error is not None:
        told = [next((name for name, kind in _RAISED_ALIKE.items() if isinstance(error, kind)), None), _named(error)]
    gathered = map(json.loads, gather_bytes(json.dumps(told).encode()))
    failed = {rank: told for rank, told in enumerate(gathered) if told is not None}
    final = {rank: told for rank, told in failed.items() if told[0] != StepTooLarge.__name__}
    if failed and not final:
        rank, (_, message) = next(iter(failed.items()))
        raise StepTooLarge(message, rank)
    if error is not None and not isinstance(error, StepTooLarge):
        raise error
    for rank, (kind, message) in final.items():
        raise _RAISED_ALIKE.get(kind, RankError)(f"rank {rank} failed with {message}")


def _broken(told: str, error: RuntimeError) -> RankError:
    reason = re.split(r"\n|\. ", str(error))[0]
    return RankError(f"{heartbeat.place()}: {told or 'some rank has ended'} ({reason})")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _is_distributed() -> bool:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return dist.get_backend() != "fake"  # torch's group of one process, in which `rehearsal` counts a step of several


def host_group() -> dist.ProcessGroup:
    """The default group if it can reach host tensors, else one on gloo beside it."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


@cache
def _gloo_beside(_default_group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")  # a new one for each default group
