"""One pass over a file of lines: which of them are rows, in groups that any reader reaches with one read.

A file that has no cheap random access (packed, remote) is copied, unpacked, in the same pass.
"""

import codecs
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.source import Source, is_damage, reading
from lowmem.errors import UsageError

LONGEST_LINE = 2**24
"""Bytes; a longer line is a group of its own, which no reader should take into memory."""

# A group is a run of so many rows at most, and ends before the row that would carry it over so many bytes.
_ROWS_PER_GROUP = 256
_BYTES_PER_GROUP = 2**20
_PIECE = 2**20  # bytes that are looked through at a time: few enough for the processor's cache
_COLUMNS = ("first_byte", "end_byte", "rows", "first_line", "hash")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def codec_of(source: Source) -> str | None:
    """What a file is packed with, by its last suffix; None if it is not."""
    return _CODECS.get("".join(source.suffixes[-1:]))


def index_lines(source: Source, copy: BinaryIO | None, tell: Callable[[int], None]) -> dict[str, np.ndarray]:
    """The groups of a file: first_byte, end_byte, rows and first_line (from 1) as int64, hash (xxh3_64) as uint64.

    Each has shape (groups,) and depends on the content alone. Bytes and lines are those of the unpacked file; it is
    written to `copy`, and the bytes read of the packed one are told. Raises OSError, and UsageError for a file that is
    damaged, cut, or written to meanwhile.
    """
    found = array("Q")
    pending, byte, line = bytearray(), 0, 1  # what is in no group yet, and the byte and the line where it begins
    pieces = _pieces(source, copy, tell)
    for piece in pieces:
        pending += piece
        if byte == 0 and pending.startswith(codecs.BOM_UTF8):
            byte = len(codecs.BOM_UTF8)
            del pending[:byte]
        if piece and b"\n" not in piece and len(pending) <= LONGEST_LINE:
            continue
        starts, ends, rows = find_lines(pending, is_whole=not piece)
        done_rows = 0
        for first, stop in _groups(starts[rows], ends[rows], None if not piece else len(pending)):
            start, end = int(starts[rows[first]]), int(ends[rows[stop - 1]])
            with memoryview(pending) as view:
                digest = xxhash.xxh3_64_intdigest(view[start:end])
            found.extend((byte + start, byte + end, stop - first, line + int(rows[first]), digest))
            done_rows = stop
        done_lines = int(rows[done_rows]) if done_rows < len(rows) else len(ends)
        done = int(ends[done_lines - 1]) if done_lines else 0
        del pending[:done]
        byte, line = byte + done, line + done_lines
        if len(pending) > LONGEST_LINE:
            size, digest, pending = _pass_over(pending, pieces)
            found.extend((byte, byte + size, 1, line, digest))
            byte, line = byte + size, line + 1
    columns = np.array(found, np.uint64).reshape(-1, len(_COLUMNS)).T
    return {
        name: column.astype(np.uint64 if name == "hash" else np.int64)
        for name, column in zip(_COLUMNS, columns, strict=True)
    }


def find_lines(text: bytes | bytearray, *, is_whole: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where lines begin, where they end (behind the newline), and which of them are rows: not blank, or very long.

    A last line without its newline counts if the text `is_whole`.
    """
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    ends += 1
    if is_whole and len(data) and not text.endswith(b"\n"):
        ends = np.append(ends, len(data))
    if not len(ends):
        return ends, ends, ends
    starts = np.concatenate([[0], ends[:-1]])
    # Whitespace (and the control signs 14 to 31) is bytes 9 to 32; less 9, all else is above 23, NUL too: it wraps.
    is_blank = np.maximum.reduceat(data[: ends[-1]] - np.uint8(9), starts) <= 23
    return starts, ends, np.flatnonzero(~is_blank | (ends - starts > LONGEST_LINE))


def _groups(starts: np.ndarray, ends: np.ndarray, more_from: int | None) -> Iterator[tuple[int, int]]:
    """The rows [first, stop) of each group that is complete, though more bytes may follow from `more_from` on."""
    first = 0
    while first < len(starts):
        limit = starts[first] + _BYTES_PER_GROUP
        fitting = int(np.searchsorted(ends[first : first + _ROWS_PER_GROUP], limit, side="right"))
        stop = first + max(1, fitting)
        if stop == len(starts) and more_from is not None and more_from < limit:
            return
        yield first, stop
        first = stop


def _pass_over(begun: bytearray, pieces: Iterator[bytes]) -> tuple[int, int, bytearray]:
    """Read a line on to its end, holding none of it: (its bytes, its hash, what was read behind it)."""
    digest, size, behind = xxhash.xxh3_64(begun), len(begun), b""
    for piece in pieces:
        line, newline, behind = piece.partition(b"\n")
        digest.update(line + newline)
        size += len(line) + len(newline)
        if newline:
            break
    return size, digest.intdigest(), bytearray(behind)


def _pieces(source: Source, copy: BinaryIO | None, tell: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a file, unpacked, and b"" at the end."""
    size, done, codec = source.stamp()[0], 0, codec_of(source)
    with source.open() as file:
        unpacked = _unpack(file, codec) if codec else file
        while piece := _read(unpacked, source, codec):
            if copy is not None:
                copy.write(piece)
            tell(file.tell() - done)
            done = file.tell()
            yield piece
        done = file.tell()
    if size not in (None, done):
        raise UsageError(
            f"{source} has {size:,} bytes, but {done:,} were read: it is being written to, or the connection was lost; "
            "start again"
        )
    yield b""


def _unpack(file: BinaryIO, codec: str):
    from pyarrow import CompressedInputStream, PythonFile

    return CompressedInputStream(PythonFile(file, mode="r"), codec)


def _read(file: BinaryIO, source: Source, codec: str | None) -> bytes:
    try:
        with reading():
            return file.read(_PIECE)
    except OSError as error:
        if codec is None or not is_damage(error):
            raise
        raise UsageError(
            f"{source} cannot be unpacked as {codec} ({error}): it is damaged or cut, get it anew"
        ) from error
