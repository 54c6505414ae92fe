"""Read files with one row per line: JSON objects or plain text. Files may be compressed (.gz, .zst) or remote."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.cache import derive
from lowmem.data.files.columns import TOOLS_COLUMN, check_row
from lowmem.data.files.line_index import (
    LONGEST_LINE,
    PIECE_BYTES,
    are_blank_lines,
    codec_of,
    find_lines,
    fits_lines,
    index_lines,
)
from lowmem.data.files.source import Row, Source, opening
from lowmem.errors import UsageError


@dataclass(frozen=True)
class _Lines:
    """A group in memory: its bytes (None for a line that is too long), and the offsets where its rows begin."""

    text: bytes | None
    starts: np.ndarray
    first_byte: int
    num_bytes: int


class _LineFile:
    """The rows of one file, read in groups. Blank lines are not rows, but count in line numbers.

    `wanted` maps columns to "text" or "messages". Raises UsageError if no row of the first readable group has them.
    """

    _parse: Callable[[bytes, int], Row]  # (line, its offset in the file) -> row; raises ValueError for a bad line

    def __init__(self, source: Source, wanted: Mapping[str, str] | None, *, piece_bytes: int = PIECE_BYTES):
        self.source = source
        self.unread: list[str] = []  # the columns of the first good row that are not wanted
        self._is_packed = codec_of(source) is not None
        copies = self._is_packed or source.path is None

        def build(copy: BinaryIO | None, report: Callable[[int], None]) -> dict[str, np.ndarray]:
            index = index_lines(source, copy, report, piece_bytes=piece_bytes)
            sizes = index["end_byte"] - index["first_byte"]
            if copies and len(sizes) and sizes.min() > LONGEST_LINE:  # the copy would be of no use, so leave none
                raise UsageError(f"{source}, line {index['first_line'][0]:,}: {too_long(int(sizes[0]))}")
            return index

        with opening(source):
            found = derive(source, build, kind="lines", copies=copies, fits=fits_lines)
            self._path, self._index = found.copy or source.path, found.index
            self.group_rows = self._index["rows"]
            self._num_bytes = self._index["end_byte"] - self._index["first_byte"]
            # Add the memory of offsets (per row) and of Python objects (per group), which matters if lines are short.
            held = np.where(self._num_bytes > LONGEST_LINE, 0, self._num_bytes)
            self.group_bytes = held + 8 * self.group_rows + 512
            if len(self.group_rows):
                self._check_columns(wanted or {})

    def fingerprint(self) -> str:
        return xxhash.xxh3_64_hexdigest(self._index["hash"].tobytes())

    def read_group(self, group: int) -> _Lines:
        """Read a group. Raises OSError, and ValueError if the bytes have changed since they were indexed."""
        first, size = int(self._index["first_byte"][group]), int(self._num_bytes[group])
        if size > LONGEST_LINE:
            return _Lines(None, np.zeros(1, np.int64), first, size)
        with open(self._path, "rb") as file:
            is_whole = are_blank_lines(file, int(self._index["end_byte"][group - 1]) if group else first, first)
            file.seek(first)
            text = file.read(size)
            is_whole &= text.endswith(b"\n") or not file.read(1)
        starts, _, rows = find_lines(text)
        is_whole &= len(rows) == self.group_rows[group]
        if not is_whole or xxhash.xxh3_64_intdigest(text) != int(self._index["hash"][group]):
            remedy = "write it again" if self._path == self.source.path else "remove it"
            what = f"bytes {first:,} to {first + size:,} of {self._path} differ from what was indexed"
            raise ValueError(f"{what}: the file was changed or is damaged; {remedy} and start again")
        return _Lines(text, starts[rows], first, size)

    def row(self, data: _Lines, index: int) -> Row:
        """Return row `index` of a group. Raises ValueError if it is bad."""
        if data.text is None:
            raise ValueError(too_long(data.num_bytes))
        start = int(data.starts[index])
        end = data.text.find(b"\n", start)
        line = data.text[start : end if end >= 0 else len(data.text)]
        return self._parse(line, data.first_byte + start)

    def location(self, group: int, index: int) -> str:
        """Return the line (from 1) and byte (from 0) of a row or, if the file is no longer readable, of its group."""
        line, byte = int(self._index["first_line"][group]), int(self._index["first_byte"][group])
        unit = "decompressed byte" if self._is_packed else "byte"
        try:
            data = self.read_group(group)
        except (OSError, ValueError):
            return f"row {index + 1} from line {line:,} on ({unit} {byte:,})"
        start = int(data.starts[index])
        line += data.text.count(b"\n", 0, start) if start else 0
        return f"line {line:,} ({unit} {byte + start:,})"

    def _check_columns(self, wanted: Mapping[str, str]) -> None:
        """If all rows of the first group within LONGEST_LINE are bad, raise UsageError with the first row's error."""
        problem, group = None, int(np.argmax(self._num_bytes <= LONGEST_LINE))
        data = self.read_group(group)
        for index in range(int(self.group_rows[group])):
            try:
                row = self.row(data, index)
                check_row(self.source, row, wanted)
                reads_tools = "messages" in wanted.values()
                self.unread = [x for x in row if wanted and x not in wanted and not (reads_tools and x == TOOLS_COLUMN)]
                return
            except UsageError as error:  # its message already names the file
                problem = problem or error
            except ValueError as error:
                problem = problem or UsageError(f"{self.source}, {self.location(group, index)}: {error}")
        raise problem


class TextFile(_LineFile):
    """Plain text: each line is a row {"text": line}."""

    @staticmethod
    def _parse(line: bytes, offset: int) -> Row:
        if (nul := line.find(b"\0")) >= 0:
            raise ValueError(f"expected text, but byte {offset + nul:,} is NUL: the file is damaged or is not text")
        return {"text": _decode(line.removesuffix(b"\r"), offset)}


class JsonLinesFile(_LineFile):
    """One JSON object per line, parsed strictly: a duplicate key, NaN or an unpaired surrogate is an error."""

    def _check_columns(self, wanted: Mapping[str, str]) -> None:
        with open(self._path, "rb") as file:
            file.seek(int(self._index["first_byte"][0]))
            line = file.readline(2**16).strip()
        if line.startswith(b"[") and not line.endswith(b"]"):  # a one-line array may be just a bad row
            raise UsageError(f"{self.source} holds a JSON array, which can only be read as a whole: {_ONE_PER_LINE}")
        super()._check_columns(wanted)

    @staticmethod
    def _parse(line: bytes, offset: int) -> Row:
        text = _decode(line, offset)
        if not text.lstrip().startswith("{"):
            raise ValueError(f"a JSON object was expected, found {text.strip()[:40]!r}: {_ONE_PER_LINE}")
        try:
            row = STRICT_JSON.decode(text)
            if _ESCAPED_SURROGATE.search(text):
                json.dumps(row, ensure_ascii=False).encode()  # fails if a surrogate is left: pairs were joined
        except json.JSONDecodeError as error:
            reason = f"{error.msg.removesuffix(' at')} at byte {offset + len(text[: error.pos].encode()):,}"
            raise ValueError(f"{reason}: fix or remove the row, and write one object per line") from error
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(f"\\u{code:04x} is an unpaired surrogate: fix or remove the row") from error
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply: fix or remove the row") from error
        return row


def too_long(num_bytes: int) -> str:
    return f"the line has {num_bytes:,} bytes, the limit is {LONGEST_LINE:,}: split it"


def _decode(line: bytes, offset: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = f"byte {offset + error.start:,} (0x{line[error.start]:02x}), {error.reason}"
        raise ValueError(f"UTF-8 was expected, found {found}: write the file in UTF-8") from error


def _unique(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, number in times.items() if number > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object: remove one")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value: write a number or null")


_ONE_PER_LINE = "write one object per line (`train_low_mem.py convert rows.json rows.jsonl` converts an array)"
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
