"""A run started by commit b140580 can be resumed: its checkpoint, flags and metrics.jsonl are still valid."""

import json
import shutil

import pytest

from tests import runs
from tests.processes import ROOT, train

OLD = ROOT / "tests" / "data" / "run-b140580"


def test_a_run_of_an_earlier_version_resumes_with_the_same_losses(tmp_path, monkeypatch):
    # as on the CPU of that run: one with instructions for bf16 adds products in another order
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    shutil.copytree(OLD, tmp_path / "old")
    saved = json.loads((OLD / "config.json").read_text())
    changed = {"output_dir": tmp_path / "old", "resume": "auto"}
    flags = [f"--{name}={value}" for name, value in (saved | changed).items() if value not in (None, "")]
    result = train("train", *flags)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout and "with" not in result.stdout.partition("resumed from")[2].split("\n")[0]
    assert result.stdout.count("is from another version of lowmem, whose updates round differently: weights") == 1
    names = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
    for mine, theirs in zip(runs.records(tmp_path, "old"), runs.records(OLD.parent, OLD.name), strict=True):
        known = {name: theirs[name] for name in names if name in theirs}
        assert {name: mine[name] for name in known} == pytest.approx(known, rel=1e-5)
