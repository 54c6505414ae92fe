"""Read table files in groups of rows: the code shared by both formats, and Arrow files. For Parquet, see parquet.py.

A group is a record batch, a row group, or a piece of a copy.
"""

import struct
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, MADV_DONTNEED, mmap
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from lowmem.data.files.columns import select_columns
from lowmem.data.files.record_batches import RecordBatches, TableLimits, copy_in_pieces, find_batches, ipc_start
from lowmem.data.files.source import Row, Source, opening
from lowmem.errors import ChangedError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    Columns = dict[str, pa.Array | pa.ChunkedArray]

_SAMPLES, _SAMPLE_BYTES = 64, 2**12


class TableFile:
    """Code shared by both formats. In memory, a group is {name: column}; a row has one item of each column."""

    source: Source
    group_rows: np.ndarray
    group_bytes: np.ndarray
    unread: list[str]
    _names: list[str]
    _batches: RecordBatches | None = None  # the Arrow file's or the copy's; None if parquet is read without a copy
    _footer_bytes = 0
    _stamp: tuple[int, str]

    def read_group(self, group: int) -> "Columns":
        """Read the columns of one group. Raises OSError (ChangedError if the file has changed) and ValueError."""
        if self._batches.source == self.source:  # a copy is hashed
            self._check_unchanged()
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
            digest = xxhash.xxh3_128(struct.pack("<q", size) + read_end(file, self._footer_bytes))
            for sample in range(_SAMPLES if self.source.path else 0):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _check_unchanged(self) -> None:
        # Of remote files, only the footer is compared: a stamp would be one more request for each group.
        if self.source.path and self.source.stamp() != self._stamp:
            raise self._changed()

    def _changed(self) -> ChangedError:
        return ChangedError(f"{self.source} is not the file that was opened: do not change it, start again")

    def _use(self, batches: RecordBatches) -> None:
        self._batches, self.group_rows, self.group_bytes = batches, batches.rows, batches.sizes


class ArrowFile(TableFile):
    """A local Arrow file, in the stream format (which `datasets.save_to_disk` writes) or the file format.

    Its groups are its record batches or, if one is large, compressed or needs a dictionary, the pieces of its copy.
    Arguments and errors are as for ParquetFile. Arrow has no checksums, so a flipped bit in a text may go undetected.
    """

    def __init__(self, source: Source, wanted: Mapping[str, str] | None, *, limits: TableLimits | None = None):
        self.source, limits = source, limits or TableLimits()
        if source.path is None:
            raise UsageError(f"{source} is an Arrow file, which must be local: download it, or use parquet")
        with opening(source, " as Arrow"):
            self._stamp = source.stamp()
            batches, num_rows, alone = find_batches(source)
            schema = select_columns(source, batches.schema, wanted)
            self._names = schema.names
            self.unread = [name for name in batches.schema.names if name not in self._names]
            if not alone or batches.sizes.max(initial=0) > limits.batch_bytes:
                rows = self._all_rows([batches.schema.names.index(name) for name in self._names], limits)
                size = {"num_rows": num_rows, "num_bytes": source.stamp()[0]}
                batches = copy_in_pieces(source, schema, rows, **size, limits=limits)
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
                # Following the offsets of a batch that is not validated can crash. Validate a nested column as a whole,
                # because each slice would validate all its items again; validate others in slices, to map less.
                batch.validate()
                nested = {name for name in batch.schema.names if _is_nested(batch.schema.field(name).type)}
                for name in nested:
                    batch.column(name).validate(full=True)
                    mapped.madvise(MADV_DONTNEED)
                rows = limits.rows_per_piece(batch.num_rows, batch.nbytes)
                for first in range(0, batch.num_rows, rows):
                    part = batch.slice(first, rows)
                    for name in set(batch.schema.names) - nested:
                        part.column(name).validate(full=True)
                    yield part
                    mapped.madvise(MADV_DONTNEED)


def read_end(file: BinaryIO, num_bytes: int) -> bytes:
    """Read the last bytes of an open file."""
    file.seek(max(0, file.seek(0, 2) - num_bytes))
    return file.read()


def _is_nested(kind: "pa.DataType") -> bool:
    from pyarrow import BaseExtensionType, types

    return kind.num_fields > 0 or types.is_dictionary(kind) or isinstance(kind, BaseExtensionType)
