"""When a launcher or process manager restarts a signalled or killed run, the run continues exactly."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import psutil
import pytest

from tests import runs
from tests.processes import (
    PROGRAM,
    children,
    finish,
    free_port,
    module_command,
    started,
    started_train,
    train,
    wait_until,
)
from tests.runs import assert_same_run, exit_of, steps, write_files

STEPS = 60
TORCHRUN = module_command("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("work"), num_rows=90, dropout_rate=0.1)


def flags(work, name, **changes):
    return runs.flags(work, name, **{"batch_size": 4, "max_steps": STEPS, "resume": "auto"} | changes)


@pytest.fixture(scope="module")
def uninterrupted(work):
    result = train("train", *flags(work, "whole", num_processes=2))
    assert result.returncode == 0, result.stderr
    assert exit_of(work, "whole")["cause"] == "done"
    return "whole"


def has_trained(work, name, more_than):
    with suppress(FileNotFoundError, json.JSONDecodeError):  # not written yet, or not to the end of the last line
        return len(steps(work, name)) > more_than


def workers(process):
    """Return the worker processes of a launcher, sorted by rank."""
    return sorted(children(process), key=lambda child: int(child.environ()["RANK"]))


def end_by_sigterm_and_its_echo(process):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)


def end_by_sigusr1_to_one_worker(process):
    workers(process)[1].send_signal(signal.SIGUSR1)


def end_by_sighup(process):
    process.send_signal(signal.SIGHUP)


def end_by_sigkill(process):
    left = workers(process)
    process.kill()
    gone, alive = psutil.wait_procs(left, timeout=30)
    assert len(gone) == 2 and not alive


def test_a_run_that_a_process_manager_restarts_equals_an_uninterrupted_one(work, uninterrupted):
    """No launcher is used: `train` starts the processes itself, and its exit code says whether to run it again."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run that is started with SIGHUP ignored (nohup) ignores it
    ways = [end_by_sigterm_and_its_echo, end_by_sigusr1_to_one_worker, end_by_sighup, end_by_sigkill]
    codes, saved = [], 0
    while not codes or codes[-1] in (75, -signal.SIGKILL):
        managed = flags(work, "managed", num_processes=2, save_steps=1000, save_total_limit=1)
        with started_train("train", *managed) as process:
            if len(codes) < len(ways):
                wait_until(partial(has_trained, work, "managed", saved + 2), process)
                ways[len(codes)](process)
            result = finish(process)
        codes.append(result.returncode)
        assert "Traceback" not in result.stderr, result.stderr
        if codes[-1]:
            record = exit_of(work, "managed")
            assert (record["cause"], record["code"], record["rank"]) == ("preempted", 75, 0)
            (checkpoint,) = (work / "managed" / "checkpoints").glob("step-*")  # only signals make this run save
            assert int(checkpoint.name.removeprefix("step-")) == record["step"] == len(steps(work, "managed"))
            saved = record["step"]
    assert codes == [75, 75, 75, -signal.SIGKILL, 0]
    assert exit_of(work, "managed")["cause"] == "done"
    assert_same_run(work, "managed", uninterrupted)


def test_torchrun_restarts_a_killed_worker_but_not_a_preempted_one(work, uninterrupted):
    command = [*TORCHRUN, "train_low_mem.py", "train", *flags(work, "elastic")]
    with started(*command) as process:
        wait_until(partial(has_trained, work, "elastic", 2), process)
        workers(process)[0].send_signal(signal.SIGTERM)
        result = finish(process)
    assert result.returncode == 1
    record = exit_of(work, "elastic")
    assert record["cause"] == "preempted" and record["step"] == len(steps(work, "elastic"))
    # this line is in stderr one to three times, because the launcher may end a process before it prints the line
    assert f"not restarting: this launch has ended (preempted: step {record['step']} is saved)" in result.stderr
    assert result.stdout.count("steps 0 to") == result.stdout.count(f"to {STEPS}, each of") == 1
    with started(*command) as process:
        wait_until(partial(has_trained, work, "elastic", record["step"] + 7), process)
        workers(process)[1].kill()
        result = finish(process)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"to {STEPS}, each of") == 2
    assert exit_of(work, "elastic")["cause"] == "done"
    assert_same_run(work, "elastic", uninterrupted)


def is_importing_torch(process):
    return any("torch" in library.path for library in psutil.Process(process.pid).memory_maps())


def test_a_signal_while_starting_ends_the_run_immediately(work):
    with started(sys.executable, PROGRAM, "train", *flags(work, "starting", num_processes=1)) as process:
        wait_until(partial(is_importing_torch, process), process)  # by then the run has locked its folder
        os.kill(process.pid, signal.SIGINT)
        result = finish(process, timeout=10)
    assert result.returncode == 75, result.stderr
    assert result.stderr == "SIGINT received before training started: exiting now, nothing to save\n"
    assert exit_of(work, "starting")["cause"] == "preempted"


def test_a_launchers_sigterm_while_starting_is_not_a_preemption(work):
    """When one process fails, DeepSpeed's launcher sends SIGTERM to all others, and so does torchrun."""
    deepspeed = {"CROSS_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    deepspeed |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with started(sys.executable, PROGRAM, "train", *flags(work, "ended"), **deepspeed) as process:
        wait_until(partial(is_importing_torch, process), process)
        process.terminate()
        result = finish(process, timeout=10)
    assert result.returncode == 75, result.stderr
    assert not (work / "ended" / "exit.json").exists()


@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_while_processes_start_is_recorded_as_a_preemption(to_all, work):
    """Send SIGTERM to `train`, or SIGUSR1 to rank 1 only. Ranks take SIGTERM for the end of a failed launch."""
    name = f"starting together {to_all}"
    with started(sys.executable, PROGRAM, "train", *flags(work, name, num_processes=2)) as process:
        wait_until((work / name / ".lock").exists, process)
        wait_until(lambda: all(map(is_importing_torch, workers(process))), process)
        if to_all:
            process.send_signal(signal.SIGTERM)
        else:
            workers(process)[1].send_signal(signal.SIGUSR1)
        result = finish(process, timeout=30)
    assert result.returncode == 75, result.stderr
    record = exit_of(work, name)
    assert (record["cause"], record["message"]) == ("preempted", "nothing is saved")
    assert record["rank"] == (0 if to_all else 1)


LAUNCHED = """
import time
from lowmem.job.processes import die_with_launcher
die_with_launcher()
print("runs", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, which only Linux has")
@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_SIZE"])
def test_a_launched_process_ends_with_its_launcher(launcher):
    launch = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with started(sys.executable, "-c", launch, LAUNCHED, **{launcher: "no"}) as process:
        assert process.stdout.readline() == "runs\n"
        left = children(process)
        process.kill()
        gone, alive = psutil.wait_procs(left, timeout=10)
        assert len(gone) == 1 and not alive
        finish(process)


def test_processes_of_deepspeeds_launcher_end_when_the_deepspeed_command_ends():
    """SIGTERM ends the `deepspeed` command, which does not forward the signal to the launcher that it started."""
    launch = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"
    words = ["-c", launch, "deepspeed", "-c", launch, "its launcher", "-c", LAUNCHED]
    with started(sys.executable, *words, CROSS_SIZE="1") as process:
        assert process.stdout.readline() == "runs\n"
        left = children(process)
        process.terminate()
        gone, alive = psutil.wait_procs(left, timeout=10)
        assert len(gone) == 2 and not alive
        finish(process)
