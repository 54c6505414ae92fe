"""The parts of the project's README that tell results: written from `results/`, or compared with it.

    python benchmarks/readme.py            # rewrites them
    python benchmarks/readme.py --check    # changes nothing; if some differ, their names and exit code 1

A part stands between two comments, of which the first has its name. See README.md.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import summaries

ROOT = Path(__file__).resolve().parents[1]

PARTS = {
    "rows": (summaries.rows, "data.jsonl"),
    "memory": (summaries.memory, "memory.jsonl"),
    "plan": (summaries.plan, "plan.jsonl"),
    "launchers": (summaries.launchers, "launchers.jsonl"),
    "checkpoint": (summaries.checkpoint, "checkpoint.jsonl"),
    "soak": (summaries.soak, "soak.md"),
    "comparison": (summaries.comparison, "compare.jsonl"),
}
"""What each part is made by, and of which file of results."""

_PART = re.compile(r"<!-- results: (\w+),[^>]*-->\n.*?<!-- end of results -->", re.DOTALL)


def part(name: str) -> str:
    """A part with its comments, as the results are now."""
    summary, file = PARTS[name]
    text = (ROOT / "benchmarks" / "results" / file).read_text()
    lines = summary(text if file.endswith(".md") else list(map(json.loads, text.splitlines())))
    begin = f"<!-- results: {name}, written by benchmarks/readme.py from {file}: changes by hand are lost -->"
    return "\n".join([begin, "", *lines, "", "<!-- end of results -->"])


def parts_of(readme: str) -> dict[str, str]:
    """The parts with their comments, as they stand there. Raises ValueError if one is missing, twice or unknown."""
    found = list(_PART.finditer(readme))
    if sorted(match[1] for match in found) != sorted(PARTS):
        names = ", ".join(match[1] for match in found) or "none"
        raise ValueError(f"the README's parts are {names}: it must have each of {', '.join(PARTS)} once")
    return {match[1]: match[0] for match in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="tell which parts differ, and change nothing")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="default: the project's README")
    flags = parser.parse_args()
    readme = flags.file.read_text()
    try:
        old = parts_of(readme)
    except ValueError as error:
        parser.error(str(error))
    new = {name: text for name in old if (text := part(name)) != old[name]}
    for name in new:
        print(f"{name}: {'differs from' if flags.check else 'written anew from'} results/{PARTS[name][1]}")
        readme = readme.replace(old[name], new[name])
    if new and not flags.check:
        flags.file.write_text(readme)
    return int(bool(new) and flags.check)


if __name__ == "__main__":
    sys.exit(main())
