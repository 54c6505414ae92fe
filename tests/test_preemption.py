"""A signal ends a run after a step that all ranks agree on, with one save; the run then resumes exactly."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from lowmem.config.parse import resolve
from lowmem.data.rows import RowSets
from lowmem.distributed.signals import Signals, catching_signals
from lowmem.errors import RowError, SaveError, UsageError
from lowmem.job.supervise import supervise
from lowmem.train import train as train_here
from tests.forked import fork_ranks
from tests.models import LLAMA, qa_rows
from tests.runs import assert_same_run, evaluations, records, settings, steps, write_files

STEPS = 6
ROWS = qa_rows(24)


class Rows(list):
    """A list of rows that calls `action` just before its `number`-th read of a row."""

    def __init__(self, rows, number=None, action=None):
        super().__init__(rows)
        self.left, self.action = number, action

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.action()
        return super().__getitem__(index)


def signalling(signals):
    """Return a function that sends SIGTERM to this process and waits until `signals` has noted it."""

    def action():
        os.kill(os.getpid(), signal.SIGTERM)
        limit = time.monotonic() + 10
        while signals.came is None and time.monotonic() < limit:
            time.sleep(0.001)

    return action


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("work"), num_rows=24, dropout_rate=0.1)


def run_here(work, name, rows=ROWS, held_out=None, signals=None, **changes):
    """Train in this process for 6 steps of 4 rows, without prefetching; evaluate and save every second step."""
    config = {"batch_size": 4, "max_steps": STEPS, "save_steps": 2, "eval_steps": 2, "prefetch_steps": 0}
    config |= {"max_predict_samples": 0, "resume": "auto"} | changes
    return train_here(resolve(settings(work, name, **config)), RowSets(rows, held_out), signals=signals or Signals())


@pytest.fixture(scope="module")
def uninterrupted(work):
    assert run_here(work, "whole", held_out=qa_rows(4)) == (STEPS, False)
    assert [step for step, _ in evaluations(work, "whole")] == [2, 4, 6]
    return "whole"


def checkpoints(work, name):
    return [int(path.name.removeprefix("step-")) for path in sorted((work / name / "checkpoints").glob("step-*"))]


def assert_resumed_to_the_same_end(work, name, uninterrupted):
    assert "event" not in records(work, name)[-1]
    assert run_here(work, name, held_out=qa_rows(4)) == (STEPS, False)
    assert_same_run(work, name, uninterrupted)
    ends = [records(work, run)[-1] for run in (name, uninterrupted)]
    assert ends[0]["event"] == "end" and ends[0]["best"] == ends[1]["best"]


def test_a_signal_between_saves_ends_the_run_after_the_current_step(work, uninterrupted):
    """An evaluation is due at step 4, but the run saves and ends without evaluating; the resumed run evaluates."""
    with catching_signals() as signals:
        rows = Rows(ROWS, 3 * 4 + 1, signalling(signals))  # while the rows of step 4 are read
        assert run_here(work, "between", rows, qa_rows(4), signals, save_steps=5) == (4, True)
    assert checkpoints(work, "between") == [4]
    assert [step for step, _ in evaluations(work, "between")] == [2]
    assert_resumed_to_the_same_end(work, "between", uninterrupted)


def test_a_signal_while_saving_ends_the_run_after_the_save(work, uninterrupted):
    with catching_signals() as signals:
        saving.action = signalling(signals)
        try:
            assert run_here(work, "saving", held_out=qa_rows(4), signals=signals) == (2, True)
        finally:
            saving.action = None
    assert checkpoints(work, "saving") == [2]
    assert_resumed_to_the_same_end(work, "saving", uninterrupted)


def saving(event, arguments):
    if event == "lowmem.disk" and saving.action and "checkpoints" in str(arguments[1]):
        saving.action()


saving.action = None
sys.addaudithook(saving)


@pytest.mark.parametrize(("reading", "step"), [(4 + 1, 2), (4 + 2 * 4 + 1, STEPS)])
def test_a_signal_while_evaluating_ends_the_run_after_saving_the_step(reading, step, work, uninterrupted):
    """If the signal comes at the last step, the first run does not save the final model, but the resumed run does."""
    with catching_signals() as signals:
        held_out = Rows(qa_rows(4), reading, signalling(signals))
        name = f"evaluating {step}"
        assert run_here(work, name, ROWS, held_out, signals, save_steps=5) == (step, True)
    assert checkpoints(work, name)[-1] == step and not (work / name / "model").exists()
    assert evaluations(work, name)[-1][0] == step
    assert_resumed_to_the_same_end(work, name, uninterrupted)


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError, MemoryError, KeyboardInterrupt])
def test_an_evaluation_that_fails_loses_no_step_and_changes_no_result(error, work, uninterrupted):
    def fail():
        held_out.left = 1  # the next read fails too: rows that could not be encoded together are read again
        raise error("from the test")

    name = f"fails-{error.__name__}"
    held_out = Rows(qa_rows(4), 4 + 2, fail)  # the check before the run reads 4 rows
    with pytest.raises((error, RowError)):
        run_here(work, name, held_out=held_out)
    assert checkpoints(work, name) == [2] and evaluations(work, name) == []
    assert_resumed_to_the_same_end(work, name, uninterrupted)
    assert evaluations(work, name) == evaluations(work, uninterrupted)


def test_a_signal_before_training_saves_nothing_and_evaluates_nothing(work, uninterrupted):
    with catching_signals() as signals:
        signalling(signals)()
        assert run_here(work, "before", ROWS, qa_rows(4), signals, eval_on_start=True) == (0, True)
        assert checkpoints(work, "before") == [] and records(work, "before") == []
        assert run_here(work, "again", ROWS, qa_rows(4), signals, save_steps=5) == (0, True)
    with catching_signals() as signals:
        rows = Rows(ROWS, 3 * 4 + 1, signalling(signals))
        assert run_here(work, "again", rows, qa_rows(4), signals, save_steps=5) == (4, True)
        assert run_here(work, "again", ROWS, qa_rows(4), signals) == (4, True)
    assert [step for step, _ in evaluations(work, "again")] == [2]
    assert_resumed_to_the_same_end(work, "again", uninterrupted)


@pytest.mark.parametrize(("step", "message"), [(0, "nothing is saved"), (3, "step 3 is saved")])
def test_exit_json_names_the_step_that_a_preempted_run_saved(step, message, tmp_path):
    assert supervise(lambda **_: (step, True), tmp_path, Signals()) == 75
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["cause"], record["step"], record["message"]) == ("preempted", step, message)


def be_signalled_on_one_rank(work):
    with catching_signals() as signals:
        if os.environ["RANK"] == "1":
            signalling(signals)()
        assert run_here(Path(work), "one rank", signals=signals) == (0, True)


def test_a_signal_to_one_rank_before_training_ends_all_ranks(work):
    assert fork_ranks(2, be_signalled_on_one_rank, str(work)) == [0, 0]


def block_saves(work, name):
    """Make every save fail: create a file where the checkpoint folder belongs."""
    (work / name).mkdir()
    (work / name / "checkpoints").touch()


def test_a_save_that_fails_ends_the_run(work):
    block_saves(work, "stop")
    with pytest.raises(SaveError, match="checkpoints"):
        run_here(work, "stop")
    assert steps(work, "stop") == [1, 2]


def test_on_save_error_continue_reports_a_failed_save_and_trains_on(work, capfd):
    block_saves(work, "continue")
    rows = Rows(ROWS, 4 * 4 + 1, (work / "continue" / "checkpoints").unlink)  # once step 5 begins, saves succeed again
    assert run_here(work, "continue", rows, on_save_error="continue") == (STEPS, False)
    output = capfd.readouterr().out
    assert "step 2: the checkpoint was not saved, training continues: " in output
    assert "step 4: the checkpoint was not saved" in output
    assert "step 6: the checkpoint was not saved" not in output
    assert checkpoints(work, "continue") == [STEPS] and steps(work, "continue") == list(range(1, STEPS + 1))


def test_a_preempted_run_that_cannot_be_saved_fails(work):
    block_saves(work, "lost")
    with catching_signals() as signals, pytest.raises(SaveError):
        rows = Rows(ROWS, 4 * 2 + 1, signalling(signals))
        run_here(work, "lost", rows, None, signals, on_save_error="continue")
    assert steps(work, "lost") == [1, 2, 3]


def test_a_resume_with_another_tokenizer_is_refused_unless_accepted(work, capfd):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    flags = {"tokenizer_name_or_path": work / "tokenizer"}
    run_here(work, "tokens", max_steps=2, **flags)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(work / "tokenizer")
    with pytest.raises(UsageError, match="step-00000002 was trained with another tokenizer or chat template: restore"):
        run_here(work, "tokens", **flags)
    assert run_here(work, "tokens", accept_changed_data=True, **flags) == (STEPS, False)
    assert "another tokenizer or chat template" in capfd.readouterr().out


def test_a_run_without_any_update_ends_with_an_error_and_no_model(work):
    (work / "llama.json").write_text(json.dumps(LLAMA))
    flags = {"model_config": work / "llama.json", "max_seq_len": 1}  # a row of one token has no target
    with pytest.raises(UsageError, match="none of the 6 steps updated the weights"):
        run_here(work, "nothing", **flags)
    assert checkpoints(work, "nothing") == [4, 6] and not (work / "nothing" / "model").exists()
