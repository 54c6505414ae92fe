"""The training loop, which uses the parts of the library in order. Copy this file and change what you like."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lowmem.adapters.lora import add_lora
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.model_card import model_card
from lowmem.checkpoint.resume import (
    check_same_run,
    check_same_tokenizer,
    checkpoint_to_resume,
    keep_best,
    load_best,
    rows_per_step,
    template_time,
)
from lowmem.checkpoint.save import check_space, prune_checkpoints, save_checkpoint, save_model
from lowmem.config.train_config import TrainConfig, fields_where
from lowmem.data.batch import collate
from lowmem.data.chat import prints_time
from lowmem.data.encode import make_encoder, with_weights
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, RowSets
from lowmem.data.stream import open_stream
from lowmem.deepspeed_step import deepspeed_step
from lowmem.distributed import zero
from lowmem.distributed.collectives import any_rank, on_main_rank
from lowmem.distributed.consistency import check_same_inputs, check_same_model, tokenizer_digest
from lowmem.distributed.offloaded import offload_weights
from lowmem.distributed.placement import data_place, handle_rank_errors
from lowmem.distributed.setup import init_distributed, make_deterministic
from lowmem.distributed.sharding import parallelize
from lowmem.distributed.signals import Signals
from lowmem.errors import UsageError
from lowmem.evaluation import Evaluation
from lowmem.loss import LOSSES, make_loss
from lowmem.memory.savers import SAVERS, entered
from lowmem.model.build import counts_of, freeze, num_embeddings
from lowmem.model.checks import check_backward, check_model
from lowmem.model.load import load_model
from lowmem.optim.make import make_optimizer
from lowmem.optim.schedule import Schedule
from lowmem.recover import fitting_step
from lowmem.report import Report
from lowmem.step import TrainState


class Outcome(NamedTuple):
    """The outcome of a run that did not fail."""

    step: int
    """Optimizer steps done. After preemption, those that are saved: 0 if the run saves no checkpoints."""
    preempted: bool
    """A signal ended the run early: resume it to finish."""


def train(
    config: TrainConfig,
    rows: RowSets,
    *,
    signals: Signals,
    on_abort: Callable[[str], None] | None = None,
    check_folder: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train from the start or from a checkpoint, and save the model in `output_dir`/model.

    After a signal on any rank, all ranks finish the current step or evaluation, save a checkpoint (not with
    save_steps=0) and end. If another rank fails or is silent, this rank raises an error, or calls
    `on_abort(message)` and exits.
    Before each write to `output_dir`, rank 0 calls `check_folder`, which raises an error if that is another run's now.
    A group of the config, such as `config.sharding`, contains keyword arguments of one function.
    """
    # --- processes
    output = Path(config.output_dir)
    accelerator = init_distributed(**config.distributed, output_dir=output, on_abort=on_abort, signals=signals)
    check_same_inputs(config.shared_flags, rows._asdict(), output)
    checkpoint = checkpoint_to_resume(config.resume, output)
    config = dataclasses.replace(config, template_time=config.template_time or template_time(checkpoint))
    settings = dataclasses.asdict(config)
    fixed = fields_where(type(config), on_resume="fixed")
    changes = check_same_run(checkpoint, settings, fixed=fixed) if checkpoint else []
    make_deterministic(config.deterministic)

    # --- model and optimizer
    torch.manual_seed(config.seed)
    # only rank 0 initializes new weights; saved weights stay in their files until make_optimizer reads each rank's part
    is_filled_later = config.model_name_or_path is not None or not accelerator.is_main_process
    # DeepSpeed, norms of DoRA and quantization need the weights themselves
    on_meta = is_filled_later and not (config.deepspeed or config.use_dora or config.quantization)
    model, tokenizer = load_model(
        **config.model_source,
        dtype=getattr(torch, config.loaded_dtype),
        on_meta=on_meta,
        scratch_folder=config.scratch_folder,
        device=accelerator.device,
    )
    tokenizer_hash = tokenizer_digest(tokenizer)  # now: using a translation tokenizer changes its state
    if checkpoint:
        changes += check_same_tokenizer(checkpoint, tokenizer, accept=config.accept_changed_data)
    if config.lora_rank:
        add_lora(model, **config.lora)
    freeze(model, parts=config.frozen_parts)
    check_same_model(model, tokenizer, weights=config.model_name_or_path is not None)
    weights, vocabulary = counts_of(model), num_embeddings(model)  # of the whole model
    model = parallelize(model, accelerator, **config.sharding, fill=False)
    if config.offload_weights:
        offload_weights(model, config.offload_weights, accelerator.device)
    optimizer = make_optimizer(model, **config.optimizer_options)  # fills each weight, then converts it to its tier
    loss_fn = make_loss(**config.training_loss)  # (model, batch) -> summed loss
    with handle_rank_errors(model):
        max_seq_len = check_model(model, loss_fn, **config.model_requirements)
    config = dataclasses.replace(config, max_seq_len=max_seq_len)
    wrapped = zero.wrap(model, optimizer, accelerator) if config.deepspeed else model

    with ExitStack() as stack:
        stack.enter_context(entered([SAVERS[name] for name in config.savers], model, optimizer))
        if config.recompute == "cheap" and not (config.release or config.deepspeed):  # these update within backward
            with handle_rank_errors(model):
                check_backward(model, loss_fn)
        # --- rows
        rank, is_causal = data_place(model), not model.config.is_encoder_decoder
        shape = {"is_encoder_decoder": not is_causal, "num_embeddings": vocabulary}
        encode = make_encoder(tokenizer, **shape, **config.encoding)  # row -> token ids
        encode_for_training = with_weights(encode, config.weight_column) if config.weight_column else encode
        bad_rows = output / f"bad_rows-{accelerator.process_index}.jsonl"
        quarantine = Quarantine(config.max_bad_rows, bad_rows) if config.on_bad_row == "skip" else None
        stream = open_stream(
            rows.training,
            encode_for_training,
            global_batch_size=rows_per_step(checkpoint, rank.size, **config.step_size),
            collate=partial(collate, causal=is_causal, max_seq_len=config.max_seq_len),
            is_encoder_decoder=not is_causal,
            quarantine=quarantine,
            pin_memory=accelerator.device.type == "cuda",
            **rank.coordinates,
            **config.batching,
        )
        stack.enter_context(closing(stream))

        # --- state: where to start, how far to go
        state = TrainState(wrapped, optimizer, stream, seed=config.seed)
        if checkpoint:
            load_checkpoint(state, checkpoint, accelerator, verify=False)  # checkpoint_to_resume has verified it
        schedule = Schedule.of_run(stream.rows_per_epoch, stream.global_batch_size, **config.schedule)
        checkpoints, keep = output / "checkpoints", config.save_total_limit or None
        can_save = config.save_steps != 0
        num_saves = schedule.num_due(state.step, config.save_steps) if can_save else 0
        num_saves += schedule.num_due(state.step, config.eval_steps) if config.load_best_model_at_end else 0
        check_space(state, checkpoints, saves=num_saves, keep=keep, saves_model=config.save_model)
        progress = {"step": state.step, "total_steps": schedule.total_steps, "resumed": checkpoint is not None}
        named = {"run_name": config.run_name, "check_folder": check_folder}
        report = Report(output, settings, accelerator, **progress, **named)
        report.opening(model, weights, stream, rank, tier=config.memory or "off", sharding=config.sharding_summary)
        report.resuming(checkpoint, changes, stream.changes, can_save)
        if config.is_sharded and accelerator.num_processes == 1 and not config.cpu_offload:
            report.print_lines(f"on one process, {config.sharding_summary} shards nothing: start more processes")
        if config.offload_activations and config.recompute == "off" and not config.layered:
            report.print_lines(
                "without --recompute=full, offload_activations copies many times as much, which takes longer: set it"
            )
        if config.messages_column and prints_time(tokenizer):
            report.print_lines(
                f"the chat template prints the time: this run uses --template_time={config.template_time}"
            )
        reporting = {"bar": report.bar, "tell": report.print_lines}
        measure = Evaluation(
            wrapped, tokenizer, encode, LOSSES[config.loss], accelerator, quarantine, **config.evaluation, **reporting
        )  # rows -> (metrics, answers), without label smoothing and weights, so that runs are comparable
        for name in ("validation", "test"):
            if held_out := getattr(rows, name):
                measure.check(held_out, name)
        saving = {"tokenizer": tokenizer, "config": settings, "max_shard_size": config.max_shard_size}

        def save() -> Path | None:
            on_main_rank(check_folder)
            options = {"on_error": report.unsaved if config.on_save_error == "continue" and not preempted else None}
            return save_checkpoint(state, checkpoints, accelerator, tokenizer_hash=tokenizer_hash, **saving, **options)

        # fitting_step calls train_step and, if memory runs out, retries with smaller micro-batches
        take_step = deepspeed_step if config.deepspeed else partial(fitting_step, tell=report.halving)

        # --- the loop: all ranks agree on `preempted` in each step and after each evaluation and save
        preempted = any_rank(signals.came)
        if rows.validation and not preempted:
            evaluate_first(state, rows.validation, measure, report, schedule, config)
            preempted = any_rank(signals.came)
        if config.load_best_model_at_end and not preempted:
            keep_best(state, checkpoints, save, report.print_lines)
        patience = config.early_stopping_patience or math.inf
        stopped = state.evaluations_since_best >= patience
        end = state.step if preempted or stopped else schedule.total_steps
        for step, batches in zip(range(state.step, end), stream, strict=False):
            report.restart_timer()
            result = take_step(
                state,
                batches,
                loss_fn,
                accelerator,
                learning_rate=schedule(step),
                max_grad_norm=config.max_grad_norm,
                nonfinite=config.nonfinite,
                preempted=signals.came is not None,
            )
            preempted = result.preempted
            report.count(result, stream)
            if schedule.is_due(state.step, config.logging_steps):
                report.training(result, stream, rank, learning_rate=schedule(step))
            saved = None
            if can_save and (preempted or schedule.is_due(state.step, config.save_steps)):
                saved = save()  # before the evaluation, which may fail
                preempted = preempted or (saved is not None and any_rank(signals.came))
            if rows.validation and not preempted and schedule.is_due(state.step, config.eval_steps):
                state.note_best(report.evaluation(*measure(rows.validation))["eval_loss"])
                preempted, stopped = any_rank(signals.came), state.evaluations_since_best >= patience
                is_new_best = config.load_best_model_at_end and state.is_best
                if can_save and not saved and (preempted or stopped or is_new_best):
                    saved = save()
            if saved and keep:
                prune_checkpoints(state, checkpoints, keep=keep)  # after evaluating: this checkpoint may be the best
            if preempted or stopped:
                break

    # --- the end
    if preempted:
        signals.ignore()  # a launcher sends SIGTERM to the other processes when the first one exits
        report.preempted(can_save)
    else:
        if not state.updates:
            raise UsageError(
                f"none of the {state.step} steps updated the weights (each printed why): no model is saved"
            )
        if state.step < schedule.total_steps:
            report.print_lines(f"stopped early: {state.evaluations_since_best} evaluations without a better eval_loss")
        model_step = load_best(state, checkpoints, accelerator) if config.load_best_model_at_end else state.step
        if config.save_model:
            on_main_rank(check_folder)
            data = {"num_rows": stream.num_rows, "fingerprints": stream.files}
            card = model_card(step=model_step, metrics=report.metrics_of(model_step), **data, **config.card)
            save_model(wrapped, output / "model", card=card, **saving)
        if rows.test:
            report.evaluation(*measure(rows.test, "test"))
        report.done(state.best, model_step=model_step if config.save_model else None)
    accelerator.end_training()
    return Outcome(state.step if can_save or not preempted else 0, preempted)


def evaluate_first(
    state: TrainState, rows: Rows, measure: Evaluation, report: Report, schedule: Schedule, config: TrainConfig
) -> None:
    """Evaluate at step 0 with `eval_on_start`, or after resuming from a step at which an evaluation was due.

    (A run saves before it evaluates, and may end in between.) An evaluation found in metrics.jsonl is reused.
    """
    if state.step == 0 and config.eval_on_start:
        report.evaluation(*measure(rows))
    elif "eval_loss" in report.resumed_at:
        state.note_best(report.resumed_at["eval_loss"])
    elif state.step and schedule.is_due(state.step, config.eval_steps):
        state.note_best(report.evaluation(*measure(rows))["eval_loss"])
