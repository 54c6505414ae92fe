"""Reading ten million rows: start, memory, speed, resume and shuffle, of lowmem and of other ways to read them.

    python benchmarks/data.py --folder=/tmp/rows --output=benchmarks/results/data.jsonl
    python benchmarks/data.py --quick

Writes a JSON line for each measurement, and tables beside it. See README.md.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

import numpy as np
from compare import MIB, Record, append

SEED = 0
BATCH_SIZE = 32
BUFFER_SIZE = 10_000  # of datasets' shuffle
PLACES = (0.1, 0.5, 0.99)  # of an epoch, where runs are resumed
VERSIONS = ("torch", "transformers", "tokenizers", "pyarrow", "datasets")

KINDS = {
    "parquet-100k": (".parquet", 100_000),
    "parquet-default": (".parquet", 2**20),
    "jsonl": (".jsonl", 100_000),
}
"""Suffix of each kind of file, and rows that are written at a time: of parquet, a row group."""


# --- rows
_BLOCK_ROWS = 100_000
_NUM_WORDS = 4096


def words() -> list[bytes]:
    """Made-up words of two to nine letters."""
    generator = np.random.default_rng(SEED)
    letters = generator.integers(ord("a"), ord("z") + 1, (_NUM_WORDS, 9), dtype=np.uint8)
    return [row[:length].tobytes() for row, length in zip(letters, generator.integers(2, 10, _NUM_WORDS), strict=True)]


def texts(generator: np.random.Generator, num_rows: int, fewest: int, most: int):
    """A pyarrow array of texts of `fewest` to `most` words, some far more frequent than others."""
    import pyarrow as pa

    # Those that end a text have no space behind them.
    written = [word + b" " for word in words()] + words()
    lengths = np.array([len(word) for word in written])
    starts = np.cumsum(lengths) - lengths
    num_words = generator.integers(fewest, most + 1, num_rows)
    ends = np.cumsum(num_words)
    chosen = (generator.random(ends[-1]) ** 3 * _NUM_WORDS).astype(np.int64)
    chosen[ends - 1] += _NUM_WORDS
    stops = np.cumsum(lengths[chosen])
    places = np.arange(stops[-1]) + np.repeat(starts[chosen] - stops + lengths[chosen], lengths[chosen])
    data = np.frombuffer(b"".join(written), np.uint8)[places]
    offsets = np.concatenate([[0], stops[ends - 1]]).astype(np.int32)
    return pa.StringArray.from_buffers(num_rows, pa.py_buffer(offsets), pa.py_buffer(data))


def block(number: int):
    """A table of _BLOCK_ROWS rows, some 75 bytes each; a prompt begins with the number of its row, for number_of."""
    import pyarrow as pa
    from pyarrow import compute

    generator = np.random.default_rng((SEED, number))
    ids = pa.array(np.arange(_BLOCK_ROWS) + number * _BLOCK_ROWS + 10**8).cast(pa.string())
    prompts = compute.binary_join_element_wise(ids, texts(generator, _BLOCK_ROWS, 2, 8), " ")
    return pa.table({"prompt": prompts, "response": texts(generator, _BLOCK_ROWS, 2, 8)})


def number_of(row: dict[str, str]) -> int:
    return int(row["prompt"][:9]) - 10**8


def tables(num_rows: int, rows_each: int) -> Iterator:
    """The first `num_rows` rows, in tables of `rows_each`: the same rows however they are cut."""
    import pyarrow as pa

    rest = block(0).slice(0, 0)
    for number in range(-(-num_rows // _BLOCK_ROWS)):
        rest = pa.concat_tables([rest, block(number).slice(0, num_rows - number * _BLOCK_ROWS)])
        while rest.num_rows >= rows_each:
            yield rest.slice(0, rows_each)
            rest = rest.slice(rows_each)
    if rest.num_rows:
        yield rest


def generate(file: str, kind: str, num_rows: int) -> Record:
    """Write a file of `num_rows` rows, whole or not at all, holding no more than a row group of them."""
    from pyarrow import compute, parquet

    unfinished, rows_each = Path(f"{file}.unfinished"), KINDS[kind][1]
    if kind == "jsonl":
        with open(unfinished, "wb") as lines:
            for table in tables(num_rows, rows_each):
                columns = [column.combine_chunks() for column in table.columns]
                parts = ('{"prompt": "', columns[0], '", "response": "', columns[1], '"}\n', "")
                lines.write(compute.binary_join_element_wise(*parts).buffers()[2])
    else:
        with parquet.ParquetWriter(unfinished, block(0).schema) as writer:
            for table in tables(num_rows, rows_each):
                writer.write_table(table, row_group_size=rows_each)
    os.replace(unfinished, file)
    return {}


def train_tokenizer(folder: str) -> Record:
    """A byte-level BPE of 8,192 tokens, trained on the first rows; a tokenizer that `make_encode` loads."""
    table = next(tables(20_000, 20_000))
    fast_tokenizer([text for column in table.columns for text in column.to_pylist()], 8192).save_pretrained(folder)
    return {}


def fast_tokenizer(corpus: list[str], vocab_size: int):
    """transformers' fast tokenizer over a byte-level BPE that is trained on `corpus`; it ends texts with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


# --- what a process holds
def memory() -> dict[str, int]:
    """Bytes that this process holds: all that is resident, what of it is no file's page, and the most so far."""
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "VmHWM": "peak"}
    found = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) * 1024 for name, _, value in found if name in names}


class Watch:
    """Seconds and bytes from its making on; bytes are those above what was resident then."""

    def __init__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._before, self._most = memory(), memory()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def look(self) -> None:
        self._most = {name: max(value, self._most[name]) for name, value in memory().items()}

    def bytes(self) -> dict[str, int]:
        """The most that was seen in any `look`, and of the peak the most at any time."""
        self.look()
        before = self._before | {"peak": self._before["resident"]}
        return {f"{name}_bytes": value - before[name] for name, value in self._most.items()}


def disk_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# --- lowmem
def make_encode(encoder: str, folder: str) -> Callable:
    """`number` makes one token of a row, its number; `bpe` and `byt5` are real tokenizers."""
    if encoder == "number":
        return lambda row: {"input_ids": [number_of(row)], "labels": [0]}
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    from lowmem import make_encoder

    tokenizer = ByT5Tokenizer() if encoder == "byt5" else PreTrainedTokenizerFast.from_pretrained(folder)
    return make_encoder(tokenizer, is_encoder_decoder=True, max_seq_len=128)


def open_lowmem(file: str, encode: Callable, rank: int = 0, world_size: int = 1, **settings: object):
    from lowmem import open_rows, open_stream

    rows = open_rows(file, columns=["prompt", "response"])
    settings = {"batch_size": BATCH_SIZE, "seed": SEED, "rank": rank, "world_size": world_size, **settings}
    return rows, open_stream(rows, encode, **settings)


def import_all() -> None:
    """What lowmem loads while it reads; it shall not count as memory of the reading."""
    import pyarrow.json  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    import lowmem.data.stream  # noqa: F401

    torch.set_num_threads(1)


def lowmem_once(file: str, cache: str) -> Record:
    """What is made of a file once: its index or its copy."""
    from lowmem import open_rows

    import_all()
    shutil.rmtree(cache, ignore_errors=True)
    watch = Watch()
    open_rows(file, columns=["prompt", "response"])
    return {"seconds": watch.seconds(), **watch.bytes(), "disk_bytes": disk_bytes(cache)}


def lowmem_draw(
    file: str, folder: str, encoder: str, num_drawn: int, elsewhere: int, rank: int = 0, world_size: int = 1
) -> Record:
    """Draw `num_drawn` rows from the start, then `elsewhere` ones at each of PLACES: a few windows in all."""
    import_all()
    encode = make_encode(encoder, folder)
    watch = Watch()
    rows, stream = open_lowmem(file, encode, rank, world_size)
    state, tokens = stream.state_dict(), 0

    def draw(position: int, count: int) -> float:
        nonlocal tokens
        stream.load_state_dict(state | {"position": position})
        tokens, started = 0, time.perf_counter()
        for step, (batch,) in zip(range(count // stream.global_batch_size + 1), stream, strict=False):
            mask = batch.inputs.get("attention_mask")
            tokens += batch.num_targets + (batch.inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            if encoder == "number" and sorted(batch.row_ids) != sorted(batch.inputs["input_ids"].flatten().tolist()):
                raise ValueError(f"{file}: rows {batch.row_ids} were asked for, others were read")
            if step % 50 == 0:
                watch.look()
            stream.advance()
        return time.perf_counter() - started

    draw(0, 0)
    start = watch.seconds()
    seconds = draw(0, num_drawn)
    record = {"start_seconds": start, "rows_per_second": num_drawn / world_size / seconds}
    record |= {"tokens_per_second": tokens / seconds} if encoder != "number" else {}
    for place in PLACES:
        draw(int(len(rows) * place), elsewhere)
    if world_size == 1:
        Path(folder, "state.json").write_text(json.dumps(state))  # for `lowmem_resume`
    return {**record, **watch.bytes()}


def lowmem_rows(file: str, num_drawn: int) -> Record:
    """Rows alone, in the order of a stream, as those of the other systems are drawn."""
    from lowmem import open_rows
    from lowmem.data.order import rows_at

    import_all()
    watch = Watch()
    rows = open_rows(file, columns=["prompt", "response"])
    starts = range(0, len(rows), BATCH_SIZE)
    orders = (rows_at(start, start + BATCH_SIZE, rows.groups, seed=SEED).tolist() for start in starts)
    return drawn(watch, (rows[number] for order in orders for number in order), num_drawn)


def lowmem_resume(file: str, folder: str, place: float) -> Record:
    """From nothing to the first batch at `place` (in epochs), and whether an uninterrupted run has its rows there."""
    import_all()
    from lowmem.data.order import rows_at

    state = json.loads(Path(folder, "state.json").read_text())
    position = int(state["num_rows"] * place)
    watch = Watch()
    rows, stream = open_lowmem(file, make_encode("number", folder))
    stream.load_state_dict(state | {"position": position})
    (batch,) = next(iter(stream))
    seconds = watch.seconds()
    expected = sorted(rows_at(position, position + BATCH_SIZE, rows.groups, seed=SEED).tolist())
    read = sorted(batch.inputs["input_ids"].flatten().tolist())
    return {"seconds": seconds, "same_rows": sorted(batch.row_ids) == expected == read}


def lowmem_wait(file: str, prefetch: int, num_steps: int) -> Record:
    """Train a small T5 on the bytes of rows, and tell which share of its time it waits for them."""
    import_all()
    import torch

    from lowmem import TrainState, join, load_model, make_encoder, make_optimizer, parallelize, plain_loss, train_step

    accelerator = join()
    torch.manual_seed(SEED)
    model, tokenizer = load_model(model_config="t5-tiny")
    model = parallelize(model, accelerator)
    encode = make_encoder(tokenizer, is_encoder_decoder=True, max_seq_len=128)
    _, stream = open_lowmem(file, encode, prefetch=prefetch)
    state = TrainState(model, make_optimizer(model), stream)
    for step, batches in enumerate(islice(stream, num_steps)):
        if step == 2:  # what came before has opened the file and filled the first window's groups
            started, waited = time.perf_counter(), stream.wait_seconds
        train_step(state, batches, plain_loss, accelerator, learning_rate=1e-4)
    seconds = time.perf_counter() - started
    return {"share": (stream.wait_seconds - waited) / seconds, "seconds_per_step": seconds / (num_steps - 2)}


# --- other ways to read
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


def drawn(watch: Watch, rows: Iterator[Record], count: int) -> Record:
    """Start, rows per second and memory of an iterator that was made under `watch`."""
    start, began = None, 0.0
    for number, row in enumerate(islice(rows, count + BATCH_SIZE)):
        number_of(row)
        if number == BATCH_SIZE - 1:
            start = began = watch.seconds()
        if number % 1000 == 0:
            watch.look()
    return {"start_seconds": start, "rows_per_second": count / (watch.seconds() - began), **watch.bytes()}


def streaming_pass(file: str, folder: str, num_rows: int) -> Record:
    """An uninterrupted epoch, as far as the limit lets it: its order, and the states that are resumed from."""
    rows = open_streaming(file)
    order = np.lib.format.open_memmap(f"{folder}/order.npy", mode="w+", dtype=np.int64, shape=(num_rows,))
    order[:] = -1
    saves = {int(num_rows * place): place for place in PLACES}
    for number, row in enumerate(rows, 1):
        order[number - 1] = number_of(row)
        if number in saves:
            Path(folder, f"{saves[number]}.json").write_text(json.dumps(rows.state_dict()))
    return {}


def streaming_resume(file: str, folder: str, place: float) -> Record:
    """From nothing to the first batch after a saved state; how many of an epoch's rows never came, or came again."""
    import datasets  # noqa: F401

    import_all()
    state = json.loads(Path(folder, f"{place}.json").read_text())
    watch = Watch()
    rows = open_streaming(file)
    rows.load_state_dict(state)
    iterator = iter(rows)
    first = [number_of(row) for row in islice(iterator, BATCH_SIZE)]
    seconds = watch.seconds()
    order = np.load(f"{folder}/order.npy", mmap_mode="r")
    position = int(len(order) * place)
    record = {"seconds": seconds, "same_rows": first == order[position : position + BATCH_SIZE].tolist()}
    if place == max(PLACES):  # elsewhere it would take long to come to the end
        times = np.zeros(len(order), np.int64)
        np.add.at(times, [*order[:position], *first, *(number_of(row) for row in iterator)], 1)
        record |= {"lost_rows": int((times == 0).sum()), "repeated_rows": int((times > 1).sum())}
    return record


def open_on_disk(file: str, cache: str, rank: int = 0, world_size: int = 1):
    """A map-style dataset in random order, as a DataLoader that accelerate prepared (and with it Trainer) reads it."""
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


def on_disk_resume(file: str, cache: str, place: float) -> Record:
    """As Trainer does it: the loader's first batches are skipped."""
    import datasets  # noqa: F401
    import torch
    from accelerate import skip_first_batches

    import_all()
    watch = Watch()
    loader = open_on_disk(file, cache)
    skipped = int(len(loader) * place)
    first = [number_of(row) for row in next(iter(skip_first_batches(loader, skipped)))]
    seconds = watch.seconds()
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(SEED))
    return {"seconds": seconds, "same_rows": first == order[skipped * BATCH_SIZE :][:BATCH_SIZE].tolist()}


def whole_draw(file: str, num_drawn: int, rank: int = 0, world_size: int = 1) -> Record:
    """All rows in memory, read in the order of a shuffled list."""
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


# --- shuffles
def quality(file: str, order_of: str) -> Record:
    """How far rows come from where they stood, and how many groups of rows a batch mixes.

    `order_of` is "lowmem", "uniform" or a file of row numbers in order (-1: not reached). Groups are lowmem's, the
    pieces that it reads at a time, for all of them.
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
    # in a sorted batch a group has more than k rows where a row equals the k-th one after it
    commonest = 1 + sum((batches[:, k:] == batches[:, :-k]).any(1) for k in range(1, BATCH_SIZE))
    return {
        "displacement": float(np.abs(order - np.arange(len(order))).mean() / groups.num_rows),
        "groups": len(groups.rows),
        "distinct_groups": float(1 + (np.diff(batches) > 0).sum(1).mean()),
        "commonest_group_rows": float(commonest.mean()),
    }


# --- processes
def run_all(calls: list[tuple[Callable, dict[str, object]]], folder: Path, limit: float | None) -> list[Record] | None:
    """Records of functions of this file, each in a process of its own, all at once; None if one is over the limit.

    What they keep beside the files is in `folder`. Raises RuntimeError if one fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"LOWMEM_CACHE": str(folder / "lowmem-cache"), "HF_HOME": str(folder / "huggingface")}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "run", function.__name__, json.dumps(arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for function, arguments in calls
    ]
    stop = None if limit is None else time.monotonic() + limit
    try:
        outputs = [process.communicate(timeout=stop and max(0, stop - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed := [process.args[3:] for process in processes if process.returncode]:
        raise RuntimeError(f"{failed} ended with an error, told above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def machine() -> dict[str, object]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {"cpu": cpu.partition(":")[2].strip() or platform.machine(), "cores": os.cpu_count()}


class Session:
    """The records of one command, and the folder that it works in."""

    def __init__(self, flags: argparse.Namespace, folder: Path, command: str):
        self.flags, self.folder, self.records = flags, folder, []
        self.process_counts = (1,) if flags.quick else (1, 3)
        self._shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command}
        self._shared |= {"machine": machine(), "versions": {name: version(name) for name in VERSIONS}}

    def file(self, kind: str, num_rows: int) -> Path:
        return self.folder / f"{kind}-{num_rows}{KINDS[kind][0]}"

    def run(self, calls: list[tuple[Callable, dict[str, object]]], limit: float | None) -> list[Record] | None:
        return run_all(calls, self.folder, limit)

    def measure(
        self, what: str, system: str, kind: str, num_rows: int, function: Callable, processes: int = 1, **arguments
    ) -> None:
        """Run, tell and keep one measurement; with several processes each is a rank, and the worst of each counts."""
        arguments = {"file": str(self.file(kind, num_rows)), **arguments}
        ranks = [{"rank": rank, "world_size": processes} for rank in range(processes)] if processes > 1 else [{}]
        found = self.run([(function, arguments | rank) for rank in ranks], self.flags.limit_seconds)
        told = {name: value for name, value in arguments.items() if name in ("encoder", "place", "prefetch")}
        record = {"what": what, "system": system, "kind": kind, "rows": num_rows, "processes": processes, **told}
        if found is None:
            record["over_limit_seconds"] = self.flags.limit_seconds
        else:
            record |= {name: (min if "per_second" in name else max)(r[name] for r in found) for name in found[0]}
        print(", ".join(f"{value:.4g}" if type(value) is float else str(value) for value in record.values()))
        record |= {"file_bytes": self.file(kind, num_rows).stat().st_size} | self._shared
        self.records.append(record)
        if self.flags.output:  # at once: a run that is stopped has measured what it has
            append(self.flags.output, [record], table, "data.py")


def measure_all(session: Session) -> None:
    flags = session.flags
    sizes = [flags.rows] if flags.quick else [flags.rows // 10, flags.rows]
    places = [0.5] if flags.quick else list(PLACES)
    for kind in flags.kinds:
        for num_rows in sizes:
            file = session.file(kind, num_rows)
            if not file.exists():
                started = time.perf_counter()
                session.run([(generate, {"file": str(file), "kind": kind, "num_rows": num_rows})], None)
                print(f"{file}: {file.stat().st_size / 1e6:,.0f} MB in {time.perf_counter() - started:.0f} s")
    session.run([(train_tokenizer, {"folder": str(session.folder)})], None)
    for kind in flags.kinds:
        for num_rows in sizes:
            count = num_rows // 10 if flags.quick else min(300_000, num_rows // 2)
            for system in flags.systems:
                measure_system, kinds = SYSTEMS[system]
                is_left_out = flags.quick and system != "lowmem" and kind != flags.kinds[0]
                if kind in kinds and not is_left_out:
                    measure = partial(session.measure, system=system, kind=kind, num_rows=num_rows)
                    measure_system(session, measure, count, places)
    for prefetch in (2, 0):
        arguments = {"prefetch": prefetch, "num_steps": 12 if flags.quick else 100}
        session.measure("wait", "lowmem", flags.kinds[0], sizes[-1], lowmem_wait, **arguments)


def measure_lowmem(session: Session, measure: Callable, count: int, places: list[float]) -> None:
    folder = str(session.folder)
    measure("once", function=lowmem_once, cache=f"{folder}/lowmem-cache")
    measure("draw", function=lowmem_rows, num_drawn=count)
    draws = [("number", 1, count), ("bpe", 1, count), ("byt5", 1, count // 5), ("bpe", 3, count)]
    for encoder, processes, num_drawn in draws[::3] if session.flags.quick else draws:
        arguments = {"num_drawn": num_drawn, "elsewhere": num_drawn // 6, "encoder": encoder, "folder": folder}
        measure("draw", function=lowmem_draw, processes=processes, **arguments)
    for place in [1.5] if session.flags.quick else [*places, 1.5]:
        measure("resume", function=lowmem_resume, folder=folder, place=place)
    for order in ("uniform", "lowmem"):
        measure("shuffle", system=order, function=quality, order_of=order)


def measure_streaming(session: Session, measure: Callable, count: int, places: list[float]) -> None:
    folder = str(session.folder)
    for processes in session.process_counts:
        measure("draw", function=streaming_draw, processes=processes, num_drawn=count)
    saved = {place: Path(folder, f"{place}.json") for place in PLACES}
    for path in saved.values():  # of another file
        path.unlink(missing_ok=True)
    kind, num_rows = (measure.keywords[name] for name in ("kind", "num_rows"))
    arguments = {"file": str(session.file(kind, num_rows)), "folder": folder, "num_rows": num_rows}
    session.run([(streaming_pass, arguments)], 5 * session.flags.limit_seconds)
    for place in places:
        if saved[place].exists():
            measure("resume", function=streaming_resume, place=place, folder=folder)
    measure("shuffle", function=quality, order_of=f"{folder}/order.npy")


def measure_on_disk(session: Session, measure: Callable, count: int, places: list[float]) -> None:
    cache = {"cache": str(session.folder / "datasets-cache")}
    measure("once", function=on_disk_once, **cache)
    for processes in session.process_counts:
        measure("draw", function=on_disk_draw, processes=processes, num_drawn=count, **cache)
    for place in places:
        measure("resume", function=on_disk_resume, place=place, **cache)


def measure_whole(session: Session, measure: Callable, count: int, places: list[float]) -> None:
    for processes in session.process_counts:
        measure("draw", function=whole_draw, processes=processes, num_drawn=count)


SYSTEMS = {
    "lowmem": (measure_lowmem, set(KINDS)),
    "datasets streaming": (measure_streaming, set(KINDS)),
    "datasets on disk": (measure_on_disk, set(KINDS)),
    "table whole": (measure_whole, {"parquet-100k", "parquet-default"}),
}
"""How each is measured, and on which kinds of files."""


# --- what is told
def markdown(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns of text (its head ends in ":") are on the left; none if it has no rows."""
    if not rows:
        return []
    marks = ["---" if name.endswith(":") else "---:" for name in head]
    lines = [[name.removesuffix(":") for name in head], marks, *rows]
    return [f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def told(record: Record | None, name: str, form: str = ",.0f", unit: float = 1) -> str:
    """A record's value; "-" where it has none, and that it was over the limit."""
    if record is None or name not in record and "over_limit_seconds" not in record:
        return "-"
    return f"{record[name] / unit:{form}}" if name in record else f"> {record['over_limit_seconds']:.0f} s"


def once_table(records: list[Record]) -> list[str]:
    head = ["system:", "file:", "rows", "file, MB", "seconds", "MB/s", "peak RSS, MiB", "on disk, MB"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", told(record, "file_bytes", unit=1e6)),
            *(told(record, "seconds", ".1f"), f"{record['file_bytes'] / 1e6 / record.get('seconds', np.nan):,.0f}"),
            *(told(record, "peak_bytes", unit=MIB), told(record, "disk_bytes", unit=1e6)),
        ]
        for record in records
        if record["what"] == "once"
    ]
    return markdown("Once for each file: what is made of it", head, rows)


def draw_table(records: list[Record]) -> list[str]:
    head = ["system:", "file:", "rows", "encoder:", "processes", "start, s", "anonymous, MiB", "RSS, MiB", "peak, MiB"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", record.get("encoder", "-")),
            *(str(record["processes"]), told(record, "start_seconds", ".2f")),
            *(told(record, f"{name}_bytes", unit=MIB) for name in ("anonymous", "resident", "peak")),
            *(told(record, "rows_per_second"), told(record, "tokens_per_second")),
        ]
        for record in records
        if record["what"] == "draw"
    ]
    return markdown("Start, memory and speed of each process", [*head, "rows/s", "tokens/s"], rows)


def resume_table(records: list[Record]) -> list[str]:
    records = [record for record in records if record["what"] == "resume"]
    places = sorted({record["place"] for record in records})
    found: dict[tuple, dict[float, Record]] = {}
    for record in records:
        found.setdefault((record["system"], record["kind"], f"{record['rows']:,}"), {})[record["place"]] = record

    def goes_on(of: dict[float, Record]) -> str:
        same = [record["same_rows"] for record in of.values() if "same_rows" in record]
        return "yes" if same and all(same) else "no" if same else "-"

    rows = [
        [
            *key,
            *(told(of.get(place), "seconds", ".2f") for place in places),
            goes_on(of),
            *(told(of.get(max(PLACES)), name) for name in ("lost_rows", "repeated_rows")),
        ]
        for key, of in found.items()
    ]
    head = ["system:", "file:", "rows", *(f"at {place:.0%}, s" for place in places), "same rows as uninterrupted:"]
    return markdown("Resume: from nothing to the first batch", [*head, "rows lost", "rows repeated"], rows)


def shuffle_table(records: list[Record]) -> list[str]:
    head = ["order:", "file:", "rows", "groups", "mean displacement / rows"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", told(record, "groups")),
            *(told(record, "displacement", ".3f"), told(record, "distinct_groups", ".1f")),
            told(record, "commonest_group_rows", ".1f"),
        ]
        for record in records
        if record["what"] == "shuffle"
    ]
    head += [f"groups in a batch of {BATCH_SIZE}", "rows of its commonest group"]
    return markdown("Shuffle", head, rows)


def wait_table(records: list[Record]) -> list[str]:
    rows = [
        [str(record["prefetch"]), told(record, "share", ".1%"), told(record, "seconds_per_step", ".3f")]
        for record in records
        if record["what"] == "wait"
    ]
    return markdown("Share of a training's time that it waits for rows", ["prefetch", "share", "s/step"], rows)


def table(records: list[Record]) -> str:
    """Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"## {max(record['rows'] for record in records):,} rows", "", f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}, {first['machine']['cores']} cores; {versions}.", ""]
    for part in (once_table, draw_table, resume_table, shuffle_table, wait_table):
        lines += part(records)
    return "\n".join(lines)


# --- the command
def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Flags as a namespace; a mistake ends the program with exit code 2."""

    def at_least(least: int) -> Callable[[str], int]:
        def parse(text: str) -> int:
            if not text.isdigit() or int(text) < least:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least:,}")
            return int(text)

        return parse

    def names_of(known: dict[str, object]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}: choose among {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=at_least(100_000), help="default 10,000,000; also a tenth is measured")
    parser.add_argument("--folder", type=Path, help="for the files, used again if they are there; default: temporary")
    parser.add_argument("--kinds", type=names_of(KINDS), help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--systems", type=names_of(SYSTEMS), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--limit_seconds", type=at_least(1), default=120, help="for one measurement")
    parser.add_argument("--quick", action="store_true", help="200,000 rows, few measurements: whether it works")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.rows = flags.rows or (200_000 if flags.quick else 10_000_000)
    flags.kinds = flags.kinds or (["parquet-100k", "jsonl"] if flags.quick else list(KINDS))
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl: a table of the same name ends in .md")
    return flags


def main() -> None:
    if sys.argv[1:2] == ["run"]:  # a child of `run_all`
        print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    flags = parse_flags(sys.argv[1:])
    shown = list(sys.argv)
    if flags.folder:  # where it is is nobody's business
        shown = [argument.replace(str(flags.folder), "FOLDER") for argument in shown]
        flags.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(flags.folder) if flags.folder else tempfile.TemporaryDirectory() as folder:
        session = Session(flags, Path(folder).resolve(), shlex.join(["python", *shown]))
        measure_all(session)
    print(table(session.records))


if __name__ == "__main__":
    main()
