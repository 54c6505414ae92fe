"""Run a function on rank 0 before the process group exists, and send its result to all ranks."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta

import torch.distributed as dist

from lowmem.distributed.rendezvous import Launch, launch_from_environment, meet, open_store
from lowmem.errors import RankError, UsageError

Found = Mapping[str, object]

_open: list[dist.Store] = []  # until the process ends: if rank 0 keeps the store, the group's rendezvous is in it


def found_by_first(find: Callable[[], Found], *, limit_seconds: float, start_seconds: float) -> Found:
    """Return on every rank, before `start_group`, what `find` returns on rank 0, passed as JSON.

    If `find` raises UsageError, every rank does; else the others raise RankError, as they do after `limit_seconds` of
    `find`, or `start_seconds` of waiting for one another.
    """
    launch = launch_from_environment()
    store = open_store(launch, start_seconds)
    _open.append(store)
    # keys of its own: a rank that is slow to leave this meeting takes no part in the group's
    keys = dist.PrefixStore("ahead", store)
    if launch.rank == 0:
        return _find_and_send(find, keys, launch, start_seconds)
    try:
        meeting = meet(keys, launch, limit_seconds)
        keys.wait([f"{meeting}/found"], timedelta(seconds=start_seconds))
        answer = json.loads(keys.get(f"{meeting}/found"))
        keys.set(f"{meeting}/heard by {launch.rank}", "")
    except dist.DistError as error:
        missed = f"{launch} did not get at {launch.address}:{launch.port} what rank 0 was to find out"
        raise RankError(f"{missed}: rank 0, or the launcher that keeps the store, has ended; see its log") from error
    if "refused" in answer:
        raise UsageError(answer["refused"])
    if "failed" in answer:
        raise RankError(f"rank 0 failed with {answer['failed']}")
    return answer["found"]


def _find_and_send(find: Callable[[], Found], keys: dist.Store, launch: Launch, start_seconds: float) -> Found:
    error, found = None, {}
    try:
        answer = {"found": (found := find())}
    except UsageError as caught:
        error, answer = caught, {"refused": str(caught)}
    except Exception as caught:
        error, answer = caught, {"failed": f"{type(caught).__name__}: {caught}"}
    # an error of the other ranks must not hide that of `find`
    with suppress(RankError, dist.DistError) if error else nullcontext():
        meeting = meet(keys, launch, start_seconds)
        keys.set(f"{meeting}/found", json.dumps(answer))
        # wait for them, as this process may end now, and with it the store
        heard = [f"{meeting}/heard by {rank}" for rank in range(1, launch.world_size)]
        keys.wait(heard, timedelta(seconds=start_seconds))
    if error:
        raise error
    return found
