"""Rows -> encoded rows. One that cannot be read or encoded ends the run, or is left out, counted and written down."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lowmem.data.encode import IGNORED, Encode, EncodedRow
from lowmem.data.rows import ReadError, Row, RowError, Rows

_ROWS_TRIED = 500  # until it is clear that none is good


class BadRow(NamedTuple):
    """A row that was left out: its content if it could be read, and the error that names its place."""

    content: Row | None
    error: RowError


class Quarantine:
    """Takes rows that are left out, each once over all epochs and resumed runs; too many of them are an error.

    `path` gets them as JSON lines {"error", "row"}, to mend them or to look what they have in common; None keeps none.
    What it holds when the first row is added counts as taken. Every process has its own.
    """

    def __init__(self, limit: int, path: str | Path | None = None):
        self.limit, self.path = limit, path if path is None else Path(path)

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, bad: BadRow) -> None:
        """Take one. Raises RowError if it is one too many, OSError if it cannot be written."""
        told = str(bad.error)
        if told in self._taken:
            return
        if len(self._taken) >= self.limit:
            where = f", the others are in {self.path}" if self.path and self.limit else ""
            raise RowError(
                f"{told}. Bad rows may be left out, but this is more than {self.limit} of them{where}: mend them, or "
                "set --max_bad_rows higher"
            ) from bad.error
        self._taken.add(told)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"error": told, "row": bad.content}, default=repr) + "\n")

    @cached_property
    def _taken(self) -> set[str]:
        """The errors of all rows so far, which tell their places."""
        if self.path is None:
            return set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            *lines, half = file.read().split(b"\n")
            if half:  # of a run that was killed while it wrote
                file.truncate(file.tell() - len(half))
        return {json.loads(line)["error"] for line in lines}


def encode_rows(
    rows: Rows, row_ids: Iterable[int], encode: Encode, *, may_skip: bool
) -> tuple[list[tuple[int, EncodedRow]], list[BadRow]]:
    """(number, encoded row) of all `row_ids`, and the rows that had to be left out, which only `may_skip` allows.

    Raises RowError for a bad row otherwise, and ReadError for a file that cannot be read any more in any case.
    """
    encoded, bad = [], []
    for row_id in row_ids:
        row = None
        try:
            row = rows[row_id]  # tells by itself what cannot be read, and where
            encoded.append((row_id, _encode_one(rows, row_id, row, encode)))
        except ReadError:
            raise
        except RowError as error:
            if not may_skip:
                raise
            bad.append(BadRow(row, error))
    return encoded, bad


def blank_row(rows: Rows, encode: Encode, *, near: int) -> EncodedRow:
    """A row that counts for nothing: one that can be encoded, the first from `near` on, with all labels ignored.

    Raises RowError if there is none among some hundreds, or if this encoder's rows have no labels.
    """
    first_error = None
    for row_id in range(near, near + min(len(rows), _ROWS_TRIED)):
        encoded, bad = encode_rows(rows, [row_id % len(rows)], encode, may_skip=True)
        if bad:
            first_error = first_error or bad[0].error
            continue
        _, row = encoded[0]
        if "labels" not in row:
            raise RowError(
                f"the micro-batch of row {near} has no row left that can be encoded, and what stands in for one "
                f"needs `labels` to ignore, these have {', '.join(row)}: take bad rows out of the files"
            )
        return {**row, "labels": [IGNORED] * len(row["labels"])}
    raise RowError(f"{first_error}; and so are those after it: mend the rows, or the encoder") from first_error


def _encode_one(rows: Rows, row_id: int, row: Row, encode: Encode) -> EncodedRow:
    try:
        return encode(row)
    except Exception as error:
        where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
        raise RowError(f"{where} cannot be encoded: {error}") from error
