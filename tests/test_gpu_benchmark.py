"""benchmarks/gpu.py runs on a CPU; a section that fails, dies or is cut loses no result and no later section."""

import json
import os
import signal
import sys
import time
from importlib import import_module
from itertools import count

from tests.processes import ROOT, children, finish, run_program, started_function, wait_until


def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script
    return import_module("gpu")


def run_gpu(*flags):
    gpu()
    run_program(ROOT / "benchmarks" / "gpu.py", *flags)


def measured(output, function, *arguments):
    """Call a function in a new process; return the records in `output`, and what the process printed."""
    with started_function(function, *arguments) as process:
        result = finish(process)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in output.read_text().splitlines()], result.stdout


def test_a_dry_run_finds_equal_bits_and_lists_each_section(tmp_path):
    output = tmp_path / "gpu.jsonl"
    records, printed = measured(output, run_gpu, f"--output={output}", "--sections=bits,syncs")
    assert printed.startswith("torch has no GPU: runs tiny shapes on the CPU\n")
    *results, end, skipped = records
    assert len(results) == 8 and all(record["differing"] == [] and record["tensors"] > 30 for record in results)
    assert end["section"] == "bits" and end["section_seconds"] > 0
    assert (skipped["section"], skipped["skipped"]) == ("syncs", "needs a GPU")
    assert all(record["versions"]["torch"] and record["machine"]["device"] == "cpu" for record in records)

    records, _ = measured(output, run_gpu, f"--output={output}", "--dry", "--minutes=0")
    listed = {record["section"]: record for record in records[10:]}
    assert list(listed) == "bits update memory speed syncs offload out_of_memory resume sdpa".split()
    assert all(record.keys() & {"left_out", "skipped"} for record in listed.values())
    table = output.with_suffix(".md").read_text()
    assert str(tmp_path) not in table + output.read_text()
    assert all(f"### {name}" in table for name in listed) and "| odd | adamw_bf16 | lean | torch.float32 | 5 |" in table


def divide():
    yield {"value": 1}
    yield {"value": 1 // 0}


def numbers(device):
    yield {"case": 1}, divide
    yield {"case": 2}, lambda: [{"value": 2}, {"value": 3}]
    raise KeyError("no third case")


def death(device):
    yield {"case": 1}, lambda: [{"value": 4}]
    yield {"case": 2}, os.abort


def hang(device):
    yield {"case": 1}, lambda: [{"value": 5}]
    yield {"case": 2}, lambda: time.sleep(60)


def endless(device):
    yield {"case": 1}, lambda: ({"value": value, "text": "x" * 1000} for value in count())


def run_sections(output, *sections, minutes):
    import torch

    about = {"date": "", "command": "", "versions": {}, "machine": {"device": "", "driver": "", "cpu": "", "cores": 1}}
    sections = {name: gpu().Section(cases, share) for name, cases, share in sections}
    gpu().run_sections(sections, torch.device("cpu"), output, minutes=minutes, about=about)


def run_bad_sections(output):
    half = [(cases.__name__, cases, 0.5) for cases in (numbers, death, hang)]
    run_sections(output, *half, ("again", numbers, 0.5), ("after", numbers, 0.0), minutes=0.2)


def test_what_fails_is_recorded_and_the_next_case_and_section_run(tmp_path):
    output = tmp_path / "gpu.jsonl"
    records, _ = measured(output, run_bad_sections, output)
    found = {record["section"]: [] for record in records}
    for record in records:
        if "section_seconds" not in record:
            found[record["section"]].append((record.get("value"), record.get("failed")))
    zero = "ZeroDivisionError: integer division or modulo by zero"
    for name in ("numbers", "again"):
        expected = [(1, None), (None, zero), (2, None), (3, None), (None, "KeyError: 'no third case'")]
        assert found[name] == expected
    assert found["death"] == [(4, None), (None, "its process ended with exit code -6")]
    assert found["hang"] == [(5, None), (None, "it did not end within 6 s")]
    assert records[-1]["section"] == "after" and records[-1]["left_out"] == "0.2 minutes were over"
    at = next(record["at"] for record in records if record.get("failed") == zero)
    assert at.startswith("test_gpu_benchmark.py:")


def run_endless_section(output):
    run_sections(output, ("endless", endless, 1.0), ("after", numbers, 1.0), minutes=10)


def test_an_interrupted_run_leaves_whole_lines_and_no_process(tmp_path):
    output = tmp_path / "gpu.jsonl"
    with started_function(run_endless_section, output) as process:
        wait_until(lambda: output.exists() and output.read_text().count("\n") >= 20, process)
        sections = children(process)
        os.kill(process.pid, signal.SIGTERM)
        result = finish(process, timeout=300)
        assert sections and not any(child.is_running() for child in sections)
    assert "KeyboardInterrupt" in result.stderr
    lines = output.read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") and json.loads(line)["value"] == number for number, line in enumerate(lines))
