"""Convert a JSON array to JSONL, one row at a time."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lowmem.data.files.line_index import LONGEST_LINE
from lowmem.data.files.lines import STRICT_JSON
from lowmem.data.files.source import Row
from lowmem.errors import UsageError

_READ_CHARACTERS = 2**16
_BLANKS = " \t\r\n"


def convert(path: Path, out: Path) -> str:
    """Write each object of the JSON array in `path` as a line of `out`; return the message to print.

    Raises UsageError if `path` is not a JSON array of objects, or if `out` exists. `out` appears when it is complete.
    """
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or name another file")
    part, count = out.with_name(f".{out.name}.part-{os.getpid()}"), 0
    try:
        with open(path, encoding="utf-8-sig") as file, open(part, "x", encoding="utf-8") as lines:
            for row in _rows(file.read):
                lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
        part.rename(out)
    except OSError as error:
        raise UsageError(f"{error.filename or out} cannot be used ({error.strerror}): name another file") from error
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
        raise UsageError(f"{path}, row {count + 1}: {error}; fix the file, nothing is written") from error
    finally:
        part.unlink(missing_ok=True)
    return f"{out}: {count:,} rows"


def _rows(read: Callable[[int], str]) -> Iterator[Row]:
    """Yield the objects of a JSON array. Holds at most one that is incomplete, and what `read` returned with it."""
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
            except json.JSONDecodeError:  # perhaps because its end is not read yet
                left = len(text) - start
                if left > 2 * LONGEST_LINE or not read_more(max(_READ_CHARACTERS, left)):
                    raise
        yield row
        is_first = False
    start += 1
    if next_mark():
        raise ValueError(f"the end of the file was expected after ']', found {text[start : start + 40]!r}")
