"""lowmem's memory tiers beside transformers' Trainer: the same weights, rows, objective and schedule, a process each.

    python benchmarks/compare.py --model=t5-small --systems=lowmem-exact,lowmem-lean,trainer --steps=6 --repeats=3

Writes a JSON line for each system and repeat, and a table of medians beside it. See README.md.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from systems import SYSTEMS, WARM_UP_STEPS

Record = dict[str, object]

MIB = 2**20

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
LLAMA_TINY = LLAMA_56M | {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def shapes() -> dict[str, dict[str, object]]:
    """Names of models, and their config's fields."""
    from lowmem.config import MODEL_SHAPES

    # the systems would draw different dropout masks, so losses could not be compared
    t5_shapes = {name: shape | {"dropout_rate": 0.0} for name, shape in MODEL_SHAPES.items()}
    return t5_shapes | {"llama-tiny": LLAMA_TINY, "llama-56m": LLAMA_56M}


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Flags as a namespace; a mistake ends the program with exit code 2, before anything is built."""

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def norm(text: str) -> float:
        value = float(text)  # argparse tells of what is no number
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is neither above 0 nor 0")
        return value

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(shapes()), default="t5-tiny")
    parser.add_argument("--batch_size", type=positive, default=4, help="rows of a micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    parser.add_argument("--seq_len", type=positive, default=128, help="tokens; for T5 each of prompt and response")
    parser.add_argument("--steps", type=positive, default=6, help=f"the first {WARM_UP_STEPS} are not timed")
    parser.add_argument("--repeats", type=positive, default=3, help="systems take turns: A B C A B C ...")
    parser.add_argument("--train_file", help="rows with a prompt and a response; default: random tokens, no padding")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--recompute", choices=["full", "off"], default="full", help="gradient checkpointing, for all")
    parser.add_argument("--max_grad_norm", type=norm, default=1.0, help="0: no clipping")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--systems", default="lowmem-exact,trainer", help=f"comma list of {', '.join(SYSTEMS)}")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.systems = flags.systems.split(",")
    if unknown := [system for system in flags.systems if system not in SYSTEMS]:
        parser.error(f"--systems has {', '.join(unknown)}: choose among {', '.join(SYSTEMS)}")
    for name in flags.systems:
        system = SYSTEMS[name]
        if system.recompute == flags.recompute == "off":
            parser.error(f"{name} is what {system.loop} is under --recompute=off: leave it out")
        if system.has_bf16_weights and flags.mixed_precision == "no":
            parser.error(f"{name} has weights in bf16: set --mixed_precision=bf16, or leave it out")
        if "release" in system.savers and (flags.gradient_accumulation_steps > 1 or flags.max_grad_norm):
            parser.error(
                f"{name} releases gradients before all of them are there, so it neither accumulates nor clips: "
                "set --gradient_accumulation_steps=1 --max_grad_norm=0, or leave it out"
            )
    if flags.steps <= WARM_UP_STEPS:
        parser.error(f"--steps={flags.steps} leaves no step to time: set more than {WARM_UP_STEPS}")
    if flags.train_file and not Path(flags.train_file).is_file():
        parser.error(f"--train_file={flags.train_file} is no file")
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl: a table of the same name ends in .md")
    return flags


def start(system: str, flags: argparse.Namespace, folder: str) -> None:
    """Run one system to its end in a fresh process, which leaves its record in `folder`."""
    settings = {name: value for name, value in vars(flags).items() if name not in ("systems", "output")}
    settings |= {"system": system, "folder": folder, "shape": shapes()[flags.model]}
    settings["num_rows"] = flags.steps * flags.gradient_accumulation_steps * flags.batch_size
    # One GPU: on more, Trainer would wrap the model in DataParallel.
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("systems.py"), json.dumps(settings)],
        env=os.environ | {"OMP_NUM_THREADS": str(flags.threads), "CUDA_VISIBLE_DEVICES": one_gpu},
        stdout=sys.stderr,
        check=True,
    )


def compare(flags: argparse.Namespace, command: str) -> list[Record]:
    """A record for each repeat and system, in the order they ran.

    This process imports no torch and stays small: Linux starts a child's ru_maxrss at its parent's size.
    """
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command}
    shared |= {"model": flags.model, "batch": flags.batch_size, "accumulation": flags.gradient_accumulation_steps}
    shared |= {"seq_len": flags.seq_len, "steps": flags.steps, "rows": "train_file" if flags.train_file else "random"}
    shared |= {"mixed_precision": flags.mixed_precision, "max_grad_norm": flags.max_grad_norm}
    shared |= {"recompute": flags.recompute}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        start("build", flags, folder)
        for repeat in range(flags.repeats):
            for system in flags.systems:
                start(system, flags, folder)
                record = json.loads(Path(folder, "record.json").read_text())
                records.append({"system": system, "repeat": repeat, **shared, **record})
                print(f"{system}, repeat {repeat}: {record['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    return records


def largest_difference(ours: list[Record], theirs: list[Record]) -> float:
    """Over all repeats and steps, how far two systems' losses lie apart."""
    pairs = (zip(a["loss"], b["loss"], strict=True) for a, b in zip(ours, theirs, strict=True))
    return max(abs(a - b) for pair in pairs for a, b in pair)


def table(records: list[Record]) -> str:
    """Markdown for the records of one command: medians over its repeats, of values and of ratios to Trainer's."""
    of = {}
    for record in records:
        of.setdefault(record["system"], []).append(record)

    def middle(system: str, name: str) -> float:
        return median(record[name] for record in of[system])

    def ratio(system: str, name: str) -> str:
        if "trainer" not in of:
            return "-"
        # turn by turn: a machine that slows down during a run slows both down
        return f"{median(a[name] / b[name] for a, b in zip(of[system], of['trainer'], strict=True)):.2f}"

    def row(system: str) -> str:
        on_device = records[0]["peak_device_bytes"] is not None
        cells = [
            system,
            f"{middle(system, 'tokens_per_second'):,.0f}",
            ratio(system, "tokens_per_second"),
            f"{middle(system, 'seconds_per_step'):.3f}",
            f"{middle(system, 'peak_rss_above_import_bytes') / MIB:,.0f}",
            ratio(system, "peak_rss_above_import_bytes"),
            f"{middle(system, 'peak_rss_bytes') / MIB:,.0f}",
            f"{middle(system, 'peak_device_bytes') / MIB:,.0f}" if on_device else "-",
            f"{min(record['cores_busy'] for record in of[system]):.2f}",
            f"{of[system][0]['loss'][-1]:.6f}",
            f"{largest_difference(of[system], of['trainer']):.1e}" if "trainer" in of else "-",
        ]
        return "| " + " | ".join(cells) + " |"

    first = records[0]
    machine, versions = first["machine"], first["versions"]
    tokens = f"{first['seq_len']} + {first['seq_len']}" if first["model"].startswith("t5") else first["seq_len"]
    return "\n".join(
        [
            f"## {first['model']}, {first['batch']} x ({tokens}) tokens x accumulation {first['accumulation']}, "
            f"mixed_precision {first['mixed_precision']}, recompute {first['recompute']}, "
            # the oldest runs were all clipped, without a flag for it
            f"{f'clipped to {clipping}' if (clipping := first.get('max_grad_norm', 1.0)) else 'not clipped'}",
            "",
            f"    {first['command']}",
            "",
            f"{first['date']}; {machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, "
            f"device {machine['device']}; {', '.join(f'{name} {number}' for name, number in versions.items())}; "
            f"{first['rows']} rows; medians of {len(of[first['system']])} repeats of {first['steps']} steps, "
            f"the first {WARM_UP_STEPS} not timed.",
            "",
            "| system | tokens/s | x trainer | s/step | RSS above imports, MiB | x trainer | RSS, MiB | device, MiB "
            "| fewest cores busy | last loss | largest loss difference |",
            "|---" + "|---:" * 10 + "|",
            *map(row, of),
            "",
        ]
    )


def append(output: Path, records: list[Record], table: Callable[[list[Record]], str], program: str) -> None:
    """Add `records` to the JSON lines of `output`, and write the tables of all commands there beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    commands: dict[str, list[Record]] = {}
    for line in output.read_text().splitlines():
        record = json.loads(line)
        commands.setdefault(record["date"], []).append(record)
    title = f"# {output.stem}\n\nGenerated by benchmarks/{program} from {output.name}.\n"
    output.with_suffix(".md").write_text("\n".join([title, *map(table, commands.values())]))


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    shown = list(sys.argv)
    if flags.train_file:  # where the rows are is nobody's business
        shown = [argument.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for argument in shown]
    records = compare(flags, command=shlex.join(["python", *shown]))
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "compare.py")


if __name__ == "__main__":
    main()
