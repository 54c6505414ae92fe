"""Compare LoRA in lowmem with peft under transformers' Trainer and with TRL's SFTTrainer; compare loss curves of tiers.

    python benchmarks/adapters.py --output=benchmarks/results/adapters.jsonl
    python benchmarks/adapters.py --curves --output=benchmarks/results/adapters.jsonl

Each run is a new process, and the runs are interleaved. All systems have the same objective and padded widths, but
TRL's loss needs a mask, so it attends with one, the others without. Appends JSON lines to --output, and writes tables
to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
from data import markdown
from launching import run_to_end
from records import MIB, Record, append
from run_system import phase_seconds
from systems import Run, System, encoded_rows, machine, open_steps, resident_bytes, write_rows

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,  # so that the head's share of the products is that of Llama 3.1 8B, 7 to 9 percent
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
# Wide enough that each adapter's matrix has more than 4,096 elements: lean keeps smaller ones as exact does.
TINY = LLAMA | {"vocab_size": 384, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 5, "num_key_value_heads": 5}


@dataclass(frozen=True)
class Adapted(System):
    """The settings of one system that trains adapters."""

    packing: bool = False
    """Whether lowmem packs the rows of a step."""


SYSTEMS = {
    "lowmem-exact": Adapted("lora_lowmem", memory="exact"),
    "lowmem-lean": Adapted("lora_lowmem", memory="lean"),
    "lowmem-off": Adapted("lora_lowmem"),  # fp32 adapters under autocast
    "lowmem-exact-packed": Adapted("lora_lowmem", memory="exact", packing=True),
    "trainer": Adapted("lora_trainer"),
    "trl": Adapted("lora_trl"),
}
REFERENCE = "trainer"
# off: fp32 adapters and moments. The control, adapters and moments in bf16, shows what a real difference looks like.
ARMS = {name: SYSTEMS[f"lowmem-{name}"] for name in ("off", "exact", "lean")}
ARMS |= {"bf16-adapters": Adapted("lora_lowmem", weights="bfloat16")}
BASE_STEPS = 150  # of training the base of the curves
SUCCESSORS = (0.4, 0.3, 0.2, 0.1)  # probabilities of the tokens that may follow a token
LAST = 20  # steps over which a run's training loss is averaged
WARM_UP = 1  # steps that are not timed
LIMIT_SECONDS = 1800


# --- the work: a model, adapters and rows
def draw_rows(settings: SimpleNamespace, number: int, *, seed: int, changed: bool) -> list[Record]:
    """Draw encoded rows of a prompt and a response, of varying length, from a Markov chain of tokens.

    With `changed`, every second token has other successors: this is what adapters learn on a base without them.
    """
    vocabulary, longest = settings.shape["vocab_size"], settings.max_seq_len
    chain, others = np.random.default_rng(0).integers(3, vocabulary, (2, vocabulary, len(SUCCESSORS)))
    if changed:
        chain[::2] = others[::2]
    generator, rows = np.random.default_rng((seed, changed)), []
    for _ in range(number):
        prompt, response = np.exp(generator.normal(np.log([longest / 6, longest / 4]), 0.6)).astype(int).tolist()
        prompt = min(max(prompt, 4), longest // 2)
        response = min(max(response, 4), longest - prompt)
        ids = [int(generator.integers(3, vocabulary))]
        for successor in generator.choice(len(SUCCESSORS), prompt + response - 1, p=SUCCESSORS):
            ids.append(int(chain[ids[-1], successor]))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def read_rows(settings: SimpleNamespace, number: int) -> list[Record]:
    """Encode the first rows of --train_file with a byte-pair tokenizer that is trained on them."""
    from corpus import fast_tokenizer

    from lowmem import encode_causal, open_rows

    rows = open_rows(settings.train_file, columns=["prompt", "response"])
    rows = [rows[index] for index in range(number)]
    tokenizer = fast_tokenizer([row["prompt"] + row["response"] for row in rows], settings.shape["vocab_size"])
    encode = encode_causal(tokenizer, max_seq_len=settings.max_seq_len)
    return [{name: encode(row)[name] for name in ("input_ids", "labels")} for row in rows]


def build(settings: SimpleNamespace) -> Record:
    """Save what all systems load: a base in bf16, adapters in fp32, and encoded rows. Return the work of each step."""
    import torch

    from lowmem import add_lora, collate, load_model, save_model

    if not Path(settings.folder, "config.json").exists():
        torch.manual_seed(0)
        model, tokenizer = load_model(model_config=settings.shape)
        if settings.has_trained_base:
            train_base(settings, model)
        tokenizer.save_pretrained(settings.folder)
        model.to(torch.bfloat16).save_pretrained(settings.folder)
    torch.manual_seed(settings.seed)
    model, _ = load_model(settings.folder, dtype=torch.bfloat16)
    save_model(add_lora(model, **LORA), settings.adapters)
    if settings.train_file:
        rows = read_rows(settings, settings.num_rows)
    else:
        rows = draw_rows(settings, settings.num_rows, seed=settings.seed, changed=True)
    held_out = draw_rows(settings, settings.held_out, seed=10**6, changed=True)
    Path(settings.folder, "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + held_out))
    write_rows(settings, rows, dict)
    size = settings.batch_size * settings.gradient_accumulation_steps
    encoded = encoded_rows(settings.folder)
    steps = [encoded[first : first + size] for first in range(0, len(encoded), size)]
    found = {"targets": [sum(label != -100 for row in step for label in row["labels"]) for step in steps]}
    tokens = sum(len(row["input_ids"]) for row in encoded)
    for name, packed_seq_len in (("padding", None), ("padding_packed", settings.max_seq_len)):
        options = {"packed_seq_len": packed_seq_len, "collate": partial(collate, causal=True)}
        stream = open_steps(settings, rows, dict, **options)
        batches = [batch for _, step in zip(steps, stream, strict=False) for batch in step]
        found[name] = 1 - tokens / sum(batch.inputs["input_ids"].numel() for batch in batches)
    return found


def train_base(settings: SimpleNamespace, model) -> None:
    """Train all weights on rows of the chain that adapters then find changed."""
    from lowmem import TrainState, chunked_loss, collate, init_distributed, learning_rate_at, make_optimizer, train_step

    accelerator, optimizer = init_distributed(), make_optimizer(model, memory="off")
    number = BASE_STEPS * settings.batch_size * settings.gradient_accumulation_steps
    rows = draw_rows(settings, number, seed=0, changed=False)
    stream = open_steps(settings, rows, dict, collate=partial(collate, causal=True))
    state = TrainState(model, optimizer, stream)
    for step, batches in zip(range(BASE_STEPS), stream, strict=False):
        rate = learning_rate_at(step, total_steps=BASE_STEPS, peak=2e-3, warmup_steps=10)
        train_step(state, batches, chunked_loss, accelerator, learning_rate=rate, max_grad_norm=1.0)


# --- one run
def child(settings: SimpleNamespace) -> None:
    """Build the work, or train one system on it, and write the record."""
    import torch

    torch.set_num_threads(settings.threads)
    record = build(settings) if settings.system is None else train(settings)
    Path(settings.output, "record.json").write_text(json.dumps(record))


def train(settings: SimpleNamespace) -> Record:
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401 (imports do not count as memory of training)

    system = Adapted(**settings.system)
    loop = import_module(f"loops.{system.loop}")
    torch.manual_seed(0)
    run = Run(imported_bytes=resident_bytes())
    found = loop.train(settings, system, run)
    assert len(run.losses) == len(run.marks) == settings.steps, "the system did not take --steps steps"
    first, last = run.marks[WARM_UP - 1], run.marks[-1]
    targets = sum(settings.targets[WARM_UP:])
    return {
        "targets_per_second": targets / (last.wall - first.wall),
        "targets_per_cpu_second": targets / (last.cpu - first.cpu),
        "cpu_seconds_per_step": median(b.cpu - a.cpu for a, b in zip(run.marks, run.marks[1:], strict=False)),
        "phase_seconds": phase_seconds(run.phases[WARM_UP:]),
        "peak_rss_above_import_bytes": run.peak_rss_bytes - run.imported_bytes,
        "loss": run.losses,
        "grad_norm": run.grad_norms,
        **found,
    }


class Work:
    """A folder with the model, adapters and rows of one seed. Each method starts a process."""

    def __init__(self, folder: Path, flags: argparse.Namespace, **settings: object):
        names = ("batch_size", "gradient_accumulation_steps", "max_seq_len", "learning_rate", "threads", "train_file")
        self._settings = {name: getattr(flags, name) for name in names} | settings
        self._settings |= {"folder": str(folder / "model"), "adapters": str(folder / f"adapters-{settings['seed']}")}
        self._settings |= {"processes": 1, "mixed_precision": "bf16", "recompute": "full", "max_grad_norm": 1.0}
        rows_per_step = flags.batch_size * flags.gradient_accumulation_steps
        self._settings["num_rows"] = rows_per_step * settings["steps"]
        self.about = self._start(system=None)
        self._settings["targets"] = self.about["targets"]

    def train(self, system: Adapted) -> Record:
        return self._start(system=vars(system))

    def _start(self, **more: object) -> Record:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._settings["threads"]), "HF_HUB_OFFLINE": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}  # without this, each system would use a GPU in its own way
        with tempfile.TemporaryDirectory() as output:
            settings = json.dumps(self._settings | more | {"output": output})
            run_to_end([sys.executable, __file__, "--child", settings], seconds=LIMIT_SECONDS, env=environment)
            return json.loads(Path(output, "record.json").read_text())


# --- the measurements
def speeds(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield a record per run of a system."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"steps": flags.steps + WARM_UP, "seed": 0, "has_trained_base": False, "held_out": 0}
        work = Work(Path(folder), flags, shape=LLAMA, **sizes)
        for repeat in range(flags.repeats):
            for name in flags.systems:
                found = work.train(SYSTEMS[name])
                yield {"what": "speed", "system": name, "repeat": repeat, "shape": LLAMA, **work.about, **found}


def curves(flags: argparse.Namespace) -> Iterator[Record]:
    """Yield a record per seed and arm. A seed has its own adapters and training rows; the base is the same for all."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(flags.seeds):
            sizes = {"steps": flags.steps, "seed": seed, "has_trained_base": True, "held_out": 256}
            work = Work(Path(folder), flags, shape=TINY, **sizes)
            for arm, system in ARMS.items():
                yield {"what": "curve", "arm": arm, "seed": seed, "shape": TINY, **work.train(system)}


# --- the tables
def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    settings = ", ".join(f"{name} {value}" for name, value in first["settings"].items())
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    of_shape = {name: first["shape"][name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")}
    shape = ", ".join(f"{name} {value}" for name, value in of_shape.items())
    title = "Loss curves" if first["what"] == "curve" else "Speed and memory"
    lines = [f"## {title}: Llama with {shape}", "", f"    {first['command']}", ""]
    lines += [f"{first['date']}; {first['machine']['cpu']}; {settings}; {versions}.", ""]
    return "\n".join([*lines, *(curve_tables if first["what"] == "curve" else speed_tables)(records)])


def speed_tables(records: list[Record]) -> list[str]:
    of: dict[str, list[Record]] = {}
    for record in records:
        of.setdefault(record["system"], []).append(record)
    rows, steps = [], []
    for system, runs in of.items():
        middle = partial(median_of, runs)
        pairs = list(zip(runs, of.get(REFERENCE, []), strict=False))
        speed, memory = "targets_per_cpu_second", "peak_rss_above_import_bytes"
        busy = median(run["targets_per_second"] / run[speed] for run in runs)
        faster, larger = ([ours[name] / theirs[name] for ours, theirs in pairs] for name in (speed, memory))
        rows.append(
            [
                *(system, str(len(runs)), f"{middle('cpu_seconds_per_step'):.2f}"),
                *(f"{min(run['cpu_seconds_per_step'] for run in runs):.2f}", f"{middle(speed):,.0f}"),
                *(spread(faster), f"{middle('targets_per_second'):,.0f}", f"{busy:.2f}"),
                *(f"{middle(memory) / MIB:,.0f}", spread(larger), f"{runs[0]['trained_weights']:,}"),
            ]
        )
        of_steps = [[f"{value:.4f}" for value in runs[0][name]] for name in ("loss", "grad_norm")]
        steps.append([system, *map(", ".join, of_steps)])
    ratio = f"x {REFERENCE} (smallest to largest of a round)"
    head = ["system:", "runs", "CPU seconds per step", "smallest", "targets per CPU second", ratio]
    head += ["targets per second", "cores busy", "peak RSS above imports, MiB", ratio, "trained weights"]
    padding = f"padding {records[0]['padding']:.1%}, packed {records[0]['padding_packed']:.1%}"
    title = f"Medians; the first step is not timed; {padding}; trl attends with a mask, the others without"
    lines = markdown(title, head, rows)
    return [*lines, *markdown("The first run", ["system:", "loss of each step", "gradient norm of each step"], steps)]


def median_of(runs: list[Record], name: str) -> float:
    return median(run[name] for run in runs)


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"


def curve_tables(records: list[Record]) -> list[str]:
    of = {(record["arm"], record["seed"]): record for record in records}
    arms, seeds = list(dict.fromkeys(arm for arm, _ in of)), sorted({seed for _, seed in of})
    seeds = [seed for seed in seeds if all((arm, seed) in of for arm in arms)]  # the last one may be incomplete
    if len(seeds) < 2:
        return []
    losses = {arm: np.array([of[arm, seed]["loss"] for seed in seeds]) for arm in arms}  # (seeds, steps)
    held_out = {arm: np.array([of[arm, seed]["held_out_loss"] for seed in seeds]) for arm in arms}
    rows, differences = [], []
    for arm in arms:
        training, result = losses[arm][:, -LAST:].mean(), held_out[arm]
        of_seeds = [f"{loss:.5f}" for loss in result]
        rows.append([arm, f"{training:.4f}", *of_seeds, f"{result.mean():.5f}", f"{result.std(ddof=1):.5f}"])
        if arm != "off":
            steps, end = losses[arm] - losses["off"], result - held_out["off"]
            is_inside = np.abs(end).max() < held_out["off"].std(ddof=1)
            differences.append(
                [
                    *(f"{arm} - off", f"{np.abs(steps).max():.5f}", f"{np.abs(steps).mean():.5f}"),
                    *(f"{steps.mean():+.5f}", f"{end.mean():+.5f}", f"{np.abs(end).max():.5f}"),
                    "yes" if is_inside else "no",
                ]
            )
    head = ["arm:", f"training loss, last {LAST} steps", *(f"held-out loss, seed {seed}" for seed in seeds)]
    head += ["mean", "standard deviation over seeds"]
    first, trained = losses["off"][:, 0].mean(), records[0]["trained_weights"]
    lines = markdown(f"{trained:,} trained weights; loss of the first step: {first:.4f}", head, rows)
    per_step = losses["off"].std(0, ddof=1).mean()
    head = ["arms:", "largest difference of a step's loss", "mean size", "mean", "mean difference of held-out losses"]
    head += ["largest", "largest is inside the standard deviation of off's"]
    title = f"Same seed, same rows (over seeds, off's loss of a step has a standard deviation of {per_step:.4f})"
    return [*lines, *markdown(title, head, differences)]


# --- the command
def parse_flags(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", help="rows with a prompt and a response; default: rows of a Markov chain")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_seq_len", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run; with --curves, all steps")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds: A B C A B C ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma list")
    parser.add_argument("--curves", action="store_true", help="compare loss curves of a tiny model instead of speed")
    parser.add_argument("--seeds", type=int, default=3, help="with --curves")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.systems = flags.systems.split(",")
    if flags.steps < 1 or flags.seeds < 2 or flags.repeats < 1:
        parser.error("--steps and --repeats must be at least 1, and --seeds at least 2")
    if flags.curves and flags.train_file:
        parser.error("--curves needs the rows of its chain, which its base is trained on: remove --train_file")
    if unknown := set(flags.systems) - SYSTEMS.keys():
        parser.error(f"--systems has unknown names {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    if "trl" in flags.systems and not flags.curves and not find_spec("trl"):
        parser.error("trl is not installed: pip install trl, or remove it from --systems")
    return flags


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(SimpleNamespace(**json.loads(sys.argv[2])))
        return
    flags = parse_flags(sys.argv[1:])
    shown = [argument for argument in sys.argv if not argument.startswith("--output")]
    if flags.train_file:
        shown = [argument.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for argument in shown]
    names = ("batch_size", "gradient_accumulation_steps", "max_seq_len", "learning_rate", "steps", "threads")
    packages = ["torch", "transformers", "accelerate", "peft"]
    packages += ["trl"] if "trl" in flags.systems and not flags.curves else []
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    shared |= {"machine": machine(), "versions": {name: version(name) for name in packages}}
    shared |= {"settings": {name: getattr(flags, name) for name in names}}
    records = []
    for record in curves(flags) if flags.curves else speeds(flags):
        records.append(record | shared)
        print({name: value for name, value in record.items() if name != "loss"}, file=sys.stderr, flush=True)
        if flags.output:
            append(flags.output, records[-1:], table, "adapters.py")
    print(table(records))


if __name__ == "__main__":
    main()
