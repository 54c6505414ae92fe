"""A folder holds one run at a time, even after processes were killed, and its exit.json can be trusted."""

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from lowmem.job.exit_file import final_exit, remove_exit, this_launch, write_exit
from lowmem.job.folder import lock_folder
from tests.processes import PROGRAM, finish, run, started, train

HOLD = (
    "import sys, time; from pathlib import Path; from lowmem.job.folder import lock_folder\n"
    "with lock_folder(Path(sys.argv[1])): "
)


def test_a_second_run_is_refused_and_the_owner_of_the_folder_is_reported(tmp_path):
    output = tmp_path / "out"
    with lock_folder(output):
        result = train("train", f"--output_dir={output}")
        assert result.returncode == 2 and sorted(os.listdir(output)) == [".lock"]
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        rf"error: --output_dir={output} is in use by process {os.getpid()} on host \S+ since [-\d]+ [:\d]+ UTC: "
        "wait until it ends, or set another folder",
        line,
    )
    assert not output.exists()


def test_the_lock_of_a_killed_owner_is_free(tmp_path):
    with started(sys.executable, "-c", HOLD + "print('held', flush=True); time.sleep(60)", tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert os.listdir(tmp_path) == []  # the lock file is removed, but not the folder, which existed before


def test_a_process_that_opened_a_lock_file_before_its_removal_locks_a_new_one(tmp_path):
    """A lock on the deleted file is worthless, because another run can create and lock a new file of the same name."""
    with ExitStack() as owner:
        owner.enter_context(lock_folder(tmp_path))
        before_locking.action = owner.close
        try:
            with lock_folder(tmp_path):
                assert before_locking.action is None
                assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
        finally:
            before_locking.action = None


def before_locking(event, arguments):
    if event == "fcntl.flock" and (action := before_locking.action):
        before_locking.action = None
        action()


before_locking.action = None
sys.addaudithook(before_locking)


def test_a_folder_that_cannot_be_written_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", "/proc/out"):
        started_at = time.perf_counter()
        result = run(sys.executable, PROGRAM, "train", f"--output_dir={output}")
        assert time.perf_counter() - started_at < 10  # reported before torch or a model is loaded
        assert result.returncode == 2
        assert f"error: --output_dir={output} cannot be written: No" in result.stderr, result.stderr


def test_the_first_cause_is_kept_with_all_its_fields(tmp_path):
    write_exit(tmp_path, "failed", "rank 1 is silent", step=7, rank=0)
    write_exit(tmp_path, "done", step=8, rank=1)
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["cause"], record["code"], record["message"], record["step"], record["rank"]) == (
        "failed",
        1,
        "rank 1 is silent",
        7,
        0,
    )
    assert os.listdir(tmp_path) == ["exit.json"]
    remove_exit(tmp_path)
    write_exit(tmp_path / "not there", "failed", step=None, rank=0)
    assert os.listdir(tmp_path) == []


def rewrite(folder, **changes):
    record = json.loads((folder / "exit.json").read_text())
    record["launch"] |= changes.pop("launch", {})
    (folder / "exit.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize(("cause", "is_final"), [("preempted", True), ("mistake", True), ("failed", False)])
def test_an_exit_that_a_restart_cannot_change_is_final(cause, is_final, tmp_path):
    assert final_exit(tmp_path) is None
    write_exit(tmp_path, cause, step=3, rank=0)
    assert (final_exit(tmp_path) is not None) == is_final


def test_an_exit_of_another_launch_is_ignored(tmp_path):
    write_exit(tmp_path, "preempted", step=3, rank=0)
    rewrite(tmp_path, launch={"since": "2020-01-01T00:00:00+00:00"}, time="2020-01-01T00:00:01+00:00")
    assert final_exit(tmp_path) is None  # as if written under an earlier launcher with our launcher's process id
    rewrite(tmp_path, launch={"host": "another"})
    assert final_exit(tmp_path) is None  # without run ids, times decide, and this exit is older than our launcher
    rewrite(tmp_path, time=datetime.now(UTC).isoformat())
    assert final_exit(tmp_path) is not None  # as if another host of this launch wrote it
    rewrite(tmp_path, launch={"run_id": "another"})
    assert final_exit(tmp_path) is None
    (tmp_path / "exit.json").write_text('{"cause": "preempted"')
    assert final_exit(tmp_path) is None


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]


def can_unshare():
    try:
        return run(*UNSHARE, "true").returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_unshare(), reason="needs permission to make a process namespace")
def test_the_first_process_of_a_container_records_its_exit(tmp_path):
    code = "import sys; from pathlib import Path; from lowmem.job.exit_file import write_exit; "
    code += "write_exit(Path(sys.argv[1]), 'done', step=3, rank=0)"
    result = run(*UNSHARE, sys.executable, "-c", code, tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["cause"], record["launch"]["launcher"]) == ("done", 0)


def test_the_process_that_started_us_is_the_launcher(tmp_path):
    code = "from lowmem.job.exit_file import this_launch; print(this_launch())"
    assert f"'launcher': {os.getpid()}," in run(sys.executable, "-c", code).stdout
    assert this_launch()["launcher"] == os.getppid()
