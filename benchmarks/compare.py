"""Compare lowmem with other training code, with the same initial weights, rows, objective and schedule.

    python benchmarks/compare.py --model=t5-small --systems=lowmem-exact,lowmem-lean,trainer --steps=6 --repeats=3

Appends a JSON line per system and repeat to --output, and writes tables (.md) and a figure (.png) of the same name.
See README.md.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from comparison import draw, table
from launching import launch_command, run_to_end
from records import Record, append
from systems import SYSTEMS, WARM_UP_STEPS, System, encoded_rows

TRAINING_LIMIT_SECONDS = 3600

LLAMA_56M = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN_500M = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
LLAMA_TINY = LLAMA_56M | {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def shapes() -> dict[str, dict[str, object]]:
    """Return the config fields of each model."""
    from lowmem.config.presets import MODEL_SHAPES

    # no dropout: with it, systems would draw different masks, and their losses could not be compared
    t5_shapes = {name: shape | {"dropout_rate": 0.0} for name, shape in MODEL_SHAPES.items()}
    return t5_shapes | {"llama-tiny": LLAMA_TINY, "llama-56m": LLAMA_56M, "qwen2.5-0.5b": QWEN_500M}


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def norm(text: str) -> float:
        value = float(text)  # if this raises ValueError, argparse reports it
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
        return value

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(shapes()), default="t5-tiny")
    parser.add_argument("--batch_size", type=positive, default=4, help="rows per micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    parser.add_argument("--seq_len", type=positive, default=128, help="tokens per row (T5: per prompt and response)")
    parser.add_argument("--steps", type=positive, default=6, help=f"the first {WARM_UP_STEPS} are not timed")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved rounds: A B C A B C ...")
    parser.add_argument("--train_file", help="rows with a prompt and a response; default: random tokens, no padding")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--recompute", choices=["full", "off"], default="full", help="activation checkpointing")
    parser.add_argument("--max_grad_norm", type=norm, default=1.0, help="0: no clipping")
    parser.add_argument("--processes", type=positive, default=1, help="each takes micro-batches of batch_size rows")
    parser.add_argument("--threads", type=positive, help="per process; default: cores / processes")
    parser.add_argument("--llamafactory_python", default=sys.executable, help="an interpreter with LLaMA-Factory")
    parser.add_argument("--systems", default="lowmem-exact,trainer", help=f"comma list of {', '.join(SYSTEMS)}")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    # keep local paths out of the results
    shown = vars(flags) | {"train_file": flags.train_file and f"rows{Path(flags.train_file).suffix}"}
    shown |= {"output": flags.output and flags.output.name, "llamafactory_python": None}
    given = [f"--{name}={value}" for name, value in shown.items() if value not in (None, parser.get_default(name))]
    flags.command = shlex.join(["python", "benchmarks/compare.py", *given])
    flags.systems = flags.systems.split(",")
    if unknown := [system for system in flags.systems if system not in SYSTEMS]:
        parser.error(f"--systems has unknown names {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    for name in flags.systems:
        system = SYSTEMS[name]
        if system.recompute == flags.recompute == "off":
            parser.error(f"--recompute=off makes {name} the same as {name.partition('-no-')[0]}: remove {name}")
        if system.has_bf16_weights and flags.mixed_precision == "no":
            parser.error(f"{name} has bf16 weights: set --mixed_precision=bf16, or remove it from --systems")
        if "release" in system.savers and (flags.gradient_accumulation_steps > 1 or flags.max_grad_norm):
            parser.error(
                f"{name} frees gradients during backward, so it can neither accumulate nor clip: "
                "set --gradient_accumulation_steps=1 --max_grad_norm=0, or remove it from --systems"
            )
        if "release" in system.savers and flags.processes > 1:
            parser.error(f"{name} needs one process: set --processes=1, or remove it from --systems")
    if not shutil.which(flags.llamafactory_python):
        parser.error(f"--llamafactory_python={flags.llamafactory_python} is not a program: set an interpreter's path")
    flags.threads = flags.threads or max(1, os.cpu_count() // flags.processes)
    if flags.steps <= WARM_UP_STEPS:
        parser.error(f"--steps={flags.steps} leaves no step to time: set more than {WARM_UP_STEPS}")
    if flags.train_file and not Path(flags.train_file).is_file():
        parser.error(f"--train_file={flags.train_file} is not a file: name a parquet or JSONL file")
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the table goes to a .md file of the same name")
    return flags


def start(system: str, flags: argparse.Namespace, folder: Path, **more: object) -> list[Record]:
    """Train `system` in new processes; return a record per process.

    If `system` is "build", only write the shared inputs. Raises RuntimeError if a process fails or exceeds the limit.
    """
    settings = {name: value for name, value in vars(flags).items() if name not in ("systems", "output", "command")}
    settings |= {"system": system, "folder": str(folder), "shape": shapes()[flags.model], "started": time.time()}
    settings |= {"rows_per_step": rows_per_step(flags), "num_rows": flags.steps * rows_per_step(flags)} | more
    # expose no more GPUs than processes, because Trainer would wrap the model in DataParallel if it saw more
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(flags.processes)))).split(",")
    environment = {"OMP_NUM_THREADS": str(flags.threads), "CUDA_VISIBLE_DEVICES": ",".join(gpus[: flags.processes])}
    if not Path("/dev/nvidiactl").exists():
        environment["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings["output"] = output
        command = [*launcher(system, flags), Path(__file__).with_name("run_system.py"), json.dumps(settings)]
        run_to_end(command, seconds=TRAINING_LIMIT_SECONDS, env=os.environ | environment)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(output).glob("record-*.json"))]
    assert len(ranks) == (flags.processes if system in SYSTEMS else 0), "the processes did not train as one group"
    return ranks


def rows_per_step(flags: argparse.Namespace) -> int:
    return flags.batch_size * flags.gradient_accumulation_steps * flags.processes


def launcher(name: str, flags: argparse.Namespace) -> list[str]:
    """Return the command that starts a system's processes, up to the name of the script."""
    system = SYSTEMS.get(name)
    interpreter = flags.llamafactory_python if system and system.loop == "llamafactory" else sys.executable
    if system is None or (flags.processes == 1 and system.launcher == "torchrun"):
        return [interpreter]
    options = []
    if system.zero_stage:
        options = ["--use_deepspeed", f"--zero_stage={system.zero_stage}", f"--mixed_precision={flags.mixed_precision}"]
        options += [f"--gradient_accumulation_steps={flags.gradient_accumulation_steps}"]
        options += [f"--gradient_clipping={flags.max_grad_norm}"]
    elif system.launcher == "accelerate" and flags.processes > 1:
        options = ["--multi_gpu"]
    return launch_command(system.launcher, flags.processes, *options, interpreter=interpreter)


def left_out(system: System, flags: argparse.Namespace) -> str:
    """Return why the system cannot run here, or an empty string if it can."""
    if system.package:
        interpreter = flags.llamafactory_python if system.loop == "llamafactory" else sys.executable
        found = f"import sys, importlib.util as i; sys.exit(i.find_spec({system.package!r}) is None)"
        if subprocess.run([interpreter, "-c", found], check=False).returncode:
            return f"{system.package} is not installed: see benchmarks/README.md"
    return system.cannot(is_causal=not flags.model.startswith("t5"), processes=flags.processes)


def compare(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield one record per run, in the order of the runs.

    A system that cannot run has one record, with the reason in `left_out`. A failed run has its error in `failed`.
    """
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": flags.command}
    shared |= {"model": flags.model, "batch": flags.batch_size, "accumulation": flags.gradient_accumulation_steps}
    shared |= {"processes": flags.processes, "seq_len": flags.seq_len, "steps": flags.steps}
    shared |= {"rows": "train_file" if flags.train_file else "random", "recompute": flags.recompute}
    shared |= {"mixed_precision": flags.mixed_precision, "max_grad_norm": flags.max_grad_norm}
    why = {name: left_out(SYSTEMS[name], flags) for name in flags.systems}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start("build", flags, folder)
        tokens = tokens_of_steps(flags, folder)
        for repeat in range(flags.repeats):
            for system in flags.systems:
                about = {"system": system, "repeat": repeat, **shared}
                if why[system]:
                    if repeat == 0:
                        yield about | {"left_out": why[system]}
                    continue
                try:
                    ranks = start(system, flags, folder, tokens=tokens)
                except RuntimeError as error:
                    yield about | {"failed": str(error)}
                    continue
                yield about | merge(ranks)


def tokens_of_steps(flags: argparse.Namespace, folder: Path) -> list[int]:
    """Count the non-padding tokens of each optimizer step: input tokens and, for T5, target tokens."""
    kinds = ("input_ids", "labels") if flags.model.startswith("t5") else ("input_ids",)
    counts = [sum(len(row[kind]) for kind in kinds) for row in encoded_rows(str(folder))]
    size = rows_per_step(flags)
    return [sum(counts[start : start + size]) for start in range(0, len(counts), size)]


def merge(ranks: list[Record]) -> Record:
    """Return rank 0's record, with host memory and busy cores summed over ranks, and the largest device memory."""
    together = {"peak_rss_bytes": sum, "peak_rss_above_import_bytes": sum, "cores_busy": sum}
    if ranks[0]["peak_device_bytes"] is not None:
        together["peak_device_bytes"] = max
    return ranks[0] | {name: of(rank[name] for rank in ranks) for name, of in together.items()}


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    records = []
    for record in compare(flags):
        records.append(record)
        outcome = record.get("left_out") or record.get("failed") or f"{record['tokens_per_second']:.0f} tokens/s"
        print(f"{record['system']}, repeat {record['repeat']}: {outcome}", file=sys.stderr)
        if flags.output:  # write now: the next run may take an hour
            draw(append(flags.output, [record], table, "compare.py"), flags.output.with_suffix(".png"))
    print(table(records))


if __name__ == "__main__":
    main()
