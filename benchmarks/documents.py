"""Write the generated parts of README.md and docs/ (tables of benchmark results, the list of flags), or check them.

    python benchmarks/documents.py            # rewrites the parts that differ
    python benchmarks/documents.py --check    # changes nothing; prints what differs, with exit code 1

Each part is between two comments, and the first comment names it. See benchmarks/README.md.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import summaries

ROOT = Path(__file__).resolve().parents[1]

_RESULTS = "benchmarks/results/"
PARTS = {
    "README.md": {"peaks": (summaries.peaks, _RESULTS + "memory.jsonl")},
    "docs/data.md": {"rows": (summaries.rows, _RESULTS + "data.jsonl")},
    "docs/memory.md": {
        "memory": (summaries.memory, _RESULTS + "memory.jsonl"),
        "layered": (summaries.layered, _RESULTS + "layered.jsonl"),
    },
    "docs/plan.md": {"plan": (summaries.plan, _RESULTS + "plan.jsonl")},
    "docs/distributed.md": {
        "launchers": (summaries.launchers, _RESULTS + "launchers.jsonl"),
        "shapes": (summaries.shapes, _RESULTS + "strategies.jsonl"),
    },
    "docs/checkpoints.md": {
        "checkpoint": (summaries.checkpoint, _RESULTS + "checkpoint.jsonl"),
        "soak": (summaries.soak, _RESULTS + "soak.md"),
    },
    "docs/results.md": {
        "comparison": (summaries.comparison, _RESULTS + "compare.jsonl"),
        "strategies": (summaries.strategies, _RESULTS + "strategies.jsonl"),
    },
    "docs/coming-from.md": {"elsewhere": (summaries.elsewhere, "lowmem/config/elsewhere.py")},
    "docs/flags.md": {"flags": (summaries.flags, "lowmem/config/train_config.py")},
}
"""For each document, its parts by name: the function that renders the part, and the file with its data."""

_PART = re.compile(r"<!-- begin (\w+),[^>]*-->\n.*?<!-- end \1 -->", re.DOTALL)


def render(name: str, summary: summaries.Summary, file: str) -> str:
    """Render a part from `file`, and add the two comments around the part."""
    text = (ROOT / file).read_text()
    lines = summary(list(map(json.loads, text.splitlines())) if file.endswith(".jsonl") else text)
    begin = f"<!-- begin {name}, written by benchmarks/documents.py from {file}: do not edit -->"
    return "\n".join([begin, "", *lines, "", f"<!-- end {name} -->"])


def parts_in(text: str, document: str) -> dict[str, str]:
    """Return the document's parts with their comments. Raises ValueError if a part is missing, repeated or unknown."""
    found = list(_PART.finditer(text))
    expected = PARTS[document]
    if sorted(match[1] for match in found) != sorted(expected):
        names = ", ".join(match[1] for match in found) or "none"
        raise ValueError(f"{document} must contain each of these parts once: {', '.join(expected)}; found: {names}")
    return {match[1]: match[0] for match in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="print what differs, and change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/; default: the project")
    flags = parser.parse_args()
    texts = {document: (flags.root / document).read_text() for document in PARTS}
    try:
        parts = {document: parts_in(text, document) for document, text in texts.items()}
    except ValueError as error:
        parser.error(str(error))
    changed = dict(texts)
    for document, old in parts.items():
        for name, (summary, file) in PARTS[document].items():
            if (new := render(name, summary, file)) != old[name]:
                print(f"{name} in {document}: {'differs from' if flags.check else 'rewritten from'} {file}")
                changed[document] = changed[document].replace(old[name], new)
    if flags.check:
        return int(changed != texts)
    for document, text in changed.items():
        if text != texts[document]:
            (flags.root / document).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
