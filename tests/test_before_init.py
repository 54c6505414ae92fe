"""Before the process group exists, rank 0 computes a value; each rank gets it or an error within a time limit."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lowmem.config.parse import resolve
from lowmem.distributed.before_init import call_on_rank_0
from lowmem.distributed.collectives import sum_over_ranks
from lowmem.distributed.setup import init_distributed
from lowmem.errors import UsageError
from lowmem.job.supervise import report_error
from lowmem.plan.command import fitted
from tests.forked import fork_ranks, started_ranks
from tests.models import LLAMA


def as_rank(folder, work):
    """Call `work`; write this rank's stderr and result to two files; after an error, exit with the CLI's exit code."""
    rank = os.environ["RANK"]
    with open(folder / f"stderr-{rank}", "w") as stderr:
        os.dup2(stderr.fileno(), 2)
    try:
        (folder / f"found-{rank}").write_text(json.dumps(work()))
    except Exception as error:
        sys.exit(report_error(error))


def find(folder, how):
    with open(folder / "calls", "a") as calls:
        calls.write(os.environ["RANK"])
    if how == "refuses":
        raise UsageError("nothing fits")
    if how == "fails":
        raise OSError("no such device")
    if how == "dies":
        time.sleep(2)  # by then, the other ranks are waiting for rank 0
        os._exit(9)
    if how == "hangs":
        time.sleep(6)
    return {"batch_size": 2, "recompute": "full"}


def find_and_join(folder, how, rounds=1):
    def work():
        found = [call_on_rank_0(lambda: find(folder, how), limit_seconds=4, start_seconds=4) for _ in range(rounds)]
        init_distributed(heartbeat_timeout=10)
        count = sum_over_ranks(1)
        dist.destroy_process_group()
        return [*found, count]

    as_rank(folder, work)


def test_rank_0_computes_a_value_for_all_ranks_before_they_join(tmp_path):
    assert fork_ranks(3, find_and_join, tmp_path, "well", 2) == [0, 0, 0]
    found = {"batch_size": 2, "recompute": "full"}
    assert [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(3)] == [[found, found, [3]]] * 3
    assert (tmp_path / "calls").read_text() == "00"


@pytest.mark.parametrize(
    ("how", "codes", "message"),
    [
        ("refuses", [2, 2, 2], "nothing fits"),
        ("fails", [1, 1, 1], "rank 0 failed with OSError: no such device"),
        ("hangs", [1, 1, 1], "timed out after 4 s waiting for rank 0 of 3"),
        ("dies", [9, 1, 1], "got no result from rank 0: rank 0, or the launcher that hosts the store, has ended"),
    ],
)
def test_a_failure_of_rank_0_ends_every_rank(how, codes, message, tmp_path):
    began = time.monotonic()
    assert fork_ranks(3, find_and_join, tmp_path, how) == codes
    assert time.monotonic() - began < 60
    if how != "refuses":
        for rank in (1, 2):
            stderr = (tmp_path / f"stderr-{rank}").read_text()
            assert message in stderr, stderr
    else:  # this user error is the same on every rank, so only one rank per host prints it
        assert [(tmp_path / f"stderr-{rank}").read_text() for rank in range(3)] == [f"error: {message}\n", "", ""]


def plan_and_join(folder, flags):
    try:
        config = fitted(resolve(json.loads(flags)), fixed=())
        init_distributed(heartbeat_timeout=10)
        dist.destroy_process_group()
        Path(folder, os.environ["RANK"]).write_text(json.dumps([config.batch_size, config.recompute]))
    except Exception as error:
        sys.exit(report_error(error))


def test_rank_0_plans_and_every_rank_gets_the_plan_or_the_error(tmp_path):
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    flags = {"model_config": str(tmp_path / "llama.json"), "text_column": "text", "max_seq_len": 256, "batch_size": 16}
    for limit, codes, message in (("648MB", [0, 0], "chosen: --recompute="), ("630MB", [2, 2], "error: nothing fits")):
        limited = json.dumps(flags | {"device_memory": limit})
        with started_ranks(2, plan_and_join, tmp_path, limited) as ranks:
            outputs = [process.communicate(timeout=300)[0] for process in ranks]
            assert [process.returncode for process in ranks] == codes, outputs
        assert "predicted for 2 x GPU: " in outputs[0] and message in outputs[0]
        assert outputs[1] == ""
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second != [16, "off"]
