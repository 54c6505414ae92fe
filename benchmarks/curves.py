"""Train on real rows with each memory tier and with reference optimizers, and compare the loss curves.

    python benchmarks/curves.py --train_file=rows.parquet --output=benchmarks/results/curves.jsonl

Writes a JSON line per run to --output, and a figure (.png) and tables (.md) of the same name. See README.md.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from lowmem import (
    Batch,
    TrainState,
    chunked_loss,
    collate,
    init_distributed,
    learning_rate_at,
    load_model,
    make_encoder,
    make_optimizer,
    open_rows,
    open_stream,
    parallelize,
    train_step,
)
from lowmem.distributed.seeds import seed_of
from lowmem.optim.norms import gradient_norms

Record = dict[str, object]
TakeStep = Callable[[int, Sequence[Batch], float], Tensor]
"""Takes (step, its micro-batches, learning rate), updates the weights, returns the step's mean loss (fp32 scalar)."""

MODELS = {
    "t5": {
        "model_type": "t5",
        "vocab_size": 384,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 384,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}
MODELS["t5-wide"] = MODELS["t5"] | {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 3, "num_decoder_layers": 3}
MODELS["llama-wide"] = MODELS["llama"] | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
WEIGHT_DECAY = 0.1  # except for biases and norms
WARM_UP_STEPS = 20
MAX_GRAD_NORM = 1.0
WINDOW = 50  # steps: losses are compared over the first 50, and a run's result is its mean loss over the last 50
SMOOTHED = 10  # steps in the figure's running mean


# --- the arms
def half_away_from_zero(master: Tensor) -> Tensor:
    """Round fp32 to bf16 with ties away from zero, as lowmem does when it splits an fp32 weight into halves."""
    return ((master.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32).to(torch.bfloat16)


def half_to_even(master: Tensor) -> Tensor:
    """Round fp32 to bf16 with ties to even, as torch does."""
    return master.to(torch.bfloat16)


class DefinedAdamW(torch.optim.Optimizer):
    """AdamW over fp32 weights as lowmem/optim/adamw.py defines it: each operation is rounded to fp32."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if not state:
                    state |= {"step": 0, "first": torch.zeros_like(weight), "second": torch.zeros_like(weight)}
                state["step"] += 1
                first, second = state["first"], state["second"]
                weight.mul_(1 - lr * group["weight_decay"])
                first.add_((gradient - first) * (1 - beta1))
                second.mul_(beta2).add_(gradient * gradient * (1 - beta2))
                root = second.double().sqrt().float()  # torch's square root of fp32 may not round to nearest
                root.mul_(1 / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
                weight.sub_(first * (lr / (1 - beta1 ** state["step"])) / root)


@dataclass(frozen=True)
class Arm:
    """One way to train: a memory tier or, if `rounding` is set, a reference (plain torch with lowmem's loss)."""

    memory: str = "off"
    """lowmem's tier. A reference does not use it."""
    optimizer: str = "adamw"
    learning_rate: float = 1.0
    """The factor by which --learning_rate is multiplied for this arm."""
    mixed_precision: str = "no"
    weights: torch.dtype = torch.float32
    """The dtype to which the initial weights are converted."""
    rounding: Callable[[Tensor], Tensor] | None = None
    """Rounds a reference's fp32 masters to its bf16 weights. None: the arm trains with a memory tier."""


CONTROL = "bf16-weights"  # has neither master weights nor stochastic rounding, so its curve must differ visibly
ARMS = {
    "exact": Arm(memory="exact"),
    "reference": Arm(rounding=half_away_from_zero),
    "reference-to-even": Arm(rounding=half_to_even),
    "autocast": Arm(memory="off", mixed_precision="bf16"),
    "fp16": Arm(memory="off", mixed_precision="fp16"),
    "lean": Arm(memory="lean"),
    CONTROL: Arm(memory="off", weights=torch.bfloat16),
    # Adafactor scales its updates by the weights' magnitude, so it needs a larger learning rate
    "exact-adafactor": Arm(memory="exact", optimizer="adafactor", learning_rate=10.0),
    "reference-adafactor": Arm(optimizer="adafactor", learning_rate=10.0, rounding=half_away_from_zero),
}
SAME_ARITHMETIC = [
    ("exact", "reference"),
    ("reference-to-even", "reference"),  # may differ: this pair shows the effect of rounding ties
    ("exact-adafactor", "reference-adafactor"),
]
SAME_CURVE = [
    ("exact", "autocast"),
    ("fp16", "autocast"),
    ("lean", "exact"),
    ("lean", "autocast"),
    (CONTROL, "exact"),  # differs
]


def library_step(arm: Arm, model: nn.Module, accelerator: Accelerator, *, seed: int) -> TakeStep:
    """Return a function that takes optimizer steps with `train_step` and the memory tier of `arm`."""
    optimizer = make_optimizer(model, name=arm.optimizer, memory=arm.memory, weight_decay=WEIGHT_DECAY)
    state = TrainState(model, optimizer, seed=seed)

    def take_step(step: int, batches: Sequence[Batch], learning_rate: float) -> Tensor:
        assert step == state.step, "dropout is seeded by the state's step"
        result = train_step(
            state, batches, chunked_loss, accelerator, learning_rate=learning_rate, max_grad_norm=MAX_GRAD_NORM
        )
        return result.loss

    return take_step


def reference_step(arm: Arm, model: nn.Module, accelerator: Accelerator, *, seed: int) -> TakeStep:
    """Return a function that takes a step in plain torch with fp32 masters. The exact tier must reproduce it.

    It sums the bf16 gradients of the micro-batches in fp32, clips the sums by the library's norm, updates the masters,
    and rounds the masters to the weights of the bf16 model.
    """
    weights = list(model.parameters())
    masters = [weight.detach().clone() for weight in weights]
    decayed = ["bias" not in name and weight.dim() > 1 for name, weight in model.named_parameters()]
    groups = [
        {"params": [master for master, is_decayed in zip(masters, decayed, strict=True) if is_decayed == wanted]}
        | {"weight_decay": WEIGHT_DECAY if wanted else 0.0}
        for wanted in (True, False)
    ]
    if arm.optimizer == "adamw":
        optimizer = DefinedAdamW(groups, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8})
    else:
        optimizer = torch.optim.Adafactor(groups, lr=0.0, foreach=False)

    def round_masters() -> None:
        for weight, master in zip(weights, masters, strict=True):
            weight.data = arm.rounding(master)

    def take_step(step: int, batches: Sequence[Batch], learning_rate: float) -> Tensor:
        num_targets = sum(batch.num_targets for batch in batches)
        loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(seed_of(seed, step, accelerator.process_index, index))  # same masks as train_step
            batch_loss = chunked_loss(model, batch.to(accelerator.device)) / num_targets
            batch_loss.backward()
            loss += batch_loss.detach()
            for weight, master in zip(weights, masters, strict=True):
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad + gradient
        # not clip_grad_norm_: it sums in another order, so the last bit of its norm may differ from train_step's
        norm = torch.linalg.vector_norm(torch.stack(gradient_norms([master.grad for master in masters])))
        clip_grads_with_norm_(masters, MAX_GRAD_NORM, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        round_masters()
        return loss

    round_masters()
    return take_step


# --- one run
def train(name: str, model_name: str, seed: int, flags: argparse.Namespace) -> Record:
    """Train one arm. Initial weights and the order of rows depend on model and `seed`, not on the arm."""
    arm = ARMS[name]
    AcceleratorState._reset_state(reset_partial_state=True)  # otherwise, every arm would get the first arm's precision
    accelerator = init_distributed(mixed_precision=arm.mixed_precision)
    torch.manual_seed(seed)
    model, tokenizer = load_model(model_config=MODELS[model_name])
    model = parallelize(model, accelerator)
    for weight in model.parameters():  # not `model.to`, which would also round the rotary frequencies
        weight.data = weight.data.to(arm.weights)
    encode = make_encoder(tokenizer, is_encoder_decoder=model.config.is_encoder_decoder, max_seq_len=flags.max_seq_len)
    stream = open_stream(
        open_rows(flags.train_file, columns=["prompt", "response"]),
        encode,
        batch_size=flags.batch_size,
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        seed=seed,
        collate=partial(collate, causal=not model.config.is_encoder_decoder),
    )
    schedule = partial(
        learning_rate_at,
        total_steps=flags.steps,
        peak=arm.learning_rate * flags.learning_rate,
        warmup_steps=WARM_UP_STEPS,
    )
    take_step = (reference_step if arm.rounding else library_step)(arm, model, accelerator, seed=seed)
    losses, marks = [], []
    for step, batches in zip(range(flags.steps), stream, strict=False):
        losses.append(take_step(step, batches, schedule(step)).item())
        marks.append(time.perf_counter())
    return {
        "loss": [float(str(np.float32(loss))) for loss in losses],  # the fewest digits that identify the fp32 number
        "weights": digest(model),
        "seconds_per_step": median(after - before for before, after in zip(marks, marks[1:], strict=False)),
    }


def digest(model: nn.Module) -> str:
    """Hash the bytes of all weights."""
    state = blake2b(digest_size=8)
    for weight in model.parameters():
        state.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


# --- the report
def losses_of(records: list[Record], model: str, arm: str) -> np.ndarray:
    """Return an arm's losses, of shape (seeds, steps), sorted by seed."""
    chosen = [record for record in records if (record["model"], record["arm"]) == (model, arm)]
    return np.array([record["loss"] for record in sorted(chosen, key=lambda record: record["seed"])])


def last_losses(records: list[Record], model: str, arm: str) -> list[float]:
    """Return each seed's mean loss over the last WINDOW steps."""
    return losses_of(records, model, arm)[:, -WINDOW:].mean(1).tolist()


def arithmetic_table(records: list[Record], model: str) -> list[str]:
    """Tabulate, for the pairs in SAME_ARITHMETIC, how far their losses and final weights agree."""
    compared = pairs(records, model, SAME_ARITHMETIC)
    if not compared:
        return []
    lines = [
        f"| arms | equal losses | largest relative difference, first {WINDOW} steps | all steps | same final weights |",
        "|---|---:|---:|---:|---:|",
    ]
    for ours, theirs in compared:
        a, b = losses_of(records, model, ours), losses_of(records, model, theirs)
        relative = np.abs(a - b) / np.abs(b)
        ends = [
            {
                record["seed"]: record["weights"]
                for record in records
                if (record["model"], record["arm"]) == (model, arm)
            }
            for arm in (ours, theirs)
        ]
        same = sum(ends[0][seed] == ends[1][seed] for seed in ends[0])
        lines.append(
            f"| {ours}, {theirs} | {(a == b).sum():,} of {a.size:,} | {relative[:, :WINDOW].max():.1e} "
            f"| {relative.max():.1e} | {same} of {len(a)} seeds |"
        )
    return lines


def result_table(records: list[Record], model: str) -> list[str]:
    """Tabulate each arm's mean loss over the last WINDOW steps, for each seed."""
    arms = [arm for arm in ARMS if len(losses_of(records, model, arm))]
    seeds = sorted({record["seed"] for record in records})
    lines = [
        f"| mean loss of the last {WINDOW} steps | {' | '.join(f'seed {seed}' for seed in seeds)} | mean "
        "| standard deviation over seeds | s/step |",
        "|---" + "|---:" * (len(seeds) + 3) + "|",
    ]
    for arm in arms:
        results = last_losses(records, model, arm)
        times = [r["seconds_per_step"] for r in records if (r["model"], r["arm"]) == (model, arm)]
        cells = [f"{result:.4f}" for result in results]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {fmean(results):.4f} | {deviation(results):.4f} | {median(times):.3f} |"
        )
    return lines


def curve_table(records: list[Record], model: str) -> list[str]:
    """Tabulate, for the pairs in SAME_CURVE, the difference of their results and its spread over seeds."""
    compared = pairs(records, model, SAME_CURVE)
    if not compared:
        return []
    lines = [
        f"| arms | difference of the mean losses of the last {WINDOW} steps, mean over seeds "
        "| its standard deviation over seeds | the second arm's own standard deviation over seeds | inside it |",
        "|---|---:|---:|---:|---|",
    ]
    for ours, theirs in compared:
        a, b = last_losses(records, model, ours), last_losses(records, model, theirs)
        differences = [x - y for x, y in zip(a, b, strict=True)]
        inside = "yes" if abs(fmean(differences)) < deviation(b) else "no"
        lines.append(
            f"| {ours} - {theirs} | {fmean(differences):+.5f} | {deviation(differences):.5f} | {deviation(b):.5f} "
            f"| {inside} |"
        )
    return lines


def pairs(records: list[Record], model: str, wanted: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs in `wanted` whose arms were both trained."""
    return [pair for pair in wanted if all(len(losses_of(records, model, arm)) for arm in pair)]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def tables(records: list[Record], settings: dict[str, object], command: str) -> str:
    """Return Markdown: the command, its settings, and up to three tables for each model."""
    description = ", ".join(f"{name} {value}" for name, value in settings.items())
    lines = ["# Loss curves", "", "Generated by benchmarks/curves.py.", "", f"    {command}", "", f"{description}.", ""]
    for model in dict.fromkeys(record["model"] for record in records):
        lines += [f"## {model}", ""]
        for table in (arithmetic_table, result_table, curve_table):
            lines += [*table(records, model), ""]
    return "\n".join(lines)


def draw(records: list[Record], path: Path) -> None:
    """Draw, for each model, the loss curves on the left and the differences of arms on the right.

    Lines are means over seeds, bands are one standard deviation. The grey band is the spread of the first arm's loss.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def smooth(losses: np.ndarray) -> np.ndarray:
        width = min(SMOOTHED, losses.shape[1])
        return np.stack([np.convolve(row, np.ones(width) / width, mode="valid") for row in losses])

    def spread(values: np.ndarray) -> np.ndarray:
        return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])

    def plot(axes, values: np.ndarray, label: str, index: int) -> None:
        style = {"color": f"C{index}", "linestyle": ["-", "--", ":", "-."][index % 4], "linewidth": 1.2}
        axes.plot(steps, values.mean(0), label=label, **style)
        low, high = values.mean(0) - spread(values), values.mean(0) + spread(values)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)

    models = list(dict.fromkeys(record["model"] for record in records))
    figure, rows = pyplot.subplots(len(models), 2, figsize=(13, 4.5 * len(models)), squeeze=False)
    for model, (curves, differences) in zip(models, rows, strict=True):
        losses = {arm: losses_of(records, model, arm) for arm in ARMS}
        losses = {arm: smooth(values) for arm, values in losses.items() if len(values)}
        first = next(iter(losses))
        num_seeds, num_means = losses[first].shape
        steps = np.arange(num_means) + len(records[0]["loss"]) - num_means + 1
        for index, (arm, values) in enumerate(losses.items()):
            plot(curves, values, arm, index)
        limits = [-spread(losses[first]), spread(losses[first])]
        differences.fill_between(steps, *limits, color="0.9", label=f"{first}: standard deviation over seeds")
        for index, (ours, theirs) in enumerate(pairs(records, model, [SAME_ARITHMETIC[0], *SAME_CURVE])):
            plot(differences, losses[ours] - losses[theirs], f"{ours} - {theirs}", index)
            if ours != CONTROL:
                limits.append((losses[ours] - losses[theirs]).mean(0))
        limit = 1.2 * np.abs(limits).max() or 1.0
        differences.set_ylim(-limit, limit)
        curves.set(title=f"{model}: loss, {num_seeds} seeds, running mean of {SMOOTHED} steps", ylabel="loss per token")
        differences.set(title=f"{model}: difference of the losses, same seed, same rows")
        for axes in (curves, differences):
            axes.set_xlabel("optimizer step")
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- the command
def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""

    def positive(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    def names_of(known: dict[str, object]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown name {', '.join(unknown)}: choose from {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train_file", required=True, help="rows with a prompt and a response: parquet or JSONL")
    parser.add_argument("--output", type=Path, required=True, help="NAME.jsonl; also writes NAME.png and NAME.md")
    parser.add_argument("--models", type=names_of(MODELS), default=["t5", "llama"], help=", ".join(MODELS))
    parser.add_argument("--arms", type=names_of(ARMS), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch_size", type=positive, default=8, help="rows per micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=2)
    parser.add_argument("--max_seq_len", type=positive, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak, after the warm-up")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    flags = parser.parse_args(arguments)
    if flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl: a .png and .md are written next to it")
    if not Path(flags.train_file).is_file():
        parser.error(f"--train_file={flags.train_file} is not a file: name a parquet or JSONL file")
    if flags.steps < 2:
        parser.error(f"--steps={flags.steps} leaves no step to time: set at least 2")
    return flags


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    torch.set_num_threads(flags.threads)
    names = ("steps", "batch_size", "gradient_accumulation_steps", "max_seq_len", "learning_rate", "threads")
    settings = {name: getattr(flags, name) for name in names}
    rows = Path(flags.train_file).read_bytes()
    settings |= {"rows": blake2b(rows, digest_size=8).hexdigest()}  # a hash, so that no local path is recorded
    settings |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    settings |= {name: version(name) for name in ("torch", "transformers", "accelerate")}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    # Training is deterministic, so a repeated command skips the runs already recorded with these settings.
    lines = flags.output.read_text().splitlines() if flags.output.exists() else []
    records = [record for record in map(json.loads, lines) if record["settings"] == settings]
    done = {(record["model"], record["seed"], record["arm"]) for record in records}
    runs = [(m, s, a) for m in flags.models for s in range(flags.seeds) for a in flags.arms]
    for number, (model, seed, arm) in enumerate(runs, 1):
        if (model, seed, arm) in done:
            continue
        record = {"model": model, "arm": arm, "seed": seed, "settings": settings, **train(arm, model, seed, flags)}
        with open(flags.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        records.append(record)
        result = fmean(record["loss"][-WINDOW:])
        print(
            f"{number} of {len(runs)}: {model}, seed {seed}, {arm}: {result:.4f}, "
            f"{record['seconds_per_step']:.3f} s/step",
            file=sys.stderr,
        )
    chosen = [record for record in records if (record["model"], record["seed"], record["arm"]) in runs]
    chosen.sort(key=lambda record: runs.index((record["model"], record["seed"], record["arm"])))
    shown = [argument.replace(flags.train_file, f"rows{Path(flags.train_file).suffix}") for argument in sys.argv]
    text = tables(chosen, settings, command=shlex.join(["python", *shown]))
    flags.output.with_suffix(".md").write_text(text)
    draw(chosen, flags.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
