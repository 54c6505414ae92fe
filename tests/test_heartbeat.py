"""No rank waits forever: each remaining rank reports which rank failed, at which step and phase, and why."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lowmem.distributed import heartbeat
from lowmem.distributed.collectives import on_main_rank, start_heartbeats, sum_over_ranks
from tests.forked import fork_ranks, started_ranks
from tests.processes import free_port, run, wait_until

LIMIT = 3.0


def join_and_watch(limit=LIMIT, on_abort=None):
    dist.init_process_group("gloo")
    start_heartbeats(limit, on_abort)
    return dist.get_rank()


def end_a_rank(victim, number, folder):
    rank = join_and_watch(on_abort=lambda message: Path(folder, str(dist.get_rank())).write_text(message))
    heartbeat.at_step(4)
    sum_over_ranks(1)
    if rank == int(victim):
        with heartbeat.phase("computing gradients"):
            time.sleep(1)  # during this time, a heartbeat tells the others this phase
            os.kill(os.getpid(), int(number))
    sum_over_ranks(2)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_is_named_by_all_others(victim, how, tmp_path):
    world_size = 2 + victim
    with started_ranks(world_size, end_a_rank, victim, how.value, tmp_path) as ranks:
        left = [rank for rank in range(world_size) if rank != victim]
        outputs = {rank: ranks[rank].communicate(timeout=300)[0] for rank in left}
    store = r", which hosts the store at localhost:\d+," if victim == 0 else ""
    for rank in left:
        message = f"rank {victim}{store} has been silent for .* s, last at step 4, computing gradients"
        assert re.search(message, outputs[rank]), outputs[rank]
        assert "step 4, all-reducing" in outputs[rank]
        assert ranks[rank].returncode == 1
        if how == signal.SIGSTOP:  # connections of a stopped rank stay open, so only the heartbeat ends other ranks
            assert re.search(message, (tmp_path / str(rank)).read_text())


def fail_alone():
    rank = join_and_watch()
    with heartbeat.phase("computing gradients"):
        if rank == 1:
            raise KeyError("no such row")
        time.sleep(60)  # rank 0 blocks here without an exception, as it would in a GPU collective


def test_an_error_on_one_rank_ends_the_others_which_report_its_cause():
    with started_ranks(2, fail_alone) as ranks:
        outputs = [process.communicate(timeout=40)[0] for process in ranks]
    assert "error: rank 1 failed with KeyError: 'no such row'. Rank 0, at computing gradients" in outputs[0]
    assert [process.returncode for process in ranks] == [1, 1] and "Traceback" in outputs[1]


def wait_long_and_end_at_different_times(next_port):
    limit = 1.5
    join_and_watch(limit)
    on_main_rank(lambda: time.sleep(2 * limit))  # only rank 0 sleeps; the other ranks wait in a collective
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = next_port  # at the old port, ranks could join the first group's store
    rank = join_and_watch(limit)  # a second group, with its own heartbeat
    if rank == 0:
        time.sleep(2 * limit)  # rank 1 ends during this time
        dist.destroy_process_group()  # rank 0 then ends, and so does the store that it hosts
    if rank == 2:
        time.sleep(4 * limit)


def test_a_long_wait_or_an_early_end_does_not_count_as_silence():
    assert fork_ranks(3, wait_long_and_end_at_different_times, str(free_port())) == [0, 0, 0]


def be_stopped_for_a_while(folder):
    rank = join_and_watch(60.0 if os.environ["RANK"] == "0" else LIMIT)
    if rank == 1:
        Path(folder, "runs").touch()
        while not Path(folder, "continue").exists():
            time.sleep(0.1)
    sum_over_ranks(1)


def test_a_rank_that_was_stopped_does_not_blame_the_others(tmp_path):
    with started_ranks(2, be_stopped_for_a_while, tmp_path) as ranks:
        wait_until((tmp_path / "runs").exists, ranks[1])
        time.sleep(1)  # long enough for a few heartbeats
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(LIMIT + 1.5)
        ranks[1].send_signal(signal.SIGCONT)
        time.sleep(1)  # long enough for a few more heartbeats
        (tmp_path / "continue").touch()
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs


def test_importing_the_heartbeat_imports_no_torch():
    result = run(sys.executable, "-c", "import lowmem.distributed.heartbeat, sys; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr
