"""Measure what packing prompts and responses gains: T5 with and without packing, and Trainer that groups by length.

    python benchmarks/pair_packing.py --train_file=rows.parquet --output=benchmarks/results/pair_packing.jsonl

Each run is a new process, and the runs are interleaved. Appends JSON lines to --output, and writes tables to the .md
file of the same name. See README.md.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from data import markdown
from launching import run_to_end
from records import MIB, Record, append
from systems import OPTIMIZER, SCHEDULE, SEED, machine, peak_resident_bytes, resident_bytes

MAX_SEQ_LEN = 512
VOCAB_SIZE = 8192
SYSTEMS = {
    "exact packed": {"memory": "exact", "packed": True},
    "exact": {"memory": "exact", "packed": False},
    "lean packed": {"memory": "lean", "packed": True},
    "lean": {"memory": "lean", "packed": False},
    "Trainer by length": {},
}
"""The systems. Trainer keeps fp32 weights under bf16 autocast, and computes attention as lowmem does, which is faster
here than its default."""
LIMIT_SECONDS = 3600


class Counts:
    """Counts what a system trains on, and takes the time of its steps."""

    def __init__(self):
        self.targets = self.tokens = self.elements = 0
        self.marks: list[tuple[float, float, int]] = []
        """Wall and CPU seconds and targets at the end of each step."""

    def add(self, inputs) -> None:
        ids, labels = inputs["input_ids"], inputs["labels"]
        self.targets += int((labels != -100).sum())
        self.elements += ids.numel() + labels.numel()

    def mark(self, *_, **__) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), self.targets))


def encoded(train_file: str) -> list[Record]:
    """Encode the rows with a byte-pair tokenizer that is trained on them."""
    from corpus import fast_tokenizer

    from lowmem import encode_seq2seq, open_rows

    rows = open_rows(train_file, columns=["prompt", "response"])
    rows = [rows[index] for index in range(len(rows))]
    encode = encode_seq2seq(
        fast_tokenizer([x["prompt"] + x["response"] for x in rows], VOCAB_SIZE), max_seq_len=MAX_SEQ_LEN
    )
    return [dict(encode(row)) for row in rows]


def train_lowmem(settings: SimpleNamespace, rows: list[Record], counts: Counts) -> None:
    from lowmem import (
        TrainState,
        chunked_loss,
        collate,
        init_distributed,
        load_model,
        make_optimizer,
        open_stream,
        parallelize,
        train_step,
    )
    from lowmem.memory.savers import entered, recompute

    accelerator, (model, _) = init_distributed(), load_model(model_config=settings.model)
    model = parallelize(model, accelerator)
    optimizer = make_optimizer(model, memory=settings.memory, **OPTIMIZER)
    batching = {"batch_size": settings.batch_size, "gradient_accumulation_steps": settings.accumulation, "seed": SEED}
    packing = {"packed_seq_len": MAX_SEQ_LEN if settings.packed else None, "is_encoder_decoder": True}
    pad = partial(collate, max_seq_len=MAX_SEQ_LEN)
    stream = open_stream(rows, lambda row: row, collate=pad, prefetch=0, **batching, **packing)
    state = TrainState(model, optimizer, stream, seed=SEED)
    with entered([recompute], model, optimizer):
        for batches in islice(stream, settings.steps):
            for batch in batches:
                counts.add(batch.inputs)
                counts.tokens += sum(len(rows[i]["input_ids"]) + len(rows[i]["labels"]) for i in batch.row_ids)
            train_step(state, batches, chunked_loss, accelerator, learning_rate=SCHEDULE["peak"], max_grad_norm=1.0)
            counts.mark()


def train_trainer(settings: SimpleNamespace, rows: list[Record], counts: Counts) -> None:
    from datasets import Dataset
    from loops.around import checkpointing_arguments
    from loops.trainer import SameObjective
    from transformers import TrainerCallback, TrainingArguments

    from lowmem import collate, load_model

    class Counted(SameObjective):
        def compute_loss(self, model, inputs, **options):
            counts.add(inputs)
            counts.tokens += int((inputs["labels"] != -100).sum())
            counts.tokens += int(inputs.get("attention_mask", inputs["input_ids"] >= 0).sum())
            return super().compute_loss(model, inputs, **options)

    class Marks(TrainerCallback):
        on_step_end = counts.mark

    model, _ = load_model(model_config=settings.model)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy="group_by_length",
        optim="adamw_torch_fused",
        weight_decay=OPTIMIZER["weight_decay"],
        learning_rate=SCHEDULE["peak"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=True,
        **checkpointing_arguments(True),
    )
    lengths = [{**row, "length": len(row["input_ids"]) + len(row["labels"])} for row in rows]
    pad = partial(collate, max_seq_len=MAX_SEQ_LEN)
    options = {"train_dataset": Dataset.from_list(lengths), "data_collator": lambda rows: pad(rows).inputs}
    Counted(model=model, args=arguments, callbacks=[Marks()], **options).train()


def child(settings: SimpleNamespace) -> None:
    """Train one system, and write its record."""
    import torch
    import transformers  # noqa: F401 (imports do not count as memory of training)

    torch.set_num_threads(settings.threads)
    torch.manual_seed(SEED)
    rows = json.loads(Path(settings.rows).read_text())
    imported, counts = resident_bytes(), Counts()
    counts.mark()
    (train_lowmem if hasattr(settings, "memory") else train_trainer)(settings, rows, counts)
    (wall, cpu, targets), *_, (last_wall, last_cpu, last_targets) = counts.marks[settings.warm_up :]
    record = {"targets_per_second": (last_targets - targets) / (last_wall - wall)}
    record |= {"targets_per_cpu_second": (last_targets - targets) / (last_cpu - cpu)}
    record |= {"padding": 1 - counts.tokens / counts.elements, "peak_bytes": peak_resident_bytes() - imported}
    Path(settings.record).write_text(json.dumps(record))


SPLITS = {
    "packed": None,
    "in the order of the step": lambda row: 0,
    "sorted by prompt + response, as without packing": lambda row: -len(row["input_ids"]) - len(row["labels"]),
    "sorted by response": lambda row: -len(row["labels"]),
    "sorted by the longer of the two": lambda row: -max(len(row["input_ids"]), len(row["labels"])),
}
"""Ways to split the rows of a step into micro-batches."""


def paddings(rows: list[Record]) -> Iterator[Record]:
    """Yield the share of padding in an epoch, by the shape of a step and the way to split its rows."""
    from lowmem import collate
    from lowmem.data.pair_packing import pack_pairs

    order = random.Random(SEED).sample(range(len(rows)), len(rows))
    for batch_size, accumulation in ((2, 16), (4, 4), (8, 4), (16, 4), (16, 16), (32, 4)):
        size = batch_size * accumulation
        for split, key in SPLITS.items():
            tokens = elements = 0
            for first in range(0, len(rows) - size + 1, size):
                step = [(index, rows[index]) for index in order[first : first + size]]
                tokens += sum(len(row["input_ids"]) + len(row["labels"]) for _, row in step)
                if key:
                    chosen = sorted((row for _, row in step), key=key)
                    parts = [chosen[start : start + batch_size] for start in range(0, size, batch_size)]
                else:
                    parts = pack_pairs(step, max_seq_len=MAX_SEQ_LEN, micro_batches=accumulation)
                inputs = [collate(part, max_seq_len=MAX_SEQ_LEN).inputs for part in parts]
                elements += sum(x["input_ids"].numel() + x["labels"].numel() for x in inputs)
            about = {"batch_size": batch_size, "accumulation": accumulation, "split": split}
            yield {"what": "padding", **about, "padding": 1 - tokens / elements}


def measure(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield one record per run."""
    about = {"model": flags.model, "batch_size": flags.batch_size, "accumulation": flags.accumulation}
    about |= {"steps": flags.steps, "threads": flags.threads, "warm_up": 1}
    with tempfile.TemporaryDirectory() as folder:
        rows, record = Path(folder, "rows.json"), Path(folder, "record.json")
        rows.write_text(json.dumps(encoded(flags.train_file)))
        for repeat in range(flags.repeats):
            for system in flags.systems.split(","):
                settings = about | SYSTEMS[system] | {"rows": str(rows), "record": str(record)}
                settings["steps"] += 1  # the first is not timed
                environment = os.environ | {"OMP_NUM_THREADS": str(flags.threads)}
                run_to_end(
                    [sys.executable, __file__, "--child", json.dumps(settings)], seconds=LIMIT_SECONDS, env=environment
                )
                found = {"what": "speed", "system": system, "repeat": repeat, **about, **json.loads(record.read_text())}
                print(found, file=sys.stderr, flush=True)
                yield found


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command: medians over its runs."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    if first["what"] == "padding":
        found = {(x["split"], x["batch_size"], x["accumulation"]): f"{x['padding']:.1%}" for x in records}
        shapes = list(dict.fromkeys(key[1:] for key in found))
        cells = [[split, *(found.get((split, *shape), "-") for shape in shapes)] for split in SPLITS]
        lines = [
            f"## Padding, at most {MAX_SEQ_LEN} tokens",
            "",
            f"    {first['command']}",
            "",
            f"{first['date']}.",
            "",
        ]
        head = ["rows of a step:", *(f"{rows} rows x {steps}" for rows, steps in shapes)]
        return "\n".join([*lines, *markdown("An epoch, by micro-batch and accumulation", head, cells)])
    shape = f"{first['model']}, micro-batches of {first['batch_size']} rows x accumulation {first['accumulation']}"
    lines = [f"## {shape}, bf16, recompute full, at most {MAX_SEQ_LEN} tokens", "", f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}, {first['threads']} threads; {versions}.", ""]
    of: dict[str, list[Record]] = {}
    for record in records:
        of.setdefault(record["system"], []).append(record)
    rows = []
    for system, runs in of.items():
        names = ("targets_per_cpu_second", "targets_per_second", "padding", "peak_bytes")
        middle = {name: median(run[name] for run in runs) for name in names}
        ratios = []
        for base in (system.removesuffix(" packed"), "Trainer by length"):
            pairs = zip(runs, of.get(base, []), strict=False)
            found = [mine["targets_per_cpu_second"] / other["targets_per_cpu_second"] for mine, other in pairs]
            ratios.append(f"{median(found):.2f}" if found and base != system else "-")
        rows.append(
            [
                *(system, str(len(runs)), f"{middle['targets_per_cpu_second']:,.0f}", *ratios),
                *(f"{middle['targets_per_second']:,.0f}", f"{middle['padding']:.1%}"),
                f"{middle['peak_bytes'] / MIB:,.0f}",
            ]
        )
    head = ["system:", "runs", "targets per CPU second", "x unpacked", "x Trainer", "targets per second", "padding"]
    head.append("RSS, MiB")
    title = f"Medians; of {first['steps'] + 1} steps, the first is not timed; RSS is above imports"
    return "\n".join([*lines, *markdown(title, head, rows)])


def main() -> None:
    if sys.argv[1] == "--child":
        child(SimpleNamespace(**json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", required=True, help="rows with a prompt and a response: parquet or JSONL")
    parser.add_argument("--model", choices=["t5-small", "t5-base"], default="t5-small")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds: A B C A B C ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma list")
    parser.add_argument("--padding", action="store_true", help="train nothing; only count padding")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args()
    shown = [argument for argument in sys.argv if not argument.startswith("--output")]
    shown = [argument.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for argument in shown]
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    shared |= {"machine": machine(), "versions": {name: version(name) for name in ("torch", "transformers")}}
    records = []
    for record in paddings(encoded(flags.train_file)) if flags.padding else measure(flags):
        records.append(record | shared)
        if flags.output:
            append(flags.output, records[-1:], table, "pair_packing.py")
    print(table(records))


if __name__ == "__main__":
    main()
