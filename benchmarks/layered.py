"""Measure layered gradient accumulation: predicted memory of large models, measured speed and traffic of a small one.

    python benchmarks/layered.py --output=benchmarks/results/layered.jsonl
    python benchmarks/layered.py --sections=steps

Appends a JSON line per result to --output, and writes tables to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from memory import GIB, MODELS
from records import Record, append

ACCUMULATED = 16
SPEED_SHAPE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
TIERS = [("exact", "adamw"), ("lean", "adamw"), ("lean", "adafactor")]
# settings of a step with 16 micro-batches; "today" is what a run without layered takes
WAYS = {
    "recompute, clipped": {"recompute": "full"},
    "layered, clipped": {"layered": True},
    "layered, clipped, offloaded": {"layered": True, "offload_activations": True},
    "layered, released": {"layered": True, "release": True, "max_grad_norm": 0.0},
    "layered, released, offloaded": {
        "layered": True,
        "release": True,
        "max_grad_norm": 0.0,
        "offload_activations": True,
    },
}


def memory(models: Sequence[str]) -> Iterator[Record]:
    """Yield the peaks on a GPU, bytes of tensors, that `plan` predicts by a step of the run on fake tensors."""
    from lowmem.config.parse import resolve
    from lowmem.plan.parts import Cluster, Kind, extrapolate
    from lowmem.plan.predict import planners

    cluster = Cluster(world_size=1, local_world_size=1, on_gpu=True)
    for model in models:
        spec = MODELS[model]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.json")
            path.write_text(json.dumps(spec.shape))
            for (tier, optimizer), (way, flags) in ((tier, way) for tier in TIERS for way in WAYS.items()):
                flags = flags | {"model_config": path, "memory": tier, "optimizer": optimizer}
                flags |= {"batch_size": spec.batch_size, "max_seq_len": spec.seq_len, "mixed_precision": "bf16"}
                config = resolve(flags | {"gradient_accumulation_steps": ACCUMULATED})
                with planners() as pool:
                    shallow, deeper = pool.submit(_shallow, config, cluster), pool.submit(_deeper, config, cluster)
                    peaks = extrapolate(shallow.result(), deeper.result()).peaks.values()
                device = [sum(size for kind, size in parts.items() if kind != Kind.OFFLOADED) for parts in peaks]
                host = max(parts.get(Kind.OFFLOADED, 0) for parts in peaks)
                yield {"model": model, "tier": f"{tier} {optimizer}", "way": way, "device": max(device), "host": host}


def _shallow(*arguments):
    from lowmem.plan.rehearsal import count_shallow

    return count_shallow(*arguments)


def _deeper(*arguments):
    from lowmem.plan.rehearsal import count_deeper

    return count_deeper(*arguments)


def steps(processes: int, rounds: int) -> list[Record]:
    """Train with and without layered on `processes` processes; return seconds and traffic of a step of rank 0."""
    context = get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_train, args=(rank, processes, port, rounds, queue), daemon=True)
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    records = queue.get(timeout=1800)
    for rank in ranks:
        rank.join(timeout=60)
    return records


def _train(rank: int, processes: int, port: int, rounds: int, queue) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()} if processes > 1 else {})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from transformers import AutoConfig

    from lowmem import Batch, TrainState, chunked_loss, init_distributed, make_optimizer, parallelize, train_step
    from lowmem.memory.savers import SAVERS
    from lowmem.model.build import build_model

    accelerator, stack = init_distributed(), ExitStack()
    records, states = [], {}
    for name in ("recompute", "layered"):
        torch.manual_seed(0)
        model = build_model(AutoConfig.for_model(**SPEED_SHAPE))
        model = parallelize(model, accelerator, sharding_strategy="FULL_SHARD" if processes > 1 else "NO_SHARD")
        states[name] = TrainState(model, make_optimizer(model, memory="off"))
        stack.enter_context(SAVERS[name](model, states[name].optimizer))

    def step(name: str, accumulation: int) -> float:
        torch.manual_seed(rank)
        ids = torch.randint(3, SPEED_SHAPE["vocab_size"], (2, 64))
        labels = ids.clone()
        labels[:, 0] = -100
        batches = [Batch({"input_ids": ids, "labels": labels}, 2 * 63, row_ids=[])] * accumulation
        started = time.perf_counter()
        train_step(states[name], batches, chunked_loss, accelerator, learning_rate=1e-4, max_grad_norm=1.0)
        return time.perf_counter() - started

    for name in states:
        step(name, 8)
    seconds = {name: [] for name in states}
    for _ in range(rounds):
        for name in states:
            seconds[name].append(step(name, 8))
    ratios = [one / other for one, other in zip(seconds["layered"], seconds["recompute"], strict=True)]
    record = {"section": "speed", "processes": processes, "strategy": "FULL_SHARD" if processes > 1 else "NO_SHARD"}
    record |= {name: statistics.median(times) for name, times in seconds.items()}
    records.append(record | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)})
    for name, accumulation in product(states, (1, 4, 16)) if processes > 1 else ():
        with _traffic() as traffic:
            step(name, accumulation)
        records.append(
            {
                "section": "traffic",
                "way": name,
                "accumulation": accumulation,
                "collectives": traffic.count,
                "bytes": traffic.bytes,
                "weights": 4 * states[name].model.num_parameters(),
            }
        )
    if rank == 0:
        queue.put(records)
    stack.close()
    accelerator.end_training()


def _traffic():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def num_bytes(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0

    class Traffic(TorchDispatchMode):
        """Counts collectives, and for each the bytes that it takes or gives, whichever are more."""

        count = bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                self.count += 1
                self.bytes += max(map(num_bytes, args))
            return func(*args, **(kwargs or {}))

    return Traffic()


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"    {first['command']}", "", f"{first['date']}; {versions}.", ""]
    by_section = {name: [x for x in records if x["section"] == name] for name in ("memory", "speed", "traffic")}
    if rows := by_section["memory"]:
        lines += [f"## Predicted peaks on one GPU, GiB of tensors, {ACCUMULATED} micro-batches a step", ""]
        lines += ["In parentheses: offloaded to host memory.", ""]
        models = list(dict.fromkeys(row["model"] for row in rows))
        titles = [f"{name}, {MODELS[name].batch_size} x {MODELS[name].seq_len}" for name in models]
        lines += ["| tier | step | " + " | ".join(titles) + " |", "|---|---" + "|---:" * len(models) + "|"]
        for tier, way in dict.fromkeys((row["tier"], row["way"]) for row in rows):
            cells = {row["model"]: row for row in rows if (row["tier"], row["way"]) == (tier, way)}
            texts = [
                f"{row['device'] / GIB:.1f}" + (f" ({row['host'] / GIB:.1f})" if row["host"] else "")
                for row in map(cells.get, models)
            ]
            lines.append(f"| {tier} | {way} | " + " | ".join(texts) + " |")
        lines.append("")
    if rows := by_section["speed"]:
        lines += ["## Seconds of a step: 8 micro-batches of 2 x 64 tokens, fp32, a Llama of 6 layers", ""]
        lines += ["| processes | strategy | recompute=full | layered | layered / recompute=full |"]
        lines += ["|---:|---|---:|---:|---:|"]
        lines += [
            f"| {row['processes']} | {row['strategy']} | {row['recompute']:.2f} | {row['layered']:.2f} | "
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) |"
            for row in rows
        ]
        lines.append("")
    if rows := by_section["traffic"]:
        lines += ["## Traffic of a step, FULL_SHARD on 2 processes (embeddings and head included)", ""]
        lines += ["| | micro-batches | collectives | bytes, in bytes of the weights |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['way']} | {row['accumulation']} | {row['collectives']} | {row['bytes'] / row['weights']:.2f} |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--sections", default="memory,steps", help="comma list of memory, steps")
    parser.add_argument("--models", default="t5-base,qwen2.5-0.5b,llama-3.1-8b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of the timed steps")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args()
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv])}
    shared |= {"versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}}
    records: list[Record] = []
    if "steps" in flags.sections.split(","):
        records += [record for processes in (1, 2) for record in steps(processes, flags.rounds)]
    if "memory" in flags.sections.split(","):
        for record in memory(flags.models.split(",")):
            print({name: str(value) for name, value in record.items()}, file=sys.stderr, flush=True)
            records.append({"section": "memory"} | record)
    records = [record | shared for record in records]
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "layered.py")


if __name__ == "__main__":
    main()
