"""Start processes with torch's elastic launcher, and end this process when its own launcher dies."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from uuid import uuid4

import psutil

from lowmem.distributed.signals import Signals

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_SECONDS_TO_START = 10.0
_POLL_SECONDS = 0.5


def program() -> list[str]:
    """Return the words after `python` that start this program again: its file or, after `python -m`, its module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_module = spec is not None and spec.origin == os.path.abspath(sys.argv[0])
    return ["-m", spec.name] if is_module else [sys.argv[0]]


def start_processes(num_processes: int, arguments: Sequence[str], signals: Signals) -> int:
    """Run `python *arguments` in `num_processes` processes on this machine, and return the exit code.

    If a process fails, the launcher ends the others; returns the failed one's code (1 if killed). Forwards the first
    signal that `signals` catches. If it kills a process that cannot catch it yet, returns minus the signal's number.
    """
    forwarded: list[int] = []

    def forward(name: str) -> None:
        forwarded.append(signal.Signals[name])
        # if children are about to start, wait for them; if all have ended, this process is about to end too
        limit = time.monotonic() + _SECONDS_TO_START
        while not (processes := psutil.Process().children()) and time.monotonic() < limit:
            time.sleep(0.05)
        if not processes:
            end_unstarted(name)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.Signals[name])

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    print(f"starting {num_processes} processes on this machine", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid4().hex}
    # by default, processes connect to the host's full name, which not every host can resolve
    rendezvous["local_addr"] = "localhost"
    # do not let the launcher handle our signals: it would kill its processes 30 s later, too soon for a large save
    options = {"max_restarts": 0, "signals_to_handle": "SIGQUIT"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=num_processes, **rendezvous, **options)
    end_unstarted, signals.at_once = signals.at_once, forward
    try:
        elastic_launch(config, sys.executable)("-u", *arguments)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 or -first.exitcode in forwarded else 1
    return 0


def die_with_launcher() -> None:
    """Under a launcher on Linux: get SIGTERM when the launcher dies, even by SIGKILL, so that the run still saves."""
    # each launcher sets at least one: torchrun, `accelerate launch` (for one process without torchrun), `deepspeed`
    is_launched = not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_SIZE"))
    if not is_launched or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # the launcher died before prctl
        os.kill(os.getpid(), signal.SIGTERM)
    if "CROSS_SIZE" in os.environ:
        _die_with_deepspeed(launcher)


def _die_with_deepspeed(launcher: int) -> None:
    """Send this process SIGTERM when the `deepspeed` command dies. Our launcher, its child, does not die with it."""

    def watch(command: int) -> None:
        with suppress(psutil.Error):
            while psutil.Process(launcher).ppid() == command:
                time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    with suppress(psutil.Error):
        if parent := psutil.Process(launcher).parent():
            program, *words = parent.cmdline()
            if "python" in Path(program).name and any("deepspeed" in word for word in words[:3]):  # not, say, a shell
                Thread(target=watch, args=(parent.pid,), daemon=True, name="lowmem-launcher").start()
