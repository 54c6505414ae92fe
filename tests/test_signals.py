"""Signals are noted whatever the main thread does; only one that is no echo ends the process."""

import os
import signal
import sys
import time

import pytest

from lowmem.parallel.signals import catching_signals
from tests.processes import finish, started

# The main thread waits for a lock that it holds itself: in C, like in a collective whose peer is gone.
STUCK = """
import ctypes, sys, threading
from lowmem.parallel.signals import catching_signals
with catching_signals() as signals:
    def tell():
        while not signals.came:
            pass
        print(signals.came, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    print("stuck", flush=True)
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a pthread mutex of zeros")
def test_a_process_stuck_in_c_notes_a_signal_and_its_echo_and_ends_at_a_second_one():
    with started(sys.executable, "-c", STUCK) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGUSR1)
        first = time.monotonic()
        assert process.stdout.readline() == "SIGUSR1\n"
        for echo in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(echo)
        time.sleep(first + 5.2 - time.monotonic())
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        result = finish(process, timeout=10)
    assert result.returncode == 1
    assert result.stderr == "SIGTERM came after SIGUSR1: ends at once, not saved\n"


def test_signals_go_back_to_who_had_them():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with catching_signals() as signals:
        assert signals.came is None
        os.kill(os.getpid(), signal.SIGTERM)
        limit = time.monotonic() + 5
        while signals.came is None and time.monotonic() < limit:
            time.sleep(0.001)
        assert signals.came == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
