"""Train two steps on real or fake tensors, and count the peak bytes of all live tensors.

`memory.py` measures each run in its own process.
"""

import os
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir

from systems import resident_bytes

STEPS = 2  # the first step creates Trainer's moments; steps after the second are like the second


@dataclass(frozen=True)
class Model:
    """A model's shape and its micro-batch. All rows have the same length, so there is no padding and no mask."""

    shape: dict[str, object]
    batch_size: int
    seq_len: int
    """Tokens per row. For T5, the input and the target have this many tokens each."""


@dataclass(frozen=True)
class System:
    """The settings of one system."""

    loop: str
    """lowmem or trainer."""
    memory: str = "off"
    """lowmem's memory tier. With off, weights are fp32 under bf16 autocast, as in Trainer."""
    optimizer: str = "adamw"
    """A name for lowmem's make_optimizer. Trainer always uses torch's fused AdamW."""
    savers: tuple[str, ...] = ()
    """Names in lowmem's SAVERS, except release (see Work). Trainer has only recompute (gradient checkpointing)."""

    @property
    def name(self) -> str:
        tier = [self.memory, *([self.optimizer] if self.optimizer != "adamw" else [])] if self.loop == "lowmem" else []
        return ", ".join([" ".join([self.loop, *tier]), *self.savers])


@dataclass(frozen=True)
class Work:
    """The settings of an optimizer step. More than two micro-batches take no more memory than two."""

    micro_batches: int
    max_grad_norm: float
    """The largest gradient norm; 0: no clipping."""
    savers: tuple[str, ...]
    """Savers that lowmem uses in addition to the system's. They work only with these settings of a step."""


def run(spec: Model, system: System, work: Work, real: bool, for_this_machine: bool) -> dict[str, object]:
    """Train STEPS optimizer steps on real or fake tensors; return the peak bytes and the bytes left at the end.

    Fake tensors predict the bytes on a GPU. If `for_this_machine` is set and there is no GPU, they predict a CPU's.
    """
    if not real:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # fake tensors are always CPU tensors
    import torch

    from lowmem import init_distributed
    from lowmem.model.masks import chosen_on_host
    from lowmem.plan.fakes import fake_tensors, few_slices, gpu_kernels
    from lowmem.plan.meter import CUDA_BLOCK_BYTES, MemoryMeter

    as_on_gpu = torch.cuda.is_available() or not for_this_machine
    slices_of = "cuda" if as_on_gpu else "cpu"
    train = {"lowmem": partial(train_lowmem, real=real, slices_of=slices_of), "trainer": train_trainer}[system.loop]
    accelerator = init_distributed(mixed_precision="bf16" if system.memory == "off" else "no")
    on_gpu = accelerator.device.type == "cuda"
    started = time.perf_counter()
    with ExitStack() as stack:
        if not real:
            stack.enter_context(few_slices())
            stack.enter_context(fake_tensors())
            stack.enter_context(gpu_kernels() if as_on_gpu else nullcontext())
        model = build(spec.shape, accelerator.device, as_on_gpu)
        # no row has padding, and fake tensors have no values that could show this
        stack.enter_context(chosen_on_host({}, is_encoder_decoder=model.config.is_encoder_decoder))
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        with MemoryMeter(block_bytes=CUDA_BLOCK_BYTES if as_on_gpu else 1) as meter:
            meter.count([*model.parameters(), *model.buffers()])

            resident_without_tensors = 0

            def begin() -> None:
                nonlocal resident_without_tensors
                resident_without_tensors = resident_bytes() - meter.live_bytes
                meter.reset_peak()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                elif real:
                    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model

            kept_alive = train(model, spec, system, work, accelerator, begin)
            peaks = {"peak_bytes": meter.peak_bytes, "rest_bytes": meter.live_bytes}
    del kept_alive
    if real and on_gpu:
        peaks["allocated_bytes"] = torch.cuda.max_memory_allocated()
        peaks["reserved_bytes"] = torch.cuda.max_memory_reserved()
    elif real:
        peaks["resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident_without_tensors
    return peaks | {
        "num_parameters": num_parameters,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def build(shape: dict[str, object], device, on_gpu: bool):
    """Build the model in fp32 and in training mode, as Trainer and lowmem's tiers expect."""
    import torch
    from transformers import AutoConfig

    from lowmem.model.build import attention_options, build_model

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    with device:
        return build_model(config, **attention_options(config, on_gpu=on_gpu))


def train_lowmem(
    model,
    spec: Model,
    system: System,
    work: Work,
    accelerator,
    begin: Callable[[], None],
    *,
    real: bool,
    slices_of: str,
) -> object:
    """Train with lowmem. Slices of weights and logits are as large as on the device `slices_of` (cuda or cpu)."""
    from lowmem import Batch, TrainState, chunked_loss, make_optimizer, train_step
    from lowmem.cross_entropy import SLICE_ELEMENTS
    from lowmem.memory.savers import SAVERS, entered
    from lowmem.optim.tiers import slice_elements_for
    from lowmem.plan.fakes import HostCopies

    savers = SAVERS if real else HostCopies().savers
    slice_elements = slice_elements_for(list(model.parameters()), slices_of)
    optimizer = make_optimizer(model, name=system.optimizer, memory=system.memory, slice_elements=slice_elements)
    state = TrainState(model, optimizer)
    kernels = None if real else slices_of == "cuda"
    loss_fn = partial(chunked_loss, slice_elements=SLICE_ELEMENTS[slices_of], fused=kernels)
    num_targets = spec.batch_size * (spec.seq_len - (not model.config.is_encoder_decoder))
    with entered([savers[name] for name in system.savers + work.savers], model, state.optimizer):
        begin()
        for _ in range(STEPS):
            inputs = [draw_tokens(model.config, spec.batch_size, spec.seq_len) for _ in range(work.micro_batches)]
            train_step(
                state,
                [Batch(tokens, num_targets, row_ids=[]) for tokens in inputs],
                loss_fn,
                accelerator,
                learning_rate=1e-4,
                max_grad_norm=work.max_grad_norm or None,
            )
    return state


def train_trainer(model, spec: Model, system: System, work: Work, accelerator, begin: Callable[[], None]) -> object:
    """Train the same steps with transformers' Trainer; settings not given here are its defaults."""
    import torch
    from loops.around import checkpointing_arguments
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=gettempdir(),  # required, but nothing is written to it
        use_cpu=accelerator.device.type == "cpu",
        max_steps=STEPS,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=work.micro_batches,
        bf16=True,
        optim="adamw_torch_fused",
        max_grad_norm=work.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing_arguments("recompute" in system.savers),
    )
    num_rows = STEPS * work.micro_batches * spec.batch_size
    rows = draw_tokens(model.config, num_rows, spec.seq_len)
    # make `to` do nothing: the model is on its device, and `to` swaps parameters, which fake tensors do not support
    model.to = lambda *args, **kwargs: model
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{name: tokens[row] for name, tokens in rows.items()} for row in range(num_rows)],
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )
    trainer.remove_callback(PrinterCallback)
    begin()
    trainer.train()
    return trainer


def draw_tokens(config, batch_size: int, seq_len: int):
    """Draw random token ids and labels for the model."""
    import torch

    ids, labels = (torch.randint(3, config.vocab_size, (batch_size, seq_len)) for _ in range(2))
    if not config.is_encoder_decoder:
        labels = ids.clone()
        labels[:, 0] = -100  # the first token has no earlier token that could predict it
    return {"input_ids": ids, "labels": labels}
