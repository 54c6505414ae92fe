"""One training of one system in a process of its own: what is equal for all, the systems, what is measured.

`compare.py` starts `python benchmarks/systems.py SETTINGS` (JSON) and reads the record that this writes.
"""

import json
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

# This checkout's lowmem, installed or not. Each system imports what it needs and no more: memory is what we measure.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# --- what is equal for all, besides the flags
SEED = 0
OPTIMIZER = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}  # biases and norms: no decay
SCHEDULE = {"peak": 1e-4, "warmup_steps": 1, "schedule": "cosine"}
WARM_UP_STEPS = 2  # left out of the times: AdamW makes its moments, allocators and thread pools settle


# --- what is not
@dataclass(frozen=True)
class System:
    """What one system has of its own; all else comes from the flags, alike for all."""

    loop: str
    """Whose: lowmem or trainer."""
    optimizer: str = "adamw"
    """adamw or adafactor: each loop's own, with what is its default beside OPTIMIZER."""
    memory: str = "off"
    """lowmem's tier."""
    weights: str = "float32"
    """What Trainer's model is loaded as; a tier of lowmem takes float32 and makes of it what it keeps."""
    recompute: str | None = None
    """full, cheap or off. None: what --recompute says."""
    savers: tuple[str, ...] = ()
    """lowmem's others: offload_activations, release."""
    attention: str = "sdpa"
    """Trainer's: transformers' default, or eager, which lowmem chooses for T5 on a CPU."""

    @property
    def has_bf16_weights(self) -> bool:
        return self.memory != "off" or self.weights == "bfloat16"


SYSTEMS = {
    "lowmem-off": System("lowmem"),
    "lowmem-exact": System("lowmem", memory="exact"),
    "lowmem-lean": System("lowmem", memory="lean"),
    "lowmem-exact-adafactor": System("lowmem", memory="exact", optimizer="adafactor"),
    "lowmem-exact-cheap": System("lowmem", memory="exact", recompute="cheap"),
    "lowmem-lean-offload": System("lowmem", memory="lean", savers=("offload_activations",)),
    "lowmem-lean-released": System("lowmem", memory="lean", savers=("release",)),
    "trainer": System("trainer"),
    "trainer-no-checkpointing": System("trainer", recompute="off"),
    "trainer-adafactor": System("trainer", optimizer="adafactor"),
    "trainer-bf16-weights": System("trainer", weights="bfloat16"),
    "trainer-eager": System("trainer", attention="eager"),
}


@dataclass
class Run:
    """What a system leaves behind for the record."""

    imported_bytes: int
    """Resident after its imports, before a model is there."""
    losses: list[float] = field(default_factory=list)
    """Mean loss over the targets of each optimizer step, in fp32."""
    marks: list[tuple[float, float]] = field(default_factory=list)
    """(wall, CPU) seconds at the end of each optimizer step."""
    tokens: list[int] = field(default_factory=list)
    """Non-padding tokens of each micro-batch: the inputs, and T5's targets too (a causal model's are its inputs)."""

    def mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))


def build(settings: SimpleNamespace) -> None:
    """Save the initial weights, and the byte tokenizer, that every system loads."""
    import torch

    from lowmem import load_model

    torch.manual_seed(SEED)
    model, tokenizer = load_model(model_config=settings.shape)
    model.save_pretrained(settings.folder)
    tokenizer.save_pretrained(settings.folder)


def open_work(settings: SimpleNamespace, tokenizer, config) -> tuple[object, Callable]:
    """Rows and their encoder: those of `train_file`, or generated ones of exactly `seq_len` random tokens."""
    from lowmem import make_encoder, open_rows

    if settings.train_file:
        rows = open_rows(settings.train_file, columns=["prompt", "response"])
        return rows, make_encoder(tokenizer, is_encoder_decoder=config.is_encoder_decoder, max_seq_len=settings.seq_len)
    generator, rows = random.Random(SEED), []
    for _ in range(settings.num_rows):
        ids, response = (generator.choices(range(3, config.vocab_size), k=settings.seq_len) for _ in range(2))
        labels = response if config.is_encoder_decoder else [-100, *ids[1:]]  # nothing predicts a first token
        rows.append({"input_ids": ids, "labels": labels})
    return rows, dict


def open_steps(settings: SimpleNamespace, rows, encode: Callable, **options):
    """lowmem's stream for every system, so that all train on the same rows in one order: those of a step by length."""
    from lowmem import open_stream

    return open_stream(
        rows,
        encode,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        seed=SEED,
        **options,
    )


def make_collate(run: Run, config) -> Callable:
    """lowmem's `collate` for every system, so that all train on the very same tensors; it counts tokens."""
    from lowmem import collate

    def collate_and_count(rows):
        batch = collate(rows, causal=not config.is_encoder_decoder)
        num_inputs = sum(len(row["input_ids"]) for row in rows)
        run.tokens.append(num_inputs + (batch.num_targets if config.is_encoder_decoder else 0))
        return batch

    return collate_and_count


# --- the two loops
def run_lowmem(settings: SimpleNamespace, system: System) -> Run:
    """The library's own loop: the parts of `lowmem.train` that train."""
    from lowmem import (
        TrainState,
        chunked_loss,
        join,
        learning_rate_at,
        load_model,
        make_optimizer,
        parallelize,
        train_step,
    )
    from lowmem.memory import savers

    run = Run(imported_bytes=resident_bytes())
    accelerator = join(mixed_precision="no" if system.has_bf16_weights else settings.mixed_precision)
    model, tokenizer = load_model(settings.folder)
    model = parallelize(model, accelerator)
    optimizer = make_optimizer(model, name=system.optimizer, memory=system.memory, **OPTIMIZER)
    rows, encode = open_work(settings, tokenizer, model.config)
    stream = open_steps(settings, rows, encode, collate=make_collate(run, model.config))
    state = TrainState(model, optimizer, stream, seed=SEED)
    schedule = partial(learning_rate_at, total_steps=settings.steps, **SCHEDULE)
    recompute = {"full": ("recompute",), "cheap": ("recompute_cheap",), "off": ()}[settings.recompute]
    with savers.entered([getattr(savers, name) for name in recompute + system.savers], model, optimizer):
        for step, batches in zip(range(settings.steps), stream, strict=False):
            result = train_step(
                state,
                batches,
                chunked_loss,
                accelerator,
                learning_rate=schedule(step),
                max_grad_norm=settings.max_grad_norm or None,
            )
            run.losses.append(result.loss.item())
            run.mark()
    return run


def run_trainer(settings: SimpleNamespace, system: System) -> Run:
    """transformers' Trainer with its defaults where nothing has to be equal; its rows are encoded before it starts."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lowmem import load_model

    run = Run(imported_bytes=resident_bytes())
    model, tokenizer = load_model(settings.folder, dtype=getattr(torch, system.weights))
    model.set_attn_implementation(system.attention)
    rows, encode = open_work(settings, tokenizer, model.config)
    steps = islice(open_steps(settings, rows, encode), settings.steps)
    row_ids = [row_id for batches in steps for batch in batches for row_id in batch.row_ids]
    collate = make_collate(run, model.config)

    class SameObjective(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Objective: token losses of the step / targets of the step. Llama's own loss divides by
            # `num_items_in_batch`. T5's ignores it and is its micro-batch's mean, which Trainer takes for divided:
            # loss and gradient would be `gradient_accumulation_steps` times too large. Weighing that mean by the
            # micro-batch's share of the targets mends just that, and leaves the model's loss and its memory alone.
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            if not self.model.config.is_encoder_decoder:
                return loss
            return loss * (inputs["labels"] != -100).sum() / num_items_in_batch

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.mark()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                run.losses.append(logs["loss"])

    arguments = TrainingArguments(
        output_dir=f"{settings.folder}/trainer",
        use_cpu=not _on_cuda(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        train_sampling_strategy="sequential",
        bf16=settings.mixed_precision == "bf16",
        optim={"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[system.optimizer],
        weight_decay=OPTIMIZER["weight_decay"],
        adam_beta1=OPTIMIZER["betas"][0],
        adam_beta2=OPTIMIZER["betas"][1],
        adam_epsilon=OPTIMIZER["eps"],
        learning_rate=SCHEDULE["peak"],
        warmup_steps=SCHEDULE["warmup_steps"],
        lr_scheduler_type=SCHEDULE["schedule"],
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing_arguments(settings.recompute == "full"),
    )
    SameObjective(
        model=model,
        args=arguments,
        train_dataset=[encode(rows[row_id]) for row_id in row_ids],
        data_collator=lambda encoded: collate(encoded).inputs,
        callbacks=[Recorder()],
    ).train()
    return run


def checkpointing_arguments(is_wanted: bool) -> dict[str, object]:
    """What TrainingArguments takes to recompute every layer, or none."""
    from transformers import TrainingArguments

    # transformers 5.17 has only the older name, which later ones deprecate
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: is_wanted, f"{name}_kwargs": {"use_reentrant": False}}


# --- what is measured
def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, object]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {"cpu": cpu.partition(":")[2].strip() or platform.machine(), "cores": os.cpu_count()}


def measured(run: Run, settings: SimpleNamespace) -> dict[str, object]:
    """A run as a line of the results; times and tokens are those of the steps after the first WARM_UP_STEPS."""
    import torch

    assert len(run.losses) == len(run.marks) == settings.steps, "a system has run another number of steps"
    marks = run.marks[WARM_UP_STEPS - 1 :]
    wall, cpu = (end - start for start, end in zip(marks[0], marks[-1], strict=True))
    micro_batches = settings.gradient_accumulation_steps
    tokens = sum(run.tokens[WARM_UP_STEPS * micro_batches : settings.steps * micro_batches])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "loss": run.losses,
        "tokens_per_second": tokens / wall,
        "seconds_per_step": median(b[0] - a[0] for a, b in zip(marks, marks[1:], strict=False)),
        "cores_busy": cpu / wall,  # on CPU well below the threads: another program was running, do not trust the times
        "peak_rss_bytes": peak,
        "peak_rss_above_import_bytes": peak - run.imported_bytes,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if _on_cuda() else None,
        "machine": {
            **machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if _on_cuda() else "cpu",
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


LOOPS = {"lowmem": run_lowmem, "trainer": run_trainer}


def main() -> None:
    settings = SimpleNamespace(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(settings.threads)
    if settings.system == "build":
        build(settings)
        return
    system = SYSTEMS[settings.system]
    settings.recompute = system.recompute or settings.recompute
    record = {"settings": asdict(system), **measured(LOOPS[system.loop](settings, system), settings)}
    Path(settings.folder, "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
