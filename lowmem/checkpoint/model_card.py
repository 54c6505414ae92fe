"""The model card of a trained model: README.md, with the front matter that the Hugging Face hub reads."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import PurePath


def model_card(
    *,
    title: str,
    base_model: str | None,
    is_adapted: bool,
    step: int,
    metrics: Mapping[str, float | None],
    num_rows: int,
    fingerprints: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
) -> str:
    """Return the text. It depends on nothing but the arguments and the versions of libraries.

    `metrics` are those of optimizer step `step`, None if not finite. `fingerprints` are names and hashes of the
    training files.
    """
    matter = {"library_name": "peft" if is_adapted else "transformers"}
    if base_model and not os.path.isdir(base_model):  # the hub accepts only its own names
        matter["base_model"] = base_model
    results = [(name, _number(value)) for name, value in metrics.items()]
    # without folders, which say more about a machine than about the data
    data = [(PurePath(name).name, digest) for name, digest in fingerprints]
    flags = [(f"--{name}", value) for name, value in settings.items()]
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in matter.items()),
        "tags:\n- lowmem",
        "---",
        f"\n# {' '.join(title.split())}\n",
        f"Trained with lowmem, torch {version('torch')} and transformers {version('transformers')}.",
        *_table(f"Results of step {step:,}", ("metric", "value"), results),
        *_table(f"Training data: {num_rows:,} rows", ("file", "fingerprint"), data),
        *_table("Settings that are not defaults", ("flag", "value"), flags),
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _table(title: str, header: tuple[str, str], rows: Sequence[tuple[str, object]]) -> list[str]:
    if not rows:
        return [f"\n## {title}"]
    plain = {ord("|"): r"\|", ord("`"): "'", ord("\n"): " "}
    cells = [tuple(str(cell).translate(plain) for cell in row) for row in rows]
    return [f"\n## {title}\n", f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {a} | `{b}` |" for a, b in cells)]
