"""The examples of other models and averages beat their baselines, sharded too, and resume to the same bits."""

import re
import signal

from lowmem import latest_checkpoint
from tests.forked import train_ranks
from tests.processes import ROOT, finish, started_train, train, wait_until

EXAMPLES = ROOT / "examples"


def result_of(process):
    """Return what an example prints, and the result and the baseline in its last line."""
    assert process.returncode == 0, process.stderr
    *printed, last = process.stdout.splitlines()
    result, baseline = map(float, re.findall(r"\d\.\d+", last))
    return printed, result, baseline


def test_a_classifier_learns_what_the_order_of_words_means():
    _, accuracy, baseline = result_of(train(program=EXAMPLES / "classify.py"))
    assert accuracy > 0.95 and baseline == 0.5


def test_captions_that_training_has_not_shown_are_exactly_right():
    _, exact, baseline = result_of(train("--steps=100", program=EXAMPLES / "caption.py"))
    assert exact > 0.15 and baseline < 0.01


def test_two_shards_in_lean_learn_captions():
    flags = ("--sharding_strategy=FULL_SHARD", "--memory=lean", "--steps=50")
    first, second = train_ranks(2, *flags, program=EXAMPLES / "caption.py")
    _, exact, baseline = result_of(first)
    assert exact > 5 * baseline and second.returncode == 0 and second.stdout == ""


def test_an_average_of_weights_beats_the_last_and_continues_with_the_same_bits(tmp_path):
    program = EXAMPLES / "ema.py"
    _, average, last = result_of(train("--out=whole", program=program, cwd=tmp_path))
    assert average < last - 0.01
    with started_train("--out=killed", program=program, cwd=tmp_path) as process:
        wait_until(lambda: latest_checkpoint(tmp_path / "killed"), process)
        process.send_signal(signal.SIGKILL)
        assert finish(process).returncode == -signal.SIGKILL
    printed, *losses = result_of(train("--out=killed", program=program, cwd=tmp_path))
    assert printed[0].startswith("continue from step ") and losses == [average, last]
    final = [tmp_path / out / "step-00000200" for out in ("whole", "killed")]
    whole, killed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in final
    )
    assert killed == whole and any(path.parent.name == "extra" for path in whole)
