"""Compute the row at each position as a pure function of (groups, seed, position), storing nothing per row.

Positions count the rows that a run consumed, over all epochs and processes: `epoch, i = divmod(position, num_rows)`.
Row groups are permuted and split into windows of at most WINDOW_BYTES, or of one larger group; then rows are permuted
within each window. So a reader needs only the row groups of one window in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from typing import Protocol

import numpy as np

WINDOW_BYTES = 16 * 2**20
_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of consecutive rows, in row order. The rows of a group are read together."""

    rows: np.ndarray
    """Number of rows in each group, int64, shape (groups,)."""
    bytes: np.ndarray
    """Approximate size of each group in memory, int64, shape (groups,)."""

    @classmethod
    def of(cls, rows: Sequence[int], bytes: Sequence[int] | None = None) -> "Groups":
        """Make groups with these numbers of rows. Without `bytes`, sizes are 0, so all groups fit into one window."""
        return cls(np.asarray(rows, np.int64), np.asarray([0] * len(rows) if bytes is None else bytes, np.int64))

    @cached_property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def rows_per_epoch(self) -> float:
        return self.num_rows

    @cached_property
    def order_digest(self) -> str:
        """A hash of the groups, which determine the order of the rows for a given seed."""
        return blake2b(self.rows.tobytes() + self.bytes.tobytes(), digest_size=8).hexdigest()

    def rows_at(self, start: int, stop: int, *, seed: int, shuffle: bool = True) -> np.ndarray:
        """Return the row numbers at positions [start, stop), as `rows_at`."""
        return rows_at(start, stop, self, seed=seed, shuffle=shuffle)

    @cached_property
    def _layout(self) -> "Callable[[int, int, int], _Layout]":
        """`_epoch_layout`, which keeps the layouts of two epochs, because a step may take rows from both."""
        return lru_cache(maxsize=2)(partial(_epoch_layout, self))


def permute(indices: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Return the images of `indices` (int64, each in [0, n)) under a permutation of [0, n) that `key` selects.

    Uses a Feistel network of 8 rounds over the smallest power of two that is at least max(n, 2), with cycle walking
    until the image is below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    width = max(1, (n - 1).bit_length())
    low_bits = width // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (width - low_bits)) - 1)
    shift = np.uint64(low_bits)
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
    round_keys = np.frombuffer(digest, "<u8")

    def encrypt(values: np.ndarray) -> np.ndarray:
        low, high = values & low_mask, values >> shift
        for number, round_key in enumerate(round_keys):
            if number % 2:
                high = high ^ (_mix(low, round_key) & high_mask)
            else:
                low = low ^ (_mix(high, round_key) & low_mask)
        return (high << shift) | low

    values = encrypt(np.asarray(indices).astype(np.uint64))
    while (outside := values >= np.uint64(n)).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray, round_key: np.uint64) -> np.ndarray:
    """Apply the 64-bit finalizer of SplitMix64 (Steele, Lea and Flood, 2014) to values + key."""
    mixed = values + round_key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def rows_at(
    start: int, stop: int, groups: Groups, *, seed: int, shuffle: bool = True, window_bytes: int = WINDOW_BYTES
) -> np.ndarray:
    """Return the row numbers at positions [start, stop), int64, shape (stop - start,). An epoch has each row once."""
    if groups.num_rows == 0:
        raise ValueError("there are no rows to order: give at least one row")
    pieces = [np.empty(0, np.int64)]
    while start < stop:
        epoch, first = divmod(start, groups.num_rows)
        last = min(groups.num_rows, first + stop - start)
        if shuffle:
            pieces += _rows_of_epoch(first, last, groups._layout(epoch, seed, window_bytes), (seed, epoch))
        else:
            pieces.append(np.arange(first, last))
        start += last - first
    return np.concatenate(pieces)


class Order(Protocol):
    """The order in which a run takes rows: that of one source (`Groups`), or of several (`Mixture`)."""

    @property
    def rows_per_epoch(self) -> float: ...

    @property
    def order_digest(self) -> str: ...

    def rows_at(self, start: int, stop: int, *, seed: int, shuffle: bool = True) -> np.ndarray: ...


@dataclass(frozen=True)
class _Layout:
    """The permuted groups of one epoch, split into windows, as int64 arrays."""

    first_rows: np.ndarray
    """The number of each group's first row, shape (groups,)."""
    offsets: np.ndarray
    """The position in the epoch where each group begins, shape (groups,)."""
    window_ends: np.ndarray
    """The position in the epoch where each window ends, shape (windows,)."""


def _rows_of_epoch(first: int, last: int, layout: _Layout, key: tuple[int, int]) -> list[np.ndarray]:
    window = int(np.searchsorted(layout.window_ends, first, side="right"))
    pieces = []
    while first < last:
        window_start = int(layout.window_ends[window - 1]) if window else 0
        window_end = int(layout.window_ends[window])
        stop = min(last, window_end)
        positions = permute(np.arange(first, stop) - window_start, window_end - window_start, (*key, window))
        positions += window_start
        group = np.searchsorted(layout.offsets, positions, side="right") - 1
        pieces.append(layout.first_rows[group] + positions - layout.offsets[group])
        first, window = stop, window + 1
    return pieces


def _epoch_layout(groups: Groups, epoch: int, seed: int, window_bytes: int) -> _Layout:
    groups_here = permute(np.arange(len(groups.rows)), len(groups.rows), (seed, epoch))
    ends, byte_ends = np.cumsum(groups.rows[groups_here]), np.cumsum(groups.bytes[groups_here])
    # A window takes groups while they fit into `window_bytes`, but at least one with rows.
    window_ends, closed, closed_bytes = [], 0, 0
    while closed < ends[-1]:
        fitting = int(np.searchsorted(byte_ends, closed_bytes + window_bytes, side="right")) - 1
        group = max(fitting, int(np.searchsorted(ends, closed, side="right")))
        closed, closed_bytes = int(ends[group]), int(byte_ends[group])
        window_ends.append(closed)
    first_rows = np.cumsum(groups.rows) - groups.rows
    return _Layout(first_rows[groups_here], ends - groups.rows[groups_here], np.asarray(window_ends))
