"""Read the files of `data.py` by three methods: `datasets` streaming, `datasets` on disk, and one table in memory.

`data.py` runs each measurement in its own process.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
from corpus import SEED, number_of
from metrics import BATCH_SIZE, EPOCH_FRACTIONS, Watch, disk_bytes, drawn, import_all
from records import Record

BUFFER_SIZE = 10_000  # rows in the shuffle buffer of `datasets`


def builder(file: str) -> str:
    return "json" if file.endswith("jsonl") else "parquet"


def open_streaming(file: str, rank: int = 0, world_size: int = 1):
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    rows = load_dataset(builder(file), data_files=file, split="train", streaming=True)
    return split_dataset_by_node(rows.shuffle(seed=SEED, buffer_size=BUFFER_SIZE), rank, world_size)


def streaming_draw(file: str, num_drawn: int, rank: int = 0, world_size: int = 1) -> Record:
    import datasets  # noqa: F401

    import_all()
    watch = Watch()
    return drawn(watch, iter(open_streaming(file, rank, world_size)), num_drawn // world_size)


def streaming_pass(file: str, folder: str, num_rows: int) -> Record:
    """Read one uninterrupted epoch; save the order of its rows, and the stream's state at each of EPOCH_FRACTIONS.

    If `data.py` kills this process at the time limit, the saved order has -1 at each position that was not reached.
    """
    rows = open_streaming(file)
    order = np.lib.format.open_memmap(f"{folder}/order.npy", mode="w+", dtype=np.int64, shape=(num_rows,))
    order[:] = -1
    saves = {int(num_rows * fraction): fraction for fraction in EPOCH_FRACTIONS}
    for number, row in enumerate(rows, 1):
        order[number - 1] = number_of(row)
        if number in saves:
            Path(folder, f"{saves[number]}.json").write_text(json.dumps(rows.state_dict()))
    return {}


def streaming_resume(file: str, folder: str, fraction: float) -> Record:
    """Time a resume up to its first batch; at the largest fraction, also count lost and repeated rows."""
    import datasets  # noqa: F401

    import_all()
    state = json.loads(Path(folder, f"{fraction}.json").read_text())
    watch = Watch()
    rows = open_streaming(file)
    rows.load_state_dict(state)
    iterator = iter(rows)
    first = [number_of(row) for row in islice(iterator, BATCH_SIZE)]
    seconds = watch.seconds()
    order = np.load(f"{folder}/order.npy", mmap_mode="r")
    position = int(len(order) * fraction)
    record = {"seconds": seconds, "same_rows": first == order[position : position + BATCH_SIZE].tolist()}
    if fraction == max(EPOCH_FRACTIONS):  # at smaller fractions, reading the rest of the epoch takes too long
        times = np.zeros(len(order), np.int64)
        np.add.at(times, [*order[:position], *first, *(number_of(row) for row in iterator)], 1)
        record |= {"lost_rows": int((times == 0).sum()), "repeated_rows": int((times > 1).sum())}
    return record


def open_on_disk(file: str, cache: str, rank: int = 0, world_size: int = 1):
    """Open a map-style dataset in random order, with the batch sampler that accelerate (and so Trainer) uses."""
    import torch
    from accelerate.data_loader import BatchSamplerShard
    from datasets import load_dataset
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    rows = load_dataset(builder(file), data_files=file, split="train", cache_dir=cache)
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(SEED))
    batches = BatchSamplerShard(BatchSampler(sampler, BATCH_SIZE, False), world_size, rank)
    return DataLoader(rows, batch_sampler=batches, collate_fn=list)


def on_disk_once(file: str, cache: str) -> Record:
    import datasets  # noqa: F401

    import_all()
    shutil.rmtree(cache, ignore_errors=True)
    watch = Watch()
    open_on_disk(file, cache)
    return {"seconds": watch.seconds(), **watch.bytes(), "disk_bytes": disk_bytes(cache)}


def on_disk_draw(file: str, cache: str, num_drawn: int, rank: int = 0, world_size: int = 1) -> Record:
    import accelerate.data_loader  # noqa: F401
    import datasets  # noqa: F401

    import_all()
    watch = Watch()
    loader = open_on_disk(file, cache, rank, world_size)
    return drawn(watch, (row for batch in loader for row in batch), num_drawn // world_size)


def on_disk_resume(file: str, cache: str, fraction: float) -> Record:
    """Time a resume up to its first batch. Like Trainer's, it skips the loader's first batches."""
    import datasets  # noqa: F401
    import torch
    from accelerate import skip_first_batches

    import_all()
    watch = Watch()
    loader = open_on_disk(file, cache)
    skipped = int(len(loader) * fraction)
    first = [number_of(row) for row in next(iter(skip_first_batches(loader, skipped)))]
    seconds = watch.seconds()
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(SEED))
    return {"seconds": seconds, "same_rows": first == order[skipped * BATCH_SIZE :][:BATCH_SIZE].tolist()}


def whole_draw(file: str, num_drawn: int, rank: int = 0, world_size: int = 1) -> Record:
    """Load the whole file into memory, then draw rows in shuffled order."""
    import random

    from pyarrow import parquet

    import_all()
    watch = Watch()
    table = parquet.read_table(file, use_threads=False)
    order = list(range(table.num_rows))
    random.Random(SEED).shuffle(order)
    starts = range(rank * BATCH_SIZE, len(order), world_size * BATCH_SIZE)
    rows = (row for start in starts for row in table.take(order[start : start + BATCH_SIZE]).to_pylist())
    return drawn(watch, rows, num_drawn // world_size)
