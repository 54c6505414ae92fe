"""Rows -> micro-batches, once and in order: for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.data.batch import Batch, Collate, collate
from lowmem.data.encode import Encode, blank_row, encode_rows
from lowmem.data.files.source import Files
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, as_rows
from lowmem.data.steps import batch_of


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """A finite, repeatable pass over rows in order: each row once over all ranks, equally many batches on each."""

    rows: Rows
    encode: Encode
    batch_size: int
    rank: int
    world_size: int
    collate: Collate
    quarantine: Quarantine | None

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            first = (index * self.world_size + self.rank) * self.batch_size
            row_ids = range(first, min(first + self.batch_size, len(self.rows)))
            rows, bad_rows = encode_rows(self.rows, row_ids, self.encode, may_skip=self.quarantine is not None)
            for bad in bad_rows:
                self.quarantine.add(bad)
            if not rows:  # a row without targets keeps the number of forwards equal on all ranks
                rows = [(None, blank_row(self.rows, self.encode, near=first % len(self.rows)))]
            yield batch_of(*zip(*rows, strict=True), self.collate)


def open_eval(
    files: Files | Rows,
    encode: Encode,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    collate: Collate = collate,
    quarantine: Quarantine | None = None,
) -> EvalBatches:
    """Open files or rows for evaluation. A rank that runs short gets batches with `num_targets` 0.

    With a `quarantine`, rows that cannot be read or encoded are skipped.
    """
    return EvalBatches(as_rows(files), encode, batch_size, rank, world_size, collate, quarantine)
