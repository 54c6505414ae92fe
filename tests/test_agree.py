import os
from datetime import timedelta

import pytest
import torch.distributed as dist

from lowmem.distributed import heartbeat
from lowmem.distributed.collectives import collective, on_main_rank, raise_on_all_ranks, report_failure, sum_over_ranks
from lowmem.distributed.setup import init_distributed
from lowmem.errors import RankError, SaveError, UsageError
from tests.forked import fork_ranks


def fail_somewhere() -> None:
    accelerator = init_distributed()
    rank = accelerator.process_index
    for failing, kind, elsewhere in [
        (1, KeyError, RankError),
        (2, UsageError, UsageError),
        (0, SaveError, SaveError),
    ]:
        error = kind if rank == failing else elsewhere
        prefix = "" if rank == failing else rf"rank {failing} failed with {kind.__name__}: .*"
        with pytest.raises(error, match=prefix + "what was wrong"), raise_on_all_ranks():
            if rank == failing:
                raise kind("what was wrong")
    with raise_on_all_ranks():
        pass  # no rank fails here
    with pytest.raises(ZeroDivisionError if rank == 0 else RankError, match="rank 0 failed|division"):
        on_main_rank(lambda: 1 / 0)
    accelerator.end_training()


def test_an_error_on_one_rank_is_raised_on_all_ranks():
    assert fork_ranks(3, fail_somewhere) == [0, 0, 0]


def test_one_process_raises_the_original_error():
    with pytest.raises(KeyError), raise_on_all_ranks():
        raise KeyError("alone")


def be_late():
    accelerator = init_distributed(heartbeat_timeout=3)
    heartbeat.at_step(7)
    group = dist.new_group(timeout=timedelta(seconds=2))
    if accelerator.process_index == 0:
        with heartbeat.phase("writing"):
            sum_over_ranks(1)  # rank 0 waits for rank 1, which is alive but waits in another group
    else:
        message = (
            "^step 7, summing gradients: no rank is silent: rank 0 is at step 7, writing, all-reducing; rank 1 is at"
        )
        with pytest.raises(RankError, match=message), collective("summing gradients"):
            dist.barrier(group)
        sum_over_ranks(1)
    accelerator.end_training()


def test_a_collective_that_times_out_reports_where_each_rank_is():
    assert fork_ranks(2, be_late) == [0, 0]


def lose_a_rank():
    accelerator = init_distributed(heartbeat_timeout=20)
    if accelerator.process_index == 1:
        os._exit(0)
    with pytest.raises(RankError) as caught, report_failure():
        sum_over_ranks(1)
    assert str(caught.value).count("rank 1 has been silent") == 1


def test_a_silent_rank_is_reported_once():
    assert fork_ranks(2, lose_a_rank) == [0, 0]
