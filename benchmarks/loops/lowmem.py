"""Train with lowmem: the loop of `lowmem.train`, without evaluation, checkpoints and retries."""

from functools import partial
from types import SimpleNamespace

from systems import OPTIMIZER, SCHEDULE, SEED, Run, System, open_steps, open_work

from lowmem import (
    TrainState,
    chunked_loss,
    collate,
    init_distributed,
    learning_rate_at,
    load_model,
    make_optimizer,
    parallelize,
    train_step,
)
from lowmem.memory import savers


def train(settings: SimpleNamespace, system: System, run: Run) -> None:
    accelerator = init_distributed(mixed_precision="no" if system.has_bf16_weights else settings.mixed_precision)
    model, tokenizer = load_model(settings.folder)
    model = parallelize(model, accelerator, sharding_strategy=system.sharding_strategy)
    optimizer = make_optimizer(model, name=system.optimizer, memory=system.memory, **OPTIMIZER)
    rows, encode = open_work(settings, tokenizer, model.config)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    padded = partial(collate, causal=not model.config.is_encoder_decoder)
    stream = open_steps(settings, rows, encode, collate=padded, **ranks)
    state = TrainState(model, optimizer, stream, seed=SEED)
    schedule = partial(learning_rate_at, total_steps=settings.steps, **SCHEDULE)
    recompute = {"full": ["recompute"], "cheap": ["recompute_cheap"], "off": []}[settings.recompute]
    wanted = [getattr(savers, name) for name in [*recompute, *system.savers]]
    clip = {"max_grad_norm": settings.max_grad_norm or None}
    run.watch(optimizer)
    loss_fn = run.timed("forward", chunked_loss)
    with savers.entered(wanted, model, optimizer):
        for step, batches in zip(range(settings.steps), stream, strict=False):
            result = train_step(state, batches, loss_fn, accelerator, learning_rate=schedule(step), **clip)
            run.losses.append(result.loss.item())
            run.mark()
    accelerator.end_training()
