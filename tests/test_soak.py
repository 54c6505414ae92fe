"""A short run of benchmarks/soak.py: a killed run ends with the bits of one never killed. Leaks are found."""

import pytest

from benchmarks.soak import VICTIMS, Growth, Kill, Soak, soak
from benchmarks.soak_runs import Run, measures


def test_a_run_killed_repeatedly_ends_with_the_bits_of_one_never_killed(tmp_path):
    result = soak(tmp_path, kills=3, processes=2)
    assert {kill.victim for kill in result.kills} == VICTIMS[2].keys()
    assert result.failures() == []


def test_a_sample_of_a_run_has_its_memory_descriptors_threads_and_files(tmp_path):
    with Run(tmp_path, "sampled", processes=1) as run:
        (run.temporary / "left").touch()
        found = measures(run)
    assert found["rank 0: RSS", "MiB"] >= found["rank 0: USS", "MiB"] > 0
    assert found["rank 0: open descriptors", ""] >= 3 and found["rank 0: threads", ""] >= 1
    assert found["files in the output folder", ""] == 0 and found["files in the temporary folder", ""] == 1


def test_a_soak_reports_every_failure():
    kill = Kill(2, "all", "step", step=14, resumed_from=5, seconds=0.1)
    lines = Soak([kill], 40, same_weights=False, same_records=False, same_answers=False).failures()
    assert lines[0] == "processes: 2; a kill lost 9 steps, but the run saves every 5 steps" and len(lines) == 4


@pytest.mark.parametrize(("unit", "grown"), [("MiB", 8.5), ("", 1.5)])
def test_a_leak_is_what_the_fitted_line_of_a_measure_gains(unit, grown):
    def growth(gain):
        return Growth(1, "rank 0", unit, [(step, 100 + gain * step / 9000 + step % 2) for step in range(9001)])

    assert abs(growth(grown).slope * 9000 - grown) < 0.01
    assert len(growth(grown).failures()) == 1
    assert growth(grown / 2).failures() == []


def test_a_run_that_fails_reports_the_end_of_its_log(tmp_path):
    with Run(tmp_path, "bad", processes=1, max_steps=0, lr="x") as run, pytest.raises(RuntimeError, match="--lr"):
        run.end()
