"""Rows -> micro-batches, once and in order: for evaluation."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem.data.batch import Batch, Collate, collate
from lowmem.data.encode import Encode, blank_row, encode_rows
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, as_rows
from lowmem.data.steps import batch_of


class EvalBatches:
    """A finite, repeatable pass over rows in order: each row once over all ranks, equally many batches on each."""

    def __init__(
        self,
        rows: Rows,
        encode: Encode,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        collate: Collate,
        quarantine: Quarantine | None,
    ):
        self._rows, self._encode, self._collate, self._quarantine = rows, encode, collate, quarantine
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self._world_size + self._rank) * self._batch_size
            row_ids = range(first, min(first + self._batch_size, len(self._rows)))
            rows, bad_rows = encode_rows(self._rows, row_ids, self._encode, may_skip=self._quarantine is not None)
            for bad in bad_rows:
                self._quarantine.add(bad)
            if not rows:  # one that counts for nothing keeps the number of forwards equal on all ranks
                rows = [(None, blank_row(self._rows, self._encode, near=first % len(self._rows)))]
            yield batch_of(*zip(*rows, strict=True), self._collate)


def open_eval(
    files: str | Path | Sequence[str | Path] | Rows,
    encode: Encode,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    collate: Collate = collate,
    quarantine: Quarantine | None = None,
) -> EvalBatches:
    """Open files or rows for evaluation. A rank that runs short gets batches with `num_targets` 0.

    With a `quarantine`, rows that cannot be read or encoded are left out.
    """
    return EvalBatches(
        as_rows(files),
        encode,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        collate=collate,
        quarantine=quarantine,
    )
