"""Real processes for tests: ranks of one gloo group, command lines, free ports; every wait has a limit."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher would set, at one thread, with this checkout importable."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    kept = {k: v for k, v in kept.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_OFFLINE": "1"} | changes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def started(*command: object, cwd: Path = ROOT, **changes: str) -> Iterator[subprocess.Popen]:
    """A command that runs, from the project's root, until `finish`; what is left of its processes then is killed."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        left = children(process) if process.poll() is None else []  # a launcher's are in sessions of their own
        end_group(process)
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.stdout.close()
        process.stderr.close()


def finish(process: subprocess.Popen, timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for its end; returns it with its output as text."""
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(*command: object, timeout: float = 120, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run a command, from the project's root, and return it with its output as text; its whole group ends with it."""
    with started(*command, cwd=cwd, **changes) as process:
        return finish(process, timeout)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that it started, and theirs."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 60) -> None:
    """Wait for `condition` while `process` runs; fails if it ends before, or the time does."""
    limit = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)


def train(*flags: object, timeout: float = 120, **changes: str) -> subprocess.CompletedProcess:
    """`python train_low_mem.py ...`"""
    return run(sys.executable, "train_low_mem.py", *flags, timeout=timeout, **changes)


@contextmanager
def started_ranks(world_size: int, function: str, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """Processes of one group that call `module:function` with text arguments; those left at its end are killed."""
    module, name = function.split(":")
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_WORLD_SIZE=str(world_size),
                MASTER_ADDR="localhost",
                MASTER_PORT=str(port),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            end_group(process)
            process.stdout.close()


def run_ranks(world_size: int, function: str, *arguments: object, timeout: float = 120) -> None:
    """Call `module:function` with text arguments in `world_size` processes of one group; all must end well."""
    with started_ranks(world_size, function, *arguments) as ranks:
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} exited with {process.returncode}:\n{output}"


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process that was started in a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=30)


def module_command(module: str, *words: object) -> Sequence[str]:
    """`python -m module ...`, for launchers that may not be on the PATH."""
    return [sys.executable, "-m", module, *map(str, words)]
