"""Signals are noted even while the main thread is stuck; a second one ends the process, unless it echoes the first."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from lowmem.distributed.signals import catching_signals
from tests.processes import finish, run, started

# The main thread waits forever in C code, for a lock that it already holds. A collective whose peer has died also
# waits like this.
STUCK = """
import ctypes, sys, threading
from lowmem.distributed.signals import catching_signals
with catching_signals() as signals:
    def print_signal():
        while not signals.came:
            pass
        print(signals.came, flush=True)
    threading.Thread(target=print_signal, daemon=True).start()
    print("stuck", flush=True)
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks a pthread mutex of zeros, which is valid only on Linux")
def test_a_process_stuck_in_c_notes_a_signal_ignores_its_echoes_and_ends_at_a_second_signal():
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
    assert result.stderr == "SIGTERM received after SIGUSR1: exiting immediately, without saving\n"


# In this program, stderr is a pipe that is full or that its reader has closed.
WITHOUT_STDERR = """
import os, signal, sys, time
from lowmem.distributed import signals
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(writing)
if sys.argv[1] == "full":
    os.set_blocking(2, False)
    try:
        while os.write(2, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(2, True)
else:
    os.close(reading)
signals.print_and_exit("ends", 7, lambda: os.write(1, b"done"), limit_seconds=0.5)
"""


@pytest.mark.parametrize("pipe", ["full", "broken"])
def test_a_process_ends_even_if_stderr_cannot_be_written(pipe):
    result = run(sys.executable, "-c", WITHOUT_STDERR, pipe, timeout=20)
    assert (result.returncode, result.stdout) == (7, "done")


def test_ignored_signals_do_nothing():
    with catching_signals() as signals:
        signals.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert signals.came is None


@pytest.mark.parametrize(("before", "came"), [(lambda *_: None, "SIGHUP"), (signal.SIG_IGN, None)])
def test_a_hang_up_is_caught_unless_it_was_ignored_as_by_nohup(before, came):
    outer = signal.signal(signal.SIGHUP, before)
    try:
        with catching_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert signals.came == came
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, outer)


def test_a_signal_to_a_fork_ends_only_the_fork():
    with catching_signals() as signals:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        process.start()
        process.terminate()
        process.join(10)
        assert process.exitcode == -signal.SIGTERM
        time.sleep(0.2)
        assert signals.came is None


@pytest.mark.parametrize(("command", "code"), [("train", 75), ("verify", 130)])
def test_ctrl_c_with_nothing_to_save_prints_no_traceback(command, code, tmp_path):
    """The signal is sent during imports. With a small pipe, the program cannot end before this test has read on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program started with SIGINT ignored would ignore it
    with started(sys.executable, "-v", "train_low_mem.py", command, tmp_path, pipesize=4096) as process:
        for line in process.stderr:
            if line.startswith("import 'lowmem.distributed.signals'"):  # many imports follow this one
                break
        process.send_signal(signal.SIGINT)
        result = finish(process, timeout=20)
    assert "Traceback" not in result.stderr
    assert result.returncode == code


def test_signal_handlers_are_restored():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in case pytest was started with SIGINT ignored
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
