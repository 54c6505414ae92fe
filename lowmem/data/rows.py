"""Random access to rows on disk: parquet, JSONL and plain text, without reading a file into memory."""

import codecs
import glob
import json
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from lowmem.config import UsageError
from lowmem.data.order import WINDOW_ROWS

_LINES_PER_GROUP = 64

Row = dict[str, object]


class RowError(ValueError):
    """A row that cannot be read or encoded; the message tells which, and why."""


class _File(Protocol):
    """One file of rows, read a group at a time."""

    path: Path
    group_sizes: list[int]

    def read_group(self, group: int) -> object: ...

    def row(self, group: object, index: int) -> Row: ...


class _ParquetFile:
    """A parquet file; its groups are its row groups, decoded into Arrow tables of the wanted columns."""

    def __init__(self, path: Path, columns: Sequence[str] | None):
        from pyarrow import ArrowException

        self.path, self._columns, self._metadata = path, columns, None
        try:
            self._metadata = self._open().metadata
        except (ArrowException, OSError) as error:
            raise UsageError(f"{path} cannot be read as parquet ({error}): write it again") from error
        schema = self._metadata.schema.to_arrow_schema()
        if missing := [column for column in columns or () if column not in schema.names]:
            raise UsageError(_missing_columns(path, missing, schema.names))
        for column in columns or ():
            kind = schema.field(column).type
            if not _is_text(kind):
                raise UsageError(f"{path}: column {column!r} must hold text, it holds {kind}: name another column")
        self.group_sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]

    def _open(self):
        from pyarrow import parquet

        # Opened anew for each group, so that ten thousand files need no ten thousand handles.
        return parquet.ParquetFile(self.path, metadata=self._metadata, page_checksum_verification=True)

    def read_group(self, group: int) -> object:
        with self._open() as file:
            return file.read_row_group(group, columns=self._columns, use_threads=False)

    def row(self, group, index: int) -> Row:
        return group.slice(index, 1).to_pylist()[0]


def _is_text(kind) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


class _LineFile:
    """A file of a row per line; blank lines are no rows. Groups are runs of 64 rows, found by their byte offset."""

    def __init__(self, path: Path, columns: Sequence[str] | None):
        self.path, self._columns = path, columns
        self._offsets, offset, num_rows = [], 0, 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    if num_rows % _LINES_PER_GROUP == 0:
                        self._offsets.append(offset)
                    num_rows += 1
                offset += len(line)
        self.group_sizes = [min(_LINES_PER_GROUP, num_rows - first) for first in range(0, num_rows, _LINES_PER_GROUP)]
        if num_rows:
            try:
                first_row = self.row(self.read_group(0), 0)
            except ValueError as error:
                raise UsageError(f"{path}, first row: {error}") from error
            if missing := [column for column in columns or () if column not in first_row]:
                raise UsageError(_missing_columns(path, missing, list(first_row)))

    def read_group(self, group: int) -> list[bytes]:
        lines = []
        with open(self.path, "rb") as file:
            file.seek(self._offsets[group])
            while len(lines) < self.group_sizes[group]:
                line = file.readline()
                if not line:
                    raise ValueError(f"{self.path} is shorter than when it was opened: do not change it during a run")
                if line.strip():
                    lines.append(line)
        return lines


class _TextFile(_LineFile):
    """Plain text: each line is a row {"text": line}."""

    def row(self, group: list[bytes], index: int) -> Row:
        return {"text": group[index].removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip("\r\n")}


class _JsonLinesFile(_LineFile):
    """JSON objects, one a line."""

    def row(self, group: list[bytes], index: int) -> Row:
        line = group[index].removeprefix(codecs.BOM_UTF8)
        if not line.lstrip().startswith(b"{"):
            raise ValueError(
                f"a JSON object was expected, found {line[:40]!r}: "
                "write one object a line (jq -c '.[]' turns an array into that)"
            )
        return json.loads(line)


_FORMATS = {
    ".parquet": _ParquetFile,
    ".pq": _ParquetFile,
    ".jsonl": _JsonLinesFile,
    ".ndjson": _JsonLinesFile,
    ".json": _JsonLinesFile,
    ".txt": _TextFile,
    ".text": _TextFile,
}


class FileRows:
    """The rows of several files in order, by number. Holds the row groups of about one shuffle window decoded."""

    def __init__(self, files: Sequence[_File], first: int = 0, stop: int | None = None):
        self._files = files
        self._groups_before = [0, *accumulate(len(file.group_sizes) for file in files)]
        self._ends = np.cumsum([size for file in files for size in file.group_sizes])
        self._first, self._stop = first, int(self._ends[-1]) if stop is None else stop
        bounds = np.clip(np.concatenate([[0], self._ends]), self._first, self._stop)
        self.group_sizes = tuple(int(size) for size in np.diff(bounds) if size)
        self._cached_rows_limit = WINDOW_ROWS + max(self.group_sizes, default=0)
        self._cache: OrderedDict[int, object] = OrderedDict()
        self._cached_rows = 0
        self._lock = Lock()  # a prefetch thread and the main thread may read the same rows

    def __len__(self) -> int:
        return self._stop - self._first

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows was asked for")
        group = self._group_of(index)
        file, _ = self._file_of(group)
        place = self._first + index - (self._ends[group] - self._size(group))
        try:
            return file.row(self._read(group), int(place))
        except (ValueError, OSError) as error:  # pyarrow's errors are of both kinds
            raise RowError(f"{self.where(index)} cannot be read: {error}") from error

    def slice(self, first: int, stop: int) -> "FileRows":
        """The rows [first, stop) of these, with a cache of their own."""
        return FileRows(self._files, self._first + first, self._first + stop)

    def where(self, index: int) -> str:
        """Where a row stands, for messages: file, and its number in that file, from 0."""
        file, first_group = self._file_of(self._group_of(index))
        file_start = self._ends[first_group] - self._size(first_group)
        return f"{file.path}, row {self._first + index - file_start}"

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, self._first + index, side="right"))

    def _file_of(self, group: int) -> tuple[_File, int]:
        """The file that a group belongs to, and that file's first group."""
        file = int(np.searchsorted(self._groups_before, group, side="right")) - 1
        return self._files[file], self._groups_before[file]

    def _size(self, group: int) -> int:
        return int(self._ends[group] - (self._ends[group - 1] if group else 0))

    def _read(self, group: int) -> object:
        with self._lock:
            if group not in self._cache:
                file, first_group = self._file_of(group)
                while self._cache and self._cached_rows + self._size(group) > self._cached_rows_limit:
                    self._cached_rows -= self._size(self._cache.popitem(last=False)[0])
                self._cache[group] = file.read_group(group - first_group)
                self._cached_rows += self._size(group)
            self._cache.move_to_end(group)
            return self._cache[group]


def open_rows(files: str | Path | Sequence[str | Path], *, columns: Sequence[str] | None = None) -> FileRows:
    """Open parquet, JSONL or text files as one sequence of rows (dicts).

    `files` is a path, a glob, a comma list of both, or a list of paths. Files stand in the order they are given in,
    the matches of a glob sorted by name. `columns` must be in every file and hold text; of parquet only
    these are read (None: all, of any type).
    Raises UsageError, naming the file, for one that is missing, empty, broken or lacks a column.
    """
    opened = []
    for path in _expand(files):
        if path.suffix not in _FORMATS:
            raise UsageError(f"{path}: files end in {', '.join(_FORMATS)}; convert this one")
        try:
            file = _FORMATS[path.suffix](path, columns)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if not sum(file.group_sizes):
            raise UsageError(f"{path} holds no rows: leave it out or write it again")
        opened.append(file)
    return FileRows(opened)


def split_rows(rows, held_out: int):
    """Split into (training rows, the last `held_out` rows). Raises UsageError if fewer than one row is left."""
    if not 0 <= held_out < len(rows):
        raise UsageError(f"{held_out} of {len(rows)} rows cannot be held out: at least one must be left for training")
    return rows.slice(0, len(rows) - held_out), rows.slice(len(rows) - held_out, len(rows))


def _expand(files: str | Path | Sequence[str | Path]) -> list[Path]:
    items = files.split(",") if isinstance(files, str) else [files] if isinstance(files, Path) else list(files)
    paths = []
    for item in filter(None, (str(item).strip() for item in items)):
        is_glob = any(mark in item for mark in "*?[") and not Path(item).exists()
        matches = sorted(glob.glob(item, recursive=True)) if is_glob else [item]
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            what = "matches no file" if is_glob else "is a folder" if Path(item).is_dir() else "does not exist"
            raise UsageError(f"{item} {what}: name a parquet, JSONL or text file, or a glob of them")
        paths += found
    if repeated := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise UsageError(f"{files} names {', '.join(repeated)} twice, so its rows would count twice: name it once")
    if not paths:
        raise UsageError(f"no file is named by {files!r}")
    return paths


def _missing_columns(path: Path, missing: list[str], present: Sequence[str]) -> str:
    return (
        f"{path} has no {' and no '.join(f'column {name!r}' for name in missing)}, it has "
        f"{', '.join(map(repr, present))}: "
        "set --prompt_column and --response_column, or --text_column"
    )
