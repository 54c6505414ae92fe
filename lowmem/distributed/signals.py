"""Catch signals that ask a run to stop (SIGTERM and others), even while the main thread is in a collective."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

PREEMPTED = 75
"""Exit code of a run that a signal stopped, and that can be resumed: EX_TEMPFAIL in sysexits.h."""

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ECHO_SECONDS = 5.0  # a signal may arrive twice, directly and from the launcher: ignore repeats for this long


def print_and_exit(
    message: str, code: int, act: Callable[[], None] = lambda: None, *, limit_seconds: float = 10.0
) -> NoReturn:
    """Print `message` to stderr, call `act`, and exit with `code` within `limit_seconds`. Works in any thread."""
    try:
        write = partial(os.write, 2, f"{message}\n".encode(errors="backslashreplace"))
        threads = [threading.Thread(target=target, daemon=True) for target in (write, act)]
        deadline = time.monotonic() + limit_seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        os._exit(code)


def ignore_closed_output() -> None:
    """Discard all further output to stdout or stderr if it is closed, or if its reader (`| head -1`) is gone."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # 0: report only errors, hang-ups and closed descriptors
    for descriptor, _ in poll.poll(0):
        discard_output(descriptor)


def discard_output(descriptor: int) -> None:
    """Let everything that this process and its children write to `descriptor` go to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.set_inheritable(descriptor, True)
    if nowhere > 2:  # a lower number belongs to a standard stream, which was closed
        os.close(nowhere)


def end_as_signalled(name: str) -> NoReturn:
    """Exit with the code that shells expect after the signal `name`: 128 + its number (130 for SIGINT)."""
    os._exit(128 + signal.Signals[name])


class Signals:
    """Catch signals from `catch` until `release`. `came` names the first. A signal over 5 s later ends the process.

    If `at_once` is set, another thread calls it with the first signal's name. Unset it once ranks can agree to stop.
    """

    came: str | None = None
    """Name of the first signal; None until one comes."""

    def __init__(self, at_once: Callable[[str], None] | None = None):
        self.at_once = at_once
        self._are_ignored = False

    def ignore(self) -> None:
        """Ignore further signals, so that they do not change the code with which the process is about to exit."""
        self._are_ignored = True

    def catch(self) -> None:
        """Start catching SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored, SIGHUP. Call it in the main thread."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # Python runs signal handlers only when the main thread leaves C code, which may be never. But Python writes
        # each signal number to this pipe immediately, and another thread reads it.
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        # `nohup` starts a process with SIGHUP ignored, so that it outlives its terminal
        caught = [number for number in _CAUGHT if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in caught}
        _catching.append(self)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def release(self) -> None:
        """Restore the handlers from before `catch`."""
        _catching.remove(self)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)  # ends the thread

    def _watch(self) -> None:
        first = 0.0
        with open(self._reading, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in _CAUGHT or self._are_ignored:
                    continue
                name = signal.Signals(number[0]).name
                if self.came is None:
                    self.came, first = name, time.monotonic()
                    if (act := self.at_once) is not None:
                        act(name)
                elif time.monotonic() - first > _ECHO_SECONDS:
                    print_and_exit(f"{name} received after {self.came}: exiting immediately, without saving", 1)


# A forked child inherits handlers and pipe, but the thread that reads the pipe runs only in the parent, which would get
# the child's signals as its own. So the child restores the previous handlers, and signals are blocked until then.
_catching: list[Signals] = []
_forking = threading.local()


def _block_signals() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT if _catching else ())


def _restore_signal_mask() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _release_in_fork() -> None:
    for signals in reversed(_catching.copy()):
        signals.release()
    _restore_signal_mask()


os.register_at_fork(before=_block_signals, after_in_parent=_restore_signal_mask, after_in_child=_release_in_fork)


@contextmanager
def catching_signals() -> Iterator[Signals]:
    """Catch signals within this block, but not in processes forked there (see `Signals`). Use it in the main thread."""
    signals = Signals()
    signals.catch()
    try:
        yield signals
    finally:
        signals.release()
