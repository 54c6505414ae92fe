"""A folder holds one run at a time, even after processes were killed, and its exit.json can be trusted."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lowmem.errors import LostFolderError, UsageError
from lowmem.job.exit_file import final_exit, remove_exit, this_launch, write_exit
from lowmem.job.folder import check_output, lock_folder
from lowmem.run_output import MetricsLog
from lowmem.storage.lock import owner_of
from tests import runs
from tests.forked import started_ranks
from tests.processes import PROGRAM, finish, run, run_program, started, train, wait_until

HOLD = (
    "import sys, time; from pathlib import Path; from lowmem.job.folder import lock_folder\n"
    "with lock_folder(Path(sys.argv[1])): "
)


def test_a_checkpoint_of_trainer_is_recognized_and_its_weights_are_named(tmp_path):
    checkpoint = tmp_path / "checkpoint-50"
    checkpoint.mkdir()
    with pytest.raises(UsageError, match="is not a checkpoint: set never, auto, or a folder with a manifest.json"):
        check_output(tmp_path / "out", str(checkpoint))
    (checkpoint / "trainer_state.json").touch()
    with pytest.raises(UsageError, match=f"transformers' Trainer: set --model_name_or_path={checkpoint} to train its"):
        check_output(tmp_path / "out", str(checkpoint))


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


def test_a_lock_is_lost_if_its_folder_or_file_is_removed_or_replaced(tmp_path):
    output, lock = tmp_path / "out", tmp_path / "out" / ".lock"
    for lose in (lock.unlink, lambda: output.rename(tmp_path / "moved")):
        with lock_folder(output) as check:
            check()
            lose()
            with pytest.raises(
                LostFolderError, match=f"^--output_dir={output} was removed or replaced during this run:"
            ):
                check()
            with lock_folder(output):
                with pytest.raises(LostFolderError, match=f"and is now in use by process {os.getpid()} on host"):
                    check()
            output.mkdir(exist_ok=True)
            lock.symlink_to(tmp_path / "moved" / ".lock")
            with pytest.raises(LostFolderError):
                check()
        assert lock.is_symlink()  # a process removes no lock that it does not hold
        lock.unlink()


def test_both_ranks_of_a_run_whose_folder_is_lost_end_without_writing_there(tmp_path):
    output, moved = tmp_path / "out", tmp_path / "moved"
    runs.write_files(tmp_path, num_rows=40)
    flags = runs.flags(tmp_path, "out", max_steps=10**5, save_steps=3, max_predict_samples=0)
    with started_ranks(2, run_program, PROGRAM, "train", *flags, stderr=subprocess.PIPE) as ranks:
        wait_until((output / "checkpoints" / "step-00000003").exists, ranks[0])
        output.rename(moved)
        with lock_folder(output):
            results = [finish(rank, timeout=300) for rank in ranks]
            assert os.listdir(output) == [".lock"]
    assert [result.returncode for result in results] == [2, 2]
    error = f"--output_dir={output} was removed or replaced during this run"
    assert results[0].stderr.startswith(f"error: {error} and is now in use by process {os.getpid()} on host ")
    assert f"rank 0 failed with LostFolderError: {error}" in results[1].stderr
    assert not (moved / "exit.json").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO", "folder"])
def test_a_lock_that_is_not_a_file_of_its_own_is_refused(tmp_path, kind):
    output, lock, precious = tmp_path / "out", tmp_path / "out" / ".lock", tmp_path / "precious"
    output.mkdir()
    precious.write_text("precious")
    {
        "link": lambda: lock.symlink_to(precious),
        "hard link": lambda: lock.hardlink_to(precious),
        "FIFO": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    with pytest.raises(UsageError, match=rf"cannot be written: Is a (symbolic |hard )?\w+ \({lock}\); set another"):
        with lock_folder(output):
            pass
    assert precious.read_text() == "precious" and lock.exists()


def test_the_text_of_a_lock_becomes_one_printable_line(tmp_path):
    (tmp_path / ".lock").write_bytes(b"process 1\n\x1b[2J\xff" + b"x" * 10**6)
    assert owner_of(tmp_path / ".lock") == "process 1??[2J\ufffd" + "x" * 985
    for text in (b"", None):
        (tmp_path / ".lock").unlink() if text is None else (tmp_path / ".lock").write_bytes(text)
        assert owner_of(tmp_path / ".lock") == "another process"


def test_an_output_folder_that_is_not_a_folder_is_described(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    for output, found in ((tmp_path / "link", "broken link to nowhere"), (tmp_path / "fifo", "FIFO")):
        with pytest.raises(UsageError, match=f"--output_dir={output} is a {found}: set a folder"):
            check_output(output, "never")
    with pytest.raises(UsageError, match="--output_dir=/dev/null is a device: set a folder"):
        check_output(Path("/dev/null"), "never")


def test_unfinished_files_do_not_follow_links(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "metrics.rewritten").symlink_to(precious)
    MetricsLog(tmp_path / "metrics.jsonl", step=None)
    (tmp_path / f".exit-{socket.gethostname()}-{os.getpid()}.json").symlink_to(precious)
    write_exit(tmp_path, "done", step=1, rank=0)
    assert precious.read_text() == "precious" and json.loads((tmp_path / "exit.json").read_text())["cause"] == "done"


def test_a_folder_that_cannot_be_written_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", "/proc/out"):
        started_at = time.perf_counter()
        result = run(sys.executable, PROGRAM, "train", f"--output_dir={output}")
        assert time.perf_counter() - started_at < 60  # reported before torch or a model is loaded
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
