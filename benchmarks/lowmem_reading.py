"""Measure how lowmem reads rows: when it first opens a file, from the start, after a resume, and during training.

`data.py` runs each measurement in its own process.
"""

import json
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from corpus import SEED, number_of
from metrics import BATCH_SIZE, EPOCH_FRACTIONS, Watch, disk_bytes, drawn, import_all
from records import Record


def make_encode(encoder: str, folder: str) -> Callable:
    """Return an encoder. `number` encodes a row as one token, the row number; `bpe` and `byt5` use real tokenizers."""
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


def lowmem_once(file: str, cache: str) -> Record:
    """Time the index or copy of a file, which lowmem builds when it first opens the file."""
    from lowmem import open_rows

    import_all()
    shutil.rmtree(cache, ignore_errors=True)
    watch = Watch()
    open_rows(file, columns=["prompt", "response"])
    return {"seconds": watch.seconds(), **watch.bytes(), "disk_bytes": disk_bytes(cache)}


def lowmem_draw(
    file: str, folder: str, encoder: str, num_drawn: int, num_later: int, rank: int = 0, world_size: int = 1
) -> Record:
    """Draw `num_drawn` rows from the start, then `num_later` rows at each of EPOCH_FRACTIONS."""
    import_all()
    encode = make_encode(encoder, folder)
    watch = Watch()
    rows, stream = open_lowmem(file, encode, rank, world_size)
    state, tokens = stream.state_dict(), 0

    def draw(position: int, count: int) -> float:
        nonlocal tokens
        stream.load_state_dict(state | {"position": position, "next_rows": None})
        tokens, started = 0, time.perf_counter()
        for step, (batch,) in zip(range(count // stream.global_batch_size + 1), stream, strict=False):
            mask = batch.inputs.get("attention_mask")
            tokens += batch.num_targets + (batch.inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            if encoder == "number" and sorted(batch.row_ids) != sorted(batch.inputs["input_ids"].flatten().tolist()):
                raise ValueError(f"{file}: requested rows {batch.row_ids}, but read others")
            if step % 50 == 0:
                watch.look()
            stream.advance()
        return time.perf_counter() - started

    draw(0, 0)
    start = watch.seconds()
    seconds = draw(0, num_drawn)
    record = {"start_seconds": start, "rows_per_second": num_drawn / world_size / seconds}
    record |= {"tokens_per_second": tokens / seconds} if encoder != "number" else {}
    for fraction in EPOCH_FRACTIONS:
        draw(int(len(rows) * fraction), num_later)
    if world_size == 1:
        Path(folder, "state.json").write_text(json.dumps(state))  # for `lowmem_resume`
    return {**record, **watch.bytes()}


def lowmem_rows(file: str, num_drawn: int) -> Record:
    """Draw rows in the order of a stream. They are not encoded, because the other systems encode nothing either."""
    from lowmem import open_rows
    from lowmem.data.order import rows_at

    import_all()
    watch = Watch()
    rows = open_rows(file, columns=["prompt", "response"])
    starts = range(0, len(rows), BATCH_SIZE)
    orders = (rows_at(start, start + BATCH_SIZE, rows.groups, seed=SEED).tolist() for start in starts)
    return drawn(watch, (rows[number] for order in orders for number in order), num_drawn)


def lowmem_resume(file: str, folder: str, fraction: float) -> Record:
    """Time a resume at `fraction` epochs up to its first batch; compare the batch with an uninterrupted run's."""
    import_all()
    from lowmem.data.order import rows_at

    state = json.loads(Path(folder, "state.json").read_text())
    position = int(state["num_rows"] * fraction)
    watch = Watch()
    rows, stream = open_lowmem(file, make_encode("number", folder))
    stream.load_state_dict(state | {"position": position, "next_rows": None})
    (batch,) = next(iter(stream))
    seconds = watch.seconds()
    expected = sorted(rows_at(position, position + BATCH_SIZE, rows.groups, seed=SEED).tolist())
    read = sorted(batch.inputs["input_ids"].flatten().tolist())
    return {"seconds": seconds, "same_rows": sorted(batch.row_ids) == expected == read}


def lowmem_wait(file: str, prefetch: int, num_steps: int) -> Record:
    """Train a small T5 on byte tokens; return the share of training time spent waiting for rows."""
    import_all()
    import torch

    from lowmem import (
        TrainState,
        init_distributed,
        load_model,
        make_encoder,
        make_optimizer,
        parallelize,
        plain_loss,
        train_step,
    )

    accelerator = init_distributed()
    torch.manual_seed(SEED)
    model, tokenizer = load_model(model_config="t5-tiny")
    model = parallelize(model, accelerator)
    encode = make_encoder(tokenizer, is_encoder_decoder=True, max_seq_len=128)
    _, stream = open_lowmem(file, encode, prefetch=prefetch)
    state = TrainState(model, make_optimizer(model), stream)
    for step, batches in enumerate(islice(stream, num_steps)):
        if step == 2:  # the first two steps also read the first row groups
            started, waited = time.perf_counter(), stream.wait_seconds
        train_step(state, batches, plain_loss, accelerator, learning_rate=1e-4)
    seconds = time.perf_counter() - started
    return {"share": (stream.wait_seconds - waited) / seconds, "seconds_per_step": seconds / (num_steps - 2)}
