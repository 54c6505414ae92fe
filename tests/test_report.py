"""What a run tells goes on whatever becomes of its readers and of the disk, and a resumed run repeats nothing."""

import json
import subprocess
import sys

import pytest

from lowmem.report import MetricsLog
from tests.processes import ROOT, environment, run

TELL = """
import sys
from lowmem.report import tell
sys.stdin.readline()
for line in range(3):
    tell("x" * 10_000)
print("goes on", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("errors", [subprocess.PIPE, subprocess.STDOUT])
def test_a_reader_that_goes_does_not_end_the_run(errors):
    process = subprocess.Popen(
        [sys.executable, "-c", TELL],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    process.stdout.close()
    with process:
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr is None or process.stderr.read() == "goes on\n"
    assert process.returncode == 0


FULL = """
import resource, sys
from pathlib import Path
from lowmem.report import MetricsLog
path = Path(sys.argv[1])
log = MetricsLog(path, step=None)
log.write({"step": 1, "loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
log.write({"step": 2, "loss": float("inf")})
log.write({"step": 3, "loss": 3.0})
if sys.argv[2] == "made":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write({"step": 4, "loss": 4.0})
log.close()
"""


@pytest.mark.parametrize("room", ["made", "never made"])
def test_records_that_a_full_disk_refuses_wait_for_room(room, tmp_path):
    path = tmp_path / "metrics.jsonl"
    result = run(sys.executable, "-c", FULL, path, room)
    assert result.returncode == 0, result.stderr
    (waits, *lost) = result.stdout.splitlines()
    assert waits == f"{path} cannot be written, its records wait for room: File too large"
    log = MetricsLog(path, step=10)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    if room == "made":
        assert [record["step"] for record in written] == [1, 2, 3, 4] and written[1]["loss"] is None and not lost
    else:
        assert [record["step"] for record in written] == [1]
        assert lost == [f"2 records of {path} are lost: it cannot be written"]
    assert log.resumed_at == {}


def test_a_run_resumed_at_its_end_tests_and_ends_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", step=None)
    for record in ({"step": 1, "loss": 2.0}, {"step": 1, "test_loss": 1.0}, {"event": "end", "steps": 1}):
        log.write(record)
    log = MetricsLog(tmp_path / "metrics.jsonl", step=1)
    assert log.resumed_at == {"step": 1, "loss": 2.0}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
