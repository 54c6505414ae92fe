"""Run commands and functions in real processes, and find free ports; every wait has a timeout."""

import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.forkserver import Forked

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "train_low_mem.py"
Process = subprocess.Popen | Forked


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without launcher variables; set one thread, and make lowmem importable.

    GPUs are hidden, because NCCL refuses ranks that share a GPU.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    kept = {k: v for k, v in kept.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_OFFLINE": "1"}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | changes


PORTS = itertools.cycle(range(10_000 + os.getpid() % 38 * 500, 10_500 + os.getpid() % 38 * 500))


def free_port() -> int:
    """Return a port that no other connection takes before a launcher listens on it.

    The system gives outgoing connections ports from 32768 up; each test process has 500 ports below that range.
    """
    for port in itertools.islice(PORTS, 500):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise RuntimeError("no free port")


@contextmanager
def started(*command: object, cwd: Path = ROOT, pipesize: int = -1, **changes: str) -> Iterator[subprocess.Popen]:
    """Start a command in the folder `cwd`; on exit, kill the command and its descendants.

    The command waits while nobody reads `pipesize` bytes of its output (-1: the system's default).
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=pipesize,
        text=True,
        start_new_session=True,
    )
    with ended(process):
        yield process


@contextmanager
def started_function(
    function: Callable[..., object], *arguments: object, cwd: Path = ROOT, **changes: str
) -> Iterator[Forked]:
    """Call `function(*arguments)` in a process that is forked from an interpreter that has imported lowmem."""
    with ended(Forked(function, *arguments, env=environment(**changes), cwd=cwd)) as process:
        yield process


@contextmanager
def started_train(*flags: object, program: Path = PROGRAM, cwd: Path = ROOT, **changes: str) -> Iterator[Forked]:
    """Like `started` for `python train_low_mem.py ...`, but fork an interpreter that has already imported lowmem."""
    with started_function(run_program, program, *flags, cwd=cwd, **changes) as process:
        yield process


def run_program(path: Path, *flags: object) -> None:
    """Run `python path ...` within this process."""
    sys.argv = [str(path), *map(str, flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


@contextmanager
def ended(process: Process) -> Iterator[Process]:
    """On exit, kill `process` and its descendants; `process` must have its own session."""
    try:
        yield process
    finally:
        left = children(process) if process.poll() is None else []  # killpg misses children in other sessions
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in (process, *left):  # killpg also misses a new fork that has no session yet
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=30)
        process.stdout.close()
        process.stderr.close()


def finish(process: Process, timeout: float = 300) -> subprocess.CompletedProcess:
    """Wait for a process to end; return its exit code and its output as text."""
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(*command: object, timeout: float = 300, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run a command in the folder `cwd`, then kill what remains of it; return its exit code and its output as text."""
    with started(*command, cwd=cwd, **changes) as process:
        return finish(process, timeout)


def children(process: Process) -> list[psutil.Process]:
    """Return all descendants of a process."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Callable[[], bool], process: Process, timeout: float = 60) -> None:
    """Wait for `condition` while `process` runs; fail if the process ends first, or after `timeout` seconds."""
    limit = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)


def train(*flags: object, timeout: float = 300, **changes: object) -> subprocess.CompletedProcess:
    """Start a process with `started_train`, and wait for its end.

    The process starts with its imports done. To test the imports too, call `run(sys.executable, PROGRAM, ...)`.
    """
    with started_train(*flags, **changes) as process:
        return finish(process, timeout)


def module_command(module: str, *words: object) -> Sequence[str]:
    """Return the command `python -m module ...`, which needs no script of the launcher on the PATH."""
    return [sys.executable, "-m", module, *map(str, words)]
