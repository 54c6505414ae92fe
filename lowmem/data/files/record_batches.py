"""Read Arrow record batches from disk by number, from an Arrow file or from a copy with small batches.

No file stays mapped: truncating a mapped file kills the process (SIGBUS), and touched pages count as resident memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.cache import derive
from lowmem.data.files.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

_END_MARK = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class TableLimits:
    """A file that exceeds one of the first three limits is copied once, in pieces within the last two limits."""

    row_group_bytes: int = 9 * 2**20  # decoded; decoding a column needs several times its bytes
    batch_bytes: int = 2**24  # a record batch needs no decoding
    footer_bytes: int = 2**21  # unless row groups are larger: reading one reads the whole parquet footer first
    piece_rows: int = 1024
    piece_bytes: int = 2**20  # unless one row takes more

    def rows_per_piece(self, num_rows: int, num_bytes: int) -> int:
        """Return the rows per piece, if all `num_rows` rows (`num_bytes` in total) have about the same size."""
        return max(1, min(self.piece_rows, self.piece_bytes * num_rows // max(1, num_bytes)))


@dataclass(frozen=True)
class RecordBatches:
    """Record batches, each an encapsulated IPC message of `sizes` bytes at `starts` that holds `rows` rows.

    `hashes` are the XXH3 hashes of the first `hashed` bytes of each message. All arrays have shape (batches,).
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
        """Read one batch. Raises OSError, and ValueError if it is damaged or not the batch that was indexed."""
        import pyarrow as pa

        start, size = int(self.starts[number]), int(self.sizes[number])
        with self.source.open() as file:
            file.seek(start)
            message = file.read(size)
        try:
            head = message[: int(self.hashed[number])]
            if len(message) < size or xxhash.xxh3_64_intdigest(head) != int(self.hashes[number]):
                raise ValueError("they are not those that were indexed: the file was changed or is damaged")
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)  # pyarrow follows an offset that points outside its buffer
        except (OSError, ValueError) as error:  # pyarrow reports damage as either
            where = f"bytes {start:,} to {start + size:,} of {self.source}"
            raise ValueError(f"{where} cannot be read ({error}): {self.remedy}") from error
        return batch


def find_batches(source: Source) -> tuple[RecordBatches, bool]:
    """Find the batches of a local Arrow file, and whether each can be read alone: no compression, no dictionary."""
    import pyarrow as pa

    found, alone = [], True
    with pa.memory_map(str(source.path)) as file:  # finds bodies without reading them
        file.seek(ipc_start(file))
        schema = pa.ipc.read_schema(pa.ipc.read_message(file))
        while True:
            start = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                break
            size = file.tell() - start
            if message.type == "record batch" and alone:
                batch = pa.ipc.read_record_batch(message, schema)
                alone = batch.nbytes <= message.body.size  # larger: it was decompressed
                # Hashing only headers detects another file, but not a flipped bit in a text.
                head = file.read_at(size - message.body.size, start)
                found.append((start, size, batch.num_rows, len(head), xxhash.xxh3_64_intdigest(head)))
            alone &= message.type != "dictionary"
        if file.read_at(8, start) != _END_MARK:
            raise ValueError(f"the end mark is missing at byte {start:,}, so the file was truncated")
    return RecordBatches(source, schema, **_columns(found)), alone


def ipc_start(file: BinaryIO) -> int:
    """Return the byte where messages begin: the file format is eight bytes, the stream format and a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def copy_in_pieces(
    source: Source, schema: "pa.Schema", batches: Iterable["pa.RecordBatch"], *, num_bytes: int, limits: TableLimits
) -> RecordBatches:
    """Copy the rows of `batches` once, in order, into batches within `limits` that have the columns of `schema`.

    Consumes `batches` (about `num_bytes` in total, each at most `limits.piece_rows` rows) only if there is no copy of
    these columns yet. Decodes dictionaries to their values. Raises the errors of `derive` and `batches`.
    """
    import pyarrow as pa

    schema = plain(schema)

    def build(copy: BinaryIO | None, update: Callable[[int], None]) -> dict[str, np.ndarray]:
        found, start = [], 0
        for piece in _pieces((batch.select(schema.names).cast(schema) for batch in batches), limits):
            piece.validate(full=True)  # otherwise a later error would blame the copy
            message = piece.serialize()
            found.append((start, len(message), piece.num_rows, len(message), xxhash.xxh3_64_intdigest(message)))
            start += copy.write(message)
            pa.default_memory_pool().release_unused()
            update(piece.nbytes)
        return _columns(found)

    kind = f"copy-{xxhash.xxh3_64_hexdigest(json.dumps(schema.names).encode())}"
    made = derive(source, build, kind=kind, copies=True, num_bytes=num_bytes)
    remedy = "delete it, the next start makes a new one"
    return RecordBatches(Source(str(made.copy)), schema, **made.index, remedy=remedy)


def _columns(found: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Convert one tuple per batch to the five arrays of RecordBatches."""
    names = [(name, np.int64) for name in ("starts", "sizes", "rows", "hashed")] + [("hashes", np.uint64)]
    table = np.array(found, names)
    return {name: np.ascontiguousarray(table[name]) for name, _ in names}


def _pieces(batches: Iterable["pa.RecordBatch"], limits: TableLimits) -> Iterator["pa.RecordBatch"]:
    """Yield the same rows in pieces within `limits`: halves large batches, and merges those of small row groups."""
    import pyarrow as pa

    held, rows, num_bytes = [], 0, 0
    for part in chain.from_iterable(_halves(batch, limits) for batch in batches):
        if held and (rows + part.num_rows > limits.piece_rows or num_bytes + part.nbytes > limits.piece_bytes):
            yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]
            held, rows, num_bytes = [], 0, 0
        held.append(part)
        rows, num_bytes = rows + part.num_rows, num_bytes + part.nbytes
    if held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _halves(batch: "pa.RecordBatch", limits: TableLimits) -> Iterator["pa.RecordBatch"]:
    if batch.nbytes <= limits.piece_bytes or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from _halves(batch.slice(0, half), limits)
        yield from _halves(batch.slice(half), limits)


def plain(schema: "pa.Schema") -> "pa.Schema":
    """Return the schema without dictionaries and views, whose slices would keep all values of the whole column."""
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
    if types.is_list_view(kind) or types.is_large_list_view(kind):  # pyarrow 26 casts them to broken lists
        raise ValueError(f"{kind} cannot be copied in small pieces: use lists instead of views")
    if types.is_large_list(kind):
        return large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return list_(kind.value_field.with_type(_plain(kind.value_type)), getattr(kind, "list_size", -1))
    return kind
