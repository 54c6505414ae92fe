"""Rows -> encoded rows. One that cannot be read or encoded ends the run, or is left out, counted and written down."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lowmem.data.encode import IGNORED, Encode, EncodedRow
from lowmem.data.rows import ReadError, Row, RowError, Rows


class BadRow(NamedTuple):
    """A row that was left out: its content if it could be read, and the error that names its place."""

    content: Row | None
    error: RowError


class Quarantine:
    """Takes rows that are left out, each once over all epochs and resumed runs; too many of them are an error.

    `path` gets them as JSON lines {"error", "row"}, to mend them or to look what they have in common; None keeps none.
    """

    def __init__(self, limit: int, path: Path | None = None):
        self.limit, self.path = limit, path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._known = {
            json.loads(line)["error"] for line in lines if line.endswith("}")
        }  # a kill may leave half a line

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: BadRow) -> None:
        """Take one. Raises RowError if it is one too many."""
        told = str(bad.error)
        if told in self._known:
            return
        if len(self._known) >= self.limit:
            where = f", the others are in {self.path}" if self.path and self.limit else ""
            raise RowError(
                f"{told}. Bad rows may be left out, but this is more than {self.limit} of them{where}: mend them, or "
                "set --max_bad_rows higher"
            ) from bad.error
        self._known.add(told)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"error": told, "row": bad.content}, default=repr) + "\n")


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
    """A row that counts for nothing: the first one at `near` or after that can be encoded, all of its labels ignored.

    Raises RowError if there is none, or if this encoder's rows have no labels.
    """
    for step in range(len(rows)):
        encoded, bad = encode_rows(rows, [(near + step) % len(rows)], encode, may_skip=True)
        if not bad:
            _, row = encoded[0]
            if "labels" not in row:
                raise RowError(
                    f"the micro-batch of row {near} has no row left that can be encoded, and what stands in for one "
                    f"needs `labels` to ignore, these have {', '.join(row)}: take bad rows out of the files"
                )
            return {**row, "labels": [IGNORED] * len(row["labels"])}
    raise bad[0].error


def _encode_one(rows: Rows, row_id: int, row: Row, encode: Encode) -> EncodedRow:
    try:
        return encode(row)
    except Exception as error:
        where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
        raise RowError(f"{where} cannot be encoded: {error}") from error
