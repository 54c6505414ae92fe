"""Measure the time that error agreement and the heartbeat add to an optimizer step on two processes over gloo.

    python benchmarks/agree.py --model=t5-small --output=benchmarks/results/agree.jsonl

Appends a JSON line to --output, and writes a table to the .md file of the same name. See README.md.
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
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from compare import shapes
from records import Record, append
from systems import OPTIMIZER, WARM_UP_STEPS, machine, open_steps, open_work

WORLD_SIZE = 2
LIMIT_SECONDS = 120.0  # the default of --heartbeat_timeout
AGREEMENTS = 2000
IDLE_SECONDS = 20.0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(shapes()), default="t5-tiny")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per process and step")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per row (T5: per prompt and response)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per round")
    parser.add_argument("--turns", type=int, default=4, help="interleaved rounds, each with the heartbeat and without")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    return parser.parse_args()


# --- in each rank
def new_step(flags: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """Return a function that takes one optimizer step, and the model's number of weights. Starts no heartbeat."""
    from accelerate import Accelerator

    from lowmem import TrainState, chunked_loss, load_model, make_optimizer, parallelize, train_step

    accelerator = Accelerator(cpu=True)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    model, tokenizer = load_model(model_config=shapes()[flags.model])
    model = parallelize(model, accelerator)
    work = {"batch_size": flags.batch_size, "gradient_accumulation_steps": 1, "seq_len": flags.seq_len}
    settings = SimpleNamespace(**work, train_file=None, num_rows=flags.batch_size * WORLD_SIZE)
    rows, encode = open_work(settings, tokenizer, model.config)
    (batches,) = islice(open_steps(settings, rows, encode, **ranks), 1)
    state = TrainState(model, make_optimizer(model, memory="off", **OPTIMIZER))

    def step() -> None:
        train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-4, max_grad_norm=1.0)

    return step, sum(parameter.numel() for parameter in model.parameters())


def measure(flags: argparse.Namespace) -> Record:
    """Time steps with and without the heartbeat, and a step's two agreements alone; measure the heartbeat's CPU use."""
    from lowmem.distributed import heartbeat
    from lowmem.distributed.collectives import start_heartbeats, sum_over_ranks

    step, num_weights = new_step(flags)
    seconds: dict[str, list[list[float]]] = {"with": [], "without": []}
    for _ in range(flags.turns):
        for name, rounds in seconds.items():
            if name == "with":
                start_heartbeats(LIMIT_SECONDS)
            marks = []
            for _ in range(flags.steps + WARM_UP_STEPS):
                started = time.perf_counter()
                step()
                marks.append(time.perf_counter() - started)
            rounds.append(marks[WARM_UP_STEPS:])
            heartbeat.report_end()
    agreements = []
    for _ in range(AGREEMENTS):
        started = time.perf_counter()
        sum_over_ranks(0, 0, 0)  # the agreement at a step's start
        sum_over_ranks(0)  # the agreement after a step's last backward
        agreements.append(time.perf_counter() - started)
    idle = idle_cores()  # without a heartbeat, only gloo's threads use the CPU; subtracted below
    start_heartbeats(LIMIT_SECONDS)
    record = {"weights": num_weights, "seconds": seconds, "agreement_seconds": median(agreements)}
    return record | {"heartbeat_cores": idle_cores() - idle}


def idle_cores() -> float:
    """Return the CPU seconds that this process uses per second while its main thread sleeps."""
    before = time.process_time()
    time.sleep(IDLE_SECONDS)
    return (time.process_time() - before) / IDLE_SECONDS


def run_rank(flags: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    record = measure(flags)
    if os.environ["RANK"] == "0":
        Path(os.environ["LOWMEM_RECORD"]).write_text(json.dumps(record))
    if dist.is_initialized():
        dist.destroy_process_group()


# --- in the parent process
def start(flags: argparse.Namespace) -> Record:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD_SIZE}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        subprocess.run(
            [sys.executable, *launch, *sys.argv],
            env=os.environ | {"OMP_NUM_THREADS": "1", "LOWMEM_RECORD": str(path)},
            stdout=sys.stderr,
            check=True,
        )
        return json.loads(path.read_text())


def table(records: list[Record]) -> str:
    """Return Markdown for one command, which has a single record."""
    (record,) = records
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [f"## {record['model']}, {record['weights']:,} weights, {record['batch_size']} rows of {record['seq_len']}"]
    lines += ["", f"    {record['command']}", ""]
    lines += [f"{record['date']}; {record['machine']['cpu']}, {record['machine']['cores']} cores; {versions}.", ""]
    with_it, without = ([s for each in record["seconds"][name] for s in each] for name in ("with", "without"))
    pairs = zip(record["seconds"]["with"], record["seconds"]["without"], strict=True)
    slower = median(median(a) / median(b) for a, b in pairs) - 1
    step, agreement, cores = median(without), record["agreement_seconds"], record["heartbeat_cores"]
    rounds = len(record["seconds"]["with"])
    lines += [
        f"Medians: {len(with_it)} steps of each kind, {rounds} interleaved rounds; {WORLD_SIZE} one-thread processes.",
        "",
        "| | | share of a step |",
        "|---|---:|---:|",
        f"| a step without heartbeat | {step * 1e3:.1f} ms | |",
        f"| a step with heartbeat | {median(with_it) * 1e3:.1f} ms | {slower:+.2%} |",
        f"| a step's two agreements, alone | {agreement * 1e6:.0f} us | {agreement / step:.3%} |",
        f"| CPU time of the heartbeat on rank 0 | {cores * 1e3:.2f} ms per second | {cores:.3%} |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    flags = parse_flags()
    if "LOWMEM_RECORD" in os.environ:
        run_rank(flags)
        return
    names = ("model", "batch_size", "seq_len", "steps", "turns")
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv])}
    record |= {name: getattr(flags, name) for name in names} | start(flags)
    record |= {"machine": machine(), "versions": {name: version(name) for name in ("torch", "accelerate")}}
    print(table([record]))
    if flags.output:
        append(flags.output, [record], table, "agree.py")


if __name__ == "__main__":
    main()
