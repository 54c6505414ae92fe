"""A training run seen from outside: its folder is locked, signals are caught, and however it ends is told."""

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

# Their messages say all: a traceback would hide it.
_TOLD_IN_A_LINE = (UsageError, RowError, RankError, SaveError, OutOfMemory, FloatingPointError)
_NOTHING_SAVED = "nothing is saved"


def supervise(train: Callable[..., tuple[int, bool]], output: Path, signals: Signals) -> int:
    """Call `train(signals=..., on_abort=...)`, which returns (step, preempted), and return the exit code.

    How it ended is in `output`/exit.json, unless it was a mistake and nothing else is in there. What `train` raises is
    raised. The main rank holds the folder's lock meanwhile.
    """
    rank = int(os.environ.get("RANK", "0"))
    record = partial(write_exit, output, rank=rank)
    if rank != 0:
        signals.at_once = partial(end_at_once, record=record)
    with owned(output) if rank == 0 else nullcontext():
        if rank == 0:
            remove_exit(output)
            signals.at_once = partial(end_at_once, record=record)  # not before: the folder may be another run's
        try:
            step, preempted = train(
                signals=signals, on_abort=lambda message: record("failed", message, step=heartbeat.current_step())
            )
        except Exception as error:
            cause = cause_of(error)
            # before the main rank has locked the folder it may be another run's
            is_ours = rank == 0 or is_in_a_group()
            if is_ours and (cause != "mistake" or holds_anything(output)):
                record(cause, message_of(error), step=heartbeat.current_step())
            raise
        cause = "preempted" if preempted else "done"
        if rank == 0:
            saved = f"step {step} is saved" if step else _NOTHING_SAVED
            record(cause, saved if preempted else "", step=step)
    return CODES[cause]


def end_at_once(signal: str, record: Callable[..., None] | None = None) -> NoReturn:
    """What a signal does to a run until its processes are one group, in which they can agree on when to end."""
    # a launcher sends SIGTERM to all also when one of them failed, be it to start them again
    is_a_launchers = signal == "SIGTERM" and not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "CROSS_SIZE"))
    if is_a_launchers and os.environ.get("LOCAL_RANK") != "0":
        os._exit(PREEMPTED)  # the one that failed tells why, or the first one that it was signalled

    def tell() -> None:
        if record is not None and not is_a_launchers:
            record("preempted", _NOTHING_SAVED, step=None)

    say_and_exit(f"{signal} came, ends at once: there is nothing to save yet", PREEMPTED, tell)


def record_preempted(output: Path) -> None:
    """Done by who started processes, once a signal has ended them: exit.json tells it if none of them could."""
    with suppress(UsageError), owned(output):  # another run's folder is left alone
        write_exit(output, "preempted", _NOTHING_SAVED, step=None, rank=0)


def tell_failure(error: Exception) -> int:
    """Tell of `error` here, to a person, and to the other ranks. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    tells_where = rank == "0" or isinstance(error, StartError)
    where = "" if tells_where else f" on rank {rank}, host {socket.gethostname()}"
    # Before the processes are one group, all on a host see the same mistake and one tells it; later one may be alone.
    is_seen_by_all = isinstance(error, UsageError) and not isinstance(error, StartError) and not is_in_a_group()
    if os.environ.get("LOCAL_RANK", "0") == "0" or not is_seen_by_all:
        if isinstance(error, _TOLD_IN_A_LINE):
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    heartbeat.ended(message_of(error))
    return CODES[cause_of(error)]


def cause_of(error: Exception) -> str:
    return "mistake" if isinstance(error, UsageError) else "failed"


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, _TOLD_IN_A_LINE) else f"{type(error).__name__}: {error}"


def is_in_a_group() -> bool:
    """Whether this process has joined the others. Imports no torch."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
