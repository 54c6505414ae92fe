"""Read Parquet and Arrow files in groups of rows. A group is a row group, a record batch, or a piece of a copy."""

import struct
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, BinaryIO, ClassVar

import numpy as np
import xxhash

from lowmem.data.files.columns import select_columns
from lowmem.data.files.record_batches import RecordBatches, TableLimits, copy_in_pieces, find_batches, ipc_start, plain
from lowmem.data.files.source import Row, Source, opening, reading
from lowmem.errors import ChangedError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

    Columns = dict[str, pa.Array | pa.ChunkedArray]

_ROWS_PER_DECODE = 2**14
_LARGEST_DICTIONARY_BYTES = 2**20  # parquet writers usually store plain values if the dictionary would be larger
_SAMPLES, _SAMPLE_BYTES = 64, 2**12
# Set a small buffer size: otherwise pyarrow would read a row group's whole encoded column into memory.
_SETTINGS = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 2**16}


class _TableFile:
    """Code shared by both formats. In memory, a group is {name: column}; a row has one item of each column."""

    source: Source
    group_rows: np.ndarray
    group_bytes: np.ndarray
    _names: list[str]
    _batches: RecordBatches | None = None  # the Arrow file's or the copy's; None if parquet is read without a copy
    _footer_bytes = 0

    def read_group(self, group: int) -> "Columns":
        """Read the columns of one group. Raises OSError and ValueError."""
        batch = self._batches.read(group)
        return {name: batch.column(name) for name in self._names}

    def row(self, data: "Columns", index: int) -> Row:
        try:
            return {name: column[index].as_py() for name, column in data.items()}
        except OverflowError as error:  # a time is outside the range of Python's datetime
            raise ValueError(f"{error}: fix the row, or remove this column from the file") from error

    def location(self, group: int, index: int) -> str:
        return f"row {int(self.group_rows[:group].sum()) + index}"

    def fingerprint(self) -> str:
        """Hash the size, parquet's footer and 64 evenly spaced samples of 4 KiB (all of a file up to 256 KiB)."""
        # Misses changes between samples if the footer is the same. Remote files get no samples: each fetches megabytes.
        with self.source.open() as file:
            size = file.seek(0, 2)
            digest = xxhash.xxh3_128(struct.pack("<q", size) + _footer(file, self._footer_bytes))
            for sample in range(_SAMPLES if self.source.path else 0):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _use(self, batches: RecordBatches) -> None:
        self._batches, self.group_rows, self.group_bytes = batches, batches.rows, batches.sizes


class ParquetFile(_TableFile):
    """A parquet file (also remote). Groups are row groups or, if one of them or the footer is large, pieces of a copy.

    Reads only the columns in `wanted` ({name: "text" or "messages"}; None: all columns), and "tools" with messages.
    Raises UsageError if the file is unreadable or does not fit `wanted`. (Some flipped bits in a footer crash pyarrow.)
    """

    # Keep only the last parsed footer: each takes 1 KiB per column chunk, but parsing it again takes only milliseconds.
    _last_parsed: "ClassVar[tuple[ParquetFile | None, parquet.FileMetaData | None]]" = (None, None)

    def __init__(self, source: Source, wanted: Mapping[str, str] | None, *, limits: TableLimits | None = None):
        from pyarrow import parquet

        self.source, limits = source, limits or TableLimits()
        with opening(source, " as parquet"):
            with source.open() as file:
                metadata = parquet.read_metadata(file)
                self._footer_bytes = metadata.serialized_size + 8
                self._footer_hash = xxhash.xxh3_64_intdigest(_footer(file, self._footer_bytes))
            schema = select_columns(source, metadata.schema.to_arrow_schema(), wanted)
            self._names = schema.names
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            self.group_rows = np.array([group.num_rows for group in groups], np.int64)
            self.group_bytes = np.array([_decoded_bytes(group, self._names) for group in groups], np.int64)
            is_large = self.group_bytes.max(initial=0) > limits.row_group_bytes
            # each read of a group also reads the footer, so copy if the footer is large, and larger than a mean group
            if is_large or self._footer_bytes > max(limits.footer_bytes, self.group_bytes.mean()):
                num_bytes = int(self.group_bytes.sum())
                self._use(copy_in_pieces(source, schema, self._all_rows(limits), num_bytes=num_bytes, limits=limits))

    def read_group(self, group: int) -> "Columns":
        if self._batches:
            return super().read_group(group)
        import pyarrow as pa
        from pyarrow import parquet

        # Open the file again for each group: keeping ten thousand files open would take ten thousand handles.
        with reading(), self.source.open() as file:
            if xxhash.xxh3_64_intdigest(_footer(file, self._footer_bytes)) != self._footer_hash:
                raise ChangedError(f"{self.source} is not the file that was opened: do not change it, start again")
            try:
                owner, metadata = ParquetFile._last_parsed
                if owner is not self:
                    metadata = parquet.read_metadata(file)
                    ParquetFile._last_parsed = (self, metadata)
                return {name: self._decode(file, metadata, group, name) for name in self._names}
            except (pa.ArrowException, LookupError) as error:
                where = f"row group {group} of {self.source}"
                raise ValueError(f"{where} cannot be decoded ({error}): write the file again") from error

    def _decode(self, file: BinaryIO, metadata: "parquet.FileMetaData", group: int, name: str) -> "pa.ChunkedArray":
        """Decode one column of a group. This can take half the memory of decoding all columns together."""
        import pyarrow as pa
        from pyarrow import parquet

        # If the file stores repeated text once, in a dictionary, decode to a dictionary to hold it once in memory too.
        repeating = [chunk.path_in_schema for chunk in _chunks(metadata.row_group(group), [name]) if _repeats(chunk)]
        with parquet.ParquetFile(file, metadata=metadata, read_dictionary=repeating, **_SETTINGS) as opened:
            if repeating:
                column = opened.read_row_group(group, columns=[name], use_threads=False).column(name)
            else:  # decode in pieces, because the buffer of a whole column grows by doubling
                pieces = opened.iter_batches(_ROWS_PER_DECODE, row_groups=[group], columns=[name], use_threads=False)
                column = pa.chunked_array([_in_own_mapping(piece).column(name) for piece in pieces])
        column.validate(full=True)  # otherwise a bad text would fail only when its row is read
        # Without this call, Arrow's allocator keeps freed memory, and a process grew to 100 MiB instead of 45 MiB.
        pa.default_memory_pool().release_unused()
        return column

    def _all_rows(self, limits: TableLimits) -> "Iterator[pa.RecordBatch]":
        from pyarrow import parquet

        with self.source.open() as file, parquet.ParquetFile(file, **_SETTINGS) as opened:
            for group in range(opened.num_row_groups):  # one at a time: several fail for lists of dictionary values
                rows = limits.rows_per_piece(int(self.group_rows[group]), int(self.group_bytes[group]))
                yield from opened.iter_batches(rows, row_groups=[group], columns=self._names, use_threads=False)


class ArrowFile(_TableFile):
    """A local Arrow file, in the stream format (which `datasets.save_to_disk` writes) or the file format.

    Its groups are its record batches or, if one is large, compressed or needs a dictionary, the pieces of its copy.
    Arguments and errors are as for ParquetFile. Arrow has no checksums, so a flipped bit in a text may go undetected.
    """

    def __init__(self, source: Source, wanted: Mapping[str, str] | None, *, limits: TableLimits | None = None):
        self.source, limits = source, limits or TableLimits()
        if source.path is None:
            raise UsageError(f"{source} is an Arrow file, which must be local: download it, or use parquet")
        with opening(source, " as Arrow"):
            batches, alone = find_batches(source)
            schema = select_columns(source, batches.schema, wanted)
            self._names = schema.names
            if not alone or batches.sizes.max(initial=0) > limits.batch_bytes:
                rows = self._all_rows([batches.schema.names.index(name) for name in self._names], limits)
                batches = copy_in_pieces(source, schema, rows, num_bytes=source.stamp()[0], limits=limits)
            self._use(batches)

    def _all_rows(self, fields: list[int], limits: TableLimits) -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        # A batch may be the whole file. Map the file for this one pass, so that only the part being read is in memory.
        with self.source.open() as file:
            mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
            messages = pa.BufferReader(mapped)
            messages.seek(ipc_start(file))
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            for batch in pa.ipc.open_stream(messages, options=options):
                rows = limits.rows_per_piece(batch.num_rows, batch.nbytes)
                for first in range(0, batch.num_rows, rows):
                    yield batch.slice(first, rows)
                    mapped.madvise(MADV_DONTNEED)


def _footer(file: BinaryIO, num_bytes: int) -> bytes:
    file.seek(max(0, file.seek(0, 2) - num_bytes))
    return file.read()


def _in_own_mapping(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Copy a batch to a separate memory mapping, which is freed with the copy. An allocator would keep the memory."""
    import pyarrow as pa

    if batch.schema != (schema := plain(batch.schema)):  # a dictionary would need a separate message
        batch = batch.cast(schema)  # cast only if needed, because `cast` loads 7 MiB of pyarrow's code
    message = batch.serialize()
    memory = mmap(-1, message.size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.write(message)
    return pa.ipc.read_record_batch(pa.py_buffer(memory), batch.schema)


def _chunks(group: "parquet.RowGroupMetaData", names: list[str]) -> "list[parquet.ColumnChunkMetaData]":
    chunks = [group.column(number) for number in range(group.num_columns)]
    return [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names)]


def _decoded_bytes(group: "parquet.RowGroupMetaData", names: list[str]) -> int:
    """Estimate the decoded size of the named columns: the uncompressed size, and 4 bytes per dictionary index."""
    chunks = _chunks(group, names)
    return sum(chunk.total_uncompressed_size + 4 * chunk.num_values * _repeats(chunk) for chunk in chunks)


def _repeats(chunk: "parquet.ColumnChunkMetaData") -> bool:
    """Judge by its size whether a chunk is stored entirely as a dictionary and indices."""
    has_dictionary = any("DICTIONARY" in kind for kind in chunk.encodings)
    return has_dictionary and chunk.total_uncompressed_size <= _LARGEST_DICTIONARY_BYTES + 4 * chunk.num_values
