"""Real processes for tests: ranks of one gloo group, command lines, free ports; every wait has a limit."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


def run(*command: object, timeout: float = 120, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run a command, from the project's root, and return it with its output as text; its whole group ends with it."""
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
        output, errors = process.communicate(timeout=timeout)
    finally:
        end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def train(*flags: object, timeout: float = 120, **changes: str) -> subprocess.CompletedProcess:
    """`python train_low_mem.py ...`"""
    return run(sys.executable, "train_low_mem.py", *flags, timeout=timeout, **changes)


def run_ranks(world_size: int, function: str, *arguments: object, timeout: float = 120) -> None:
    """Call `module:function` with text arguments in `world_size` processes of one group; all must end well."""
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
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            end_group(process)
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
