"""Small collectives on the host, by which ranks share values and errors. They send integers and bytes, not pickles."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from lowmem.distributed import heartbeat
from lowmem.errors import LostFolderError, OutOfMemory, RankError, SaveError, StepTooLarge, StoreError, UsageError

Result = TypeVar("Result")

# If one rank raises one of these (or StepTooLarge), the others raise the first class that fits; else RankError.
_RAISED_ON_ALL = {kind.__name__: kind for kind in (LostFolderError, UsageError, SaveError, StoreError)}


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Run a collective as heartbeat phase `name`. If it breaks, raise RankError naming the silent or failed ranks."""
    with heartbeat.phase(name):
        try:
            yield
        except RuntimeError as error:  # torch raises RuntimeError when a connection is closed or times out
            raise _broken(heartbeat.suspects() or heartbeat.all_statuses(), error) from error


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)


def sum_over_ranks(*counts: float, dtype: torch.dtype = torch.int64) -> list[float]:
    """Return the sum of each count over all ranks, on every rank. Runs one small collective on the host.

    `dtype` is int64 or float64, and must be the same on all ranks. The sums are Python's int or float accordingly.
    """
    if not _is_distributed():
        return list(map(float if dtype.is_floating_point else int, counts))
    totals = torch.tensor(counts, dtype=dtype)
    with collective("all-reducing"):
        dist.all_reduce(totals, group=host_group())
    return totals.tolist()


def any_rank(condition: object) -> bool:
    """Return on every rank whether `condition` is true on at least one. Runs one small collective on the host."""
    return sum_over_ranks(bool(condition)) != [0]


def gather_bytes(payload: bytes) -> list[bytes]:
    """Return the payloads of all ranks, in rank order, on every rank."""
    if not _is_distributed():
        return [payload]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with collective("exchanging messages"):
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=host_group())
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
        everyone = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(everyone, mine, group=host_group())
    return [bytes(data[: int(size)].numpy()) for data, size in zip(everyone, sizes, strict=True)]


def gather_json(value: object) -> list:
    """Return the values of all ranks, sent as JSON, in rank order, on every rank."""
    return [json.loads(payload) for payload in gather_bytes(json.dumps(value).encode())]


def on_main_rank(function: Callable[[], Result]) -> Result | None:
    """Run `function` on rank 0 only. Returns its result on rank 0, None on others. If it raises, every rank raises."""
    rank, _ = rank_and_world_size()
    with heartbeat.phase("waiting for rank 0" if rank else "working on rank 0 only"), raise_on_all_ranks():
        return function() if rank == 0 else None


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If an error leaves this block on any rank, every rank raises (see `raise_error_of_any_rank`).

    Leaving the block runs a small collective. The block itself must run none, because a failing rank would skip it.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if any_rank(error is not None):
        raise_error_of_any_rank(error)


@contextmanager
def report_failure() -> Iterator[None]:
    """If a block with collectives fails on this rank, report the error by heartbeat, so that the other ranks exit."""
    try:
        yield
    except RankError:  # the error already names the rank that failed
        raise
    except Exception as error:
        # torch raises RuntimeError for a broken collective, so check whether another rank is the cause
        may_be_broken = isinstance(error, RuntimeError) and not isinstance(error, OutOfMemory)
        if may_be_broken and (suspects := heartbeat.suspects()):
            raise _broken(suspects, error) from error
        heartbeat.report_end(_named(error))
        raise


def raise_error_of_any_rank(error: Exception | None) -> None:
    """If any rank passes an error, every rank raises: its own error, else a copy of the lowest failed rank's error.

    A copy is of a class in _RAISED_ON_ALL if the original is, else a RankError. StepTooLarge is raised only if no rank
    has any other error.
    """
    mine = None
    if isinstance(error, StepTooLarge):
        mine = [StepTooLarge.__name__, str(error)]
    elif error is not None:
        mine = [next((name for name, kind in _RAISED_ON_ALL.items() if isinstance(error, kind)), None), _named(error)]
    failed = {rank: found for rank, found in enumerate(gather_json(mine)) if found is not None}
    final = {rank: found for rank, found in failed.items() if found[0] != StepTooLarge.__name__}
    if failed and not final:
        rank, (_, message) = next(iter(failed.items()))
        raise StepTooLarge(message, rank)
    if error is not None and not isinstance(error, StepTooLarge):
        raise error
    for rank, (kind, message) in final.items():
        raise _RAISED_ON_ALL.get(kind, RankError)(f"rank {rank} failed with {message}")


def start_heartbeats(limit_seconds: float, on_abort: heartbeat.OnAbort = None) -> None:
    """Start heartbeats. If a rank is silent for `limit_seconds`, the others name it, call `on_abort` and exit."""
    if not _is_distributed():
        return
    rank, world_size = rank_and_world_size()
    address, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=max(60.0, limit_seconds))
    # Use a separate store, because the group's store closes when rank 0 leaves the group, and may have outdated keys.
    store = on_main_rank(lambda: dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience))
    port, *_ = gather_json(store.port if rank == 0 else None)
    with raise_on_all_ranks():
        if rank == 0:
            for other in range(world_size):
                store.set(str(other), heartbeat.FIRST)  # reading a key that was never set would block
        else:
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    heartbeat.start(store, f"{address}:{port}", rank, world_size, limit_seconds=limit_seconds, on_abort=on_abort)


def _broken(suspects: str, error: RuntimeError) -> RankError:
    reason = re.split(r"\n|\. ", str(error))[0]
    return RankError(f"{heartbeat.status()}: {suspects or 'a rank has ended'} ({reason})")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def is_rehearsed() -> bool:
    """Whether this one process simulates all ranks (see `lowmem.plan.rehearsal`): the backend is "fake"."""
    return dist.is_initialized() and dist.get_backend() == "fake"


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1 and not is_rehearsed()


def host_group() -> dist.ProcessGroup:
    """Return the default group if its backend is gloo, else a gloo group of all ranks."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else _gloo_group(dist.group.WORLD)


@cache
def _gloo_group(_default_group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")  # cached, so that there is one gloo group per default group
