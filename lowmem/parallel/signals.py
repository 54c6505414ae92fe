"""SIGTERM, SIGINT and SIGUSR1 ask a run to end. They are noted also while the main thread is in a collective."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PREEMPTED = 75
"""Exit code of a run that a signal ended and that may be started again: EX_TEMPFAIL of sysexits.h."""

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_SECONDS = 5.0  # launchers pass on what they got, beside what reached us directly


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
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def release(self) -> None:
        """Give the signals back to who had them before."""
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
                    if self.at_once is not None:
                        self.at_once(name)
                elif time.monotonic() - first > _ECHO_SECONDS:
                    print(f"{name} came after {self.came}: ends at once, not saved", file=sys.stderr, flush=True)
                    os._exit(1)


@contextmanager
def catching_signals() -> Iterator[Signals]:
    """Within it SIGTERM, SIGINT and SIGUSR1 are noted in `.came` of what it gives, and do nothing else.

    A second one more than 5 seconds after the first ends the process at once, with exit code 1. Enter it in the main
    thread.
    """
    signals = Signals()
    signals.catch()
    try:
        yield signals
    finally:
        signals.release()
