"""Index a file of lines in one pass: find its rows, and divide them into groups. Readers load one group at a time.

If the file is compressed or remote, the same pass writes a decompressed local copy.
"""

import codecs
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.source import Source, check_ratio, is_damage, reading
from lowmem.errors import UsageError

LONGEST_LINE = 2**24  # bytes; a longer line is a separate group, which readers must not load
PIECE_BYTES = 2**20  # bytes scanned at a time, to fit in the CPU cache; the index does not depend on this
# A group ends after _ROWS_PER_GROUP rows, or before a row that would make it exceed _BYTES_PER_GROUP.
_ROWS_PER_GROUP = 256
_BYTES_PER_GROUP = 2**20
_COLUMNS = ("first_byte", "end_byte", "rows", "first_line", "hash")
_BLANK = bytes(range(9, 33))
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def codec_of(source: Source) -> str | None:
    """Return the compression that a file's last suffix indicates; None if it is not compressed."""
    return _CODECS.get("".join(source.suffixes[-1:]))


def index_lines(
    source: Source, copy: BinaryIO | None, report: Callable[[int], None], *, piece_bytes: int = PIECE_BYTES
) -> dict[str, np.ndarray]:
    """Index a file's groups. Returns int64 first_byte, end_byte, rows, first_line (from 1), and uint64 hash (xxh3_64).

    Each array has shape (groups,) and refers to the decompressed bytes, which are written to `copy` unless it is None.
    `report` gets the compressed size of each read. Raises OSError, and UsageError for damaged or incomplete files.
    """
    found = array("Q")
    pending, byte, line = bytearray(), 0, 1  # the bytes not yet in a group; the byte and line where they begin
    pieces = _pieces(source, copy, report, piece_bytes)
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
            size, digest, pending = _skip_line(pending, pieces)
            found.extend((byte, byte + size, 1, line, digest))
            byte, line = byte + size, line + 1
    columns = zip(_COLUMNS, np.array(found, np.uint64).reshape(-1, len(_COLUMNS)).T, strict=True)
    return {name: column.astype(np.uint64 if name == "hash" else np.int64) for name, column in columns}


def fits_lines(index: Mapping[str, np.ndarray], file: BinaryIO) -> bool:
    """Whether `index_lines` could have returned this index for an open file.

    Checks names, dtypes, shapes, limits and order of the groups, and that no row is before the first or after the last.
    Readers must compare each group's hash and number of rows, and check the bytes before it with `are_blank_lines`.
    """
    types = {name: np.uint64 if name == "hash" else np.int64 for name in _COLUMNS}
    if {name: column.dtype for name, column in index.items()} != types:
        return False
    num_bytes, groups = file.seek(0, os.SEEK_END), index["hash"].size
    first, end, rows, line, _ = (index[name] for name in _COLUMNS)
    file.seek(0)
    start = len(codecs.BOM_UTF8) * (file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
    if any(column.shape != (groups,) for column in index.values()):
        return False
    if not groups:
        return are_blank_lines(file, start, num_bytes)
    if first.min() < 0 or np.any(first >= end) or end.max() > num_bytes or line.min() < 1:
        return False  # now, because differences of such numbers could overflow
    is_small = (rows <= _ROWS_PER_GROUP) & (end - first <= _BYTES_PER_GROUP)
    is_ordered = np.all(end[:-1] <= first[1:]) and np.all(line[1:] - line[:-1] >= rows[:-1])
    is_within = np.all((1 <= rows) & (rows <= end - first) & (is_small | (rows == 1)))
    return bool(is_ordered and is_within) and (
        are_blank_lines(file, start, int(first[0])) and are_blank_lines(file, int(end[-1]), num_bytes)
    )


def are_blank_lines(file: BinaryIO, first: int, stop: int) -> bool:
    """Whether the bytes [first, stop) of an open file are whole lines, all blank. Moves the file's position."""
    file.seek(first)
    piece = b"\n"
    while first < stop and (piece := file.read(min(PIECE_BYTES, stop - first))):
        if piece.translate(None, _BLANK):
            return False
        first += len(piece)
    return first == stop and (piece.endswith(b"\n") or not file.read(1))


def find_lines(text: bytes | bytearray, *, is_whole: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where lines begin, where they end (after the newline), and which lines are rows.

    A line is a row if it exceeds LONGEST_LINE or is not blank. A last line without a newline counts if `is_whole`.
    """
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    ends += 1
    if is_whole and len(data) and not text.endswith(b"\n"):
        ends = np.append(ends, len(data))
    if not len(ends):
        return ends, ends, ends
    starts = np.concatenate([[0], ends[:-1]])
    # Blank lines have only bytes 9 to 32. Subtracting 9 makes these at most 23, and all others larger (0 to 8 wrap).
    is_blank = np.maximum.reduceat(data[: ends[-1]] - np.uint8(9), starts) <= 23
    return starts, ends, np.flatnonzero(~is_blank | (ends - starts > LONGEST_LINE))


def _groups(starts: np.ndarray, ends: np.ndarray, more_from: int | None) -> Iterator[tuple[int, int]]:
    """Yield each group's row range [first, stop), but not the last if a row at byte `more_from` may still join it."""
    first = 0
    while first < len(starts):
        limit = starts[first] + _BYTES_PER_GROUP
        fitting = int(np.searchsorted(ends[first : first + _ROWS_PER_GROUP], limit, side="right"))
        stop = first + max(1, fitting)
        if stop == len(starts) and more_from is not None and more_from < limit:
            return
        yield first, stop
        first = stop


def _skip_line(begun: bytearray, pieces: Iterator[bytes]) -> tuple[int, int, bytearray]:
    """Read to the end of a line without storing it. Returns its size, its hash, and the bytes read beyond its end."""
    digest, size, rest = xxhash.xxh3_64(begun), len(begun), b""
    for piece in pieces:
        line, newline, rest = piece.partition(b"\n")
        digest.update(line + newline)
        size += len(line) + len(newline)
        if newline:
            break
    return size, digest.intdigest(), bytearray(rest)


def _pieces(source: Source, copy: BinaryIO | None, report: Callable[[int], None], piece_bytes: int) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in pieces, and b"" at the end."""
    size, done, decoded, codec = source.stamp()[0], 0, 0, codec_of(source)
    if codec:
        from pyarrow import CompressedInputStream, PythonFile
    with source.open() as file:
        unpacked = CompressedInputStream(PythonFile(file, mode="r"), codec) if codec else file
        try:
            with reading():
                while piece := unpacked.read(piece_bytes):
                    if copy is not None:
                        copy.write(piece)
                    report(file.tell() - done)
                    done, decoded = file.tell(), decoded + len(piece)
                    check_ratio(done, decoded)
                    yield piece
                done = file.tell()
        except OSError as error:
            if codec and is_damage(error):
                what = f"{source} cannot be decompressed as {codec} ({error})"
                raise UsageError(f"{what}: it is damaged or truncated, download it again") from error
            raise
    if size not in (None, done):
        raise UsageError(f"{source} has {size:,} bytes, but {done:,} were read: start again when it is complete")
    yield b""
