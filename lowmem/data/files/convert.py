"""Convert a JSON array to JSONL, one row at a time."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lowmem.data.files.line_index import LONGEST_LINE
from lowmem.data.files.lines import STRICT_JSON, too_long
from lowmem.data.files.source import Row
from lowmem.errors import UsageError
from lowmem.storage.files import describe, sync, write_file

_READ_CHARACTERS = 2**16
_MOST_CHARACTERS = 2 * LONGEST_LINE  # of a row, which may have indents and escapes that its line has not
_BLANKS = " \t\r\n"
_OTHER_FORMATS = {b"PAR1": "parquet", b"ARROW1": "Arrow"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK": "zip"}


def convert(path: Path, out: Path) -> str:
    """Write each object of the JSON array in `path` as a line of `out`; return the message to print.

    Raises UsageError if `path` is not a JSON array of objects, if a line would be longer than lowmem reads, or if `out`
    does not end in .jsonl, exists or cannot be written. `out` appears when it is complete and on disk, and never
    replaces a file.
    """
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        try:
            with _naming(path), open(path, encoding="utf-8-sig", buffering=_READ_CHARACTERS) as file:
                _check_start(path, file.buffer.peek())
                for row in _rows(file.read):
                    line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                    if len(line) > LONGEST_LINE:
                        raise ValueError(too_long(len(line)))
                    yield line
                    count += 1
        except UsageError:
            raise
        except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
            raise UsageError(f"{path}, row {count + 1}: {error}; fix the file, nothing is written") from error

    with _naming(out):
        _check_free(out)
        if out.suffix.lower() != ".jsonl":
            raise UsageError(f"{out} must end in .jsonl, by which `train` recognizes the format: name it so")
        # A folder of its own: `out` may have the longest name that is allowed, and a former part may be left.
        with TemporaryDirectory(prefix=".convert-", dir=out.parent) as folder:
            part = Path(folder) / "rows.jsonl"
            write_file(part, lines())
            os.link(part, out)  # unlike a rename, this never replaces a file that another process has made
            sync(out.parent)
    return f"{out}: {count:,} rows"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert OSErrors to a UsageError that names `path`, whichever file failed on its behalf."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be used ({error.strerror}): name another file") from error


def _check_free(out: Path) -> None:
    """Raise UsageError if there is a file, or a link to none; OSError if the name cannot be used."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    raise UsageError(f"{out} exists (it {describe(out)}): remove it, or name another file")


def _check_start(path: Path, start: bytes) -> None:
    """Raise UsageError if a file that begins with `start` has a known format that is not a JSON array."""
    if kind := next((kind for magic, kind in _OTHER_FORMATS.items() if start.startswith(magic)), None):
        raise UsageError(f"{path} is a {kind} file, not a JSON array: train on it without converting it")
    if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None):
        raise UsageError(f"{path} is compressed ({kind}): decompress it first")
    text = start.decode("utf-8-sig", errors="ignore").lstrip()
    first, _, rest = text.partition("\n")
    if text.startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{"):
        raise UsageError(f"{path} has one object per line, so it is JSONL, not a JSON array: train on it as it is")
    if text.startswith("{") and (key := re.search(r'"([^"\\]+)"\s*:\s*\[\s*\{', text)):
        advice = f"write that array to a file of its own, such as with `jq .{key[1]}`, and convert this file"
        raise UsageError(f"{path} is an object, whose key {key[1]!r} holds an array: {advice}")


def _rows(read: Callable[[int], str]) -> Iterator[Row]:
    """Yield the objects of a JSON array. Holds at most _MOST_CHARACTERS, or what `read` returned at once."""
    text, start = "", 0  # what is read, and where the part that is left begins

    def read_more(most: int = _READ_CHARACTERS) -> bool:
        nonlocal text, start
        more = read(most)
        text, start = text[start:] + more, 0
        return bool(more)

    def next_mark() -> str:
        nonlocal start
        while True:
            while start < len(text) and text[start] in _BLANKS:
                start += 1
            if start < len(text) or not read_more():
                return text[start : start + 1]

    if next_mark() != "[":
        raise ValueError(f"a JSON array of objects was expected, found {text[start : start + 40]!r}")
    start += 1
    is_first = True
    while (mark := next_mark()) != "]":
        if not is_first:
            if mark != ",":
                raise ValueError(f"',' or ']' was expected, found {text[start : start + 40]!r}")
            start += 1
            mark = next_mark()
        if mark != "{":
            raise ValueError(f"a JSON object was expected, found {text[start : start + 40]!r}")
        while True:
            try:
                row, start = STRICT_JSON.raw_decode(text, start)
                break
            except json.JSONDecodeError as error:  # perhaps because its end is not read yet
                left = len(text) - start
                if left >= _MOST_CHARACTERS:
                    most = f"the object does not end within {_MOST_CHARACTERS:,} characters"
                    raise ValueError(f"{most} ({error.msg}): fix or split it") from error
                if not read_more(min(max(_READ_CHARACTERS, left), _MOST_CHARACTERS - left)):
                    raise ValueError(error.msg) from error  # its line number would be relative to `text`
        yield row
        is_first = False
    start += 1
    if next_mark():
        raise ValueError(f"the end of the file was expected after ']', found {text[start : start + 40]!r}")
