"""Open files for random access by row number. Only recently used groups of rows are in memory."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from lowmem.config.row_formats import kinds_of
from lowmem.data.files.line_index import codec_of
from lowmem.data.files.lines import JsonLinesFile, TextFile
from lowmem.data.files.parquet import ParquetFile
from lowmem.data.files.source import Files, Row, expand, is_damage
from lowmem.data.files.tables import ArrowFile
from lowmem.data.order import WINDOW_BYTES, Groups
from lowmem.errors import ChangedError, ReadError, RowError, UsageError


class Rows(Protocol):
    """Any sequence of rows: the result of `open_rows`, a list of dicts, a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class RowSets(NamedTuple):
    """The rows of a run for each purpose; None for a purpose without rows."""

    training: Rows | None
    validation: Rows | None = None
    test: Rows | None = None


# A DataFile is read in groups of rows. Its `group_rows` (numbers of rows) and `group_bytes` (approximate sizes in
# memory) are int64, shape (groups,), and depend only on its content. `row` and `location` number rows within a group.
DataFile = ParquetFile | ArrowFile | JsonLinesFile | TextFile
_FORMATS: dict[str, type[DataFile]] = {".parquet": ParquetFile, ".pq": ParquetFile, ".arrow": ArrowFile}
_FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), JsonLinesFile) | dict.fromkeys((".txt", ".text"), TextFile)


class FileRows:
    """The rows of several files, numbered consecutively in file order; `first` and `stop` select a range.

    Keeps the most recently used groups in memory: up to `window_bytes`, or one larger group. Repeats a failed read
    after each of the delays in `retry_seconds`, unless the file is damaged or was changed.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        first: int = 0,
        stop: int | None = None,
        *,
        window_bytes: int = WINDOW_BYTES,
        retry_seconds: Sequence[float] = (0.2, 1.0, 3.0),
    ):
        self._files, self._window_bytes, self._retry_seconds = files, window_bytes, retry_seconds
        self._groups_before = np.cumsum([0, *(len(file.group_rows) for file in files)])
        self._ends = np.cumsum(np.concatenate([file.group_rows for file in files]))
        self._first, self._stop = first, int(self._ends[-1]) if stop is None else stop
        rows = np.diff(np.clip(np.concatenate([[0], self._ends]), self._first, self._stop))
        self._bytes = np.concatenate([file.group_bytes for file in files])
        self.groups = Groups(rows[rows > 0], self._bytes[rows > 0])
        # Group number -> group or, if it could not be read, the error. The least recently used is first.
        self.loaded: OrderedDict[int, object] = OrderedDict()
        self.loaded_bytes = 0
        self._lock = Lock()  # a prefetch thread and the main thread may read at the same time

    def __len__(self) -> int:
        return self._stop - self._first

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} does not exist")
        group, file, group_in_file, row = self._find(index)
        try:
            data = self._load(group, file, group_in_file)
            if isinstance(data, Exception):
                raise data.with_traceback(None)  # otherwise the error's traceback would grow with each raise
            return file.row(data, row)
        except (OSError, ValueError) as error:
            if is_damage(error):
                raise RowError(f"{self.where(index)} cannot be read: {error}") from error
            attempts = "" if isinstance(error, ChangedError) else f" after {1 + len(self._retry_seconds)} attempts"
            raise ReadError(f"{self.where(index)} cannot be read{attempts}: {error}") from error

    def slice(self, first: int, stop: int) -> "FileRows":
        limits = {"window_bytes": self._window_bytes, "retry_seconds": self._retry_seconds}
        return FileRows(self._files, self._first + first, self._first + stop, **limits)

    def where(self, index: int) -> str:
        """Return a row's file and its location in the file, for messages."""
        _, file, group_in_file, row = self._find(index)
        return f"{file.source}, {file.location(group_in_file, row)}"

    @property
    def unread(self) -> list[str]:
        """The columns of any of the files that are not read; of a JSONL file, those in its first good row."""
        return list(dict.fromkeys(name for file in self._files for name in file.unread))

    def fingerprints(self) -> list[tuple[str, str]]:
        return [(str(file.source), file.fingerprint()) for file in self._files]

    def digest(self, indices: Sequence[int]) -> str | None:
        return hash_rows(self, indices)

    def _find(self, index: int) -> tuple[int, DataFile, int, int]:
        """Return a row's group number, its file, the group's number in the file, and the row's number in the group."""
        row = self._first + index
        group = int(np.searchsorted(self._ends, row, side="right"))
        number = int(np.searchsorted(self._groups_before, group, side="right")) - 1
        row_in_group = row - int(self._ends[group - 1] if group else 0)
        return group, self._files[number], group - int(self._groups_before[number]), row_in_group

    def _load(self, group: int, file: DataFile, group_in_file: int) -> object:
        """Return a group, or the error from reading it. Keeps errors, too, to avoid reading a bad group again."""
        with self._lock:
            if group not in self.loaded:
                while self.loaded and self.loaded_bytes + self._bytes[group] > self._window_bytes:
                    self.loaded_bytes -= int(self._bytes[self.loaded.popitem(last=False)[0]])
                self.loaded[group] = self._read(file, group_in_file)
                self.loaded_bytes += int(self._bytes[group])
            self.loaded.move_to_end(group)
            return self.loaded[group]

    def _read(self, file: DataFile, group_in_file: int) -> object:
        for seconds in (*self._retry_seconds, None):
            try:
                return file.read_group(group_in_file)
            except (OSError, ValueError) as error:
                if seconds is None or is_damage(error) or isinstance(error, ChangedError):
                    return error
                time.sleep(seconds)


def hash_rows(rows: Rows, indices: Sequence[int]) -> str | None:
    """Hash the content of rows; a bad row counts as None. Returns None if a file is no longer readable."""
    found = xxhash.xxh3_128()
    for index in indices:
        try:
            found.update(repr(rows[index]).encode(errors="surrogatepass"))
        except ReadError:
            return None
        except RowError:
            found.update(b"None")
    return found.hexdigest()


def open_rows(
    files: Files,
    *,
    columns: Sequence[str] | None = None,
    prompt_template: str | None = None,
    messages_column: str | None = None,
    weight_column: str | None = None,
) -> FileRows:
    """Open parquet, Arrow, JSONL or text files as one sequence of rows (dicts).

    `files` is a path, a glob, a URL or a folder that `datasets` saved; or several of these, separated by commas or as a
    list. `columns` must hold text; `messages_column` must hold lists of {"role", "content"}, `weight_column` numbers.
    The columns of `prompt_template` hold text or null, and of JSONL files, rows after the first may lack them.
    From parquet and Arrow files, reads only these columns and, with messages, "tools" (all columns if none is named).
    Raises UsageError if a file is missing, empty or broken, or lacks a column.
    """
    wanted = kinds_of(prompt_template) if prompt_template else {}
    wanted |= {name: "text" for name in columns or ()} | ({messages_column: "messages"} if messages_column else {})
    wanted |= {weight_column: "number"} if weight_column else {}
    opened = []
    for source in expand(files):
        suffixes = source.suffixes[:-1] if codec_of(source) else source.suffixes
        if not suffixes or suffixes[-1] not in _FORMATS:
            raise UsageError(f"{source} must end in {', '.join(_FORMATS)}: convert the file")
        file = _FORMATS[suffixes[-1]](source, wanted or None)
        if not file.group_rows.sum():
            raise UsageError(f"{source} contains no rows: remove it or write it again")
        opened.append(file)
    return FileRows(opened)


def as_rows(files: Files | Rows) -> Rows:
    """Open files, or return rows that are already open. Raises UsageError if there are no rows."""
    names = files if isinstance(files, list | tuple) else [files]
    rows = open_rows(files) if names and all(isinstance(name, str | Path) for name in names) else files
    if not hasattr(rows, "__len__"):
        raise UsageError(f"{type(rows).__name__} has no random access: write it to parquet, or name files")
    if len(rows) == 0:
        raise UsageError("no rows found: pass at least one row")
    return rows


def split_rows(rows, held_out: int):
    """Split into (training rows, the last `held_out` rows). Raises UsageError if no training row is left."""
    if not 0 <= held_out < len(rows):
        raise UsageError(f"{held_out} of {len(rows)} rows cannot be held out: at least one must remain for training")
    return rows.slice(0, len(rows) - held_out), rows.slice(len(rows) - held_out, len(rows))
