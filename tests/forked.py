"""Ranks of one gloo group without the seconds that a fresh interpreter needs: forked from one that has torch loaded."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch

from tests.processes import free_port


def fork_ranks(world_size: int, function: Callable[..., None], *arguments: object, timeout: float = 120) -> list[int]:
    """Call `function` in `world_size` processes of one group. Returns their exit codes, below 0 for signals.

    What they say is on this process's own output.
    """
    context = multiprocessing.get_context("forkserver")  # which has no threads: to fork from pytest's process is unsafe
    context.set_forkserver_preload(["lowmem.train"])
    port = free_port()
    ranks = [
        context.Process(target=_call_as_rank, args=(rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    limit = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, limit - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join(30)
    assert not hung, f"ranks {hung} did not end within {timeout} s"
    return [process.exitcode for process in ranks]


def _call_as_rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Sequence) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()})
    os.environ["MASTER_ADDR"] = "localhost"
    function(*arguments)
