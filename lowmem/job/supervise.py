"""Lock a run's folder, run the training, and record how it ended."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from lowmem.distributed import heartbeat
from lowmem.distributed.signals import PREEMPTED, Signals, print_and_exit
from lowmem.errors import (
    LostFolderError,
    OutOfMemory,
    RankError,
    RowError,
    SaveError,
    StartError,
    StoreError,
    UsageError,
    one_line,
)
from lowmem.job.exit_file import CODES, remove_exit, write_exit
from lowmem.job.folder import has_files, lock_folder

# errors that are printed in one line
_WITHOUT_TRACEBACK = (UsageError, RowError, RankError, SaveError, StoreError, OutOfMemory, FloatingPointError)
_NOTHING_SAVED = "nothing is saved"


def supervise(train: Callable[..., tuple[int, bool]], output: Path, signals: Signals) -> int:
    """Call `train(signals=..., on_abort=..., check_folder=...)`, which returns (step, preempted); return the exit code.

    Rank 0 locks `output`; there, `check_folder()` raises LostFolderError once the folder is no longer this run's.
    exit.json records how the run ended, except for a user error in an empty folder and for a lost folder.
    """
    rank = int(os.environ.get("RANK", "0"))

    def record(cause: str, message: str) -> None:
        write_exit(output, cause, message, step=heartbeat.current_step(), rank=rank)

    if rank != 0:
        signals.at_once = partial(end_at_once, record=record)
    with lock_folder(output) if rank == 0 else nullcontext(lambda: None) as check_folder:
        if rank == 0:
            remove_exit(output)
            signals.at_once = partial(end_at_once, record=record)  # once locked: the folder is now this run's
        try:
            step, preempted = train(signals=signals, on_abort=partial(record, "failed"), check_folder=check_folder)
        except LostFolderError:
            raise
        except Exception as error:
            cause = cause_of(error)
            # the folder is ours once rank 0 has locked it, which it does before it joins the process group
            is_ours = rank == 0 or has_process_group()
            if is_ours and (cause != "mistake" or has_files(output)):
                record(cause, message_of(error))
            raise
        cause = "preempted" if preempted else "done"
        if rank == 0:
            saved = f"step {step} is saved" if step else _NOTHING_SAVED
            write_exit(output, cause, saved if preempted else "", step=step, rank=rank)
    return CODES[cause]


def end_at_once(signal: str, record: Callable[..., None] | None = None) -> NoReturn:
    """Exit on a signal that comes before the process group exists, because ranks cannot agree on a last step yet."""
    # a launcher also sends SIGTERM after one process failed, and may then restart all, so do not record that signal
    from_launcher = signal == "SIGTERM" and not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "CROSS_SIZE"))
    if from_launcher and os.environ.get("LOCAL_RANK") != "0":
        os._exit(PREEMPTED)  # without a report, which the failed process or local rank 0 makes
    act = partial(record, "preempted", _NOTHING_SAVED) if record and not from_launcher else lambda: None
    print_and_exit(f"{signal} received before training started: exiting now, nothing to save", PREEMPTED, act)


def record_preempted(output: Path) -> None:
    """Write exit.json after a signal ended the processes that this one started, if none of them wrote it."""
    with suppress(UsageError), lock_folder(output):  # skip a folder that another run has locked
        write_exit(output, "preempted", _NOTHING_SAVED, step=None, rank=0)


def report_error(error: Exception) -> int:
    """Print `error`, report it to the other ranks, and return the exit code."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" or isinstance(error, StartError) else f" on rank {rank}, host {socket.gethostname()}"
    # before the process group exists, all processes of a host have the same user error, so only one prints it
    same_on_host = isinstance(error, UsageError) and not isinstance(error, StartError) and not has_process_group()
    is_alone = "WORLD_SIZE" not in os.environ  # then LOCAL_RANK is a leftover
    if is_alone or os.environ.get("LOCAL_RANK", "0") == "0" or not same_on_host:
        lines = traceback.format_exception(error)
        if isinstance(error, _WITHOUT_TRACEBACK):
            lines = [f"error{where}: {one_line(error)}\n"]
        print(*lines, sep="", end="", file=sys.stderr, flush=True)
    heartbeat.report_end(message_of(error))
    return CODES[cause_of(error)]


def cause_of(error: Exception) -> str:
    return "mistake" if isinstance(error, UsageError) else "failed"


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, _WITHOUT_TRACEBACK) else f"{type(error).__name__}: {error}"


def has_process_group() -> bool:
    """Whether this process has joined a process group. Imports no torch."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
