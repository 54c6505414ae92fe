"""torch's elastic launcher from both sides: who starts processes through it, and what a process knows that it started.

Imports no torch until processes are started.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from uuid import uuid4

import psutil

from lowmem.distributed.signals import Signals

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SECONDS_TO_START = 10.0
_SECONDS_BETWEEN_LOOKS = 0.5


def start_processes(num_processes: int, arguments: Sequence[str], signals: Signals) -> int:
    """Run this script with `arguments` in `num_processes` processes on this machine, and return its exit code.

    Without restarts: when one process fails, the launcher ends the others and its code is returned. The first of
    `signals`, which are caught already, is passed on to the processes; they may take the time they need to save. If
    it ended one that could not catch it yet, its number is returned, below 0. Until the processes are about to be
    started `signals.at_once`, which ends this one, is left as it is.
    """
    passed_on: list[int] = []

    def pass_on(name: str) -> None:
        passed_on.append(signal.Signals[name])
        # none: they are about to be started, or all have ended and this process ends too
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
    config = LaunchConfig(
        run_id=uuid4().hex,  # or torch warns that it has made one
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",  # 30 s after one that it handles it kills: too soon for a large model
    )
    end_unstarted, signals.at_once = signals.at_once, pass_on
    try:
        elastic_launch(config, sys.executable)("-u", *arguments)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 or -first.exitcode in passed_on else 1
    return 0


def die_with_launcher() -> None:
    """Under a launcher, on Linux: get a SIGTERM if the launcher dies, be it of SIGKILL. Elsewhere: nothing.

    So a launcher that is killed, or ended by a second signal, leaves nothing behind that trains on, and what can be
    saved is.
    """
    # the second is of `accelerate launch`, which starts a single process without an elastic launcher; the third of
    # `deepspeed`, which has none
    is_launched = not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_SIZE"))
    if not is_launched or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
    if (command := _deepspeed_above(launcher)) is not None:
        Thread(target=_die_with_deepspeed, args=(launcher, command), daemon=True, name="lowmem-launcher").start()


def _deepspeed_above(launcher: int) -> int | None:
    """The process id of `deepspeed` if it has started the launcher, and not a shell, which may end as it likes."""
    with suppress(psutil.Error):
        if "CROSS_SIZE" in os.environ and (command := psutil.Process(launcher).parent()):
            program, *words = command.cmdline()
            if "python" in Path(program).name and any("deepspeed" in word for word in words[:3]):
                return command.pid
    return None


def _die_with_deepspeed(launcher: int, command: int) -> None:
    """As `die_with_launcher`: what ends `deepspeed`, SIGTERM included, leaves the launcher that it has started."""
    with suppress(psutil.Error):
        while psutil.Process(launcher).ppid() == command:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def this_launch() -> dict[str, object]:
    """{"run_id", "host", "launcher": id of the process that started this one, "since": when that was started}.

    Where that one cannot be seen (the first process of a container has none) `since` is this one's own start.
    """
    try:
        since = psutil.Process(os.getppid()).create_time()
    except psutil.Error:
        since = psutil.Process().create_time()
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "host": socket.gethostname(),
        "launcher": os.getppid(),
        "since": datetime.fromtimestamp(since, UTC).isoformat(),
    }


def is_restarted() -> bool:
    """Whether an elastic launcher has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_of_this_launch(launch: Mapping[str, object], time: str) -> bool:
    """Whether what a process of `launch` wrote down at `time` (ISO 8601) was written in the launch that we are in.

    A launch has a launcher on each host, and all have its run id. But that may be "none", or one that a scheduler uses
    again, so another launcher's word counts if it is younger than our launcher.
    """
    ours = this_launch()
    since = datetime.fromisoformat(ours["since"])
    if (launch["host"], launch["launcher"]) == (ours["host"], ours["launcher"]):
        # a process id may be used again; the start of one process is told up to the second's rounding of boot time
        return abs((datetime.fromisoformat(launch["since"]) - since).total_seconds()) < 2
    return launch["run_id"] == ours["run_id"] and datetime.fromisoformat(time) > since
