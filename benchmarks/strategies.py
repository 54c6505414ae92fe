"""Compare ways to train one model: what a process holds, what it sends in a step, and what that costs.

    python benchmarks/strategies.py --train_file=rows.parquet --output=benchmarks/results/strategies.jsonl
    python benchmarks/strategies.py --sections=predicted,shapes --output=benchmarks/results/strategies.jsonl

Measures a small Llama on a CPU, in interleaved rounds, and predicts large models as `plan` does. Appends a JSON line
per result to --output, and writes tables to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

from data import grid
from launchers import COMMON, DEEPSPEED_CONFIGS, MODELS, state_bytes
from memory import GIB
from records import MIB, Record, append
from shown_plans import FINE_TUNED
from systems import machine, peak_resident_bytes, resident_bytes

RUN_LIMIT_SECONDS = 600
COUNTED_STEP = 2
"""The step, from 0, whose bytes are counted; later ones are timed."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")


class Way(NamedTuple):
    """A way to train, and the way on one process that has its losses."""

    processes: int
    flags: str = ""
    reference: str = "fp32"


_EXACT, _LEAN = "--mixed_precision=bf16", "--mixed_precision=bf16 --memory=lean"
_LORA, _LAYERED = f"{_EXACT} --lora_rank=8", "--layered=True"
_RELEASED = f"{_LAYERED} --release=True --max_grad_norm=0"
_FULL = "--sharding_strategy=FULL_SHARD"
WAYS = {
    # tiers and savers
    "fp32": Way(1),
    "bf16, `--memory=off`": Way(1, f"{_EXACT} --memory=off", "bf16, `--memory=off`"),
    "exact": Way(1, _EXACT, "exact"),
    "lean": Way(1, _LEAN, "lean"),
    "exact, layered": Way(1, f"{_EXACT} {_LAYERED}", "exact"),
    "exact, layered, released": Way(1, f"{_EXACT} {_RELEASED}", "exact, layered, released"),
    "exact, offloaded activations": Way(1, f"{_EXACT} --offload_activations=True", "exact"),
    "exact, weights on the host": Way(1, f"{_EXACT} --offload_weights=host", "exact"),
    "exact, weights in a file": Way(1, f"{_EXACT} --offload_weights=weights", "exact"),
    "LoRA, exact": Way(1, _LORA, "LoRA, exact"),
    "QLoRA, exact": Way(1, f"{_LORA} --quantization=nf4", "QLoRA, exact"),
    # strategies
    "NO_SHARD": Way(2),
    "SHARD_GRAD_OP": Way(2, "--sharding_strategy=SHARD_GRAD_OP"),
    "FULL_SHARD": Way(2, _FULL),
    "FULL_SHARD, layered": Way(2, f"{_FULL} {_LAYERED}"),
    "FULL_SHARD, `--cpu_offload`": Way(2, f"{_FULL} --cpu_offload=True"),
    "ZeRO-2": Way(2, "--deepspeed=zero2.json"),
    "ZeRO-3": Way(2, "--deepspeed=zero3.json"),
    "TP-2": Way(2, "--tp_size=2"),
    "PP-2": Way(2, "--pp_size=2"),
    # the same on more processes
    "NO_SHARD on 4": Way(4),
    "FULL_SHARD on 4": Way(4, _FULL),
    "FULL_SHARD on 4, layered": Way(4, f"{_FULL} {_LAYERED}"),
    "HYBRID_SHARD, 2 x 2": Way(4, "--sharding_strategy=HYBRID_SHARD --shard_size=2"),
    "TP-4": Way(4, "--tp_size=4"),
    "PP-4": Way(4, "--pp_size=4"),
    "PP-2 x DP-2": Way(4, "--pp_size=2"),
    "PP-2 x FULL_SHARD-2": Way(4, f"--pp_size=2 {_FULL}"),
    "PP-2 x TP-2": Way(4, "--pp_size=2 --tp_size=2"),
    # both
    "exact, FULL_SHARD, layered": Way(2, f"{_EXACT} {_FULL} {_LAYERED}", "exact"),
    "exact, FULL_SHARD, layered, released": Way(2, f"{_EXACT} {_FULL} {_RELEASED}", "exact, layered, released"),
    "exact, PP-2": Way(2, f"{_EXACT} --pp_size=2", "exact"),
    "lean, PP-2": Way(2, f"{_LEAN} --pp_size=2", "lean"),
    "LoRA, exact, PP-2": Way(2, f"{_LORA} --pp_size=2", "LoRA, exact"),
}
ROWS, TOKENS = 8, 64  # of a step that is measured

# flags by which three large models are compared on several cards
SHARED = {
    "NO_SHARD": "--recompute=full",
    "FULL_SHARD, layered": f"{_FULL} {_LAYERED}",
    "tensor parallel": "--recompute=full --tp_size={}",
    "pipeline": "--recompute=full --pp_size={}",
}
SHAPES = {
    "llama-3.1-8b": FINE_TUNED["llama-8b"],
    "qwen2.5-0.5b": [*FINE_TUNED["qwen-0.5b"], "--batch_size=2"],
    "t5-base": ["--model_config=t5-base", "--max_seq_len=512", "--batch_size=4"],
}
MOST_TENSOR_PARALLEL = {"t5-base": 1, "qwen2.5-0.5b": 2}
"""T5 has no plan, and a head of keys cannot be split."""
CARDS, MICRO_BATCHES = (2, 4, 8), 16


# --- measured
def run_rank(rank: int, way: Way, folder: str, port: int, arguments: Sequence[str], results) -> None:
    """Run lowmem's command `train` as `rank`, and put what it takes into `results`."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if way.processes > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": way.processes, "LOCAL_WORLD_SIZE": way.processes}
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in group.items()}
    os.chdir(folder)
    sys.argv = ["train_low_mem.py", "train", *arguments]
    import torch

    import lowmem.train as loop
    from lowmem import cli
    from lowmem.plan.meter import sent_bytes

    torch.set_num_threads(1)
    before, taken = resident_bytes(), []

    class Sent(torch.utils._python_dispatch.TorchDispatchMode):
        """Counts the bytes that this rank sends."""

        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                self.num_bytes += sent_bytes(func.overloadpacket.__name__, args)
            return func(*args, **(kwargs or {}))

    sent = Sent()

    def measured(take_step):
        @wraps(take_step)
        def call(state, *others, **options):
            started, used = time.perf_counter(), time.process_time()
            with sent if len(taken) == COUNTED_STEP else nullcontext():
                result = take_step(state, *others, **options)
            step = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
            step |= {"loss": result.loss.item(), "num_tokens": int(result.num_tokens)}
            taken.append(step | {"state_bytes": state_bytes(state)})
            return result

        return call

    loop.fitting_step, loop.deepspeed_step = measured(loop.fitting_step), measured(loop.deepspeed_step)
    code = cli.main()
    peak = peak_resident_bytes() - before
    results.put((rank, {"code": code, "steps": taken, "sent_bytes": sent.num_bytes, "peak_rss_above_import": peak}))


def measure(name: str, folder: Path, flags: argparse.Namespace) -> Record:
    """Train in a way, on forks of a process that has imported lowmem. Raises RuntimeError if a rank fails."""
    way = WAYS[name]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        words = [f"--train_file={flags.train_file.resolve()}", f"--max_steps={flags.steps}", *way.flags.split()]
        words += [f"--output_dir={output}/out", f"--max_seq_len={TOKENS}", "--learning_rate=3e-4", "--save_steps=0"]
        words += [f"--global_batch_size={ROWS}", "--batch_size=1", "--save_model=False", "--logging_steps=1"]
        words += [f"--model_name_or_path={folder / 'model'}", "--max_predict_samples=0"]
        context = get_context("forkserver")
        results = context.SimpleQueue()
        arguments = (way, str(folder), port, words, results)
        ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(way.processes)]
        for rank in ranks:
            rank.start()
        limit, found = time.monotonic() + RUN_LIMIT_SECONDS, {}
        try:
            while len(found) < len(ranks):
                if not results.empty():
                    found.update([results.get()])
                elif time.monotonic() > limit or any(rank.exitcode for rank in ranks):
                    raise RuntimeError(f"{name} failed, or took more than {RUN_LIMIT_SECONDS} s")
                time.sleep(0.01)
        finally:
            for rank in ranks:
                if len(found) < len(ranks):
                    rank.kill()
                rank.join()
    if any(each["code"] for each in found.values()):
        raise RuntimeError(f"{name} failed")
    of_ranks = list(found.values())
    timed = [[rank["steps"][index] for rank in of_ranks] for index in range(COUNTED_STEP + 1, flags.steps)]
    return {
        "section": "measured",
        "way": name,
        "processes": way.processes,
        "loss": [step["loss"] for step in of_ranks[0]["steps"]],
        "tokens_per_second": median(ranks[0]["num_tokens"] / max(x["seconds"] for x in ranks) for ranks in timed),
        "cpu_seconds": median(sum(x["cpu_seconds"] for x in ranks) for ranks in timed),
        "state_bytes": max(rank["steps"][0]["state_bytes"] for rank in of_ranks),
        "sent_bytes": max(rank["sent_bytes"] for rank in of_ranks),
        "peak_rss_above_import_bytes": max(rank["peak_rss_above_import"] for rank in of_ranks),
    }


def make_model(folder: str) -> None:
    """Save the small model, with random weights, because adapters need a model in a folder."""
    import torch
    from transformers import AutoConfig, ByT5Tokenizer

    from lowmem.model.build import build_model

    torch.manual_seed(0)
    fields = COMMON | MODELS["llama"]
    build_model(AutoConfig.for_model(**fields)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def measured(flags: argparse.Namespace) -> Iterator[Record]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["lowmem.cli", "lowmem.train", "lowmem.plan.meter", "transformers.generation"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = context.Process(target=make_model, args=(str(folder / "model"),))
        maker.start()
        maker.join()
        for stage, config in DEEPSPEED_CONFIGS.items():
            (folder / f"zero{stage}.json").write_text(json.dumps(config))
        for number in range(flags.repeats):
            for way in flags.ways:
                record = measure(way, folder, flags)
                print(f"{number}: {way}: {record['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
                yield record | {"round": number}


# --- predicted
def predictions(model: Sequence[str], settings: Sequence[tuple[int, str]]) -> Iterator[Record]:
    """Yield what `plan` predicts for a process on a card, for each number of cards and flags."""
    from lowmem.config.parse import resolve
    from lowmem.plan.parts import Cluster
    from lowmem.plan.predict import planners, predicting

    with planners() as pool:
        for cards, words in settings:
            pairs = (word.removeprefix("--").split("=", 1) for word in (*model, *words.split()))
            (found,) = predicting(pool, Cluster(cards, cards, on_gpu=True))([resolve(dict(pairs))])
            # of all processes: what is offloaded to the host, or stored there or in files
            parts = [*found.host.items(), *found.disk.items()]
            moved = sum(size for name, size in parts if "of all processes" in name or name.startswith("offloaded"))
            record = {"cards": cards, "flags": words, "device_bytes": found.device_bytes}
            record |= {"elsewhere_bytes": moved // cards, "sent_bytes": found.sent_bytes, "stages": found.stages}
            print(record, file=sys.stderr, flush=True)
            yield record


def predicted(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield predictions of the ways for a Llama of 8 B; of strategies in fp32, those in exact."""
    model = [word for word in FINE_TUNED["llama-8b"] if not word.startswith("--mixed_precision")]
    model += ["--recompute=full", "--global_batch_size=16"]

    def settings(name: str) -> tuple[int, str]:
        way = WAYS[name]
        is_exact = "--mixed_precision" not in way.flags and name != "fp32"
        return way.processes, f"{_EXACT} {way.flags}" if is_exact else way.flags.replace("=weights", "=.")

    names = [name for name in flags.ways if "deepspeed" not in WAYS[name].flags]  # which `plan` does not predict
    for name, record in zip(names, predictions(model, [*map(settings, names)]), strict=True):
        yield {"section": "predicted", "way": name} | record


def shapes(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield predictions of three models on 2, 4 and 8 cards, with the same rows per step."""
    for model, words in SHAPES.items():
        sizes = dict(word.removeprefix("--").split("=", 1) for word in words)
        rows, tokens = int(sizes["batch_size"]), int(sizes["max_seq_len"])
        ways = [(way, cards) for cards in CARDS for way in SHARED]
        most = MOST_TENSOR_PARALLEL.get(model, max(CARDS))
        ways = [(way, cards) for way, cards in ways if way != "tensor parallel" or cards <= most]
        settings = [(cards, SHARED[way].format(cards)) for way, cards in ways]
        shared = [*words, _EXACT, f"--global_batch_size={rows * MICRO_BATCHES}"]
        for (way, _), record in zip(ways, predictions(shared, settings), strict=True):
            yield {"section": "shapes", "way": way, "model": model, "size": f"{rows} x {tokens}"} | record


# --- tables
def latest(records: Sequence[Record], section: str) -> list[Record]:
    """Return the last record of each way of a section (by round; by model and number of cards)."""
    found = (record for record in records if record["section"] == section)
    return list({tuple(map(x.get, ("way", "round", "model", "cards"))): x for x in found}.values())


def compared(records: Sequence[Record]) -> list[str]:
    """Tabulate the ways: measured with a small Llama, and predicted for a large one."""
    predictions = {record["way"]: record for record in latest(records, "predicted")}
    runs: dict[str, dict[int, Record]] = {}
    for record in latest(records, "measured"):
        runs.setdefault(record["way"], {})[record["round"]] = record

    def difference(way: str) -> str:
        if WAYS[way].reference == way:
            return ""
        pairs = [(run["loss"], runs[WAYS[way].reference][number]["loss"]) for number, run in runs[way].items()]
        largest = max(abs(a / b - 1) for mine, its in pairs for a, b in zip(mine, its, strict=True))
        return f"{largest:.0e}" if largest else "0"

    def middle(way: str, name: str) -> float:
        return median(run[name] for run in runs[way].values())

    def line(way: str) -> list[str]:
        ratios = [run["cpu_seconds"] / runs["fp32"][number]["cpu_seconds"] for number, run in runs[way].items()]
        sizes = [f"{middle(way, name) / MIB:.1f}" for name in ("state_bytes", "peak_rss_above_import_bytes")]
        cells = [way, str(WAYS[way].processes), difference(way), *sizes, f"{middle(way, 'sent_bytes') / MIB:.1f}"]
        cells += [f"{median(ratios):.2f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if ratios[1:] else "")]
        if large := predictions.get(way):
            moved = f" + {large['elsewhere_bytes'] / GIB:.1f}" if large["elsewhere_bytes"] else ""
            return [*cells, f"{large['device_bytes'] / GIB:.1f}{moved}", f"{large['sent_bytes'] / GIB:.1f}"]
        return [*cells, "-", "-"]

    head = ["way:", "processes", "difference of losses from one process", "MiB of weights and optimizer per process"]
    head += [
        "MiB, peak RSS above imports",
        "MiB that a process sends in a step",
        "processor time of all processes, x fp32",
    ]
    head += ["8 B: GiB on a card + elsewhere", "8 B: GiB that a card sends in a step"]
    return grid(head, [line(way) for way in WAYS if way in runs])


def by_shape(records: Sequence[Record]) -> list[str]:
    """Tabulate, by model and number of cards, what a card holds and what it sends in a step."""
    found = {(x["model"], x["cards"], x["way"]): x for x in latest(records, "shapes")}
    shapes = {x["model"]: f"{x['model']} {x['size']}" for x in found.values()}

    def cell(model: str, cards: int, way: str) -> str:
        if record := found.get((model, cards, way)):
            return f"{record['sent_bytes'] / GIB:.2f} ({record['device_bytes'] / GIB:.1f})"
        return "-" if way == "tensor parallel" else ""

    lines = [
        [f"{shape}, {cards} cards", *(cell(model, cards, way) for way in SHARED)]
        for model, shape in shapes.items()
        for cards in CARDS
    ]
    return grid(["GiB sent in a step (GiB held):", *SHARED], lines)


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first, sections = records[0], {record["section"] for record in records}
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"    {first['command']}", "", f"{first['date']}; {first['machine']['cpu']}; {versions}.", ""]
    for section, names in FIGURES.items():
        if section in sections:
            rows = latest(records, section)
            own = ["way", *[name for name in ("round", "model", "cards") if name in rows[0]]]
            lines += [
                f"## {section}",
                "",
                *grid(
                    [f"{own[0]}:", *own[1:], *names],
                    [
                        [*(str(row[name]) for name in own), *(show(row[name]) for name, show in names.items())]
                        for row in rows
                    ],
                ),
                "",
            ]
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f}"


FIGURES = {
    "measured": {
        "tokens_per_second": "{:.0f}".format,
        "cpu_seconds": "{:.2f}".format,
        **dict.fromkeys(("state_bytes", "peak_rss_above_import_bytes", "sent_bytes"), _mib),
        "loss": lambda losses: ", ".join(f"{loss:.7f}" for loss in losses),
    },
    "predicted": dict.fromkeys(("device_bytes", "elsewhere_bytes", "sent_bytes"), _mib),
    "shapes": dict.fromkeys(("device_bytes", "sent_bytes"), _mib),
}
"""The columns of the .md file by section. Bytes are in MiB."""
SECTIONS = {"measured": measured, "predicted": predicted, "shapes": shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--sections", default="measured,predicted,shapes", help=f"comma list of {', '.join(SECTIONS)}")
    parser.add_argument("--train_file", type=Path, help="rows with a prompt and a response, for measured")
    parser.add_argument("--ways", default="", help="ways, separated by semicolons; default: all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args()
    flags.ways = flags.ways.split(";") if flags.ways else [*WAYS]
    shown = [
        word.replace(str(flags.train_file), f"rows{flags.train_file.suffix}") if flags.train_file else word
        for word in sys.argv
    ]
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    about |= {"machine": machine(), "versions": {name: version(name) for name in PACKAGES}}
    for section in flags.sections.split(","):
        for record in SECTIONS[section](flags):
            if flags.output:
                append(flags.output, [about | record], table, "strategies.py")
            else:
                print(record)


if __name__ == "__main__":
    main()
