"""Position -> the micro-batches of one optimizer step on this rank: a pure function."""

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import NamedTuple

from lowmem.data.batch import Batch, Collate, EncodedRow
from lowmem.data.encode import BadRow, Encode, blank_row, encode_rows
from lowmem.data.order import Groups, rows_at
from lowmem.data.packing import Document, pack
from lowmem.data.rows import Rows


class Step(NamedTuple):
    """This rank's part of one optimizer step."""

    batches: list[Batch]
    bad_rows: list[BadRow]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Where the steps of a stream come from, and how they are cut."""

    rows: Rows
    encode: Encode
    collate: Collate
    global_batch_size: int
    micro_batches: int
    seed: int
    rank: int
    world_size: int
    shuffle: bool
    packed_seq_len: int | None
    may_skip: bool
    pin_memory: bool

    @cached_property
    def groups(self) -> Groups:
        return getattr(self.rows, "groups", None) or Groups.of([len(self.rows)])

    @property
    def batch_size(self) -> int:
        """Rows of the largest micro-batch."""
        return -(-self.global_batch_size // (self.micro_batches * self.world_size))

    def halved(self) -> "Steps | None":
        """The same steps cut into as few micro-batches as have half as many rows; None if some would have none."""
        batch_size = -(-self.batch_size // 2)
        micro_batches = -(-self.global_batch_size // (batch_size * self.world_size))
        if batch_size == self.batch_size or micro_batches * self.world_size > self.global_batch_size:
            return None
        return replace(self, micro_batches=micro_batches)

    def at(self, position: int) -> Step:
        """Positions [position, position + global batch) are cut into equal pieces; each rank takes its own.

        Within its pieces the rank's rows stand longest first, those of one length by position: micro-batches need
        little padding, and those that take most memory come first.
        """
        first_piece, num_pieces = self.rank * self.micro_batches, self.world_size * self.micro_batches
        pieces = range(first_piece, first_piece + self.micro_batches + 1)
        bounds = [position + self.global_batch_size * piece // num_pieces for piece in pieces]
        row_ids = rows_at(bounds[0], bounds[-1], self.groups, seed=self.seed, shuffle=self.shuffle).tolist()
        rows, bad = encode_rows(self.rows, row_ids, self.encode, may_skip=self.may_skip)
        cuts = [row.get("num_cut", 0) for _, row in rows]
        counts = {"cut_rows": sum(cut > 0 for cut in cuts), "cut_tokens": sum(cuts), "bad_rows": len(bad)}
        rows.sort(key=lambda row: -_num_ids(row[1]))
        while len(rows) < self.micro_batches:
            rows.append((None, blank_row(self.rows, self.encode, near=row_ids[0])))
        sizes = [stop - first for first, stop in pairwise(bounds)] if not bad else self._equal_sizes(len(rows))
        batches = [batch_of(*part, self.collate) for part in self._parts(rows, sizes)]
        return Step([batch.pin_memory() for batch in batches] if self.pin_memory else batches, bad, counts)

    def _equal_sizes(self, num_rows: int) -> list[int]:
        bounds = [num_rows * piece // self.micro_batches for piece in range(self.micro_batches + 1)]
        return [stop - first for first, stop in pairwise(bounds)]

    def _parts(self, rows: list[Document], sizes: list[int]) -> Iterator[tuple[Iterable[int | None], Sequence]]:
        """Numbers and rows of each micro-batch: so many rows each, or packed."""
        if self.packed_seq_len is None:
            rest = iter(rows)
            for size in sizes:
                yield tuple(zip(*islice(rest, size), strict=True))
        else:
            for part in pack(rows, max_seq_len=self.packed_seq_len, micro_batches=self.micro_batches):
                yield chain.from_iterable(row["row_ids"] for row in part), part


def batch_of(row_ids: Iterable[int | None], rows: Sequence[EncodedRow], collate: Collate) -> Batch:
    """Rows and their numbers as one micro-batch; None is the number of one that stands in for another."""
    return replace(collate(rows), row_ids=[row_id for row_id in row_ids if row_id is not None])


def _num_ids(row: EncodedRow) -> int:
    """How much an encoded row holds, whatever its keys: all of its lists and arrays, but no text or number."""
    values = (value for value in row.values() if isinstance(value, Sized) and not isinstance(value, str))
    return sum(math.prod(value.shape) if hasattr(value, "shape") else len(value) for value in values)
