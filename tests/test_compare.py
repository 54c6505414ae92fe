"""benchmarks/compare.py: the systems do the same work, and what is not there is a line."""

import json
import sys

from tests.processes import run


def compared(output, *flags):
    """The records of a comparison of small models, by system, and its table."""
    sizes = ["--steps=3", "--repeats=1", "--batch_size=2", "--gradient_accumulation_steps=2", "--seq_len=16"]
    command = [sys.executable, "benchmarks/compare.py", *sizes, *flags, f"--output={output}"]
    result = run(*command, timeout=240)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {record["system"]: record for record in records}, output.with_suffix(".md").read_text()


def test_in_fp32_all_systems_have_the_same_losses(tmp_path):
    systems = ["trainer", "lowmem-off", "plain"]
    flags = ["--model=t5-tiny", "--mixed_precision=no", f"--systems={','.join(systems)},llamafactory"]
    of, table = compared(tmp_path / "t5.jsonl", *flags)
    for system in systems[1:]:
        pairs = zip(of[system]["loss"], of["trainer"]["loss"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4, system
    assert of["trainer"]["loss"][2] < of["trainer"]["loss"][0]
    assert "not installed" in of["llamafactory"]["left_out"] or "causal" in of["llamafactory"]["left_out"]
    assert f"| llamafactory | {of['llamafactory']['left_out']} |" in table


def test_two_processes_share_the_rows_of_a_step(tmp_path):
    flags = ["--model=llama-tiny", "--mixed_precision=no", "--threads=1"]
    one, _ = compared(tmp_path / "one.jsonl", *flags, "--batch_size=4", "--systems=lowmem-off")
    two, _ = compared(tmp_path / "two.jsonl", *flags, "--processes=2", "--systems=lowmem-off,trainer")
    for system in two:
        pairs = zip(two[system]["loss"], one["lowmem-off"]["loss"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4, system
    assert two["lowmem-off"]["peak_rss_bytes"] > 1.5 * one["lowmem-off"]["peak_rss_bytes"]
