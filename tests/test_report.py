"""A run continues to log after a closed pipe or a full disk, and a resumed run logs nothing twice."""

import io
import json
import os
import resource
import sys
import time

import pytest
import yaml
from transformers import ByT5Tokenizer

from lowmem import Report, data_place, encode_causal, init_distributed, open_stream, parallelize
from lowmem.checkpoint.model_card import model_card
from lowmem.evaluation import Answer
from lowmem.report import memory_notes, print_answers
from lowmem.run_output import MetricsLog, print_lines
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.processes import finish, started_function


def print_to_a_closed_pipe(pipe, gone, streams):
    """Print into a pipe after its reader has closed it."""
    writer = os.open(pipe, os.O_WRONLY)
    for stream in streams:
        os.dup2(writer, stream)
    while not gone.exists():
        time.sleep(0.01)
    for _ in range(3):
        print_lines("x" * 10_000)
    print("still running", file=sys.stderr, flush=True)


@pytest.mark.parametrize("streams", [(1,), (1, 2)])
def test_a_reader_that_closes_the_pipe_does_not_end_the_run(streams, tmp_path):
    pipe, gone = tmp_path / "pipe", tmp_path / "gone"
    os.mkfifo(pipe)
    with started_function(print_to_a_closed_pipe, pipe, gone, streams) as process:
        pipe.open().close()
        gone.touch()
        result = finish(process)
    assert (result.returncode, result.stderr) == (0, "" if 2 in streams else "still running\n")


def write_on_a_full_disk(path, room):
    log = MetricsLog(path, step=None)
    # The limit below holds for every file, including the one that stdout goes to. This record makes the metrics file
    # long, so that a limit near its size leaves room for the text on stdout.
    log.write({"step": 1, "padding": "x" * 1000})
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
    log.write({"step": 2, "loss": float("inf")})
    log.write({"step": 3, "loss": 3.0})
    assert log.metrics_of(3) == {"step": 3, "loss": 3.0} and log.metrics_of(4) == {}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if room == "made":
        log.write({"step": 4, "loss": 4.0})
    else:
        log.close()


@pytest.mark.parametrize("room", ["made", "never made"])
def test_records_that_cannot_be_written_are_kept_until_there_is_room(room, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with started_function(write_on_a_full_disk, path, room) as process:
        result = finish(process)
    assert result.returncode == 0, result.stderr
    (waits, *lost) = result.stdout.splitlines()
    assert waits == f"{path} cannot be written (File too large): keeping its records in memory for now"
    log = MetricsLog(path, step=10)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    if room == "made":
        assert [record["step"] for record in written] == [1, 2, 3, 4] and written[1]["loss"] is None and not lost
    else:
        assert [record["step"] for record in written] == [1]
        assert lost == [f"2 records of {path} are lost: the file cannot be written"]
    assert log.resumed_at == {}


def test_a_run_resumed_at_its_end_logs_its_test_loss_and_end_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", step=None)
    for record in ({"step": 1, "loss": 2.0}, {"step": 1, "test_loss": 1.0}, {"event": "end", "steps": 1}):
        log.write(record)
    log = MetricsLog(tmp_path / "metrics.jsonl", step=1)
    assert log.resumed_at == {"step": 1, "loss": 2.0}
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_characters_that_the_terminal_cannot_show_become_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    print_answers([Answer(0, "四", "十", "a")])
    assert terminal.buffer.getvalue() == b"  '\\u56db' -> 'a' (expected '\\u5341')\n"


def test_the_peaks_of_a_gpu_are_shown():
    measured = {"peak_device_bytes": 3 * 2**30, "peak_active_bytes": 2**32, "peak_reserved_bytes": 9 * 2**29}
    assert memory_notes(measured) == ["peak 3.0 GiB of the GPU, 4.5 GiB reserved"]
    assert memory_notes(dict.fromkeys(measured, 0)) == []


def print_openings(folder, accumulations):
    """Print what a run in two stages prints before its first step, with each number of micro-batches."""
    accelerator = init_distributed()
    model = parallelize(build("llama"), accelerator, pp_size=2)
    report, rank = Report(folder, {}, accelerator, total_steps=1), data_place(model)
    encode = encode_causal(ByT5Tokenizer(), max_seq_len=32)
    for number in accumulations:
        sizes = {"batch_size": 1, "gradient_accumulation_steps": number}
        stream = open_stream(qa_rows(9), encode, **rank.coordinates, **sizes)
        report.opening(model, "weights", stream, rank, tier="off", sharding="pp_size=2")


def test_stages_that_idle_for_more_than_a_quarter_of_a_step_are_reported(tmp_path, capfd):
    assert fork_ranks(2, print_openings, tmp_path, [1, 2, 3]) == [0, 0]
    advice = "--gradient_accumulation_steps=3, or a larger --global_batch_size, makes it 25% or less"
    lines = [line.removeprefix("rank 0: ").strip() for line in capfd.readouterr().out.splitlines() if "idles" in line]
    assert lines == [f"each stage idles for {idle} of a step: {advice}" for idle in ("50%", "33%")]


def test_a_model_card_has_front_matter_that_yaml_reads_and_tables_without_stray_bars():
    card = {"title": "a\nb", "base_model": "org/model", "is_adapted": True, "step": 1200, "num_rows": 5000}
    card |= {
        "metrics": {"eval_loss": 1.25, "eval_rows": 1000, "loss": None},
        "fingerprints": [("/home/me/a.parquet", "12ab")],
    }
    text = model_card(**card, settings={"prompt_template": "{a}|`{b}`\n"})
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter) == {"library_name": "peft", "base_model": "org/model", "tags": ["lowmem"]}
    lines = body.splitlines()
    for line in (
        "# a b",
        "## Results of step 1,200",
        "| eval_loss | `1.25` |",
        "| eval_rows | `1,000` |",
        "| loss | `not finite` |",
    ):
        assert line in lines
    assert "## Training data: 5,000 rows" in lines and "| a.parquet | `12ab` |" in lines
    assert r"| --prompt_template | `{a}\|'{b}' ` |" in lines
    assert "base_model" not in model_card(**card | {"base_model": "/"}, settings={})
