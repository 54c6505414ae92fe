"""Parquet and Arrow files by groups of rows: row groups, record batches, or the pieces of a copy in small ones."""

import json
import struct
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, BinaryIO, ClassVar

import numpy as np
import xxhash

from lowmem.data.files.record_batches import (
    RecordBatches,
    copy_in_pieces,
    find_batches,
    plain,
    rows_in_a_piece,
    stream_start,
)
from lowmem.data.files.source import Row, Source, check_columns, reading
from lowmem.errors import ChangedError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

# A file with a larger group is copied, once, in small pieces. A column of a row group needs several times its bytes
# while it is decoded, a record batch is read as it stands.
_LARGEST_ROW_GROUP_BYTES = 9 * 2**20
_LARGEST_BATCH_BYTES = 2**24
_LARGEST_FOOTER_BYTES = 2**21
_ROWS_DECODED = 2**14  # at a time
_LARGEST_DICTIONARY_BYTES = 2**20  # writers give a dictionary up when its page gets larger
_SAMPLES, _SAMPLE_BYTES = 64, 2**12


class _TableFile:
    """What the formats share: a group that was read is its columns by name, and a row is one item of each."""

    source: Source
    group_rows: np.ndarray
    group_bytes: np.ndarray
    _names: list[str]
    _footer_bytes = 0

    def row(self, data: "dict[str, pa.Array | pa.ChunkedArray]", index: int) -> Row:
        try:
            return {name: column[index].as_py() for name, column in data.items()}
        except OverflowError as error:  # a time that Python has no date for
            raise ValueError(f"{error}: mend the row, or leave its column out") from error

    def place(self, group: int, index: int) -> str:
        return f"row {int(self.group_rows[:group].sum()) + index}"

    def fingerprint(self) -> str:
        """A hash of the file's size, its footer and 64 pieces of 4 KiB, spread evenly from the first byte to the last.

        A parquet file's footer tells each column chunk's size and, mostly, its least and greatest value. A change that
        leaves those and falls between the pieces is not seen; a file up to 256 KiB is seen whole. Of a remote file
        only size and footer are looked at, because each piece would fetch megabytes. Raises OSError.
        """
        with self.source.open() as file:
            size = file.seek(0, 2)
            digest = xxhash.xxh3_128(struct.pack("<q", size) + _footer(file, self._footer_bytes))
            for sample in range(_SAMPLES if self.source.path else 0):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _batches(self) -> "Iterator[pa.RecordBatch]":
        """All rows of the wanted columns in order, to be copied."""
        raise NotImplementedError

    def _copied(self, schema: "pa.Schema", num_bytes: int) -> RecordBatches:
        import pyarrow as pa

        # Runs that want other columns of the file have copies of their own.
        kind = f"copy-{xxhash.xxh3_64_hexdigest(json.dumps(self._names).encode())}"
        wanted = pa.schema([schema.field(name) for name in self._names])
        return copy_in_pieces(self.source, kind, wanted, self._batches, num_bytes=num_bytes)


class ParquetFile(_TableFile):
    """A parquet file, local or remote; its groups are its row groups, or the pieces of its copy if one is large.

    Of `wanted` columns ("text" or "messages") only these are read; None: all, of any type. Raises UsageError, naming
    the file, if it cannot be read or lacks a wanted column, or if one holds something else. (A flipped bit in the part
    of a footer that describes columns may end the process inside of pyarrow, where no error can be caught.)
    """

    _last_parsed: "ClassVar[tuple[ParquetFile | None, parquet.FileMetaData | None]]" = (None, None)

    def __init__(self, source: Source, wanted: Mapping[str, str] | None):
        from pyarrow import ArrowException, parquet

        self.source, self._copy = source, None
        try:
            with reading(), source.open() as file:
                metadata = parquet.read_metadata(file)
                self._footer_bytes = metadata.serialized_size + 8
                self._footer_hash = xxhash.xxh3_64_intdigest(_footer(file, self._footer_bytes))
            schema = metadata.schema.to_arrow_schema()
            _check_types(source, schema, wanted)
            self._names = schema.names if wanted is None else list(wanted)
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            self.group_rows = np.array([group.num_rows for group in groups], np.int64)
            self.group_bytes = np.array([_decoded_bytes(group, self._names) for group in groups], np.int64)
            is_large = self.group_bytes.max(initial=0) > _LARGEST_ROW_GROUP_BYTES
            # Each group is read behind the whole footer: a large one needs groups that are worth it.
            if is_large or self._footer_bytes > max(_LARGEST_FOOTER_BYTES, self.group_bytes.mean()):
                self._copy = self._copied(schema, int(self.group_bytes.sum()))
                self.group_rows, self.group_bytes = self._copy.rows, self._copy.sizes
        except UsageError:
            raise
        except (ArrowException, OSError, LookupError, ValueError) as error:
            raise UsageError(f"{source} cannot be read as parquet ({error}): write it again") from error

    def read_group(self, group: int) -> "dict[str, pa.Array | pa.ChunkedArray]":
        """The columns of one group. Raises OSError and ValueError."""
        import pyarrow as pa

        if self._copy:
            batch = self._copy.read(group)
            return {name: batch.column(name) for name in self._names}
        # The file is opened anew: ten thousand files need no ten thousand handles.
        with reading(), self.source.open() as file:
            if xxhash.xxh3_64_intdigest(_footer(file, self._footer_bytes)) != self._footer_hash:
                raise ChangedError(f"{self.source} is not the file that was opened: start anew, and leave it as it is")
            try:
                metadata = self._metadata(file)
                return {name: self._decode(file, metadata, group, name) for name in self._names}
            except (pa.ArrowException, LookupError) as error:
                told = f"row group {group} of {self.source} cannot be decoded ({error}): write the file again"
                raise ValueError(told) from error

    def _metadata(self, file: BinaryIO) -> "parquet.FileMetaData":
        """The parsed footer, kept for one file alone: it takes milliseconds, and 1 KiB for each chunk of a column."""
        from pyarrow import parquet

        of, metadata = ParquetFile._last_parsed
        if of is not self:
            metadata = parquet.read_metadata(file)
            ParquetFile._last_parsed = (self, metadata)
        return metadata

    def _decode(self, file: BinaryIO, metadata: "parquet.FileMetaData", group: int, name: str) -> "pa.ChunkedArray":
        """One column of a group: decoding one at a time takes half of what all at once do."""
        import pyarrow as pa

        # Texts that repeat stand in the file once; decoded as a dictionary they do so in memory.
        repeating = [chunk.path_in_schema for chunk in _chunks(metadata.row_group(group), [name]) if _repeats(chunk)]
        with _decoder(file, metadata=metadata, read_dictionary=repeating, buffer_size=2**16) as opened:
            if repeating:
                column = opened.read_row_group(group, columns=[name], use_threads=False).column(name)
            else:  # in pieces, as a whole would grow by doubling
                pieces = opened.iter_batches(_ROWS_DECODED, row_groups=[group], columns=[name], use_threads=False)
                column = pa.chunked_array([_apart(piece).column(name) for piece in pieces])
        column.validate(full=True)  # as texts are only looked at when their row is asked for
        # Arrow's allocator would keep what decoding took: 100 MiB instead of 45 after a while.
        pa.default_memory_pool().release_unused()
        return column

    def _batches(self) -> "Iterator[pa.RecordBatch]":
        # Through a small buffer, or each column of a row group would be in memory as it stands in the file.
        with self.source.open() as file, _decoder(file, buffer_size=2**16) as opened:
            for group in range(opened.num_row_groups):  # as texts in lists cannot be read from several at a time
                rows = rows_in_a_piece(int(self.group_rows[group]), int(self.group_bytes[group]))
                yield from opened.iter_batches(rows, row_groups=[group], columns=self._names, use_threads=False)


class ArrowFile(_TableFile):
    """A local Arrow file, in the stream format (`datasets.save_to_disk` writes it) or the file format.

    Its groups are its record batches, or the pieces of its copy if one is large, compressed or needs a dictionary.
    Takes and raises what ParquetFile does. The format has no checksums: a flipped bit in a text may go unseen.
    """

    def __init__(self, source: Source, wanted: Mapping[str, str] | None):
        from pyarrow import ArrowException

        self.source = source
        if source.path is None:
            raise UsageError(
                f"{source} is an Arrow file, which is read on this machine: fetch it, or name parquet files"
            )
        try:
            self._found, alone = find_batches(source)
            _check_types(source, self._found.schema, wanted)
            self._names = self._found.schema.names if wanted is None else list(wanted)
            if not alone or self._found.sizes.max(initial=0) > _LARGEST_BATCH_BYTES:
                self._found = self._copied(self._found.schema, source.stamp()[0])
        except UsageError:
            raise
        except (ArrowException, OSError, EOFError, LookupError, ValueError) as error:
            raise UsageError(f"{source} cannot be read as Arrow ({error}): write it again") from error
        self.group_rows, self.group_bytes = self._found.rows, self._found.sizes

    def read_group(self, group: int) -> "dict[str, pa.Array | pa.ChunkedArray]":
        """The columns of one group. Raises OSError and ValueError."""
        batch = self._found.read(group)
        return {name: batch.column(name) for name in self._names}

    def _batches(self) -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        # A batch may be the whole file: mapped, for this one pass, it is in memory no further than it is read.
        with self.source.open() as file:
            mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
            messages = pa.BufferReader(mapped)
            messages.seek(stream_start(file))
            fields = [number for number, name in enumerate(self._found.schema.names) if name in self._names]
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            for batch in pa.ipc.open_stream(messages, options=options):
                rows = rows_in_a_piece(batch.num_rows, batch.nbytes)
                for first in range(0, batch.num_rows, rows):
                    yield batch.slice(first, rows)
                    mapped.madvise(MADV_DONTNEED)


def _footer(file: BinaryIO, num_bytes: int) -> bytes:
    file.seek(max(0, file.seek(0, 2) - num_bytes))
    return file.read()


def _decoder(file: BinaryIO, **settings: object) -> "parquet.ParquetFile":
    from pyarrow import parquet

    return parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, **settings)


def _apart(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The same in a mapping of its own, which the system has back when the batch goes; an allocator would keep it."""
    import pyarrow as pa

    if batch.schema != (schema := plain(batch.schema)):  # a dictionary would need a message of its own
        batch = batch.cast(schema)  # which loads 7 MiB of pyarrow, so only where it is needed
    message = batch.serialize()
    memory = mmap(-1, message.size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.write(message)
    return pa.ipc.read_record_batch(pa.py_buffer(memory), batch.schema)


def _chunks(group: "parquet.RowGroupMetaData", names: list[str]) -> "list[parquet.ColumnChunkMetaData]":
    """The chunks of the named columns, several of a nested one."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    return [chunk for chunk in chunks if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names)]


def _decoded_bytes(group: "parquet.RowGroupMetaData", names: list[str]) -> int:
    """About what the named columns take decoded; in a dictionary, each value takes four bytes that the file does not.

    A chunk that begins as a dictionary and goes on without takes more, by what repeats at its beginning.
    """
    chunks = _chunks(group, names)
    return sum(chunk.total_uncompressed_size + 4 * chunk.num_values * _repeats(chunk) for chunk in chunks)


def _repeats(chunk: "parquet.ColumnChunkMetaData") -> bool:
    """Whether a chunk is a dictionary and places in it, as far as its size can tell."""
    has_dictionary = any("DICTIONARY" in kind for kind in chunk.encodings)
    return has_dictionary and chunk.total_uncompressed_size <= _LARGEST_DICTIONARY_BYTES + 4 * chunk.num_values


def _check_types(source: Source, schema: "pa.Schema", wanted: Mapping[str, str] | None) -> None:
    check_columns(source, wanted or (), schema.names)
    if twice := [column for column in wanted or schema.names if schema.names.count(column) > 1]:
        raise UsageError(
            f"{source} has column {twice[0]!r} twice, so a row has two of it: rename one and write it again"
        )
    for column, kind in (wanted or {}).items():
        found = schema.field(column).type
        if not (_is_text(found) if kind == "text" else _is_chat(found)):
            what = "text" if kind == "text" else "chats (lists of a struct of the texts role and content)"
            raise UsageError(f"{source}: column {column!r} must hold {what}, it holds {found}: name another column")


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_chat(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    return {"role", "content"} <= {field.name for field in kind.value_type if _is_text(field.type)}
