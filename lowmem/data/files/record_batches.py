"""Read Arrow record batches by number, from an Arrow file or from a copy with small batches.

Files do not stay mapped: if one is truncated, reading it kills the process (SIGBUS), and mapped pages count as memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.arrow_sizes import check_message, row_bytes
from lowmem.data.files.cache import derive
from lowmem.data.files.line_index import LONGEST_LINE
from lowmem.data.files.source import Source, check_ratio

if TYPE_CHECKING:
    import pyarrow as pa

_INDEX = [(name, np.int64) for name in ("starts", "sizes", "rows", "hashed")] + [("hashes", np.uint64)]
LARGEST_DECODED_BYTES = 2**28
"""How many bytes may be decoded at once, from one page of a parquet file or one batch of an Arrow file."""
LARGEST_RATIO = 32
"""More may be decoded if it is at most this many times the stored size. Texts are rarely compressed to a tenth."""
_END_MARK = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class TableLimits:
    """If a file exceeds one of the first three limits, it is copied once, in pieces within the last two limits."""

    row_group_bytes: int = 9 * 2**20  # decoded size; low, because decoding a column needs several times its bytes
    batch_bytes: int = 2**24  # higher than row_group_bytes, because a record batch needs no decoding
    footer_bytes: int = 2**21  # or the mean row group's size, if larger; each read of a group also reads the footer
    piece_rows: int = 1024
    piece_bytes: int = 2**20  # a single row may be larger

    def rows_per_piece(self, num_rows: int, num_bytes: int) -> int:
        """Return the number of rows per piece, for `num_rows` rows of about equal size and `num_bytes` in total."""
        return max(1, min(self.piece_rows, self.piece_bytes * num_rows // max(1, num_bytes)))


@dataclass(frozen=True)
class RecordBatches:
    """The record batches of a file. Batch i is an IPC message of sizes[i] bytes at starts[i], and has rows[i] rows.

    hashes[i] is the XXH3 hash of the message's first hashed[i] bytes. All arrays have shape (batches,). A copy does not
    store a row of more than LONGEST_LINE bytes: sizes[i] is then the row's size, and hashed[i] is 0.
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
        """Read one batch. Raises OSError, and ValueError if it is damaged or has changed since it was indexed."""
        import pyarrow as pa

        start, size = int(self.starts[number]), int(self.sizes[number])
        if not self.hashed[number]:
            raise ValueError(f"the row has {size:,} bytes, the limit is {LONGEST_LINE:,}: split it")
        with self.source.open() as file:
            file.seek(start)
            message = file.read(size)
        try:
            head = message[: int(self.hashed[number])]
            if len(message) < size or xxhash.xxh3_64_intdigest(head) != int(self.hashes[number]):
                raise ValueError("the data differs from what was indexed: the file was changed or is damaged")
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)  # otherwise pyarrow would follow offsets that point outside their buffer
            if batch.num_rows != self.rows[number]:
                raise ValueError(f"it has {batch.num_rows:,} rows, but {self.rows[number]:,} were indexed")
        except (OSError, ValueError) as error:  # pyarrow raises either of them for damage
            where = f"bytes {start:,} to {start + size:,} of {self.source}"
            raise ValueError(f"{where} cannot be read ({error}): {self.remedy}") from error
        return batch


def find_batches(source: Source) -> tuple[RecordBatches, int, bool]:
    """Return the batches of a local Arrow file, its number of rows, and whether each batch can be read alone.

    If one cannot, because it is compressed or needs a dictionary, those after it are missing in the first result.
    """
    import pyarrow as pa

    found, num_rows, alone = [], 0, True
    with pa.memory_map(str(source.path)) as file:  # mapped, so that the bodies of messages are not read
        file.seek(ipc_start(file))
        message = pa.ipc.read_message(file)
        if message.type != "schema":  # pyarrow crashes if it reads another message as a schema
            raise ValueError(f"a schema was expected first, found a message of type {message.type!r}")
        schema = pa.ipc.read_schema(message)
        while True:
            start = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                break
            size = file.tell() - start
            if message.type not in ("record batch", "dictionary"):
                raise ValueError(f"rows were expected at byte {start:,}, found a message of type {message.type!r}")
            num_rows += check_message(message, limit=LARGEST_DECODED_BYTES, ratio=LARGEST_RATIO)
            if message.type == "record batch" and alone:
                batch = pa.ipc.read_record_batch(message, schema)
                num_bytes = batch.get_total_buffer_size()  # not `nbytes`, which follows offsets, which may be damaged
                alone = num_bytes <= message.body.size  # if a batch is larger than its message, it was compressed
                if batch.num_rows > 8 * num_bytes:
                    raise ValueError(f"a batch of {num_bytes:,} bytes at byte {start:,} claims {batch.num_rows:,} rows")
                # Hash only headers, to leave bodies unread. This detects a replaced file, but no flipped bit in text.
                head = file.read_at(size - message.body.size, start)
                found.append((start, size, batch.num_rows, len(head), xxhash.xxh3_64_intdigest(head)))
            alone &= message.type != "dictionary"
        if file.read_at(8, start) != _END_MARK:
            raise ValueError(f"the end mark is missing at byte {start:,}, so the file was truncated")
    return RecordBatches(source, schema, **_columns(found)), num_rows, alone


def ipc_start(file: BinaryIO) -> int:
    """Return the byte where messages begin. The file format wraps a stream in an 8-byte header and a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def copy_in_pieces(
    source: Source,
    schema: "pa.Schema",
    batches: Iterable["pa.RecordBatch"],
    *,
    num_rows: int,
    num_bytes: int,
    limits: TableLimits,
) -> RecordBatches:
    """Copy the columns of `schema` from `batches`, in order, into new batches within `limits`.

    If an earlier call has made this copy, uses it and reads no batch. `batches` have `num_rows` rows and about
    `num_bytes` in total and at most `limits.piece_rows` rows each, and are valid: pyarrow crashes if it casts a
    damaged one. Decodes dictionaries.
    Raises the errors of `derive` and those of `batches`.
    """
    import pyarrow as pa

    schema = plain(schema)

    def build(copy: BinaryIO | None, update: Callable[[int], None]) -> dict[str, np.ndarray]:
        found, start, stored_bytes = [], 0, source.stamp()[0]
        for piece in _pieces(chain.from_iterable(_plain_parts(batch, schema) for batch in batches), limits):
            if isinstance(piece, int):
                found.append((start, piece, 1, 0, 0))
                continue
            message = piece.serialize()
            found.append((start, len(message), piece.num_rows, len(message), xxhash.xxh3_64_intdigest(message)))
            start += copy.write(message)
            check_ratio(stored_bytes, start)
            pa.default_memory_pool().release_unused()
            update(piece.nbytes)
        return _columns(found)

    kind = f"copy-{xxhash.xxh3_64_hexdigest(json.dumps(schema.names).encode())}"
    fits = partial(_fits_copy, num_rows=num_rows)
    made = derive(source, build, kind=kind, copies=True, fits=fits, num_bytes=num_bytes)
    remedy = "delete it, the next start makes a new one"
    return RecordBatches(Source(str(made.copy)), schema, **made.index, remedy=remedy)


def _fits_copy(index: Mapping[str, np.ndarray], file: BinaryIO, *, num_rows: int) -> bool:
    """Whether `copy_in_pieces` could have made this index of an open copy: batches of `num_rows` rows without gaps."""
    if {name: column.dtype for name, column in index.items()} != dict(_INDEX):
        return False
    starts, sizes, rows, hashed, _ = (index[name] for name, _ in _INDEX)
    if any(column.shape != (starts.size,) for column in index.values()):
        return False
    num_bytes = file.seek(0, os.SEEK_END)
    is_left_out = (hashed == 0) & (rows == 1) & (sizes > LONGEST_LINE)
    is_stored = (hashed == sizes) & (0 < sizes) & (sizes <= num_bytes) & (0 <= rows) & (rows <= num_rows)
    if not np.all((0 <= starts) & (starts <= num_bytes) & (is_stored | is_left_out)):
        return False
    return rows.sum() == num_rows and np.array_equal(np.append(0, starts + hashed), np.append(starts, num_bytes))


def _columns(found: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Convert a list with one tuple per batch to the five arrays of RecordBatches."""
    table = np.array(found, _INDEX)
    return {name: np.ascontiguousarray(table[name]) for name, _ in _INDEX}


def _plain_parts(batch: "pa.RecordBatch", schema: "pa.Schema") -> Iterator["pa.RecordBatch | int"]:
    """Decode a batch to `schema`, in parts of limited size. Yields the size of a row that is too long to be decoded."""
    batch = batch.select(schema.names)
    if batch.schema.equals(schema):
        yield batch
        return
    sizes = row_bytes(batch)
    ends, first = np.cumsum(sizes), 0
    while first < len(sizes):
        limit = 4 * LONGEST_LINE + int(ends[first - 1] if first else 0)
        stop = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        too_long = first + np.flatnonzero(sizes[first:stop] > LONGEST_LINE)
        if len(too_long) and too_long[0] == first:
            yield int(sizes[first])
            first += 1
            continue
        stop = int(too_long[0]) if len(too_long) else stop
        yield batch.slice(first, stop - first).cast(schema)
        first = stop


def _pieces(batches: "Iterable[pa.RecordBatch | int]", limits: TableLimits) -> "Iterator[pa.RecordBatch | int]":
    """Yield the same rows in pieces within `limits`: split large batches in halves, and merge small ones."""
    import pyarrow as pa

    held, rows, num_bytes = [], 0, 0
    for part in chain(chain.from_iterable(_halves(batch, limits) for batch in batches), [None]):
        is_end = not isinstance(part, pa.RecordBatch)
        if held and (
            is_end or rows + part.num_rows > limits.piece_rows or num_bytes + part.nbytes > limits.piece_bytes
        ):
            yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]
            held, rows, num_bytes = [], 0, 0
        if not is_end:
            held.append(part)
            rows, num_bytes = rows + part.num_rows, num_bytes + part.nbytes
        elif part is not None:
            yield part


def _halves(batch: "pa.RecordBatch | int", limits: TableLimits) -> Iterator["pa.RecordBatch | int"]:
    if isinstance(batch, int) or batch.nbytes <= limits.piece_bytes:
        yield batch
    elif batch.num_rows == 1:
        yield batch if batch.nbytes <= LONGEST_LINE else batch.nbytes
    else:
        half = batch.num_rows // 2
        yield from _halves(batch.slice(0, half), limits)
        yield from _halves(batch.slice(half), limits)


def plain(schema: "pa.Schema") -> "pa.Schema":
    """Return the schema without dictionaries and views, because a slice of such a column keeps the whole column."""
    import pyarrow as pa

    return pa.schema([(field.name, _plain(field.type)) for field in schema])


def _plain(kind: "pa.DataType") -> "pa.DataType":
    from pyarrow import large_binary, large_list, large_string, list_, map_, struct, types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return large_string()
    if types.is_binary_view(kind):
        return large_binary()
    if types.is_struct(kind):
        return struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_map(kind):
        return map_(_plain(kind.key_type), _plain(kind.item_type))
    if types.is_list_view(kind) or types.is_large_list_view(kind):  # pyarrow 26 casts views to broken lists
        raise ValueError(f"{kind} cannot be copied in small pieces: use lists instead of views")
    if types.is_large_list(kind):
        return large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return list_(kind.value_field.with_type(_plain(kind.value_type)), getattr(kind, "list_size", -1))
    return kind
