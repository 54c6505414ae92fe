"""Run a function on rank 0 before the process group exists, and send its result to all ranks."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta

import torch.distributed as dist

from lowmem.distributed.rendezvous import Launch, launch_from_environment, open_store, rendezvous
from lowmem.errors import RankError, UsageError

Found = Mapping[str, object]

_open: list[dist.Store] = []  # keeps stores open until exit, because the process group later uses rank 0's store


def call_on_rank_0(find: Callable[[], Found], *, limit_seconds: float, start_seconds: float) -> Found:
    """Call `find` on rank 0 and return its result, sent as JSON, on every rank. Use this before `start_group`.

    If `find` raises UsageError, every rank raises it. Any other error is raised on rank 0, and RankError on the others.
    If `find` takes over `limit_seconds`, or ranks wait over `start_seconds` for each other, they raise RankError, or
    StartError if they cannot reach the store.
    """
    launch = launch_from_environment()
    store = open_store(launch, start_seconds)
    _open.append(store)
    # a separate key prefix, so that the process group's later rendezvous in this store does not mix with this one
    keys = dist.PrefixStore("ahead", store)
    if launch.rank == 0:
        return _find_and_send(find, keys, launch, start_seconds)
    try:
        name = rendezvous(keys, launch, limit_seconds)
        keys.wait([f"{name}/found"], timedelta(seconds=start_seconds))
        answer = json.loads(keys.get(f"{name}/found"))
        keys.set(f"{name}/heard by {launch.rank}", "")
    except dist.DistError as error:
        failed = f"{launch} waited at {launch.address}:{launch.port} and got no result from rank 0"
        raise RankError(f"{failed}: rank 0, or the launcher that hosts the store, has ended; see its log") from error
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
    # if `find` failed, ignore errors of the exchange, because the error of `find` is raised below
    with suppress(RankError, dist.DistError) if error else nullcontext():
        name = rendezvous(keys, launch, start_seconds)
        keys.set(f"{name}/found", json.dumps(answer))
        # wait until all ranks have read the result, because a store hosted here closes when this process exits
        heard = [f"{name}/heard by {rank}" for rank in range(1, launch.world_size)]
        keys.wait(heard, timedelta(seconds=start_seconds))
    if error:
        raise error
    return found
