"""Random bits for stochastic rounding, as a pure function of a key and an element's position in the full matrix.

Philox4x32-10 (Salmon et al., 2011) turns a 64-bit key and a counter into four 32-bit words. A row of the full matrix
consists of blocks of 256 columns, each with 32 counters. Element j of a block takes 16 bits of counter j % 32: of word
j // 64, the low half if j // 32 is even. So any slice or shard, on any device, has the bits of the full matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # columns that share 32 counters; also the 8-bit values that share a scale
COUNTERS = 32
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class Origin(NamedTuple):
    """Where a rank's part of a matrix begins in the full matrix, and how many columns the full matrix has."""

    row: int
    column: int
    full_columns: int

    @property
    def blocks_per_row(self) -> int:
        """The blocks in a row of the full matrix."""
        return -(-self.full_columns // BLOCK)

    @property
    def first_block(self) -> int:
        """The index of the block, in the full matrix, in which this part begins."""
        return self.row * self.blocks_per_row + self.column // BLOCK


class Segments(NamedTuple):
    """How kernels divide a rank's part of a matrix: a segment is the elements of one row that are in the same block."""

    columns: int
    offset: int
    """Of the part's first column in its block."""
    first: int
    """The index of the part's first block in the full matrix."""
    stride: int
    """Blocks in a row of the full matrix."""

    @classmethod
    def of(cls, part: Tensor, origin: Origin, *, is_rounded: bool) -> "Segments":
        """Divide a part, (rows, columns); as one row if no value is rounded, because then no bit depends on columns."""
        if not is_rounded:
            return cls(part.numel(), 0, 0, 0)
        return cls(part.shape[1], origin.column % BLOCK, origin.first_block, origin.blocks_per_row)

    def count(self, part: Tensor) -> int:
        """Return the number of segments of a part."""
        return part.numel() // max(1, self.columns) * -(-(self.offset + self.columns) // BLOCK)


def random_halves(key: int, origin: Origin, rows: slice, columns: int, device: torch.device) -> Tensor:
    """Return 16 random bits per element, int32 in [0, 65536), of some rows of a rank's part; (rows, columns)."""
    begin = origin.column % BLOCK
    width = begin + columns
    first = torch.arange(rows.start, rows.stop, device=device) * origin.blocks_per_row + origin.first_block
    blocks = first.unsqueeze(1) + torch.arange(-(-width // BLOCK), device=device)
    # narrow rows need only some counters and words of their block
    counters = blocks.unsqueeze(2) * COUNTERS + torch.arange(min(COUNTERS, width), device=device)
    halves = [half.to(torch.int32) for word in philox(key, counters) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves[: -(-width // COUNTERS)], 2).flatten(1)[:, begin:width]


def shuffled(random: Tensor) -> Tensor:
    """Apply a permutation of [0, 65536) to each value, so that the random bits of one rounding can serve another."""
    return (random * 40503).bitwise_and_(0xFFFF)


def philox(key: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of each counter (int64), as int64."""
    a, b, c, d = counters & _WORD, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)
    keys = [key & _WORD, key >> 32]
    for _ in range(_ROUNDS):
        # the products overflow int64, but their bits are those of an unsigned product
        products = [word * multiplier for word, multiplier in zip((a, c), _MULTIPLIERS, strict=True)]
        (high_a, low_a), (high_c, low_c) = ((product >> 32 & _WORD, product & _WORD) for product in products)
        a, b, c, d = high_c ^ b ^ keys[0], low_c, high_a ^ d ^ keys[1], low_a
        keys = [key + step & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return a, b, c, d
