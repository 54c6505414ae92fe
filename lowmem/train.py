"""The worked loop: every part of the library in the order in which a run needs it. Copy it, change what you like."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.resume import check_same_run, checkpoint_to_resume, rows_per_step
from lowmem.checkpoint.save import check_space, save_checkpoint, save_model
from lowmem.config.train_config import CHANGEABLE_ON_RESUME, MAY_DIFFER_BETWEEN_RANKS, TrainConfig
from lowmem.config.zero import complete_zero_config
from lowmem.data.batch import collate
from lowmem.data.encode import make_encoder
from lowmem.data.eval_batches import open_eval
from lowmem.data.packing import check_packing
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows
from lowmem.data.stream import open_stream
from lowmem.distributed import zero
from lowmem.distributed.collectives import sum_over_ranks
from lowmem.distributed.consistency import check_same, code, model_digest, rows_digest, seen_by_all, tokenizer_digest
from lowmem.distributed.placement import data_place
from lowmem.distributed.setup import init_distributed, make_deterministic
from lowmem.distributed.sharding import parallelize
from lowmem.distributed.signals import Signals
from lowmem.errors import SaveError
from lowmem.evaluation import measure
from lowmem.loss import LOSSES, check_loss
from lowmem.memory.savers import compiled, entered, offload_activations, recompute, recompute_cheap, release
from lowmem.model import freeze, load_model
from lowmem.optim.make import make_optimizer
from lowmem.optim.schedule import learning_rate_at
from lowmem.recover import fitting_step
from lowmem.report import Report
from lowmem.step import TrainState


class Outcome(NamedTuple):
    """How a run ended that did not fail."""

    step: int
    """Optimizer steps done; of a preempted run those that are saved."""
    preempted: bool
    """True: a signal ended it before its last step was done and reported."""


def train(
    config: TrainConfig,
    train_rows: Rows,
    validation_rows: Rows | None,
    test_rows: Rows | None,
    *,
    signals: Signals,
    on_abort: Callable[[str], None] | None = None,
) -> Outcome:
    """Train as `config` says, from the start or from a checkpoint, and leave the model in `output_dir`/model.

    A signal that a rank has caught ends the run on all of them: after the step or evaluation that is going on, once it
    is saved; before the first step, as soon as all is loaded. `on_abort` is called with a message before a silent or
    failed rank makes this one exit.
    """
    # --- processes
    output, settings = Path(config.output_dir), dataclasses.asdict(config)
    trackers = [name for name in config.report_to.split(",") if name]
    accelerator = init_distributed(
        mixed_precision=config.autocast,
        deepspeed=complete_zero_config(config.deepspeed, **config.zero_settings) if config.deepspeed else None,
        report_to=trackers,
        output_dir=output,
        heartbeat_timeout=config.heartbeat_timeout,
        on_abort=on_abort,
        signals=signals,
    )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if world_size > 1:
        flags = {f"--{name}": value for name, value in settings.items() if name not in MAY_DIFFER_BETWEEN_RANKS}
        all_rows = {"training rows": train_rows, "validation rows": validation_rows, "test rows": test_rows}
        digests = {name: rows_digest(rows) for name, rows in all_rows.items() if rows is not None}
        check_same(code() | flags | digests | seen_by_all(output))
    checkpoint = checkpoint_to_resume(config.resume, output)
    changes = check_same_run(checkpoint, settings, may_change=CHANGEABLE_ON_RESUME) if checkpoint is not None else []
    make_deterministic(config.deterministic)

    # --- model and optimizer
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(
        config.model_name_or_path,
        model_config=config.model_config,
        tokenizer_name_or_path=config.tokenizer_name_or_path,
        on_meta=config.is_divided and (config.model_name_or_path is not None or rank != 0),
    )
    freeze(model, parts=[part for part in config.freeze.split(",") if part])
    if world_size > 1:
        # one built from scratch is drawn by each rank as its CPU does, and then gets the weights of rank 0
        digest = model_digest(model, weights=config.model_name_or_path is not None)
        check_same({"the model": digest, "the tokenizer": tokenizer_digest(tokenizer)})
    model = parallelize(
        model,
        accelerator,
        sharding_strategy=config.sharding_strategy,
        shard_size=config.shard_size,
        cpu_offload=config.cpu_offload,
        tp_size=config.tp_size,
    )
    place = data_place(model)
    optimizer = make_optimizer(
        model,
        name=config.optimizer,
        memory=config.memory or "off",
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    eval_loss_fn = LOSSES[config.loss]
    loss_fn = partial(eval_loss_fn, label_smoothing=config.label_smoothing)
    savers = {
        recompute: config.recompute == "full",
        recompute_cheap: config.recompute == "cheap",
        offload_activations: config.offload_activations,
        release: config.release,
        compiled: config.compile,
    }
    savers = [saver for saver, is_wanted in savers.items() if is_wanted]
    with entered(savers, model, optimizer):
        pass  # what any of them refuses is refused here, before a run has begun
    check_loss(loss_fn, model)
    if config.packing:
        check_packing(model)

    # --- rows
    encode = make_encoder(tokenizer, is_encoder_decoder=model.config.is_encoder_decoder, **config.encoding)
    skips = config.on_bad_row == "skip"
    quarantine = Quarantine(config.max_bad_rows, output / f"bad_rows-{rank}.jsonl") if skips else None
    batching = {
        "batch_size": config.batch_size,
        "rank": place.rank,
        "world_size": place.size,
        "collate": partial(collate, causal=not model.config.is_encoder_decoder),
        "quarantine": quarantine,
    }
    global_batch_size = rows_per_step(
        checkpoint,
        place.size,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        global_batch_size=config.global_batch_size,
    )
    stream = open_stream(
        train_rows,
        encode,
        global_batch_size=global_batch_size,
        seed=config.seed,
        packed_seq_len=config.max_seq_len if config.packing else None,
        prefetch=config.prefetch_steps,
        accept_changed_data=config.accept_changed_data,
        pin_memory=accelerator.device.type == "cuda",
        **batching,
    )
    open_batches = partial(open_eval, encode=encode, **batching)

    # --- where to start, how far to go
    weights = f"{model.num_parameters():,} weights"  # before they are divided
    trained = zero.wrap(model, optimizer, accelerator) if config.deepspeed else model
    saves_checkpoints = not config.deepspeed  # ZeRO lays out its optimizer's state as no other run could read it
    state = TrainState(trained, optimizer, stream, seed=config.seed)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint, accelerator, verify=False)  # checkpoint_to_resume has
    total_steps = config.max_steps or math.ceil(config.epochs * stream.num_rows / stream.global_batch_size)
    warmup_steps = math.ceil(total_steps * config.warmup_ratio) if config.warmup_ratio else config.warmup_steps or 0
    schedule = partial(
        learning_rate_at,
        total_steps=total_steps,
        peak=config.learning_rate,
        warmup_steps=warmup_steps,
        schedule=config.lr_scheduler_type,
    )
    saving = {"tokenizer": tokenizer, "config": settings, "max_shard_size": config.max_shard_size}
    keep = config.save_total_limit or None
    saves = math.ceil((total_steps - state.step) / config.save_steps) if saves_checkpoints else 0
    check_space(state, output / "checkpoints", saves=saves, keep=keep)
    report = Report(
        output,
        settings,
        accelerator,
        step=state.step,
        total_steps=total_steps,
        resumed=checkpoint is not None,
        trackers=bool(trackers),
    )
    processes = f"{place.size} process{'es' * (place.size > 1)}"
    division = f", {config.sharding_strategy}" if config.tp_size == 1 else f", {config.tp_size} with the same rows"
    report.tell(
        f"{weights} ({model.dtype}, memory={config.memory or 'off'}) on {world_size} x "
        f"{accelerator.device.type}{division if config.is_divided else ''}, {stream.num_rows:,} rows",
        f"steps {state.step} to {total_steps}, each of {stream.global_batch_size} rows: {processes} x "
        f"{stream.micro_batches} micro-batches of at most {config.batch_size}",
        *([] if saves_checkpoints else ["no checkpoints under DeepSpeed: a run that ends early is begun anew"]),
        *([f"resumed from {checkpoint}{', with ' if changes else ''}{', '.join(changes)}"] if checkpoint else []),
        *(f"the rows are others than then: {change}" for change in stream.changes),
    )

    def is_due(every: int) -> bool:
        return state.step == total_steps or state.step % every == 0

    def signalled() -> bool:
        """Whether any rank caught a signal, as all see it. One small collective."""
        return sum_over_ranks(signals.came is not None) != [0]

    def evaluate_on(rows: Rows, prefix: str) -> dict[str, float]:
        metrics, answers = measure(
            trained,
            tokenizer,
            rows,
            lambda rows: report.bar(open_batches(rows), prefix),
            eval_loss_fn,
            accelerator,
            num_answers=config.max_predict_samples if config.prompt_column else 0,
            max_new_tokens=config.generation_max_new_tokens,
            prefix=prefix,
        )
        report.evaluation(metrics, answers[:3])
        return metrics

    # --- the loop
    # `preempted` is alike on all ranks: agreed on here, in each step's first collective, and after what takes long
    preempted = signalled()
    if validation_rows and not preempted:
        if state.step == 0 and config.eval_on_start:
            evaluate_on(validation_rows, "eval")
        if state.step and is_due(config.eval_steps):
            # a run that was preempted at this step saved it first, and left its evaluation to us
            evaluated = report.resumed_at if "eval_loss" in report.resumed_at else evaluate_on(validation_rows, "eval")
            state.note_best(evaluated["eval_loss"])
        preempted = signalled()
    end = state.step if preempted else total_steps
    report.restart_timer()
    with entered(savers, model, optimizer), closing(stream):
        for step, batches in zip(range(state.step, end), stream, strict=False):
            result = fitting_step(
                state,
                batches,
                loss_fn,
                accelerator,
                tell=report.halving,
                learning_rate=schedule(step),
                max_grad_norm=config.max_grad_norm,
                nonfinite=config.nonfinite,
                preempted=signals.came is not None,
            )
            preempted = result.preempted
            report.count(result, rows=stream.global_batch_size, waited=stream.wait_seconds)
            if is_due(config.logging_steps):
                epoch = stream.position / stream.num_rows
                counts = stream.counts if place.is_counted else dict.fromkeys(stream.counts, 0)
                report.training(result, epoch=epoch, learning_rate=schedule(step), counts=counts)
            if validation_rows and not preempted and is_due(config.eval_steps):
                state.note_best(evaluate_on(validation_rows, "eval")["eval_loss"])
                preempted = signalled()
            if saves_checkpoints and (preempted or is_due(config.save_steps)):
                try:
                    save_checkpoint(state, output / "checkpoints", accelerator, keep=keep, **saving)
                except SaveError as error:
                    if preempted or config.on_save_error == "stop":
                        raise
                    report.tell(f"step {state.step} is not saved, training goes on: {error}")
                else:
                    preempted = preempted or signalled()
            if preempted:
                break
            report.restart_timer()

    if preempted:
        signals.ignore()  # a launcher ends the others as soon as one of us has ended
        report.close()
        what_now = "--resume=auto goes on from there" if saves_checkpoints else "nothing of it is saved, begin anew"
        report.tell(f"preempted after step {state.step} of {total_steps}: {what_now}")
    else:  # what is left behind
        if test_rows:
            evaluate_on(test_rows, "test")
        save_model(trained, output / "model", **saving)
        report.close(best=state.best)
        report.tell(f"done: {output / 'model'} holds the model, {output / 'metrics.jsonl'} its curve")
    accelerator.end_training()
    return Outcome(state.step if saves_checkpoints or not preempted else 0, preempted)
