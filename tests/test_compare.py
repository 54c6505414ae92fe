"""In benchmarks/compare.py, systems do the same work, and the table says why a system could not run."""

import json
import re
import sys

from tests.processes import run


def compared(folder, *flags):
    """Run compare.py on a small model and rows of unequal lengths; return {system: record}, and the table as text."""
    rows = [{"prompt": "a" * (i % 23 + 1), "response": "b" * (i * 7 % 11 + 1)} for i in range(97)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "compared.jsonl"
    sizes = ["--steps=5", "--gradient_accumulation_steps=2", "--seq_len=32", f"--train_file={folder}/rows.jsonl"]
    sizes += ["--mixed_precision=no", "--repeats=1", "--threads=1", f"--output={output}"]
    result = run(sys.executable, "benchmarks/compare.py", *sizes, *flags, timeout=240)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert not any("failed" in record for record in records), result.stderr
    table = output.with_suffix(".md").read_text()
    assert str(folder) not in table + output.read_text()
    output.unlink()
    return {record["system"]: record for record in records}, table


def largest_difference(losses, others):
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def test_in_fp32_three_systems_have_the_same_losses(tmp_path):
    flags = ["--model=t5-tiny", "--batch_size=3", "--systems=trainer,lowmem-off,plain,llamafactory"]
    of, table = compared(tmp_path, *flags)
    for system in ("lowmem-off", "plain"):
        assert largest_difference(of[system]["loss"], of["trainer"]["loss"]) < 1e-5, system
    assert {"trainer", "lowmem-off", "plain"} == {name for name in of if re.search(rf"\| {name} \| [\d,]+ \|", table)}
    assert f"| llamafactory | {of['llamafactory']['left_out']} |" in table


def test_two_processes_share_the_rows_of_a_step(tmp_path):
    one, _ = compared(tmp_path, "--model=llama-tiny", "--batch_size=4", "--systems=lowmem-off")
    two, _ = compared(tmp_path, "--model=llama-tiny", "--batch_size=2", "--systems=lowmem-off,trainer", "--processes=2")
    for system in two:
        assert largest_difference(two[system]["loss"], one["lowmem-off"]["loss"]) < 1e-5, system
    assert two["lowmem-off"]["peak_rss_bytes"] > 1.5 * one["lowmem-off"]["peak_rss_bytes"]
