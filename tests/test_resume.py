"""A killed and resumed run has the bits of a run never killed; the rows do not depend on the number of processes."""

import json
import os
import random
import signal
import time

import pytest
from torch import equal

from tests import runs
from tests.forked import train_ranks
from tests.models import T5
from tests.processes import started_train, train
from tests.runs import assert_same_run, curve, steps, weights, write_files

STEPS = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("work"), num_rows=90, dropout_rate=0.1)


def flags(work, name, **changes):
    return runs.flags(work, name, **{"batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": STEPS} | changes)


@pytest.fixture(scope="module")
def uninterrupted(work):
    result = train("train", *flags(work, "whole"))
    assert result.returncode == 0, result.stderr
    assert steps(work, "whole") == list(range(1, STEPS + 1))
    return "whole"


def test_a_run_killed_at_random_and_resumed_ends_with_the_same_bits(work):
    """This test uses the exact tier; similar tests use fp32 (test_restart.py) and the lean tier (test_soak.py)."""
    options, rng = {"mixed_precision": "bf16"}, random.Random(8)
    assert train("train", *flags(work, "whole exact", **options)).returncode == 0
    kills = 0
    for _ in range(12):
        with started_train("train", *flags(work, "killed exact", resume="auto", **options)) as process:
            # kill the run up to three times, each time at a random moment shortly after a new checkpoint
            if kills < 3 and wait_for_new_checkpoint(process, work / "killed exact" / "checkpoints"):
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
            _, errors = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
    assert process.returncode == 0 and kills >= 2, kills
    assert_same_run(work, "killed exact", "whole exact")


def wait_for_new_checkpoint(process, folder):
    before = set(os.listdir(folder)) if folder.exists() else set()
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit:
        if folder.exists() and {name for name in os.listdir(folder) if name.startswith("step-")} - before:
            return True
        time.sleep(0.002)
    return False


def test_two_processes_continue_a_run_of_one_process(work, uninterrupted):
    result = train("train", *flags(work, "elastic", max_steps=STEPS // 2))
    assert result.returncode == 0, result.stderr
    resumed, other = train_ranks(2, "train", *flags(work, "elastic", max_steps=STEPS, resume="auto"))
    assert resumed.returncode == other.returncode == 0, (resumed.stdout, other.stdout)
    assert f"steps {STEPS // 2} to {STEPS}, each of 8 rows: 2 processes x 2 micro-batches" in resumed.stdout
    assert steps(work, "elastic") == list(range(1, STEPS + 1))
    assert f"with --max_steps={STEPS} (was {STEPS // 2})" in resumed.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_the_losses_continue_as_if_never_interrupted(work, processes, tmp_path):
    """Losses depend on neither max_steps nor processes, because the learning rate is constant and dropout is off."""
    (tmp_path / "t5.json").write_text(json.dumps(T5 | {"dropout_rate": 0.0}))
    common = {"model_config": tmp_path / "t5.json", "lr_scheduler_type": "constant", "output_dir": tmp_path / "out"}
    whole = common | {"output_dir": tmp_path / "whole"}
    assert train("train", *flags(work, "", **whole, max_steps=16)).returncode == 0
    assert train("train", *flags(work, "", **common, max_steps=9)).returncode == 0
    for last in train_ranks(processes, "train", *flags(work, "", **common, max_steps=16, resume="auto")):
        assert last.returncode == 0, last.stdout
    assert dict(curve(tmp_path, "out")) == pytest.approx(dict(curve(tmp_path, "whole")), rel=1e-5)
    assert steps(tmp_path, "out") == list(range(1, 17))


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(work, uninterrupted):
    assert train("train", *flags(work, "damaged")).returncode == 0
    newest = work / "damaged" / "checkpoints" / f"step-{STEPS:08d}"
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    refused = train("train", *flags(work, "damaged", resume=newest))
    assert refused.returncode == 2 and "optimizer.safetensors changed since it was saved" in refused.stderr
    result = train("train", *flags(work, "damaged", resume="auto"))
    assert result.returncode == 0, result.stderr
    assert "skipped a checkpoint" in result.stdout and f"steps {STEPS - 5} to {STEPS}" in result.stdout
    assert_same_run(work, "damaged", uninterrupted)


def test_flags_of_another_run_are_refused_on_resume(work, uninterrupted):
    for changes, message in [
        ({"seed": 1}, "is from another run: --seed=1 (was 0)"),
        ({"max_grad_norm": 0.5}, "is from another run: --max_grad_norm=0.5 (was 1.0)"),
        ({"batch_size": 3}, "trained on 8 rows per step, but these flags set 12: set --global_batch_size=8"),
    ]:
        result = train("train", *flags(work, uninterrupted, resume="auto", **changes))
        assert result.returncode == 2 and message in result.stderr, result.stderr
    kept = flags(work, uninterrupted, resume="auto", batch_size=4, gradient_accumulation_steps=2)
    assert train("train", *kept).returncode == 0  # accepted, because a step still has 8 rows


def test_an_older_checkpoint_is_not_resumed_into_a_folder_with_later_ones(work, uninterrupted):
    older = work / uninterrupted / "checkpoints" / f"step-{STEPS - 5:08d}"
    result = train("train", *flags(work, uninterrupted, resume=older))
    assert result.returncode == 2 and "contains later checkpoints" in result.stderr
    mixed = train("train", *flags(work, "whole2", resume=older, max_steps=STEPS - 4))
    assert mixed.returncode == 0, mixed.stderr
    again = train("train", *flags(work, "whole2", resume=older))
    assert again.returncode == 2 and "is not one of them" in again.stderr
    result = train("train", *flags(work, "branch", resume=older))
    assert result.returncode == 0, result.stderr
    assert steps(work, "branch") == list(range(STEPS - 4, STEPS + 1))
    assert all(
        equal(a, b) for a, b in zip(*(weights(work, x).values() for x in ("branch", uninterrupted)), strict=True)
    )
