"""SIGTERM, SIGINT and SIGUSR1 ask a run to end. They are noted also while the main thread is in a collective."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

PREEMPTED = 75
"""Exit code of a run that a signal ended and that may be started again: EX_TEMPFAIL of sysexits.h."""

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_SECONDS = 5.0  # launchers pass on what they got, beside what reached us directly
_SECONDS_TO_SAY = 10.0


def say_and_exit(message: str, code: int, beside: Callable[[], None] = lambda: None) -> NoReturn:
    """Write `message` to stderr, call `beside` meanwhile, and end the process with `code` when both are done.

    From any thread, and for certain: whatever hangs for 10 seconds or fails, be it a disk or a terminal.
    """
    try:
        writes = threading.Thread(target=os.write, args=(2, f"{message}\n".encode()), daemon=True)
        acts = threading.Thread(target=beside, daemon=True)
        deadline = time.monotonic() + _SECONDS_TO_SAY
        for thread in (writes, acts):
            thread.start()
        for thread in (writes, acts):
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        os._exit(code)


def end_as_signalled(name: str) -> NoReturn:
    """What shells expect of a command that nobody starts again: exit code 128 and the signal's number (130: SIGINT)."""
    os._exit(128 + signal.Signals[name])


class Signals:
    """Notes the first signal in `came`, from `catch` until `release`; a second one, if it comes more than 5 seconds
    after the first and so is no echo of it, ends the process at once with exit code 1.

    `at_once`, while it is set, is called with the first signal's name, in a thread of its own: for times in which the
    ranks cannot agree on when to end.
    """

    came: str | None = None
    """Name of the first signal, or None."""

    def __init__(self, at_once: Callable[[str], None] | None = None):
        self.at_once = at_once
        self._are_ignored = False

    def ignore(self) -> None:
        """From here on signals do nothing: the process ends by itself, and with the right exit code."""
        self._are_ignored = True

    def catch(self) -> None:
        """Take over the three signals. Call it in the main thread."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # Python's own handlers wait until the main thread leaves C code, which may never be; a thread that reads the
        # numbers from here need not.
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in _CAUGHT}
        _catching.append(self)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def release(self) -> None:
        """Give the signals back to who had them before."""
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
                    say_and_exit(f"{name} came after {self.came}: ends at once, not saved", 1)


# A fork has the handlers and the pipe, but no thread that reads it: who signals the fork would signal us instead. So it
# releases them, and until it has its signals wait.
_catching: list[Signals] = []
_forking = threading.local()


def _let_signals_wait() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT if _catching else ())


def _let_signals_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _release_in_fork() -> None:
    for signals in reversed(_catching.copy()):
        signals.release()
    _let_signals_through()


os.register_at_fork(before=_let_signals_wait, after_in_parent=_let_signals_through, after_in_child=_release_in_fork)


@contextmanager
def catching_signals() -> Iterator[Signals]:
    """Within it the first SIGTERM, SIGINT or SIGUSR1 is noted in `.came` of what it gives, and does nothing else.

    A second one more than 5 seconds after it ends the process at once, with exit code 1. Processes that are forked
    within it have the signals as they were before. Enter it in the main thread.
    """
    signals = Signals()
    signals.catch()
    try:
        yield signals
    finally:
        signals.release()
