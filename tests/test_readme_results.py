"""The README's results are those of the files in benchmarks/results, and a digit that is changed by hand is found."""

import re
import sys

import pytest

from tests.processes import ROOT, run

README = (ROOT / "README.md").read_text()
PARTS = re.findall(r"<!-- results: (\w+),.*?<!-- end of results -->", README, re.DOTALL)


def readme(*words):
    return run(sys.executable, ROOT / "benchmarks" / "readme.py", *words)


def test_the_readme_is_what_the_results_say():
    result = readme("--check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(PARTS) >= 7


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_digit_is_found_and_written_anew(part, tmp_path):
    begin = README.index("-->", README.index(f"<!-- results: {part},"))
    end = README.index("<!-- end of results -->", begin)
    place = re.compile(r"\d").search(README, begin, end).start()
    copy = tmp_path / "README.md"
    changed = README[:place] + str((int(README[place]) + 1) % 10) + README[place + 1 :]
    copy.write_text(changed)
    result = readme("--check", f"--file={copy}")
    assert result.returncode == 1 and result.stdout.startswith(f"{part}: differs from results/"), result
    assert result.stdout.count("\n") == 1 and copy.read_text() == changed
    assert readme(f"--file={copy}").returncode == 0 and copy.read_text() == README


def test_a_part_that_is_missing_is_told_and_nothing_written(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.replace("<!-- results: rows,", "<!-- "))
    result = readme(f"--file={copy}")
    assert result.returncode == 2 and "must have each of rows, memory" in result.stderr
    assert "results: rows" not in copy.read_text()
