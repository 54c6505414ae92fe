"""Mix several sources of rows by weight, so that the row at each position is a pure function of (seed, position).

Weights become whole numbers that sum to PERIOD, and the sources of PERIOD consecutive positions are computed once. In
each prefix, the rows of each source are its exact share, rounded up or down. The rows of a source have their own
positions, so it has its own permutations, and epochs of its own length (see `order`).
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from heapq import heappop, heappush
from pathlib import Path

import numpy as np

from lowmem.config.groups import problem_of_weights
from lowmem.data.files.source import Files, Row, expand, items_of
from lowmem.data.order import Groups, Order, permute
from lowmem.data.rows import Rows, as_rows, hash_rows, open_rows
from lowmem.distributed.seeds import seed_of
from lowmem.errors import UsageError

PERIOD = 10_000


class Mixture:
    """The rows of several sources, numbered consecutively in source order, and the order in which a run takes them.

    Weights are positive numbers of any sum, and are rounded so that each source has a multiple of 1/PERIOD of the rows.
    Raises UsageError unless each source has a row and a weight of at least 1/PERIOD.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], names: Sequence[str] | None = None):
        if len(sources) != len(weights):
            counts = ((len(weights), "weight"), (len(sources), "source"))
            found = " for ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts)
            raise UsageError(f"{found}: give one weight for each source (each file or glob between commas)")
        self.sources = sources
        self.names = names or [f"source {number}" for number in range(1, len(sources) + 1)]
        self.weights = whole_weights(weights)
        """Rows of each source in PERIOD positions."""
        self.groups_of_sources = [groups_of(source) for source in sources]
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} does not exist")
        source, row = self._find(index)
        return self.sources[source][row]

    def where(self, index: int) -> str:
        """Return a row's source and its location there, for messages."""
        source, row = self._find(index)
        rows = self.sources[source]
        return rows.where(row) if hasattr(rows, "where") else f"{self.names[source]}, row {row}"

    @property
    def unread(self) -> list[str]:
        """The columns of any of the sources that are not read."""
        return list(dict.fromkeys(name for source in self.sources for name in getattr(source, "unread", ())))

    def fingerprints(self) -> list[tuple[str, str]]:
        return [pair for source in self.sources for pair in getattr(source, "fingerprints", list)()]

    def digest(self, indices: Sequence[int]) -> str | None:
        """Hash the content of rows. Returns None if a source is not from files, or a file is no longer readable."""
        return hash_rows(self, indices) if all(hasattr(source, "digest") for source in self.sources) else None

    @cached_property
    def rows_per_epoch(self) -> float:
        """The number of positions in which the first source has an epoch."""
        return len(self.sources[0]) * PERIOD / self.weights[0]

    @cached_property
    def order_digest(self) -> str:
        """A hash of everything but the seed that determines the order."""
        text = ",".join([*map(str, self.weights), *(groups.order_digest for groups in self.groups_of_sources)])
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def rows_at(self, start: int, stop: int, *, seed: int, shuffle: bool = True) -> np.ndarray:
        """Return the row numbers at positions [start, stop), int64, shape (stop - start,)."""
        source_at, taken_before = _period(self.weights, seed)
        period, position = np.divmod(np.arange(start, stop), PERIOD)
        source_of, found = source_at[position], np.empty(stop - start, np.int64)
        for source in np.unique(source_of).tolist():
            here = np.flatnonzero(source_of == source)
            first, last = (period[at] * self.weights[source] + taken_before[position[at]] for at in (here[0], here[-1]))
            options = {"seed": seed_of(seed, source), "shuffle": shuffle}
            rows = self.groups_of_sources[source].rows_at(int(first), int(last) + 1, **options)
            found[here] = self._starts[source] + rows
        return found

    def rows_before(self, position: int, *, seed: int) -> list[int]:
        """Return the number of rows that each source has at positions [0, position)."""
        periods, left = divmod(position, PERIOD)
        counts = np.bincount(_period(self.weights, seed)[0][:left], minlength=len(self.weights))
        return [periods * weight + count for weight, count in zip(self.weights, counts.tolist(), strict=True)]

    def _find(self, index: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - int(self._starts[source])


def open_mixture(sources: Files | Sequence[Rows], weights: Sequence[float], **options: object) -> Mixture:
    """Open a source for each path, glob or URL in `sources`, or for each of several rows that are already open.

    `options` are those of `open_rows`. Raises UsageError if a file is in two sources.
    """
    items = items_of(sources) if isinstance(sources, str | Path) else list(sources)
    if all(isinstance(item, str | Path) for item in items):
        expand(items)
        return Mixture([open_rows([item], **options) for item in items], weights, list(map(str, items)))
    return Mixture(list(map(as_rows, items)), weights)


def order_of(rows: Rows) -> Order:
    """Return the order in which a run takes the rows."""
    return rows if isinstance(rows, Mixture) else groups_of(rows)


def groups_of(rows: Rows) -> Groups:
    """Return the groups of rows that are read together; all rows are one group if `rows` does not define any."""
    return getattr(rows, "groups", None) or Groups.of([len(rows)])


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Scale weights to whole numbers that sum to PERIOD, by the largest remainders. Raises UsageError if one is 0."""
    if not weights:
        raise UsageError("no weights: give one weight for each source")
    if problem := problem_of_weights(weights):
        raise UsageError(f"weights {', '.join(map(str, weights))} cannot be used: {problem}")
    exact = [weight / sum(weights) * PERIOD for weight in weights]
    whole = [int(quota) for quota in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: PERIOD - sum(whole)]:
        whole[source] += 1
    if 0 in whole:
        found = f"weight {weights[whole.index(0)]:g} (of --train_weights) is less than 1/{PERIOD:,} of their sum"
        raise UsageError(f"{found}: raise it, or remove the source")
    return tuple(whole)


@lru_cache(maxsize=4)
def _period(weights: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each position's source, and how many earlier positions have that source; both int64, shape (PERIOD,).

    Row m of a source with weight w may have a position from floor(m * PERIOD / w) to ceil((m + 1) * PERIOD / w) - 1, so
    that each prefix has its share, rounded down or up. Each position gets the row whose last position is the earliest,
    which is possible for any weights (Baruah et al., "Proportionate Progress", 1996); the seed decides between equals.
    """
    random = iter(permute(np.arange(PERIOD), PERIOD, (seed,)).tolist())
    rows = sorted(
        (row * PERIOD // weight, -(-(row + 1) * PERIOD // weight), next(random), source)
        for source, weight in enumerate(weights)
        for row in range(weight)
    )
    source_at, taken_before = np.empty((2, PERIOD), np.int64)
    taken, released, ready = [0] * len(weights), 0, []
    for position in range(PERIOD):
        while released < PERIOD and rows[released][0] <= position:
            heappush(ready, rows[released][1:])
            released += 1
        source = heappop(ready)[-1]
        source_at[position], taken_before[position] = source, taken[source]
        taken[source] += 1
    return source_at, taken_before
