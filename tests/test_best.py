"""A run that stops early, or saves its best model, ends the same however often it is killed."""

import json
import os
import signal
import sys

import pytest

from lowmem.cli import main
from lowmem.config.parse import resolve
from lowmem.data.rows import RowSets, open_rows
from lowmem.distributed.signals import Signals
from lowmem.train import train as train_here
from tests.forked import train_ranks
from tests.models import qa_rows
from tests.processes import finish, started_function
from tests.runs import evaluations, records, settings, write_files

BEST, LAST = 12, 16  # with these settings, on one process
OPTIONS = {"batch_size": 4, "max_steps": 30, "learning_rate": 6e-2, "lr_scheduler_type": "constant", "eval_steps": 2}
OPTIONS |= {"save_steps": 5, "early_stopping_patience": 2, "load_best_model_at_end": True, "max_predict_samples": 2}
OPTIONS |= {"generation_max_new_tokens": 3, "logging_steps": 3}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("work"), num_rows=24, dropout_rate=0.1)
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_rows(30)[24:]))
    return folder


def flags(work, name, **changes):
    return settings(work, name, **OPTIONS | {"validation_file": work / "held.jsonl"} | changes)


def run_here(work, name, **changes):
    config = resolve(flags(work, name, **changes))
    rows = RowSets(open_rows(config.train_file), open_rows(config.validation_file))
    return train_here(config, rows, signals=Signals())


@pytest.fixture(scope="module")
def unbroken(work):
    assert run_here(work, "unbroken") == (LAST, False)
    return "unbroken"


def saved(work, name):
    return sorted(int(path.name.removeprefix("step-")) for path in (work / name / "checkpoints").glob("step-*"))


def model_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lowmem.json"}  # has output_dir


def test_the_run_ends_after_the_patience_and_saves_the_best_model(work, unbroken):
    found = evaluations(work, unbroken)
    assert [step for step, _ in found] == [*range(2, LAST + 1, 2)]
    assert min(found, key=lambda pair: pair[1])[0] == BEST == LAST - 2 * 2
    assert saved(work, unbroken) == [BEST, LAST]
    assert records(work, unbroken)[-1]["best"] == {"step": BEST, "eval_loss": dict(found)[BEST]}
    model, best = model_files(work / unbroken / "model"), work / unbroken / "checkpoints" / f"step-{BEST:08d}" / "model"
    card = model.pop("README.md").decode()
    assert model == model_files(best)
    assert f"## Results of step {BEST}\n" in card and f"| eval_loss | `{dict(found)[BEST]:.6g}` |" in card
    assert "| rows.jsonl | `" in card and "| --learning_rate | `0.06` |" in card and str(work) not in card
    answers = [json.loads(line) for line in (work / unbroken / "predictions.jsonl").read_text().splitlines()]
    assert [(answer["step"], answer["row_id"]) for answer in answers] == [
        (step, row) for step, _ in found for row in (0, 1)
    ]
    assert answers[0].keys() == {"step", "rows", "row_id", "prompt", "reference", "prediction"}


def test_ranks_that_shard_the_model_stop_together_and_load_the_best(work):
    words = flags(work, "sharded", sharding_strategy="FULL_SHARD", eval_batch_size=2)
    for rank in train_ranks(2, "train", *(f"--{name}={value}" for name, value in words.items())):
        assert rank.returncode == 0, rank.stdout + rank.stderr
    found = evaluations(work, "sharded")
    best, last = min(found, key=lambda pair: pair[1])[0], found[-1][0]
    assert last == best + 2 * 2 < OPTIONS["max_steps"] and saved(work, "sharded") == [best, last]
    model = model_files(work / "sharded" / "model")
    del model["README.md"]
    assert model == model_files(work / "sharded" / "checkpoints" / f"step-{best:08d}" / "model")


# where a run is killed: an event that a Python audit hook sees, how its path ends, and how often it comes before
KILLS = [
    ("open", "predictions.jsonl", 4),  # step 10 is saved and evaluated, but nothing of the evaluation is written
    ("open", "metrics.jsonl", 0),  # its answers are written, but not its metrics
    ("lowmem.disk mkdir", ".unfinished-step-00000012", 0),  # a new best is evaluated, but not saved
    ("lowmem.disk rename", "step-00000008", 0),  # it is saved, but an old checkpoint is not removed
    ("lowmem.disk mkdir", ".unfinished-step-00000016", 0),  # the run is to stop, but the step is not saved
    ("lowmem.disk mkdir", ".unfinished-model", 0),  # only model/ is missing
]


def train_until(event, name, before, words):
    left = before

    def kill(seen, arguments):
        nonlocal left
        if seen == "open" and arguments[1] == "r+":
            kind, path = seen, arguments[0]
        elif seen == "lowmem.disk":
            kind, path = f"{seen} {arguments[0]}", arguments[1]
        else:
            return
        if kind == event and str(path).endswith(name):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    sys.exit(main(arguments=words))


def test_a_run_killed_at_each_point_ends_with_the_same_model(work, unbroken):
    words = ["train", *(f"--{name}={value}" for name, value in flags(work, "killed", resume="auto").items())]
    for event, name, before in KILLS:
        with started_function(train_until, event, name, before, words) as process:
            result = finish(process)
        assert result.returncode == -signal.SIGKILL, (event, name, before, result.stdout, result.stderr)
        assert not (work / "killed" / "model").exists()
    assert run_here(work, "killed", resume="auto") == (LAST, False)
    assert evaluations(work, "killed") == evaluations(work, unbroken)
    for name in ("checkpoints/step-00000012/model", "checkpoints/step-00000016/model", "model"):
        assert model_files(work / "killed" / name) == model_files(work / unbroken / name)
    read = [(work / name / "predictions.jsonl").read_text() for name in ("killed", unbroken)]
    assert read[0] == read[1]
    assert saved(work, "killed") == saved(work, unbroken)


def test_a_best_evaluation_without_checkpoint_in_the_folder_is_forgotten_with_those_since(work, unbroken, capsys):
    last = work / unbroken / "checkpoints" / f"step-{LAST:08d}"  # where that run has stopped
    assert run_here(work, "elsewhere", resume=last, max_steps=LAST + 2) == (LAST + 2, False)
    assert f"of step {BEST}, has no checkpoint in" in capsys.readouterr().out
    assert records(work, "elsewhere")[-1]["best"]["step"] == LAST + 2
