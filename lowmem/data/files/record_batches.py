"""Arrow record batches on disk by number, each read alone: those of an Arrow file, or of a copy in small pieces.

A file is never mapped to read from it during a run: a mapped file that is cut kills the process (SIGBUS), and the pages
of it that were looked at count as its memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.cache import derive
from lowmem.data.files.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

_PIECE_ROWS, _PIECE_BYTES = 1024, 2**20
_END_MARK = b"\xff\xff\xff\xff\0\0\0\0"


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
    """The batches of a local file in Arrow's stream or file format, and whether each can be read alone: it is not
    compressed and needs no dictionary.

    The hashes are of the messages' heads: they tell another file, not a flipped bit in a text. Raises OSError, and
    ValueError if the file is cut or no Arrow file.
    """
    import pyarrow as pa

    found, alone = [], True
    with pa.memory_map(str(source.path)) as file:  # so that bodies are found, but not read
        file.seek(stream_start(file))
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
                alone = batch.nbytes <= message.body.size  # or it was unpacked
                head_bytes = size - message.body.size
                head = file.read_at(head_bytes, start)
                found.append((start, size, batch.num_rows, head_bytes, xxhash.xxh3_64_intdigest(head)))
            alone &= message.type != "dictionary"
        if file.read_at(8, start) != _END_MARK:
            raise ValueError(f"its end mark is missing at byte {start:,}, so it was cut")
    return RecordBatches(source, schema, *_columns(found)), alone


def stream_start(file: BinaryIO) -> int:
    """Where the messages begin: the file format is the stream format behind eight bytes, with a footer."""
    file.seek(0)
    return 8 if file.read(6) == b"ARROW1" else 0


def copy_in_pieces(
    source: Source,
    kind: str,
    schema: "pa.Schema",
    batches: Callable[[], Iterable["pa.RecordBatch"]],
    *,
    num_bytes: int,
) -> RecordBatches:
    """The rows of `batches()`, in order, as batches of at most 1,024 rows and, if they have several, about 1 MiB.

    Made once for each `kind`; `num_bytes` is about what all batches take. Dictionaries are replaced by their values.
    Raises what `derive` and `batches` raise.
    """
    import pyarrow as pa

    schema = plain(schema)

    def build(copy: BinaryIO | None, update: Callable[[int], None]) -> dict[str, np.ndarray]:
        found, start = [], 0
        pieces = (piece for batch in batches() for piece in _pieces(batch.select(schema.names), schema))
        for piece in _merged(pieces):
            piece.validate(full=True)  # or the copy would be blamed for it
            message = piece.serialize()
            found.append((start, len(message), piece.num_rows, len(message), xxhash.xxh3_64_intdigest(message)))
            start += copy.write(message)
            pa.default_memory_pool().release_unused()
            update(piece.nbytes)
        return dict(zip(("starts", "sizes", "rows", "hashed", "hashes"), _columns(found), strict=True))

    made = derive(source, build, kind=kind, copies=True, num_bytes=num_bytes)
    remedy = "delete it, and it is made anew at the next start"
    return RecordBatches(Source(str(made.copy)), schema, **made.index, remedy=remedy)


def _columns(found: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The five arrays of RecordBatches out of their rows: int64, the hashes uint64."""
    columns = list(zip(*found, strict=True)) or [()] * 5
    return [np.array(column, np.int64) for column in columns[:4]] + [np.array(columns[4], np.uint64)]


def _pieces(batch: "pa.RecordBatch", schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    for first in range(0, batch.num_rows, _PIECE_ROWS):
        yield from _halves(batch.slice(first, _PIECE_ROWS).cast(schema))


def _merged(pieces: Iterable["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    """The same rows in as few pieces as may be: very small row groups would be very small pieces."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    rows = num_bytes = 0

    def joined() -> pa.RecordBatch:
        return held[0] if len(held) == 1 else pa.Table.from_batches(held).combine_chunks().to_batches()[0]

    for piece in pieces:
        rows, num_bytes = rows + piece.num_rows, num_bytes + piece.nbytes
        if held and (rows > _PIECE_ROWS or num_bytes > _PIECE_BYTES):
            yield joined()
            held.clear()
            rows, num_bytes = piece.num_rows, piece.nbytes
        held.append(piece)
    if held:
        yield joined()


def _halves(batch: "pa.RecordBatch") -> Iterator["pa.RecordBatch"]:
    if batch.nbytes <= _PIECE_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from _halves(batch.slice(0, half))
        yield from _halves(batch.slice(half))


def rows_in_a_piece(num_rows: int, num_bytes: int) -> int:
    """How many of `num_rows` rows that take `num_bytes` together a piece takes, if they are about equal."""
    return max(1, min(_PIECE_ROWS, _PIECE_BYTES * num_rows // max(1, num_bytes)))


def plain(schema: "pa.Schema") -> "pa.Schema":
    """The schema without dictionaries and views. Raises ValueError for a type that pyarrow cannot make so."""
    import pyarrow as pa

    return pa.schema([(field.name, _plain(field.type)) for field in schema])


def _plain(kind: "pa.DataType") -> "pa.DataType":
    """The type without dictionaries and views: a piece of those would hold all that the whole refers to."""
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
        raise ValueError(f"{kind} cannot be copied in small pieces, use lists instead of views")
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = kind.value_field.with_type(_plain(kind.value_type))
        if types.is_fixed_size_list(kind):
            return list_(item, kind.list_size)
        return large_list(item) if types.is_large_list(kind) else list_(item)
    return kind
