"""Measure start, memory, speed, resume and shuffling of lowmem and other libraries that read ten million rows.

    python benchmarks/data.py --folder=/tmp/rows --output=benchmarks/results/data.jsonl
    python benchmarks/data.py --quick

Appends a JSON line per measurement to --output, and writes tables to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

import numpy as np
from baseline_reading import (
    on_disk_draw,
    on_disk_once,
    on_disk_resume,
    streaming_draw,
    streaming_pass,
    streaming_resume,
    whole_draw,
)
from corpus import KINDS, generate, train_tokenizer
from lowmem_reading import lowmem_draw, lowmem_once, lowmem_resume, lowmem_rows, lowmem_wait
from metrics import BATCH_SIZE, EPOCH_FRACTIONS, quality
from records import MIB, Record, append
from systems import machine

VERSIONS = ("torch", "transformers", "tokenizers", "pyarrow", "datasets")


# --- processes
def run_all(calls: list[tuple[Callable, dict[str, object]]], folder: Path, limit: float | None) -> list[Record] | None:
    """Call all functions in parallel, each in its own process; return their records, or None after `limit` seconds.

    A child process looks up its function by name in this file. The functions write their caches to `folder`.
    Raises RuntimeError if a function fails.
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
        raise RuntimeError(f"{failed} failed with the error printed above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


class Session:
    """The records of one command, and the folder of its files."""

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
        """Run, print and record one measurement. With several ranks, each value is the worst of all ranks."""
        arguments = {"file": str(self.file(kind, num_rows)), **arguments}
        ranks = [{"rank": rank, "world_size": processes} for rank in range(processes)] if processes > 1 else [{}]
        found = self.run([(function, arguments | rank) for rank in ranks], self.flags.limit_seconds)
        names = {"encoder": "encoder", "fraction": "place", "prefetch": "prefetch"}
        shown = {names[name]: value for name, value in arguments.items() if name in names}
        record = {"what": what, "system": system, "kind": kind, "rows": num_rows, "processes": processes, **shown}
        if found is None:
            record["over_limit_seconds"] = self.flags.limit_seconds
        else:
            record |= {name: (min if "per_second" in name else max)(r[name] for r in found) for name in found[0]}
        print(", ".join(f"{value:.4g}" if type(value) is float else str(value) for value in record.values()))
        record |= {"file_bytes": self.file(kind, num_rows).stat().st_size} | self._shared
        self.records.append(record)
        if self.flags.output:  # write now, so that an interrupted command keeps its measurements
            append(self.flags.output, [record], table, "data.py")


def measure_all(session: Session) -> None:
    flags = session.flags
    sizes = [flags.rows] if flags.quick else [flags.rows // 10, flags.rows]
    fractions = [0.5] if flags.quick else list(EPOCH_FRACTIONS)
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
                is_skipped = flags.quick and system != "lowmem" and kind != flags.kinds[0]
                if kind in kinds and not is_skipped:
                    measure = partial(session.measure, system=system, kind=kind, num_rows=num_rows)
                    measure_system(session, measure, count, fractions)
    for prefetch in (2, 0):
        arguments = {"prefetch": prefetch, "num_steps": 12 if flags.quick else 100}
        session.measure("wait", "lowmem", flags.kinds[0], sizes[-1], lowmem_wait, **arguments)


def measure_lowmem(session: Session, measure: Callable, count: int, fractions: list[float]) -> None:
    folder = str(session.folder)
    measure("once", function=lowmem_once, cache=f"{folder}/lowmem-cache")
    measure("draw", function=lowmem_rows, num_drawn=count)
    draws = [("number", 1, count), ("bpe", 1, count), ("byt5", 1, count // 5), ("bpe", 3, count)]
    for encoder, processes, num_drawn in draws[::3] if session.flags.quick else draws:
        arguments = {"num_drawn": num_drawn, "num_later": num_drawn // 6, "encoder": encoder, "folder": folder}
        measure("draw", function=lowmem_draw, processes=processes, **arguments)
    for fraction in [1.5] if session.flags.quick else [*fractions, 1.5]:
        measure("resume", function=lowmem_resume, folder=folder, fraction=fraction)
    for order in ("uniform", "lowmem"):
        measure("shuffle", system=order, function=quality, order_of=order)


def measure_streaming(session: Session, measure: Callable, count: int, fractions: list[float]) -> None:
    folder = str(session.folder)
    for processes in session.process_counts:
        measure("draw", function=streaming_draw, processes=processes, num_drawn=count)
    saved = {fraction: Path(folder, f"{fraction}.json") for fraction in EPOCH_FRACTIONS}
    for path in saved.values():  # remove the states saved while reading the previous file
        path.unlink(missing_ok=True)
    kind, num_rows = (measure.keywords[name] for name in ("kind", "num_rows"))
    arguments = {"file": str(session.file(kind, num_rows)), "folder": folder, "num_rows": num_rows}
    session.run([(streaming_pass, arguments)], 5 * session.flags.limit_seconds)
    for fraction in fractions:
        if saved[fraction].exists():
            measure("resume", function=streaming_resume, fraction=fraction, folder=folder)
    measure("shuffle", function=quality, order_of=f"{folder}/order.npy")


def measure_on_disk(session: Session, measure: Callable, count: int, fractions: list[float]) -> None:
    cache = {"cache": str(session.folder / "datasets-cache")}
    measure("once", function=on_disk_once, **cache)
    for processes in session.process_counts:
        measure("draw", function=on_disk_draw, processes=processes, num_drawn=count, **cache)
    for fraction in fractions:
        measure("resume", function=on_disk_resume, fraction=fraction, **cache)


def measure_whole(session: Session, measure: Callable, count: int, fractions: list[float]) -> None:
    for processes in session.process_counts:
        measure("draw", function=whole_draw, processes=processes, num_drawn=count)


SYSTEMS = {
    "lowmem": (measure_lowmem, set(KINDS)),
    "datasets streaming": (measure_streaming, set(KINDS)),
    "datasets on disk": (measure_on_disk, set(KINDS)),
    "table whole": (measure_whole, {"parquet-100k", "parquet-default"}),
}
"""For each system: the function that measures it, and the kinds of files that it reads."""


# --- the report
def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table. A column whose head ends in ":" holds text and is left-aligned."""
    marks = ["---" if name.endswith(":") else "---:" for name in head]
    return [f"| {' | '.join(line)} |" for line in ([name.removesuffix(":") for name in head], marks, *rows)]


def markdown(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table with a title, or no lines if the table has no rows."""
    return [f"### {title}", "", *grid(head, rows), ""] if rows else []


def cell(record: Record | None, name: str, form: str = ",.0f", unit: float = 1) -> str:
    """Format a field of a record. If missing, return "> N s" if the time limit was exceeded, and otherwise "-"."""
    if record is None or name not in record and "over_limit_seconds" not in record:
        return "-"
    return f"{record[name] / unit:{form}}" if name in record else f"> {record['over_limit_seconds']:.0f} s"


def once_table(records: list[Record]) -> list[str]:
    head = ["system:", "file:", "rows", "file, MB", "seconds", "MB/s", "peak RSS, MiB", "on disk, MB"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", cell(record, "file_bytes", unit=1e6)),
            *(cell(record, "seconds", ".1f"), f"{record['file_bytes'] / 1e6 / record.get('seconds', np.nan):,.0f}"),
            *(cell(record, "peak_bytes", unit=MIB), cell(record, "disk_bytes", unit=1e6)),
        ]
        for record in records
        if record["what"] == "once"
    ]
    return markdown("Once per file: building the index or the copy", head, rows)


def draw_table(records: list[Record]) -> list[str]:
    head = ["system:", "file:", "rows", "encoder:", "processes", "start, s", "anonymous, MiB", "RSS, MiB", "peak, MiB"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", record.get("encoder", "-")),
            *(str(record["processes"]), cell(record, "start_seconds", ".2f")),
            *(cell(record, f"{name}_bytes", unit=MIB) for name in ("anonymous", "resident", "peak")),
            *(cell(record, "rows_per_second"), cell(record, "tokens_per_second")),
        ]
        for record in records
        if record["what"] == "draw"
    ]
    return markdown("Start, memory and speed of each process", [*head, "rows/s", "tokens/s"], rows)


def resume_table(records: list[Record]) -> list[str]:
    records = [record for record in records if record["what"] == "resume"]
    fractions = sorted({record["place"] for record in records})
    found: dict[tuple, dict[float, Record]] = {}
    for record in records:
        found.setdefault((record["system"], record["kind"], f"{record['rows']:,}"), {})[record["place"]] = record

    def continues(of: dict[float, Record]) -> str:
        same = [record["same_rows"] for record in of.values() if "same_rows" in record]
        return "yes" if same and all(same) else "no" if same else "-"

    rows = [
        [
            *key,
            *(cell(of.get(fraction), "seconds", ".2f") for fraction in fractions),
            continues(of),
            *(cell(of.get(max(EPOCH_FRACTIONS)), name) for name in ("lost_rows", "repeated_rows")),
        ]
        for key, of in found.items()
    ]
    head = ["system:", "file:", "rows", *(f"at {each:.0%}, s" for each in fractions), "same rows as uninterrupted:"]
    return markdown("Resume: from imports done to the first batch", [*head, "rows lost", "rows repeated"], rows)


def shuffle_table(records: list[Record]) -> list[str]:
    head = ["order:", "file:", "rows", "groups", "mean displacement / rows"]
    rows = [
        [
            *(record["system"], record["kind"], f"{record['rows']:,}", cell(record, "groups")),
            *(cell(record, "displacement", ".3f"), cell(record, "distinct_groups", ".1f")),
            cell(record, "commonest_group_rows", ".1f"),
        ]
        for record in records
        if record["what"] == "shuffle"
    ]
    head += [f"groups in a batch of {BATCH_SIZE}", "rows from its most common group"]
    return markdown("Shuffle", head, rows)


def wait_table(records: list[Record]) -> list[str]:
    rows = [
        [str(record["prefetch"]), cell(record, "share", ".1%"), cell(record, "seconds_per_step", ".3f")]
        for record in records
        if record["what"] == "wait"
    ]
    return markdown("Share of training time spent waiting for rows", ["prefetch", "share", "s/step"], rows)


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"## {max(record['rows'] for record in records):,} rows", "", f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}, {first['machine']['cores']} cores; {versions}.", ""]
    for part in (once_table, draw_table, resume_table, shuffle_table, wait_table):
        lines += part(records)
    return "\n".join(lines)


# --- the command
def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""

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
                raise argparse.ArgumentTypeError(f"unknown name {', '.join(unknown)}: choose from {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=at_least(100_000), help="default 10,000,000; a tenth of them is measured too")
    parser.add_argument("--folder", type=Path, help="for the generated files, which are reused; default: temporary")
    parser.add_argument("--kinds", type=names_of(KINDS), help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--systems", type=names_of(SYSTEMS), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--limit_seconds", type=at_least(1), default=120, help="per measurement")
    parser.add_argument("--quick", action="store_true", help="smoke test: 200,000 rows, few measurements")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.rows = flags.rows or (200_000 if flags.quick else 10_000_000)
    flags.kinds = flags.kinds or (["parquet-100k", "jsonl"] if flags.quick else list(KINDS))
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the table goes to a .md file of the same name")
    return flags


def main() -> None:
    if sys.argv[1:2] == ["run"]:  # a child process of `run_all`
        print(json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    flags = parse_flags(sys.argv[1:])
    shown = list(sys.argv)
    if flags.folder:  # keep local paths out of the results
        shown = [argument.replace(str(flags.folder), "FOLDER") for argument in shown]
        flags.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(flags.folder) if flags.folder else tempfile.TemporaryDirectory() as folder:
        session = Session(flags, Path(folder).resolve(), shlex.join(["python", *shown]))
        measure_all(session)
    print(table(session.records))


if __name__ == "__main__":
    main()
