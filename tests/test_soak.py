"""A short run of benchmarks/soak.py: a killed and resumed run ends with the bits of a run that is never killed."""

from benchmarks.soak import VICTIMS, Kill, Soak, soak


def test_a_run_killed_repeatedly_ends_with_the_bits_of_one_never_killed(tmp_path):
    result = soak(tmp_path, kills=3)
    assert {kill.victim for kill in result.kills} == VICTIMS.keys()
    assert result.failures() == []


def test_a_soak_reports_every_failure():
    kill = Kill("all", in_save=False, step=14, resumed_from=5, seconds=0.1)
    lines = Soak([kill], 40, same_weights=False, same_losses=False).failures()
    assert lines[0] == "a kill lost 9 steps, but the run saves every 5 steps" and len(lines) == 3
