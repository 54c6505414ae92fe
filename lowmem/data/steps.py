"""Compute this rank's micro-batches of one optimizer step, as a pure function of the position."""

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import NamedTuple

from lowmem.data.batch import Batch, Collate, EncodedRow
from lowmem.data.encoder import BadRow, Encode, blank_row, encode_rows
from lowmem.data.mixture import order_of
from lowmem.data.order import Order
from lowmem.data.packing import pack
from lowmem.data.pair_packing import pack_pairs
from lowmem.data.rows import Rows
from lowmem.distributed.seeds import seed_of


class Step(NamedTuple):
    """This rank's part of one optimizer step."""

    batches: list[Batch]
    bad_rows: list[BadRow]
    counts: dict[str, int]


@dataclass(frozen=True)
class Steps:
    """Which rows each optimizer step takes, and how they are split into micro-batches."""

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
    is_encoder_decoder: bool
    may_skip: bool
    pin_memory: bool
    takes_rng: bool

    @cached_property
    def order(self) -> Order:
        return order_of(self.rows)

    def row_ids(self, start: int, stop: int) -> list[int]:
        """Return the row numbers at positions [start, stop)."""
        return self.order.rows_at(start, stop, seed=self.seed, shuffle=self.shuffle).tolist()

    def seeds(self, start: int, stop: int) -> list[int] | None:
        """Return the seeds of the generators for the rows at positions [start, stop); None if `encode` takes none.

        A position counts rows over all epochs and ranks, so it also determines the epoch.
        """
        return [seed_of("encode", self.seed, at) for at in range(start, stop)] if self.takes_rng else None

    @property
    def batch_size(self) -> int:
        return -(-self.global_batch_size // (self.micro_batches * self.world_size))

    def at(self, position: int) -> Step:
        """Make this rank's micro-batches of the step at positions [position, position + global_batch_size)."""
        num_pieces = self.world_size * self.micro_batches
        pieces = range(self.rank * self.micro_batches, (self.rank + 1) * self.micro_batches + 1)
        bounds = [position + self.global_batch_size * piece // num_pieces for piece in pieces]
        row_ids, seeds = self.row_ids(bounds[0], bounds[-1]), self.seeds(bounds[0], bounds[-1])
        rows, bad = encode_rows(self.rows, row_ids, self.encode, may_skip=self.may_skip, seeds=seeds)
        cuts = [row.get("num_cut", 0) for _, row in rows]
        counts = {"cut_rows": sum(cut > 0 for cut in cuts), "cut_tokens": sum(cuts), "bad_rows": len(bad)}
        rows.sort(key=lambda row: -_num_ids(row[1]))  # to reduce padding and run the largest micro-batch first
        while len(rows) < self.micro_batches:
            rows.append((None, blank_row(self.rows, self.encode, near=row_ids[0], seeds=seeds and seeds[:1])))
        if self.packed_seq_len is not None:
            pack_rows = pack_pairs if self.is_encoder_decoder else pack
            packed = pack_rows(rows, max_seq_len=self.packed_seq_len, micro_batches=self.micro_batches)
            parts = [(chain.from_iterable(row["row_ids"] for row in part), part) for part in packed]
        else:
            if bad:  # split the remaining rows evenly
                bounds = [len(rows) * piece // self.micro_batches for piece in range(self.micro_batches + 1)]
            rest = iter(rows)
            parts = [zip(*islice(rest, stop - first), strict=True) for first, stop in pairwise(bounds)]
        batches = [batch_of(*part, self.collate) for part in parts]
        return Step([batch.pin_memory() for batch in batches] if self.pin_memory else batches, bad, counts)

    def halved(self) -> "Steps | None":
        """Return the same steps with half the rows per micro-batch; None if that would leave a micro-batch empty."""
        batch_size = -(-self.batch_size // 2)
        micro_batches = -(-self.global_batch_size // (batch_size * self.world_size))
        if batch_size == self.batch_size or micro_batches * self.world_size > self.global_batch_size:
            return None
        return replace(self, micro_batches=micro_batches)


def batch_of(row_ids: Iterable[int | None], rows: Sequence[EncodedRow], collate: Collate) -> Batch:
    """Collate rows and attach their row numbers. Blank rows have the number None, which is left out.

    A batch of blank rows has no target, whatever `collate` counts.
    """
    batch = replace(collate(rows), row_ids=[row_id for row_id in row_ids if row_id is not None])
    return batch if batch.row_ids else replace(batch, num_targets=0, weight_sum=0.0, is_blank=True)


def _num_ids(row: EncodedRow) -> int:
    """Return the total number of items in an encoded row's lists and arrays except its weights."""
    others = (value for name, value in row.items() if name != "weights")
    values = (value for value in others if isinstance(value, Sized) and not isinstance(value, str))
    return sum(math.prod(value.shape) if hasattr(value, "shape") else len(value) for value in values)
