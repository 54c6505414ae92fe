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
from lowmem.distributed.signals import PREEMPTED, Signals, say_and_exit
from lowmem.errors import OutOfMemory, RankError, RowError, SaveError, StartError, UsageError
from lowmem.job.exit_file import CODES, remove_exit, write_exit
from lowmem.job.folder import holds_anything, owned

# printed in one line, without a traceback
_PRINTED_ALONE = (UsageError, RowError, RankError, SaveError, OutOfMemory, FloatingPointError)
_NOTHING_SAVED = "nothing is saved"


def supervise(train: Callable[..., tuple[int, bool]], output: Path, signals: Signals) -> int:
    """Call `train(signals=..., on_abort=...)`, which returns (step, preempted), and return the exit code.

    Rank 0 locks `output`. exit.json says how it ended, unless it was a mistake and nothing else is in there.
    """
    rank = int(os.environ.get("RANK", "0"))

    def record(cause: str, message: str) -> None:
        write_exit(output, cause, message, step=heartbeat.current_step(), rank=rank)

    if rank != 0:
        signals.at_once = partial(end_at_once, record=record)
    with owned(output) if rank == 0 else nullcontext():
        if rank == 0:
            remove_exit(output)
            signals.at_once = partial(end_at_once, record=record)  # not before: the folder may be another run's
        try:
            step, preempted = train(signals=signals, on_abort=partial(record, "failed"))
        except Exception as error:
            cause = cause_of(error)
            # before the main rank has locked the folder it may be another run's
            is_ours = rank == 0 or is_in_a_group()
            if is_ours and (cause != "mistake" or holds_anything(output)):
                record(cause, message_of(error))
            raise
        cause = "preempted" if preempted else "done"
        if rank == 0:
            saved = f"step {step} is saved" if step else _NOTHING_SAVED
            write_exit(output, cause, saved if preempted else "", step=step, rank=rank)
    return CODES[cause]


def end_at_once(signal: str, record: Callable[..., None] | None = None) -> NoReturn:
    """End on a signal before the ranks are one group, which can agree on when to end."""
    # a launcher also sends SIGTERM to all when one of them failed, be it to start them again
    is_a_launchers = signal == "SIGTERM" and not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "CROSS_SIZE"))
    if is_a_launchers and os.environ.get("LOCAL_RANK") != "0":
        os._exit(PREEMPTED)  # the failed process, or the first one of the host, reports
    records = record is not None and not is_a_launchers
    act = partial(record, "preempted", _NOTHING_SAVED) if records else lambda: None
    say_and_exit(f"{signal} came, ends at once: there is nothing to save yet", PREEMPTED, act)


def record_preempted(output: Path) -> None:
    """Write exit.json after a signal ended the processes that this one started, if none of them could."""
    with suppress(UsageError), owned(output):  # another run's folder is left alone
        write_exit(output, "preempted", _NOTHING_SAVED, step=None, rank=0)


def tell_failure(error: Exception) -> int:
    """Print `error`, and report it to the other ranks. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" or isinstance(error, StartError) else f" on rank {rank}, host {socket.gethostname()}"
    # before the processes are one group, all on a host see the same mistake and one prints it; later one may be alone
    is_seen_by_all = isinstance(error, UsageError) and not isinstance(error, StartError) and not is_in_a_group()
    if os.environ.get("LOCAL_RANK", "0") == "0" or not is_seen_by_all:
        lines = traceback.format_exception(error)
        if isinstance(error, _PRINTED_ALONE):
            lines = [f"error{where}: {error}\n"]
        with suppress(OSError):  # nobody reads it
            print(*lines, sep="", end="", file=sys.stderr, flush=True)
    heartbeat.ended(message_of(error))
    return CODES[cause_of(error)]


def cause_of(error: Exception) -> str:
    return "mistake" if isinstance(error, UsageError) else "failed"


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, _PRINTED_ALONE) else f"{type(error).__name__}: {error}"


def is_in_a_group() -> bool:
    """Whether this process has joined the others. Imports no torch."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
