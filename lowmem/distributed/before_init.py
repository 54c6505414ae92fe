"""What rank 0 finds out before the ranks are one group, known to all: in the memory of one process, not of each."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta

import torch.distributed as dist

from lowmem.distributed.rendezvous import Place, meet, open_store, place_of_this_rank
from lowmem.errors import RankError, UsageError

Found = Mapping[str, object]

_open: list[dist.Store] = []  # until the process ends: where rank 0 keeps the store, the group will meet in it


def found_by_first(find: Callable[[], Found], *, limit_seconds: float, start_seconds: float) -> Found:
    """What `find` returns on rank 0, as JSON has it, on every rank. Called by all of them, before `start_group`.

    A UsageError of `find` is raised on every rank; of another error the others raise a RankError. They wait for it
    `limit_seconds` at most, and for one another, as rank 0 for them, `start_seconds`: beyond that it is a RankError.
    """
    place, patience = place_of_this_rank(), timedelta(seconds=start_seconds)
    store = open_store(place, time.monotonic() + start_seconds, start_seconds)
    _open.append(store)
    if place.rank == 0:
        return _find_and_tell(find, store, place, patience)
    try:
        meeting = _meet(store, place, limit_seconds)
        store.wait([f"{meeting}/found"], patience)
        told = json.loads(store.get(f"{meeting}/found"))
        store.set(f"{meeting}/heard by {place.rank}", "")
    except dist.DistError as error:
        raise RankError(
            f"{place} did not hear at {place.address}:{place.port} what rank 0 was to find out: rank 0, or the "
            "launcher that keeps the store, has ended; look at its log"
        ) from error
    if "refused" in told:
        raise UsageError(told["refused"])
    if "failed" in told:
        raise RankError(f"rank 0 failed with {told['failed']}")
    return told["found"]


def _find_and_tell(find: Callable[[], Found], store: dist.Store, place: Place, patience: timedelta) -> Found:
    error, found = None, {}
    try:
        told = {"found": (found := find())}
    except UsageError as caught:
        error, told = caught, {"refused": str(caught)}
    except Exception as caught:
        error, told = caught, {"failed": f"{type(caught).__name__}: {caught}"}
    # an error is not hidden by one of those that were to hear it
    with suppress(RankError, dist.DistError) if error else nullcontext():
        meeting = _meet(store, place, patience.total_seconds())
        store.set(f"{meeting}/found", json.dumps(told))
        # this process may end now, and with it the store
        store.wait([f"{meeting}/heard by {rank}" for rank in range(1, place.world_size)], patience)
    if error:
        raise error
    return found


def _meet(store: dist.Store, place: Place, limit_seconds: float) -> str:
    # by keys of its own, so that who is slow to leave this meeting takes no part in the group's
    return meet(dist.PrefixStore("ahead", store), place, time.monotonic() + limit_seconds, limit_seconds)
