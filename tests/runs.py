"""Write the input files, make the flags and read the outputs of small training runs."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import equal

from tests.models import T5, qa_rows


def write_files(folder: Path, *, num_rows: int, dropout_rate: float = 0.0) -> Path:
    """Write rows.jsonl and t5.json (a T5 config) into `folder`; return `folder`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_rows(num_rows)))
    (folder / "t5.json").write_text(json.dumps(T5 | {"dropout_rate": dropout_rate}))
    return folder


def settings(work: Path, name: str, **changes: object) -> dict[str, object]:
    """Return the settings of a run that reads the files in `work`, writes to `work/name` and logs every step."""
    return {
        "train_file": work / "rows.jsonl",
        "model_config": work / "t5.json",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 5,
        "output_dir": work / name,
    } | changes


def flags(work: Path, name: str, **changes: object) -> list[str]:
    return [f"--{flag}={value}" for flag, value in settings(work, name, **changes).items()]


def records(work: Path, name: str) -> list[Mapping[str, object]]:
    return [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def curve(work: Path, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(work, name) if "loss" in record]


def losses(work: Path, name: str) -> list[float]:
    return [loss for _, loss in curve(work, name)]


def evaluations(work: Path, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record["eval_loss"]) for record in records(work, name) if "eval_loss" in record]


def steps(work: Path, name: str) -> list[int]:
    return [step for step, _ in curve(work, name)]


def weights(work: Path, name: str):
    return load_file(work / name / "model" / "model.safetensors")


def exit_of(work: Path, name: str) -> dict[str, object]:
    return json.loads((work / name / "exit.json").read_text())


def assert_same_run(work: Path, name: str, other: str) -> None:
    """Assert that two runs ended with bit-identical weights and logged the same losses."""
    mine, theirs = weights(work, name), weights(work, other)
    assert mine.keys() == theirs.keys()
    assert all(equal(mine[key], theirs[key]) for key in mine)
    assert curve(work, name) == curve(work, other)
    assert evaluations(work, name) == evaluations(work, other)
