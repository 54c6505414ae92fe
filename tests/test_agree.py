import pytest

from lowmem.config import RankError, UsageError
from lowmem.parallel.agree import failing_together, on_main_rank
from lowmem.parallel.launch import join
from tests.processes import run_ranks


def fail_somewhere() -> None:
    accelerator = join()
    rank = accelerator.process_index
    for failing, kind, elsewhere in [(1, KeyError, RankError), (2, UsageError, UsageError)]:
        told = "what was wrong" if rank == failing else rf"rank {failing} failed with {kind.__name__}: .*what was wrong"
        with pytest.raises(kind if rank == failing else elsewhere, match=told), failing_together():
            if rank == failing:
                raise kind("what was wrong")
    with failing_together():
        pass  # nobody failed
    with pytest.raises(ZeroDivisionError if rank == 0 else RankError, match="rank 0 failed|division"):
        on_main_rank(lambda: 1 / 0)
    accelerator.end_training()


def test_one_rank_fails_and_all_raise_what_it_tells():
    run_ranks(3, "tests.test_agree:fail_somewhere")


def test_alone_an_error_is_itself():
    with pytest.raises(KeyError), failing_together():
        raise KeyError("alone")
