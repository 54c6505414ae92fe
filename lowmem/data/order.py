"""Which row stands at which position: a pure function of (seed, position) that needs no memory per row.

Positions count the rows a run has consumed, over all epochs and processes: `epoch, i = divmod(position, num_rows)`.
Rows are shuffled on two levels, so that a reader holds a few row groups at a time: the row groups are permuted, cut
into windows of at least WINDOW_ROWS rows, and the rows of a window are permuted among themselves.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

WINDOW_ROWS = 16_384
_ROUNDS = 8


def permute(indices: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Images of `indices` (int64, each in [0, n)) under the permutation of [0, n) that `key` names.

    A Feistel network of 8 rounds over the smallest power of two that holds n - 1, walked along its cycles until the
    image falls below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
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
    """The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood, 2014) over values + key."""
    mixed = values + round_key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def rows_at(start: int, stop: int, group_sizes: tuple[int, ...], *, seed: int, shuffle: bool = True) -> np.ndarray:
    """Row numbers (int64, shape (stop - start,)) at the positions [start, stop).

    `group_sizes` holds the rows of each row group, in file order. Every epoch holds each row exactly once.
    """
    num_rows = sum(group_sizes)
    if num_rows == 0:
        raise ValueError("an order over no rows was asked for: give at least one row")
    pieces = []
    while start < stop:
        epoch, first = divmod(start, num_rows)
        last = min(num_rows, first + stop - start)
        pieces.append(_rows_of_epoch(epoch, first, last, group_sizes, seed) if shuffle else np.arange(first, last))
        start += last - first
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _rows_of_epoch(epoch: int, first: int, last: int, group_sizes: tuple[int, ...], seed: int) -> np.ndarray:
    group_rows, group_places, window_ends = _epoch_layout(epoch, group_sizes, seed)
    window = int(np.searchsorted(window_ends, first, side="right"))
    pieces = []
    while first < last:
        window_start = int(window_ends[window - 1]) if window else 0
        window_end = int(window_ends[window])
        stop = min(last, window_end)
        places = permute(np.arange(first, stop) - window_start, window_end - window_start, (seed, epoch, window))
        places += window_start
        group = np.searchsorted(group_places, places, side="right") - 1
        pieces.append(group_rows[group] + places - group_places[group])
        first, window = stop, window + 1
    return np.concatenate(pieces)


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _epoch_layout(epoch: int, group_sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The permuted groups of an epoch: each one's first row, its first place in the epoch, and where windows end."""
    sizes = np.asarray(group_sizes, np.int64)
    first_rows = np.cumsum(sizes) - sizes
    groups = permute(np.arange(len(sizes)), len(sizes), (seed, epoch))
    ends = np.cumsum(sizes[groups])
    places = ends - sizes[groups]
    # A window closes with the first group that brings it to WINDOW_ROWS; the last one takes what is left.
    window_ends, closed = [], 0
    while closed < ends[-1]:
        group = min(int(np.searchsorted(ends, closed + WINDOW_ROWS)), len(ends) - 1)
        closed = int(ends[group])
        window_ends.append(closed)
    return first_rows[groups], places, np.asarray(window_ends)
