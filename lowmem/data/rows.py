"""Random access to the rows of files, by number, with a few groups of them in memory."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np

from lowmem.data.files.line_index import codec_of
from lowmem.data.files.lines import JsonLinesFile, TextFile
from lowmem.data.files.source import Row, Source, expand, is_damage
from lowmem.data.files.tables import ArrowFile, ParquetFile
from lowmem.data.order import WINDOW_BYTES, Groups
from lowmem.errors import ChangedError, ReadError, RowError, UsageError

_SECONDS_BETWEEN_TRIES = (0.2, 1.0, 3.0)


class Rows(Protocol):
    """Any sequence of rows: those of `open_rows`, a list of dicts, a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class RowSets(NamedTuple):
    """The rows of a run; None: it has no such rows."""

    training: Rows | None
    validation: Rows | None = None
    test: Rows | None = None


class DataFile(Protocol):
    """One file of rows, read a group at a time."""

    source: Source
    group_rows: np.ndarray
    """Rows of each group, int64, shape (groups,)."""
    group_bytes: np.ndarray
    """About what each group takes in memory once it is read, int64, shape (groups,): a function of the content."""

    def fingerprint(self) -> str:
        """Equal for equal content, whatever the file's name and time."""

    def read_group(self, group: int) -> object:
        """A group, for `row`. Raises OSError or ValueError."""

    def row(self, data: object, index: int) -> Row:
        """Row `index` of a group that was read. Raises ValueError."""

    def place(self, group: int, index: int) -> str:
        """Where that row stands in the file, for messages."""


_FORMATS: dict[str, Callable[[Source, Mapping[str, str] | None], DataFile]] = {
    ".parquet": ParquetFile,
    ".pq": ParquetFile,
    ".arrow": ArrowFile,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".json": JsonLinesFile,
    ".txt": TextFile,
    ".text": TextFile,
}


class FileRows:
    """The rows of several files in order, by number. Holds the groups of about one shuffle window in memory."""

    def __init__(self, files: Sequence[DataFile], first: int = 0, stop: int | None = None):
        self._files = files
        self._groups_before = np.cumsum([0, *(len(file.group_rows) for file in files)])
        self._ends = np.cumsum(np.concatenate([file.group_rows for file in files]))
        self._first, self._stop = first, int(self._ends[-1]) if stop is None else stop
        bounds = np.clip(np.concatenate([[0], self._ends]), self._first, self._stop)
        self._bytes = np.concatenate([file.group_bytes for file in files])
        inside = np.diff(bounds) > 0
        self.groups = Groups(np.diff(bounds)[inside], self._bytes[inside])
        self._held: OrderedDict[int, object] = OrderedDict()
        self._bytes_held = 0
        self._lock = Lock()  # a prefetch thread and the main thread may read the same rows

    def __len__(self) -> int:
        return self._stop - self._first

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows was asked for")
        group, place, file = self._find(index)
        try:
            data = self._read(group)
            if isinstance(data, Exception):
                raise data.with_traceback(None)  # or it would keep the frames of all that ask for its rows
            return file.row(data, place)
        except (OSError, ValueError) as error:
            if is_damage(error):
                raise RowError(f"{self.where(index)} cannot be read: {error}") from error
            times = "" if isinstance(error, ChangedError) else f", {1 + len(_SECONDS_BETWEEN_TRIES)} times"
            raise ReadError(f"{self.where(index)} cannot be read{times}: {error}") from error

    def slice(self, first: int, stop: int) -> "FileRows":
        """The rows [first, stop) of these, held apart from them."""
        return FileRows(self._files, self._first + first, self._first + stop)

    def where(self, index: int) -> str:
        """Where a row stands, for messages: its file, and its place there."""
        group, place, file = self._find(index)
        return f"{file.source}, {file.place(group - self._first_group(group), place)}"

    def fingerprints(self) -> list[tuple[str, str]]:
        """Name and fingerprint of each file."""
        return [(str(file.source), file.fingerprint()) for file in self._files]

    def _find(self, index: int) -> tuple[int, int, DataFile]:
        """A row's group, its number in that group, and its file."""
        row = self._first + index
        group = int(np.searchsorted(self._ends, row, side="right"))
        place = row - int(self._ends[group - 1] if group else 0)
        return group, place, self._files[self._file_of(group)]

    def _file_of(self, group: int) -> int:
        return int(np.searchsorted(self._groups_before, group, side="right")) - 1

    def _first_group(self, group: int) -> int:
        """The first group of the file that `group` is in."""
        return int(self._groups_before[self._file_of(group)])

    def _read(self, group: int) -> object:
        """A group of a file, or the error that reading it ends with: the next row of it shall not wait again."""
        with self._lock:
            if group not in self._held:
                while self._held and self._bytes_held + self._bytes[group] > WINDOW_BYTES:
                    self._bytes_held -= int(self._bytes[self._held.popitem(last=False)[0]])
                self._held[group] = self._read_patiently(group)
                self._bytes_held += int(self._bytes[group])
            self._held.move_to_end(group)
            return self._held[group]

    def _read_patiently(self, group: int) -> object:
        file = self._files[self._file_of(group)]
        for seconds in (*_SECONDS_BETWEEN_TRIES, None):
            try:
                return file.read_group(group - self._first_group(group))
            except (OSError, ValueError) as error:
                if seconds is None or is_damage(error) or isinstance(error, ChangedError):
                    return error
                time.sleep(seconds)  # a disk or a network may be back in a moment


def open_rows(
    files: str | Path | Sequence[str | Path],
    *,
    columns: Sequence[str] | None = None,
    messages_column: str | None = None,
) -> FileRows:
    """Open parquet, Arrow, JSONL or text files as one sequence of rows (dicts).

    `files` is a path, a glob, a URL that fsspec knows, a comma list of these, or a list of paths; a folder must be one
    that `datasets` saved. Files stand in the order they are given in, the matches of a glob sorted by name. `columns`
    must be in every file and hold text, `messages_column` chats: lists of {"role", "content"}. Of tables only these
    are read (without either: all columns, of any type).
    Raises UsageError, naming the file, for one that is missing, empty, broken or lacks a column.
    """
    wanted = {name: "text" for name in columns or ()} | ({messages_column: "messages"} if messages_column else {})
    opened = []
    for source in expand(files):
        suffixes = source.suffixes[:-1] if codec_of(source) else source.suffixes
        if not suffixes or suffixes[-1] not in _FORMATS:
            raise UsageError(f"{source}: files end in {', '.join(_FORMATS)}; convert this one")
        try:
            file = _FORMATS[suffixes[-1]](source, wanted or None)
        except OSError as error:
            raise UsageError(f"{source} cannot be read: {error.strerror or error}") from error
        if not file.group_rows.sum():
            raise UsageError(f"{source} holds no rows: leave it out or write it again")
        opened.append(file)
    return FileRows(opened)


def as_rows(files: str | Path | Sequence[str | Path] | Rows) -> Rows:
    """Rows that are open already as they are, files opened. Raises UsageError if there is no row."""
    names_files = isinstance(files, list | tuple) and files and all(isinstance(file, str | Path) for file in files)
    rows = open_rows(files) if names_files or isinstance(files, str | Path) else files
    if not hasattr(rows, "__len__"):
        raise UsageError(
            f"{type(rows).__name__} can only be read from its start, and a run must reach any row: write it to "
            "parquet, or name its files (hf://datasets/...)"
        )
    if len(rows) == 0:
        raise UsageError("a stream over no rows was asked for: give at least one row")
    return rows


def split_rows(rows, held_out: int):
    """Split into (training rows, the last `held_out` rows). Raises UsageError if fewer than one row is left."""
    if not 0 <= held_out < len(rows):
        raise UsageError(f"{held_out} of {len(rows)} rows cannot be held out: at least one must be left for training")
    return rows.slice(0, len(rows) - held_out), rows.slice(len(rows) - held_out, len(rows))
