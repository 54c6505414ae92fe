"""Check that packing changes neither the tokens nor the losses of training, and measure the speed-up.

    python benchmarks/packing.py --train_file=rows.parquet --output=benchmarks/results/packing.jsonl

Exits with code 1 if a check fails. Appends JSON lines to --output, and writes tables to the .md file of the same name.
See README.md.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from corpus import fast_tokenizer
from data import VERSIONS, markdown
from records import Record, append
from systems import machine
from torch import nn
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from lowmem import (
    Batch,
    Stream,
    TrainState,
    check_packing,
    chunked_loss,
    collate,
    init_distributed,
    load_model,
    make_encoder,
    make_optimizer,
    open_rows,
    open_stream,
    parallelize,
    plain_loss,
    train_step,
)

Row = dict[str, object]
Count = tuple[int, int]
"""The number of tokens, and of targets."""

SEED = 0
IGNORED = -100
MAX_SEQ_LEN = 512
ROWS_PER_STEP = 96  # in `check_counts`; the number of rows is a multiple of this, so an epoch ends with a full step
BATCH_SIZES = (4, 16, 32)
TOLERANCE = 1e-5
VOCAB_SIZE = 8192
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)

_SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_SEQ_LEN}
MODELS = {name: _SHAPE | {"model_type": name, "tie_word_embeddings": False} for name in ("llama", "qwen2")}
MODELS["t5"] = {"model_type": "t5", "vocab_size": VOCAB_SIZE, "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 688}
MODELS["t5"] |= {"num_layers": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}


class ChatRows:
    """Rows that have a text and a chat in addition to a prompt and a response."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        turns = zip(("user", "assistant"), (row["prompt"], row["response"]), strict=True)
        messages = [{"role": role, "content": content} for role, content in turns]
        return {**row, "text": row["prompt"] + row["response"], "messages": messages}


# --- reference counts: the expected tokens and targets of a row
def count_seq2seq(row: Row, tokenizer: PreTrainedTokenizerBase) -> Count:
    prompt, response = (min(MAX_SEQ_LEN, len(tokenizer(row[name]).input_ids)) for name in ("prompt", "response"))
    return prompt + response, response


def count_causal(row: Row, tokenizer: PreTrainedTokenizerBase) -> Count:
    prompt = len(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
    response = len(tokenizer(row["response"], add_special_tokens=False).input_ids) + 1  # + 1: the end token
    kept = min(response, max(MAX_SEQ_LEN - prompt, MAX_SEQ_LEN // 2))
    return min(MAX_SEQ_LEN, prompt + response), kept


def count_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Count:
    tokens = min(MAX_SEQ_LEN, len(tokenizer(row["text"], add_special_tokens=False).input_ids) + 1)
    return tokens, tokens - 1


def count_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> Count:
    """Count the targets in transformers' mask of assistant tokens. The slow ByT5 has no mask: count answer bytes."""
    if tokenizer.is_fast:
        encoded = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = encoded["assistant_masks"]
    else:  # for ByT5, each byte is a token; this includes the bytes of <|im_end|>, which is not in its vocabulary
        num_targets = len((row["response"] + "<|im_end|>").encode())
        num_tokens = len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"])
        mask = [0] * (num_tokens - num_targets - 1) + [1] * num_targets + [0]
    return min(MAX_SEQ_LEN, len(mask)), sum(mask[:MAX_SEQ_LEN])


TASKS: dict[str, tuple[dict[str, object], Callable[[Row, PreTrainedTokenizerBase], Count]]] = {
    "seq2seq": ({"is_encoder_decoder": True}, count_seq2seq),
    "causal": ({"is_encoder_decoder": False}, count_causal),
    "text": ({"is_encoder_decoder": False, "text_column": "text"}, count_text),
    "chat": ({"is_encoder_decoder": False, "messages_column": "messages"}, count_chat),
}
"""For each task: the arguments of `make_encoder`, and the function that gives a row's reference counts."""


class Counter:
    """A `collate` that counts the tokens and targets of its rows, and the elements of the padded tensors."""

    def __init__(self, *, causal: bool):
        self._collate = partial(collate, causal=causal)
        self._sequences = ["input_ids"] if causal else ["input_ids", "labels"]
        self.tokens = self.targets = self.elements = 0

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> Batch:
        batch = self._collate(rows)
        self.targets += batch.num_targets
        self.elements += sum(batch.inputs[name].numel() for name in self._sequences)
        self.tokens += sum(len(row[name]) for row in rows for name in self._sequences)
        return batch


def open_counted(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, task: str = "causal", *, packed: bool, **settings: object
) -> tuple[Stream, Counter]:
    """Open a stream of `task` without prefetching; also return the counter of what the stream yields."""
    arguments, _ = TASKS[task]
    encode = make_encoder(tokenizer, max_seq_len=MAX_SEQ_LEN, **arguments)
    counter = Counter(causal=not arguments["is_encoder_decoder"])
    length = MAX_SEQ_LEN if packed else None
    settings |= {"seed": SEED, "collate": counter, "packed_seq_len": length, "prefetch": 0}
    settings["is_encoder_decoder"] = arguments["is_encoder_decoder"]
    return open_stream(rows, encode, **settings), counter


# --- checks
def count_epoch(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, task: str, **settings: object) -> Record:
    """Count what the streams of all ranks together yield in one epoch, and check that each row occurs once."""
    tokens = targets = elements = 0
    row_ids = []
    for rank in range(settings["world_size"]):
        accumulation = ROWS_PER_STEP // settings["world_size"] // 16
        batching = {"batch_size": 16, "gradient_accumulation_steps": accumulation}
        stream, counter = open_counted(rows, tokenizer, task, rank=rank, **batching, **settings)
        for batches in islice(stream, len(rows) // ROWS_PER_STEP):
            row_ids += [row_id for batch in batches for row_id in batch.row_ids]
        tokens, targets = tokens + counter.tokens, targets + counter.targets
        elements += counter.elements
    whole = sorted(row_ids) == list(range(len(rows)))
    return {"tokens": tokens, "targets": targets, "padding": 1 - tokens / elements, "each_row_once": whole}


def check_counts(rows: Sequence[Row], tokenizers: dict[str, PreTrainedTokenizerBase]) -> Iterator[Record]:
    """Compare an epoch's counts with the reference. Yields a record per tokenizer, task, packing and world size."""
    for name, tokenizer in tokenizers.items():
        for task, (_, count) in TASKS.items():
            counts = [count(rows[number], tokenizer) for number in range(len(rows))]
            expected = {"expected_tokens": sum(c[0] for c in counts), "expected_targets": sum(c[1] for c in counts)}
            for packed in (False, True):
                for world_size in (1, 2):
                    found = count_epoch(rows, tokenizer, task, packed=packed, world_size=world_size)
                    same = (found["tokens"], found["targets"]) == tuple(expected.values())
                    settings = {"task": task, "tokenizer": name, "packed": packed, "world_size": world_size}
                    yield {"what": "count", **settings, **expected, **found, "ok": same and found["each_row_once"]}


def check_losses(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, *, num_steps: int
) -> Iterator[Record]:
    """Train on packed batches; compare each step's loss with that of unpacked batches. Yields a record per model."""
    for name, shape in MODELS.items():
        state = new_state(shape, accelerator)
        check_packing(state.model)
        batching = {"batch_size": 16, "gradient_accumulation_steps": 2}
        task = "seq2seq" if shape["model_type"] == "t5" else "causal"
        streams = [open_counted(rows, tokenizer, task, packed=packed, **batching)[0] for packed in (False, True)]
        losses = []
        for unpacked, packed in islice(zip(*streams, strict=True), num_steps):
            with torch.no_grad():
                loss = sum(plain_loss(state.model, batch) for batch in unpacked) / sum(b.num_targets for b in unpacked)
            result = train_step(state, packed, plain_loss, accelerator, learning_rate=1e-3)
            losses.append((loss.item(), result.loss.item()))
        difference = max(abs(a - b) / a for a, b in losses)
        found = {"steps": num_steps, "first_loss": losses[0][1], "last_loss": losses[-1][1], "difference": difference}
        yield {"what": "loss", "model": name, **found, "ok": difference <= TOLERANCE}


def new_state(shape: Mapping[str, object], accelerator: Accelerator) -> TrainState:
    """Return the state of a new model and its AdamW optimizer. Every call draws the same random weights."""
    torch.manual_seed(SEED)
    model: nn.Module = load_model(model_config=shape)[0]
    model = parallelize(model, accelerator)
    return TrainState(model, make_optimizer(model))


# --- speed
def time_rounds(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    rounds: int,
    rows_per_round: int,
) -> Iterator[Record]:
    """Time training on the same rows, packed and unpacked, in interleaved rounds.

    Yields a record for each batch size, with and without packing. The first round and the encoding are not timed.
    """
    for batch_size in BATCH_SIZES:
        both = {}
        for packed in (False, True):
            batching = {"batch_size": batch_size, "gradient_accumulation_steps": 4}
            both[packed] = (
                *open_counted(rows, tokenizer, packed=packed, **batching),
                new_state(MODELS["llama"], accelerator),
            )
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds + 1):
            for packed, (stream, counter, state) in both.items():
                before = counter.tokens
                steps = list(islice(stream, rows_per_round // stream.global_batch_size))
                started = time.perf_counter()
                for batches in steps:
                    train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-3, max_grad_norm=1.0)
                speeds[packed].append((counter.tokens - before) / (time.perf_counter() - started))
        ratios = [fast / slow for fast, slow in zip(speeds[True][1:], speeds[False][1:], strict=True)]
        for packed, (_, counter, _) in both.items():
            padding = 1 - counter.tokens / counter.elements
            found = {"padding": padding, "tokens_per_second": median(speeds[packed][1:]), "turns": rounds}
            found |= {"ratio": median(ratios) if packed else 1.0}
            yield {"what": "speed", "batch_size": batch_size, "packed": packed, **found}


# --- the report
def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"## {first['rows']:,} rows of at most {MAX_SEQ_LEN} tokens", "", f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}, {first['threads']} threads; {versions}.", ""]
    of = {what: [record for record in records if record["what"] == what] for what in ("count", "loss", "speed")}
    yes = {True: "yes", False: "no"}
    counts = [
        [
            *(record["task"], record["tokenizer"], yes[record["packed"]], str(record["world_size"])),
            *(f"{record[name]:,}" for name in ("tokens", "expected_tokens", "targets", "expected_targets")),
            *(yes[record["each_row_once"]], f"{record['padding']:.1%}", yes[record["ok"]]),
        ]
        for record in of["count"]
    ]
    head = ["task:", "tokenizer:", "packed:", "ranks", "tokens", "expected", "targets", "expected"]
    lines += markdown("An epoch of the stream", [*head, "each row once:", "padding", "equal:"], counts)
    losses = [
        [
            *(record["model"], str(record["steps"]), f"{record['first_loss']:.6f}", f"{record['last_loss']:.6f}"),
            *(f"{record['difference']:.1e}", yes[record["ok"]]),
        ]
        for record in of["loss"]
    ]
    head = ["model:", "steps", "first loss", "last loss", "largest relative difference", f"within {TOLERANCE:.0e}:"]
    lines += markdown("Losses of the same optimizer steps, packed and not, in fp32", head, losses)
    speeds = [
        [
            *(str(record["batch_size"]), yes[record["packed"]], f"{record['padding']:.1%}"),
            *(f"{record['tokens_per_second']:,.0f}", f"{record['ratio']:.2f}"),
        ]
        for record in of["speed"]
    ]
    head = ["batch size", "packed:", "padding", "tokens/s", "x unpacked"]
    lines += markdown("Training", head, speeds)
    return "\n".join(lines)


# --- the command
def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", required=True, help="rows with a prompt and a response: parquet or JSONL")
    parser.add_argument("--threads", type=int, choices=range(1, 257), metavar="N", default=1)
    parser.add_argument("--quick", action="store_true", help="smoke test: few rows, steps and rounds")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    if not Path(flags.train_file).is_file():
        parser.error(f"--train_file={flags.train_file} is not a file: name a parquet or JSONL file")
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the table goes to a .md file of the same name")
    flags.rows = open_rows(flags.train_file, columns=["prompt", "response"])
    if len(flags.rows) < 2 * ROWS_PER_STEP:
        parser.error(f"--train_file={flags.train_file} has {len(flags.rows)} rows: at least {2 * ROWS_PER_STEP} needed")
    return flags


def records_of(flags: argparse.Namespace) -> Iterator[Record]:
    """Run all checks and timings; print and yield each record."""
    num_rows = 2 * ROWS_PER_STEP if flags.quick else len(flags.rows) // ROWS_PER_STEP * ROWS_PER_STEP
    rows = ChatRows(flags.rows.slice(0, num_rows))
    tokenizer = fast_tokenizer([rows[number]["text"] for number in range(num_rows)], VOCAB_SIZE)
    tokenizers = {"bpe": tokenizer, "byt5": ByT5Tokenizer()}
    for each in tokenizers.values():
        each.chat_template = CHATML
    accelerator = init_distributed()
    about = {"rows": num_rows, "threads": flags.threads}
    for records in (
        check_counts(rows, tokenizers),
        check_losses(rows, tokenizer, accelerator, num_steps=3 if flags.quick else 20),
        time_rounds(rows, tokenizer, accelerator, rounds=1 if flags.quick else 5, rows_per_round=128),
    ):
        for record in records:
            print(", ".join(f"{value:.4g}" if type(value) is float else str(value) for value in record.values()))
            yield record | about


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    torch.set_num_threads(flags.threads)
    shown = [argument.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for argument in sys.argv]
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    shared |= {"machine": machine(), "versions": {name: version(name) for name in VERSIONS}}
    shared |= {"rows_hash": blake2b(Path(flags.train_file).read_bytes(), digest_size=8).hexdigest()}
    records = [record | shared for record in records_of(flags)]
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "packing.py")
    sys.exit(not all(record.get("ok", True) for record in records))


if __name__ == "__main__":
    main()
