"""Arrow record batches on disk by number, each read alone: those of an Arrow file, or of a copy in small pieces.

A file is never mapped to read from it during a run: a mapped file that is cut kills the process (SIGBUS), and the pages
of it that were looked at count as its memory.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from lowmem.data.derived import derive
from lowmem.data.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

PIECE_ROWS, _PIECE_BYTES = 1024, 2**20
_SCHEMA, _DICTIONARY, _RECORD_BATCH = 1, 2, 3  # MessageHeader in Arrow's Message.fbs


@dataclass(frozen=True)
class RecordBatches:
    """Record batches, each an encapsulated IPC message of `sizes` bytes at `starts`, holding `rows` rows.

    Of each message the first `hashed` bytes have the XXH3 hash `hashes`. All are arrays of shape (batches,).
    """

    source: Source
    schema: "pa.Schema"
    starts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    hashed: np.ndarray
    hashes: np.ndarray
    remedy: str = "write it again"

    def read(self, number: int) -> "pa.RecordBatch":
        """One batch, in memory of its own. Raises OSError, and ValueError if it is damaged or not the one indexed."""
        import pyarrow as pa

        start, size, hashed = int(self.starts[number]), int(self.sizes[number]), int(self.hashed[number])
        with self.source.open() as file:
            file.seek(start)
            message = file.read(size)
        try:
            if len(message) < size or xxhash.xxh3_64_intdigest(message[:hashed]) != int(self.hashes[number]):
                raise ValueError("they are not those that were indexed, the file changed or is damaged")
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)  # an offset that leaves its buffer would be followed
        except (OSError, ValueError) as error:  # pyarrow tells damage as either
            told = f"bytes {start:,} to {start + size:,} of {self.source} cannot be read ({error}): {self.remedy}"
            raise ValueError(told) from error
        return batch


def find_batches(source: Source) -> tuple[RecordBatches, bool]:
    """The batches of a file in Arrow's stream or file format, and whether each can be read alone: it is not
    compressed and needs no dictionary. Only the head of each message is read, a few hundred bytes.

    The hashes are of the heads: they tell another file, not a flipped bit in a text. Raises OSError, and ValueError or
    struct.error if the file is cut or no Arrow file.
    """
    import pyarrow as pa

    schema, found, alone = None, [], True
    with source.open() as file:
        for start, head, body_bytes in _messages(file, stream_start(file)):
            kind, rows, is_compressed = _facts(head)
            if kind == _SCHEMA:
                schema = pa.ipc.read_schema(pa.py_buffer(head))
            elif kind == _RECORD_BATCH:
                found.append((start, len(head) + body_bytes, rows, len(head), xxhash.xxh3_64_intdigest(head)))
            alone &= kind != _DICTIONARY and not is_compressed
    if schema is None:
        raise ValueError("it has no schema")
    return RecordBatches(source, schema, *_columns(found)), alone


def stream_start(file: BinaryIO) -> int:
    """Where the messages begin: the file format is the stream format behind eight bytes, with a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def copy_in_pieces(
    source: Source, kind: str, num_rows: int, schema: "pa.Schema", batches: Callable[[], Iterable["pa.RecordBatch"]]
) -> RecordBatches:
    """The rows of `batches()`, in order, as batches of at most 1,024 rows and, if they have several, about 1 MiB.

    Made once for each `kind`. Dictionaries are replaced by their values. Raises what `derive` and `batches` raise.
    """
    import pyarrow as pa

    plain = pa.schema([(field.name, _plain(field.type)) for field in schema])
    num_bytes = source.stamp()[0]

    def build(copy: BinaryIO | None, update: Callable[[int], None]) -> dict[str, np.ndarray]:
        found, start = [], 0
        for batch in batches():
            for piece in _pieces(batch, plain):
                message = piece.serialize()
                found.append((start, len(message), piece.num_rows, len(message), xxhash.xxh3_64_intdigest(message)))
                start += copy.write(message)
            pa.default_memory_pool().release_unused()
            update(num_bytes * batch.num_rows // num_rows)
        return dict(zip(("starts", "sizes", "rows", "hashed", "hashes"), _columns(found), strict=True))

    made = derive(source, build, kind=kind, copies=True)
    remedy = "delete it, and it is made anew at the next start"
    return RecordBatches(Source(str(made.copy)), plain, **made.index, remedy=remedy)


def _columns(found: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The five arrays of RecordBatches out of their rows: int64, the hashes uint64."""
    columns = list(zip(*found, strict=True)) or [()] * 5
    return [np.array(column, np.int64) for column in columns[:4]] + [np.array(columns[4], np.uint64)]


def _pieces(batch: "pa.RecordBatch", schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    for first in range(0, batch.num_rows, PIECE_ROWS):
        yield from _halves(batch.slice(first, PIECE_ROWS).cast(schema))


def _halves(batch: "pa.RecordBatch") -> Iterator["pa.RecordBatch"]:
    if batch.nbytes <= _PIECE_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from _halves(batch.slice(0, half))
        yield from _halves(batch.slice(half))


def _plain(kind: "pa.DataType") -> "pa.DataType":
    """The type without dictionaries and views: a piece of those would hold all that the whole refers to."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_field.with_type(_plain(kind.value_type))
        return pa.list_(item) if pa.types.is_list(kind) else pa.large_list(item)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _messages(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes, int]]:
    """(first byte, head, bytes of the body) of each message of a stream. Raises ValueError if it has no end mark."""
    while True:
        file.seek(start)
        prefix = file.read(8)
        if prefix[:4] != b"\xff\xff\xff\xff" or len(prefix) < 8:
            raise ValueError(f"no message is at byte {start:,} of {file.seek(0, 2):,}")
        (head_bytes,) = struct.unpack_from("<I", prefix, 4)
        if head_bytes == 0:
            return
        head = prefix + file.read(head_bytes)
        place = _field(head, _root(head), 3)
        body_bytes = struct.unpack_from("<q", head, place)[0] if place else 0
        if body_bytes < 0:
            raise ValueError(f"the message at byte {start:,} has {body_bytes:,} bytes")
        yield start, head, body_bytes
        start += len(head) + body_bytes


def _facts(head: bytes) -> tuple[int, int, bool]:
    """(kind of message, rows, whether the body is compressed), from the fields of Arrow's Message.fbs."""
    kind_place, header_place = _field(head, _root(head), 1), _field(head, _root(head), 2)
    if kind_place is None or header_place is None:
        raise ValueError("a message has no header")
    kind = head[kind_place]
    if kind != _RECORD_BATCH:
        return kind, 0, False
    header = header_place + struct.unpack_from("<I", head, header_place)[0]
    rows_place = _field(head, header, 0)
    rows = struct.unpack_from("<q", head, rows_place)[0] if rows_place else 0
    return kind, rows, _field(head, header, 3) is not None


def _root(head: bytes) -> int:
    """The flatbuffer's root table. Flatbuffers are read by hand: pyarrow tells a message only with its whole body."""
    return 8 + struct.unpack_from("<I", head, 8)[0]


def _field(head: bytes, table: int, number: int) -> int | None:
    """Where a table's field stands, None if it is left out."""
    vtable = table - struct.unpack_from("<i", head, table)[0]
    num_bytes, entry = struct.unpack_from("<H", head, vtable)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", head, vtable + entry)[0] if entry < num_bytes else 0
    return table + offset if offset else None
