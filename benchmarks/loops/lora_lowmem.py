"""Train LoRA adapters with lowmem: the loop of `lowmem.train`, without evaluation, checkpoints and retries."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft.tuners.lora  # noqa: F401 (lowmem imports it on first use; imports do not count as memory of training)
import torch
from systems import OPTIMIZER, SCHEDULE, SEED, Run, System, open_steps

from lowmem import (
    TrainState,
    chunked_loss,
    collate,
    evaluate,
    init_distributed,
    learning_rate_at,
    load_model,
    make_optimizer,
    open_eval,
    parallelize,
    train_step,
)
from lowmem.memory.savers import entered, recompute


def train(settings: SimpleNamespace, system: System, run: Run) -> dict[str, object]:
    accelerator = init_distributed(mixed_precision="no" if system.memory != "off" else settings.mixed_precision)
    model, _ = load_model(settings.adapters, dtype=torch.bfloat16, on_meta=True)
    model = parallelize(model, accelerator, fill=False)
    if system.has_bf16_weights and system.memory == "off":  # the control
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    optimizer = make_optimizer(model, memory=system.memory, **OPTIMIZER)
    rows = [json.loads(line) for line in Path(settings.folder, "all.jsonl").read_text().splitlines()]
    rows, held_out = rows[: settings.num_rows], rows[settings.num_rows :]
    padded = partial(collate, causal=True)
    packing = {"packed_seq_len": settings.max_seq_len if system.packing else None}
    stream = open_steps(settings, rows, dict, collate=padded, **packing)
    state = TrainState(model, optimizer, stream, seed=SEED)
    schedule = partial(learning_rate_at, total_steps=settings.steps, **SCHEDULE | {"peak": settings.learning_rate})
    run.watch(optimizer)
    loss_fn = run.timed("forward", chunked_loss)
    clip = {"max_grad_norm": settings.max_grad_norm}
    with entered([recompute], model, optimizer):
        for step, batches in zip(range(settings.steps), stream, strict=False):
            result = train_step(state, batches, loss_fn, accelerator, learning_rate=schedule(step), **clip)
            run.losses.append(result.loss.item())
            run.grad_norms.append(result.grad_norm.item())
            run.mark()
    found = {"trained_weights": model.num_parameters(only_trainable=True)}
    if held_out:
        batches = open_eval(held_out, dict, batch_size=settings.batch_size, collate=padded)
        found["held_out_loss"] = evaluate(model, batches, chunked_loss, accelerator)["eval_loss"]
    return found
