"""Run the ranks of one gloo group as forks of an interpreter that has already imported torch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

from tests.forkserver import Forked
from tests.processes import PROGRAM, ROOT, ended, environment, finish, free_port, run_program


@contextmanager
def started_ranks(
    world_size: int, function: Callable[..., object], *arguments: object, stderr: int = subprocess.STDOUT
) -> Iterator[list[Forked]]:
    """Start the ranks of one group, which each call `function(*arguments)`; on exit, kill the ranks still running."""
    group = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": free_port()}
    ranks = []
    with ExitStack() as stack:
        for rank in range(world_size):
            variables = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            env = environment(MASTER_ADDR="localhost", **variables)
            process = Forked(function, *arguments, env=env, cwd=ROOT, stderr=stderr)
            ranks.append(stack.enter_context(ended(process)))
        yield ranks


def fork_ranks(world_size: int, function: Callable[..., object], *arguments: object, timeout: float = 300) -> list[int]:
    """Call `function(*arguments)` on each of `world_size` ranks, and wait at most `timeout` seconds for all of them.

    Returns the exit codes of the ranks (-N if signal N killed a rank), and prints the output of all ranks.
    """
    limit = monotonic() + timeout
    with started_ranks(world_size, function, *arguments) as ranks:
        try:
            return [process.wait(max(0.0, limit - monotonic())) for process in ranks]
        finally:
            for rank, process in enumerate(ranks):
                sys.stdout.write("".join(f"rank {rank}: {line}" for line in process.stdout))


def train_ranks(world_size: int, *flags: object, program: Path = PROGRAM) -> list[subprocess.CompletedProcess]:
    """Run `python train_low_mem.py ...` on every rank, as a launcher does."""
    with started_ranks(world_size, run_program, program, *flags, stderr=subprocess.PIPE) as ranks:
        return [finish(process) for process in ranks]
