"""The generated parts of README.md and docs/ are up to date, and an edit by hand is detected."""

import re
import shutil
import sys

import pytest

from tests.processes import ROOT, run

DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PARTS = [
    (document, name)
    for document in DOCUMENTS
    for name in re.findall(r"<!-- begin (\w+),.*?<!-- end \1 -->", (ROOT / document).read_text(), re.DOTALL)
]


def documents(*words):
    return run(sys.executable, ROOT / "benchmarks" / "documents.py", *words)


@pytest.fixture
def copy(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_the_documents_are_up_to_date():
    result = documents("--check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(PARTS) == 13


def test_a_changed_digit_is_detected_and_rewritten(copy):
    texts = {document: (copy / document).read_text() for document in DOCUMENTS}
    changed = dict(texts)
    for document, name in PARTS:
        text = changed[document]
        begin = text.index("-->", text.index(f"<!-- begin {name},"))
        digit = re.compile(r"\d").search(text, begin, text.index(f"<!-- end {name} -->", begin)).start()
        changed[document] = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
        (copy / document).write_text(changed[document])
    result = documents("--check", f"--root={copy}")
    assert result.returncode == 1, result.stderr
    found = [tuple(reversed(line.split(": differs ")[0].split(" in "))) for line in result.stdout.splitlines()]
    assert sorted(found) == sorted(PARTS)
    assert {document: (copy / document).read_text() for document in DOCUMENTS} == changed
    assert documents(f"--root={copy}").returncode == 0
    assert {document: (copy / document).read_text() for document in DOCUMENTS} == texts


def test_a_missing_part_is_an_error_and_nothing_is_written(copy):
    path = copy / "docs" / "data.md"
    path.write_text(path.read_text().replace("<!-- begin rows,", "<!-- "))
    result = documents(f"--root={copy}")
    assert result.returncode == 2
    assert "docs/data.md must contain each of these parts once: rows; found: none" in result.stderr
    assert "begin rows" not in path.read_text()
