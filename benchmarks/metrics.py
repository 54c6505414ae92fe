"""Metrics for reading rows: seconds, bytes, rows per second, and how well an order shuffles rows."""

import gc
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import SEED, number_of
from records import Record

BATCH_SIZE = 32
EPOCH_FRACTIONS = (0.1, 0.5, 0.99)  # where runs are resumed


# --- memory
def memory() -> dict[str, int]:
    """Return this process's resident bytes, its anonymous bytes (not backed by a file), and its peak resident bytes."""
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "VmHWM": "peak"}
    found = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) * 1024 for name, _, value in found if name in names}


class Watch:
    """Measure the seconds since this object was created, and the memory added since then."""

    def __init__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak of this process
        self._before, self._most = memory(), memory()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def look(self) -> None:
        self._most = {name: max(value, self._most[name]) for name, value in memory().items()}

    def bytes(self) -> dict[str, int]:
        """Return the largest increases that `look` saw. The kernel's `peak_bytes` includes peaks between looks."""
        self.look()
        before = self._before | {"peak": self._before["resident"]}
        return {f"{name}_bytes": value - before[name] for name, value in self._most.items()}


def disk_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def import_all() -> None:
    """Import the modules with which lowmem reads rows, so that later measurements exclude their memory."""
    import pyarrow.json  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    import lowmem.data.stream  # noqa: F401

    torch.set_num_threads(1)


# --- reading
def drawn(watch: Watch, rows: Iterator[Record], count: int) -> Record:
    """Read a batch, then `count` rows; return the seconds until the first batch, rows per second and memory."""
    start, began = None, 0.0
    for number, row in enumerate(islice(rows, count + BATCH_SIZE)):
        number_of(row)
        if number == BATCH_SIZE - 1:
            start = began = watch.seconds()
        if number % 1000 == 0:
            watch.look()
    return {"start_seconds": start, "rows_per_second": count / (watch.seconds() - began), **watch.bytes()}


# --- shuffles
def quality(file: str, order_of: str) -> Record:
    """Measure how far an order moves rows, and from how many row groups the rows of a batch come.

    `order_of` is "lowmem", "uniform", or a file of the row numbers in the order in which they were read, with -1
    for rows not reached. The row groups are always those that lowmem reads as a unit.
    """
    from lowmem import open_rows
    from lowmem.data.order import rows_at

    groups = open_rows(file, columns=["prompt", "response"]).groups
    if order_of == "lowmem":
        order = rows_at(0, groups.num_rows, groups, seed=SEED)
    elif order_of == "uniform":
        order = np.random.default_rng(SEED).permutation(groups.num_rows)
    else:
        order = np.load(order_of)
        order = order[order >= 0]
    group = np.searchsorted(np.cumsum(groups.rows), order, side="right")
    batches = np.sort(group[: len(group) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE), axis=1)
    # a batch is sorted by group, so two equal entries k apart belong to a group with more than k rows in the batch
    commonest = 1 + sum((batches[:, k:] == batches[:, :-k]).any(1) for k in range(1, BATCH_SIZE))
    return {
        "displacement": float(np.abs(order - np.arange(len(order))).mean() / groups.num_rows),
        "groups": len(groups.rows),
        "distinct_groups": float(1 + (np.diff(batches) > 0).sum(1).mean()),
        "commonest_group_rows": float(commonest.mean()),
    }
