"""Real processes for tests: command lines and free ports; every wait has a limit."""

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
    """This process's environment without what a launcher would set, at one thread, with this checkout importable.

    GPUs are hidden: NCCL refuses ranks that share one.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    kept = {k: v for k, v in kept.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_OFFLINE": "1"}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | changes


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
    with ended(process):
        yield process


@contextmanager
def started_train(*flags: object, program: Path = PROGRAM, cwd: Path = ROOT, **changes: str) -> Iterator[Forked]:
    """`python train_low_mem.py ...` as by `started`, but forked from an interpreter that has done its imports."""
    with ended(Forked(run_program, program, *flags, env=environment(**changes), cwd=cwd)) as process:
        yield process


def run_program(path: Path, *flags: object) -> None:
    """Do in this process what `python path ...` does."""
    sys.argv = [str(path), *map(str, flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


@contextmanager
def ended(process: Process) -> Iterator[Process]:
    """Kill, at the end, what is left of a process that was started in a session of its own, and of its children."""
    try:
        yield process
    finally:
        left = children(process) if process.poll() is None else []  # a launcher's are in sessions of their own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in (process, *left):  # a fork may not have its session yet
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=30)
        process.stdout.close()
        process.stderr.close()


def finish(process: Process, timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for its end; returns it with its output as text."""
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(*command: object, timeout: float = 120, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run a command, from the project's root, and return it with its output as text; its whole group ends with it."""
    with started(*command, cwd=cwd, **changes) as process:
        return finish(process, timeout)


def children(process: Process) -> list[psutil.Process]:
    """The processes that it started, and theirs."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Callable[[], bool], process: Process, timeout: float = 60) -> None:
    """Wait for `condition` while `process` runs; fails if it ends before, or the time does."""
    limit = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)


def train(*flags: object, timeout: float = 120, **changes: object) -> subprocess.CompletedProcess:
    """As `started_train`, until its end. Tests of what precedes the imports `run(sys.executable, PROGRAM, ...)`."""
    with started_train(*flags, **changes) as process:
        return finish(process, timeout)


def module_command(module: str, *words: object) -> Sequence[str]:
    """`python -m module ...`, for launchers that may not be on the PATH."""
    return [sys.executable, "-m", module, *map(str, words)]
