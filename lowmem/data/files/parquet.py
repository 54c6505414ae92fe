"""Read Parquet files in groups of rows. A group is a row group, or a piece of a copy."""

from collections.abc import Iterator, Mapping
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, BinaryIO, ClassVar, NamedTuple

import numpy as np
import xxhash

from lowmem.data.files.arrow_sizes import item_bytes
from lowmem.data.files.columns import select_columns
from lowmem.data.files.line_index import LONGEST_LINE
from lowmem.data.files.parquet_headers import Chunk, longest_value, parse_footer, read_pages
from lowmem.data.files.record_batches import LARGEST_DECODED_BYTES, LARGEST_RATIO, TableLimits, copy_in_pieces, plain
from lowmem.data.files.source import Source, check_ratio, opening, reading
from lowmem.data.files.tables import TableFile, read_end

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

    from lowmem.data.files.tables import Columns

_ROWS_PER_DECODE = 2**14
_LARGEST_DICTIONARY_BYTES = 2**20  # parquet writers usually store plain values if the dictionary would be larger
# Set a small buffer size: otherwise pyarrow would read a row group's whole encoded column into memory.
_SETTINGS = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 2**16}


class _Plan(NamedTuple):
    """How to decode columns of a row group."""

    repeating: list[str]  # paths to decode to dictionaries
    may_be_long: bool  # whether the rows of `repeating` may be far larger than they are stored
    rows: int  # to decode at once
    stored_bytes: int


class ParquetFile(TableFile):
    """A parquet file (also remote). Groups are row groups or, if one of them or the footer is large, pieces of a copy.

    Reads only the columns in `wanted` ({name: "text" or "messages"}; None: all columns), and "tools" with messages.
    Raises UsageError if the file is unreadable or does not fit `wanted`.
    """

    # Keep only the last parsed footer: each takes 1 KiB per column chunk, but parsing it again takes only milliseconds.
    _last_parsed: "ClassVar[tuple[ParquetFile | None, parquet.FileMetaData | None]]" = (None, None)

    def __init__(self, source: Source, wanted: Mapping[str, str] | None, *, limits: TableLimits | None = None):
        from pyarrow import parquet

        self.source, limits = source, limits or TableLimits()
        with opening(source, " as parquet"):
            self._stamp = source.stamp()
            with source.open() as file:
                metadata = parquet.read_metadata(file)
                self._footer_bytes = metadata.serialized_size + 8
                self._footer_hash = xxhash.xxh3_64_intdigest(read_end(file, self._footer_bytes))
                size = int.from_bytes(read_end(file, 8)[:4], "little")
                footer = read_end(file, 8 + size)[:size]
            whole = metadata.schema.to_arrow_schema()
            schema = select_columns(source, whole, wanted)
            self._names = schema.names
            self.unread = [name for name in whole.names if name not in self._names]
            # The descriptions of the chunks, int64, shape (groups, paths, 7)
            paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
            self._paths = [path for path in paths if _is_within(path, self._names)]
            groups = [(rows, [chunks[path] for path in self._paths]) for rows, chunks in parse_footer(footer)]
            self._chunks = np.array([chunks for _, chunks in groups], np.int64)
            self.group_rows = np.array([rows for rows, _ in groups], np.int64)
            self.group_bytes = np.array([sum(map(_decoded_bytes, chunks)) for _, chunks in groups], np.int64)
            is_large = self.group_bytes.max(initial=0) > limits.row_group_bytes
            # each read of a group also reads the footer, so copy if the footer is large, and larger than a mean group
            if is_large or self._footer_bytes > max(limits.footer_bytes, self.group_bytes.mean()):
                size = {"num_rows": int(self.group_rows.sum()), "num_bytes": int(self.group_bytes.sum())}
                self._use(copy_in_pieces(source, schema, self._all_rows(limits), **size, limits=limits))

    def read_group(self, group: int) -> "Columns":
        if self._batches:
            return super().read_group(group)
        import pyarrow as pa
        from pyarrow import parquet

        # Open the file again for each group: keeping ten thousand files open would take ten thousand handles.
        with reading(), self.source.open() as file:
            self._check_unchanged()
            if xxhash.xxh3_64_intdigest(read_end(file, self._footer_bytes)) != self._footer_hash:
                raise self._changed()
            try:
                owner, metadata = ParquetFile._last_parsed
                if owner is not self:
                    metadata = parquet.read_metadata(file)
                    ParquetFile._last_parsed = (self, metadata)
                return {name: self._decode(file, metadata, group, name) for name in self._names}
            except (pa.ArrowException, LookupError, ValueError) as error:
                where = f"row group {group} of {self.source}"
                raise ValueError(f"{where} cannot be decoded ({error}): write the file again") from error

    def _decode(self, file: BinaryIO, metadata: "parquet.FileMetaData", group: int, name: str) -> "pa.ChunkedArray":
        """Decode one column of a group. This can take half the memory of decoding all columns together."""
        import pyarrow as pa
        from pyarrow import parquet

        plan = self._plan(file, group, [name], rows=_ROWS_PER_DECODE, to_copy=False)
        # If the file stores repeated text once, in a dictionary, decode to a dictionary to hold it once in memory too.
        with parquet.ParquetFile(file, metadata=metadata, read_dictionary=plan.repeating, **_SETTINGS) as opened:
            if plan.repeating:
                column = opened.read_row_group(group, columns=[name], use_threads=False).column(name)
                column.validate(full=True)  # otherwise a bad text would fail only when its row is read
                if plan.may_be_long:
                    sizes = np.concatenate([item_bytes(part) for part in column.chunks])
                    check_ratio(plan.stored_bytes, int(sizes.sum()))
                    if sizes.max(initial=0) > LONGEST_LINE:
                        raise ValueError(f"a row has more than {LONGEST_LINE:,} bytes: split it")
            else:  # decode in pieces, because the buffer of a whole column grows by doubling
                pieces, num_bytes = [], 0
                for piece in opened.iter_batches(plan.rows, row_groups=[group], columns=[name], use_threads=False):
                    piece.validate(full=True)  # before anything else, because pyarrow crashes if it casts a bad batch
                    pieces.append(_in_own_mapping(piece).column(name))
                    num_bytes += pieces[-1].nbytes
                    if num_bytes > LARGEST_DECODED_BYTES:
                        raise ValueError(f"column {name!r} has more than {LARGEST_DECODED_BYTES:,} bytes")
                column = pa.chunked_array(pieces) if pieces else ()
        if len(column) != self.group_rows[group]:
            raise ValueError(f"column {name!r} has {len(column):,} rows, the footer says {self.group_rows[group]:,}")
        # Without this call, Arrow's allocator keeps freed memory, and a process grew to 100 MiB instead of 45 MiB.
        pa.default_memory_pool().release_unused()
        return column

    def _plan(self, file: BinaryIO, group: int, names: list[str], *, rows: int, to_copy: bool) -> _Plan:
        """Check the pages of some columns, and plan how to decode at most `rows` rows and 256 MiB of them at once.

        Raises OSError, and ValueError if a page header is damaged or a page is too large.
        """
        # A group that is not copied takes less than a page may take here.
        limits = {"limit": LARGEST_DECODED_BYTES, "ratio": LARGEST_RATIO} if to_copy else {"limit": LONGEST_LINE}
        repeating, may_be_long, stored_bytes = [], False, 0
        for path, numbers in zip(self._paths, self._chunks[group].tolist(), strict=True):
            if not _is_within(path, names):
                continue
            chunk = Chunk(*numbers)
            stored_bytes += chunk.stored_bytes
            pages = read_pages(file, chunk, **limits)
            values = [page for page in pages if not page.is_dictionary]
            num_encoded = sum(page.num_values for page in values if page.is_encoded)
            # what the values of the dictionary may take, when each is decoded
            upper = num_encoded * max((page.decoded_bytes for page in pages if page.is_dictionary), default=0)
            if not to_copy and _repeats(chunk):
                repeating.append(path)
                may_be_long |= upper > (LONGEST_LINE if "." in path else LARGEST_DECODED_BYTES)
            elif upper > LARGEST_DECODED_BYTES:
                longest = longest_value(file, chunk, pages)
                if num_encoded * longest <= LARGEST_DECODED_BYTES:
                    continue
                # of nested values, the number in each row is not known
                if "." in path or (not to_copy and all(page.is_encoded for page in values)):
                    repeating.append(path)
                    may_be_long = True
                else:
                    rows = max(1, min(rows, LARGEST_DECODED_BYTES // longest))
        return _Plan(repeating, may_be_long, rows, stored_bytes)

    def _all_rows(self, limits: TableLimits) -> "Iterator[pa.RecordBatch]":
        from pyarrow import parquet

        with self.source.open() as file:
            metadata = parquet.read_metadata(file)
            for group in range(len(self.group_rows)):  # one at a time: several fail for lists of dictionary values
                yield from self._checked_batches(file, metadata, group, limits)

    def _checked_batches(
        self, file: BinaryIO, metadata: "parquet.FileMetaData", group: int, limits: TableLimits
    ) -> "Iterator[pa.RecordBatch]":
        from pyarrow import parquet

        group_rows, done = int(self.group_rows[group]), 0
        rows = limits.rows_per_piece(group_rows, int(self.group_bytes[group]))
        plan = self._plan(file, group, self._names, rows=rows, to_copy=True)
        with parquet.ParquetFile(file, metadata=metadata, read_dictionary=plan.repeating, **_SETTINGS) as opened:
            for batch in opened.iter_batches(plan.rows, row_groups=[group], columns=self._names, use_threads=False):
                batch.validate(full=True)
                done += batch.num_rows
                yield batch
        if done != group_rows:
            raise ValueError(f"row group {group} has {done:,} rows, the footer says {group_rows:,}")


def _in_own_mapping(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Copy a batch to a separate memory mapping, which is freed with the copy. An allocator would keep the memory."""
    import pyarrow as pa

    if batch.schema != (schema := plain(batch.schema)):  # a dictionary would need a separate message
        batch = batch.cast(schema)  # cast only if needed, because `cast` loads 7 MiB of pyarrow's code
    message = batch.serialize()
    memory = mmap(-1, message.size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.write(message)
    return pa.ipc.read_record_batch(pa.py_buffer(memory), batch.schema)


def _is_within(path: str, names: list[str]) -> bool:
    """Whether the path of a leaf, such as messages.list.element.role, is in one of the columns `names`."""
    return any(f"{path}.".startswith(f"{name}.") for name in names)


def _decoded_bytes(chunk: Chunk) -> int:
    """Estimate the decoded size of a chunk: the uncompressed size, and 4 bytes per dictionary index."""
    return chunk.decoded_bytes + 4 * chunk.num_values * _repeats(chunk)


def _repeats(chunk: Chunk) -> bool:
    """Judge by its size whether a chunk is stored entirely as a dictionary and indices."""
    return bool(chunk.has_dictionary) and chunk.decoded_bytes <= _LARGEST_DICTIONARY_BYTES + 4 * chunk.num_values
