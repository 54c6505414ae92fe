"""Predict the peak memory of training models of any size without a GPU, or compare predictions with measurements.

    python benchmarks/memory.py --output=benchmarks/results/memory.jsonl
    python benchmarks/memory.py --savers --models=t5-base
    python benchmarks/memory.py --measure --models=t5-small,llama-56m

Appends a JSON line per run to --output, and writes a table to the .md file of the same name. See README.md.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from compare import LLAMA_56M, QWEN_500M
from footprint import Model, System, Work, run
from records import MIB, Record, append

from lowmem.config.presets import MODEL_SHAPES

GIB = 2**30
# Dropout is 0, because its masks add the same bytes to every system.
_T5 = {name: shape | {"dropout_rate": 0.0} for name, shape in MODEL_SHAPES.items()}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
_LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {
    "t5-base": Model(_T5["t5-base"], batch_size=16, seq_len=512),
    "qwen2.5-0.5b": Model(QWEN_500M, batch_size=8, seq_len=2048),
    "llama-3.1-8b": Model(_LLAMA | {"max_position_embeddings": 131072}, batch_size=1, seq_len=4096),
    "t5-small": Model(_T5["t5-small"], batch_size=4, seq_len=128),
    "llama-56m": Model(LLAMA_56M, batch_size=4, seq_len=256),
}

BASELINE = System("trainer", savers=("recompute",))
SYSTEMS = [
    System("trainer"),
    BASELINE,
    System("lowmem", "off", savers=("recompute",)),
    System("lowmem", "exact", savers=("recompute",)),
    System("lowmem", "exact", savers=("recompute", "offload_activations")),
    System("lowmem", "exact", "adamw_bf16", savers=("recompute",)),
    System("lowmem", "lean", savers=("recompute",)),
    System("lowmem", "lean", savers=("recompute", "offload_activations")),
    System("lowmem", "lean", "adafactor", savers=("recompute",)),
]
SAVERS = [BASELINE] + [
    System("lowmem", memory, savers=recompute + offload)
    for memory in ("off", "exact", "lean")
    for recompute in ((), ("recompute_cheap",), ("recompute",))
    for offload in ((), ("offload_activations",))
]

WORKS = {
    "released": Work(micro_batches=1, max_grad_norm=0.0, savers=("release",)),
    "accumulated": Work(micro_batches=2, max_grad_norm=1.0, savers=()),
}


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    default = "t5-base,qwen2.5-0.5b,llama-3.1-8b"
    parser.add_argument("--models", default=default, help=f"comma list of {', '.join(MODELS)}")
    parser.add_argument("--savers", action="store_true", help="each tier with each kind of recomputation and offload")
    parser.add_argument("--measure", action="store_true", help="also train on real tensors, on the GPU if there is one")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.models = flags.models.split(",")
    if unknown := [name for name in flags.models if name not in MODELS]:
        parser.error(f"--models has unknown names {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the table goes to a .md file of the same name")
    return flags


def in_a_new_process(function: Callable[..., Record], *arguments: object) -> Record:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def records_of(flags: argparse.Namespace, command: str) -> Iterator[Record]:
    """Yield one record per run. Torch is imported only in children, because a child's peak includes its parent's."""
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command}
    for name, system, work in product(flags.models, SAVERS if flags.savers else SYSTEMS, WORKS):
        spec = MODELS[name]
        shape = {"model": name, "batch": spec.batch_size, "seq_len": spec.seq_len}
        for kind in ("predicted", "measured") if flags.measure else ("predicted",):
            record = in_a_new_process(run, spec, system, WORKS[work], kind == "measured", flags.measure)
            print(f"{kind}: {name}, {system.name}, {work}: {record['peak_bytes'] / GIB:.3f} GiB", file=sys.stderr)
            yield {"kind": kind, "system": system.name, **shape, "work": work, **shared, **record}


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    rows = table_of_measured if any(record["kind"] == "measured" for record in records) else table_of_predicted
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    title = rows.__doc__.splitlines()[0].rstrip(".")
    return "\n".join(
        [f"## {title}", "", f"    {first['command']}", "", f"{first['date']}; {versions}.", "", *rows(records), ""]
    )


def peaks_of(records: list[Record]) -> dict[tuple[str, str, str], int]:
    """Return the peak bytes of each (system, model, work), from its last record."""
    return {(record["system"], record["model"], record["work"]): record["peak_bytes"] for record in records}


def table_of_predicted(records: list[Record]) -> Iterator[str]:
    """Predicted peaks on a GPU in GiB, and in parentheses their ratio to Trainer's with checkpointing.

    One row per system, one column for each model with each `Work` (settings of a step).
    """
    peaks = peaks_of(records)
    systems, models, works = (list(dict.fromkeys(names)) for names in zip(*peaks, strict=True))
    columns = list(product(models, works))

    def cell(system: str, *column: str) -> str:
        return f"{peaks[system, *column] / GIB:.2f} ({peaks[system, *column] / peaks[BASELINE.name, *column]:.2f})"

    yield "| | " + " | ".join(f"{model}, {work}" for model, work in columns) + " |"
    yield "|---" + "|---:" * len(columns) + "|"
    for system in systems:
        yield f"| {system} | " + " | ".join(cell(system, *column) for column in columns) + " |"


def table_of_measured(records: list[Record]) -> Iterator[str]:
    """Predicted and measured peaks, MiB.

    One row per run: the predicted bytes, the bytes counted on real tensors, and those that the allocator or the kernel
    reports. Resident memory excludes programs and libraries loaded before training, but includes tensors.
    """
    measured = [name for name in ("allocated_bytes", "reserved_bytes", "resident_bytes") if name in records[-1]]
    names = ("predicted", "counted", *(name.removesuffix("_bytes").replace("_", " ") for name in measured))
    yield "| model | system | work | " + " | ".join(names) + f" | predicted / {names[2]} |"
    yield "|---|---|---" + "|---:" * (len(names) + 1) + "|"
    for predicted, real in zip(records[::2], records[1::2], strict=True):
        peaks = [predicted["peak_bytes"], real["peak_bytes"], *(real[name] for name in measured)]
        cells = [*(f"{peak / MIB:,.1f}" for peak in peaks), f"{peaks[0] / peaks[2]:.3f}"]
        yield "| " + " | ".join([real["model"], real["system"], real["work"], *cells]) + " |"


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    records = list(records_of(flags, command=shlex.join(["python", *sys.argv])))
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "memory.py")


if __name__ == "__main__":
    main()
