"""Compare every launcher and sharding strategy with a single process: losses, memory, speed and start-up time.

    python benchmarks/launchers.py --train_file=rows.parquet --output=benchmarks/results/launchers.jsonl

Each launcher starts this file, which runs lowmem's `train` command in every process. Appends JSON lines to --output,
and writes a table to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

from launching import launch_command, run_to_end
from records import MIB, Record, append
from systems import machine, peak_resident_bytes, resident_bytes

ROOT = Path(__file__).parent.parent
RUN_LIMIT_SECONDS = 300
COMMON = {"eos_token_id": 1, "pad_token_id": 0, "vocab_size": 384}
MODELS = {
    "t5": {"model_type": "t5", "d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 1024, "num_layers": 4}
    | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
}


LAUNCHERS = ("torchrun", "python", "accelerate", "deepspeed", "torch.distributed.launch")
STRATEGIES = {
    "NO_SHARD": [],
    "SHARD_GRAD_OP": ["--sharding_strategy=SHARD_GRAD_OP"],
    "FULL_SHARD": ["--sharding_strategy=FULL_SHARD"],
    "HYBRID_SHARD": ["--sharding_strategy=HYBRID_SHARD", "--shard_size=2"],
    "ZeRO-2": ["--deepspeed=zero2.json"],
    "ZeRO-3": ["--deepspeed=zero3.json"],
    "TP-2": ["--tp_size=2"],
    "PP-2": ["--pp_size=2"],
    "PP-2 x FULL_SHARD": ["--pp_size=2", "--sharding_strategy=FULL_SHARD"],
    "PP-2 x TP-2": ["--pp_size=2", "--tp_size=2"],
}
# with threshold 0, ZeRO-3 shards these small weights too, which it leaves whole by default
_SHARDS_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
DEEPSPEED_CONFIGS = {
    stage: {"zero_optimization": {"stage": stage} | (_SHARDS_ALL if stage == 3 else {})} for stage in (2, 3)
}


def applies(model: str, strategy: str, processes: int) -> bool:
    """Return False for TP-2 with T5 (transformers has no tensor-parallel plan), and for too few processes."""
    of_four = ("HYBRID_SHARD", "PP-2 x FULL_SHARD", "PP-2 x TP-2")
    return not ("TP-2" in strategy and model == "t5") and not (strategy in of_four and processes < 4)


def parse_flags() -> argparse.Namespace:
    def names(known: object) -> Callable[[str], list[str]]:
        message = f"choose from {', '.join(known)}"
        return lambda text: [name for name in text.split(",") if name in known or parser.error(f"{name}: {message}")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", required=True, help="rows with a prompt and a response: parquet or JSONL")
    parser.add_argument("--models", type=names(MODELS), default=[*MODELS])
    parser.add_argument("--launchers", type=names(LAUNCHERS), default=[*LAUNCHERS])
    parser.add_argument("--strategies", type=names(STRATEGIES), default=[*STRATEGIES])
    parser.add_argument("--processes", default="2,4", help="comma list of numbers of processes")
    parser.add_argument("--max_seq_len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    return parser.parse_args()


# --- in each process of a run
def state_bytes(state) -> int:
    """Return the bytes of the weights and the optimizer state that this process holds; shared memory counts once."""
    from lowmem.distributed.dtensor import local_of

    # ZeRO-3 replaces each weight with an empty tensor and keeps this rank's shard in `ds_tensor`
    held = [getattr(weight, "ds_tensor", weight) for weight in state.model.parameters()]
    held += [x for values in state.optimizer.state.values() for x in values.values() if hasattr(x, "nbytes")]
    by_storage: dict[int, int] = {}
    for tensor in map(local_of, held):
        storage = tensor.untyped_storage()
        taken = by_storage.get(storage.data_ptr(), 0) + tensor.nbytes
        by_storage[storage.data_ptr()] = min(taken, storage.nbytes())
    return sum(by_storage.values())


def run_rank() -> None:
    """Run lowmem's CLI; record when each phase of `train` ended, and the bytes of weights and optimizer state."""
    marks, record_folder = {"the interpreter": time.time()}, Path(os.environ["LOWMEM_RECORDS"])
    sys.path.insert(0, str(ROOT))
    from lowmem import cli

    is_rank = "RANK" in os.environ or "--num_processes=1" in sys.argv
    if is_rank:
        import lowmem.train as loop

        marks["imports"] = time.time()
        resident = resident_bytes()

        def marked(phase: str, function: Callable) -> Callable:
            @wraps(function)
            def call(*arguments, **options):
                result = function(*arguments, **options)
                marks.setdefault(phase, time.time())
                if phase == "first step":
                    write(arguments[0])
                return result

            return call

        def write(state) -> None:
            record = {"marks": marks, "state_bytes": state_bytes(state)}
            record["peak_rss_above_import_bytes"] = peak_resident_bytes() - resident
            (record_folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))

        phases = {
            "init_distributed": "process group",
            "check_model": "model",
            "open_stream": "rows",
            "fitting_step": "first step",
            "deepspeed_step": "first step",
        }
        for name, phase in phases.items():
            setattr(loop, name, marked(phase, getattr(loop, name)))
    sys.exit(cli.main())


# --- in the parent process
def start(flags: argparse.Namespace, folder: Path, model: str, name: str, strategy: str, processes: int) -> Record:
    """Launch one run and return its record. If the run fails, the record has the reason in `failed`."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = [f"--train_file={Path(flags.train_file).resolve()}", f"--model_config={folder / model}.json"]
        words += [f"--max_steps={flags.steps}", f"--max_seq_len={flags.max_seq_len}", f"--output_dir={output}/out"]
        words += [
            "--global_batch_size=8",
            "--batch_size=2",
            "--learning_rate=3e-4",
            "--logging_steps=1",
            *STRATEGIES[strategy],
        ]
        words += [f"--num_processes={processes}"] if name == "python" else []
        command = launch_command(name, processes, *(["--multi_gpu"] if name == "accelerate" else []))
        record = {"model": model, "launcher": name, "strategy": strategy, "processes": processes}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWMEM_RECORDS": output, "DS_ACCELERATOR": "cpu"}
        command += [Path(__file__).resolve(), "train", *words]
        started = time.time()
        try:
            run_to_end(command, seconds=RUN_LIMIT_SECONDS, env=environment, cwd=folder)
        except RuntimeError as error:  # of launchers, which do not say why a process failed
            end = Path(output, "out", "exit.json")
            why = f" {json.loads(end.read_text())['message']}" if end.exists() else ""
            return record | {"failed": f"{error}{why}"}
        steps = [json.loads(line) for line in Path(output, "out", "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if "loss" in step]
        ranks = [json.loads(path.read_text()) for path in Path(output).glob("*.json")]
        assert len(ranks) == processes and len(steps) == flags.steps
        slowest = max(ranks, key=lambda rank: rank["marks"]["first step"])
        return record | {
            "loss": [step["loss"] for step in steps],
            "grad_norm": steps[0]["grad_norm"],
            "tokens_per_second": median(step["tokens_per_second"] for step in steps[2:]),
            "state_bytes": max(rank["state_bytes"] for rank in ranks),
            "peak_rss_above_import_bytes": max(rank["peak_rss_above_import_bytes"] for rank in ranks),
            "seconds": {phase: mark - started for phase, mark in slowest["marks"].items()},
        }


def runs(flags: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    yield from ((model, "python", "NO_SHARD", 1) for model in flags.models)
    for processes, name, model, strategy in product(
        map(int, flags.processes.split(",")), flags.launchers, flags.models, flags.strategies
    ):
        if applies(model, strategy, processes):
            yield model, name, strategy, processes


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}, {first['machine']['cores']} cores; {versions}.", ""]
    lines += [
        "| model | processes | strategy | launcher | loss difference from one process "
        "| first gradient norm, difference | state, MiB per rank | peak RSS above imports, MiB per rank | tokens/s "
        "| first step, s | launcher and interpreter, s | imports, s | process group, s | model, s | rows, s |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    single = {record["model"]: record for record in records if record["processes"] == 1}
    for record in records:
        line = [record["model"], record["processes"], record["strategy"], record["launcher"]]
        if "failed" in record:
            lines.append(f"| {' | '.join(map(str, line))} | failed: {record['failed']} |{' |' * 10}")
            continue
        reference, ends = single[record["model"]], record["seconds"]
        pairs = zip(record["loss"], reference["loss"], strict=True)
        line += [f"{max(abs(mine / its - 1) for mine, its in pairs):.1e}"]
        line += [f"{abs(record['grad_norm'] / reference['grad_norm'] - 1):.1e}"]
        line += [f"{record[name] / MIB:.1f}" for name in ("state_bytes", "peak_rss_above_import_bytes")]
        line += [f"{record['tokens_per_second']:,.0f}", f"{ends['first step']:.1f}"]
        phases = ["the interpreter", "imports", "process group", "model", "rows"]
        line += [
            f"{ends[phase] - before:.1f}" for phase, before in zip(phases, [0, *map(ends.get, phases)], strict=False)
        ]
        lines.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    if "LOWMEM_RECORDS" in os.environ:
        run_rank()
    flags = parse_flags()
    shown = [word.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for word in sys.argv]
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    about |= {"machine": machine(), "versions": {name: version(name) for name in packages}}
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, fields in MODELS.items():
            (folder / f"{model}.json").write_text(json.dumps(COMMON | fields))
        for stage, config in DEEPSPEED_CONFIGS.items():
            (folder / f"zero{stage}.json").write_text(json.dumps(config))
        for run in runs(flags):
            records.append(about | start(flags, folder, *run))
            print(*run, records[-1].get("failed", "done"), flush=True)
            if flags.output:
                append(flags.output, records[-1:], table, "launchers.py")
    print(table(records))


if __name__ == "__main__":
    main()
