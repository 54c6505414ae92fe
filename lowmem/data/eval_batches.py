"""Make micro-batches for evaluation: every row once, in order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lowmem.data.batch import Batch, Collate, collate
from lowmem.data.encoder import Encode, blank_row, encode_rows
from lowmem.data.files.source import Files
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, as_rows
from lowmem.data.steps import batch_of
from lowmem.distributed.placement import given_or_only_rank


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """One rank's micro-batches of one pass over the rows. All ranks have equally many. Can be iterated again."""

    batch_at: Callable[[int], Batch]
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch_at, range(self.num_batches))


def open_eval(
    files: Files | Rows,
    encode: Encode,
    *,
    batch_size: int,
    rank: int | None = None,
    world_size: int | None = None,
    collate: Collate = collate,
    quarantine: Quarantine | None = None,
) -> EvalBatches:
    """Open files or rows for evaluation. With a `quarantine`, skip rows that cannot be read or encoded."""
    rows, (rank, world_size) = as_rows(files), given_or_only_rank(rank, world_size)

    def batch_at(index: int) -> Batch:
        first = (index * world_size + rank) * batch_size
        row_ids = range(first, min(first + batch_size, len(rows)))
        encoded, bad_rows = encode_rows(rows, row_ids, encode, may_skip=quarantine is not None)
        for bad in bad_rows:
            quarantine.add(bad)
        if not encoded:  # use a row without targets, so that all ranks run equally many forward passes
            encoded = [(None, blank_row(rows, encode, near=first % len(rows)))]
        return batch_of(*zip(*encoded, strict=True), collate)

    return EvalBatches(batch_at, num_batches=-(-len(rows) // (batch_size * world_size)))
