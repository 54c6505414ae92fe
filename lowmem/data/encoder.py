"""What an encoder is, and how rows pass through it: several at a time, and without those that are bad."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lowmem.data.batch import IGNORED, LARGEST_WEIGHT, EncodedRow, is_weight, weights_of
from lowmem.data.rows import Row, Rows
from lowmem.errors import ReadError, RowError

Encode = Callable[..., EncodedRow]
"""A function of a row and, with `takes_rng`, of the row's generator. If it has a method `batch` (rows -> encoded rows;
with `takes_rng`, rows, generators -> encoded rows), that encodes several rows faster."""

_ROWS_AT_ONCE = 64
_MAX_ROWS_TRIED = 500


class TextEncoder:
    """Encodes rows of one or several texts each.

    `texts_of` returns a row's texts. `tokenize` has a function for each, which takes several texts and returns their
    token ids: one call for many texts takes less than half the time of one call for each. `encode` takes a row's ids.
    """

    def __init__(
        self,
        texts_of: Callable[[Row], Sequence[str]],
        tokenize: Sequence[Callable[[list[str]], list[list[int]]]],
        encode: Callable[..., EncodedRow],
    ):
        self._texts_of, self._tokenize, self._encode = texts_of, tokenize, encode

    def __call__(self, row: Row) -> EncodedRow:
        return self.batch([row])[0]

    def batch(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Encode rows. Raises ValueError if one is bad."""
        if not rows:
            return []
        texts = zip(*map(self._texts_of, rows), strict=True)
        ids = [tokenize(list(column)) for tokenize, column in zip(self._tokenize, texts, strict=True)]
        return [self._encode(*of_row) for of_row in zip(*ids, strict=True)]


class Then:
    """Encodes rows with `encode`, then changes each: `change` takes the row and the encoded row.

    If `encode` takes a generator, this does too.
    """

    def __init__(self, encode: Encode, change: Callable[[Row, EncodedRow], EncodedRow]):
        self._encode, self._change = encode, change

    def __call__(self, row: Row, *rng: np.random.Generator) -> EncodedRow:
        return self._change(row, self._encode(row, *rng))

    def batch(self, rows: Sequence[Row], *rngs: Sequence[np.random.Generator]) -> list[EncodedRow]:
        return list(map(self._change, rows, _encode_all(self._encode, rows, *rngs)))


def _encode_all(encode: Encode, rows: Sequence[Row], *rngs: Sequence[np.random.Generator]) -> list[EncodedRow]:
    return encode.batch(rows, *rngs) if hasattr(encode, "batch") else list(map(encode, rows, *rngs))


class BadRow(NamedTuple):
    """A bad row: its content (None if it cannot be read), and the error, which names the row's location."""

    content: Row | None
    error: RowError


def encode_rows(
    rows: Rows, row_ids: Iterable[int], encode: Encode, *, may_skip: bool, seeds: Sequence[int] | None = None
) -> tuple[list[tuple[int, EncodedRow]], list[BadRow]]:
    """Encode rows. Returns pairs (row number, encoded row) and, with `may_skip`, the bad rows.

    With `seeds`, one for each row, `encode` also takes a generator with the row's seed.
    Without `may_skip`, raises RowError for a bad row. In both cases, raises ReadError if a file is no longer readable,
    and the error of the encoder's method `batch` if no row is bad: then the method is.
    """
    encoded, bad, row_ids = [], [], list(row_ids)
    for first in range(0, len(row_ids), _ROWS_AT_ONCE):
        part = row_ids[first : first + _ROWS_AT_ONCE]
        seeds_here = () if seeds is None else (seeds[first : first + _ROWS_AT_ONCE],)
        together, failed = _encode_together(rows, part, encode, *seeds_here)
        if together is not None:
            encoded += zip(part, together, strict=True)
            continue
        num_bad = len(bad)
        for row_id, *seed in zip(part, *seeds_here, strict=True):
            row = None
            try:
                row = rows[row_id]  # raises RowError if the row is unreadable
                try:
                    encoded.append((row_id, _checked(encode(row, *map(np.random.default_rng, seed)))))
                except MemoryError:
                    raise
                except Exception as error:
                    where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
                    raise RowError(f"{where} cannot be encoded: {error}") from error
            except RowError as error:
                if not may_skip or isinstance(error, ReadError):
                    raise
                bad.append(BadRow(row, error))
        if failed is not None and len(bad) == num_bad:
            raise failed
    return encoded, bad


def _encode_together(
    rows: Rows, row_ids: Sequence[int], encode: Encode, *seeds: Sequence[int]
) -> tuple[list[EncodedRow] | None, Exception | None]:
    """Return the encoded rows, or None if the encoder must get them one by one, and the error of its method `batch`."""
    if not hasattr(encode, "batch"):
        return None, None
    try:
        contents = [rows[row_id] for row_id in row_ids]
    except Exception:  # to read the rows one by one shows which is bad
        return None, None
    try:
        together = list(encode.batch(contents, *([np.random.default_rng(seed) for seed in each] for each in seeds)))
    except MemoryError:
        raise
    except Exception as error:  # to encode the rows one by one shows which is bad
        return None, error
    if len(together) != len(contents):
        found = f"the encoder's method `batch` returned {len(together)} rows for {len(contents)}"
        raise ValueError(f"{found}: return one for each")
    try:
        return list(map(_checked, together)), None
    except ValueError as error:
        return None, error


def _checked(row: EncodedRow) -> EncodedRow:
    """Return the row. Raises ValueError if it has more or fewer weights than labels, or one that is no weight."""
    if "weights" not in row or "labels" not in row:
        return row
    distinct = {id(weight): weight for weight in weights_of(row)}  # a row's labels usually share one number
    if bad := [weight for weight in distinct.values() if not is_weight(weight)]:
        raise ValueError(f"weights must be numbers from 0 to {LARGEST_WEIGHT:.2g}, found {bad[0]!r:.80}: correct them")
    return row


def blank_row(rows: Rows, encode: Encode, *, near: int, seeds: Sequence[int] | None = None) -> EncodedRow:
    """Make a row without targets from the first row at or after `near` that can be encoded. Its labels are IGNORED.

    `seeds` has one seed, or is None (see `encode_rows`). Raises RowError if none of the next 500 rows can be encoded.
    """
    first_error = None
    for row_id in range(near, near + min(len(rows), _MAX_ROWS_TRIED)):
        encoded, bad = encode_rows(rows, [row_id % len(rows)], encode, may_skip=True, seeds=seeds)
        for _, row in encoded:
            return {**row, "labels": [IGNORED] * len(row["labels"])} if "labels" in row else row
        first_error = first_error or bad[0].error
    raise RowError(f"{first_error}; all rows read after it fail too: fix the rows or the encoder") from first_error
