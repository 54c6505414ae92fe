"""Find the checkpoint that a run resumes from, and compare the settings of the run with the saved ones."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from lowmem.checkpoint.load import first_valid, load_checkpoint, verify_together
from lowmem.checkpoint.manifest import checkpoint_of, checkpoints
from lowmem.checkpoint.saved import check_resumable, saved_settings
from lowmem.config.groups import weights_in
from lowmem.data.mixture import whole_weights
from lowmem.distributed.collectives import gather_json, on_main_rank, rank_and_world_size
from lowmem.distributed.consistency import tokenizer_digest
from lowmem.errors import UsageError
from lowmem.optim.state import TIERS
from lowmem.step import TrainState


def checkpoint_to_resume(resume: str, output_dir: Path, *, has_stream: bool = True) -> Path | None:
    """Return the checkpoint that `resume` (never, auto or a path) selects, verified and the same on every rank.

    auto: the newest intact one in `output_dir`. Without `has_stream`, it needs no position of a stream. Returns None
    for a fresh start. Raises UsageError if the checkpoint at a path cannot be used.
    """
    if resume == "never":
        return None
    if resume != "auto":
        _verify_run(Path(resume), has_stream)
        return Path(resume)
    found = on_main_rank(lambda: [str(path) for path in reversed(checkpoints(output_dir / "checkpoints"))])
    rank, _ = rank_and_world_size()
    return first_valid(map(Path, gather_json(found)[0]), partial(_verify_run, has_stream=has_stream), silent=rank != 0)


def _verify_run(path: Path, has_stream: bool) -> None:
    verify_together(path)
    check_resumable(path, has_stream=has_stream)


def check_same_run(checkpoint: Path, settings: Mapping[str, object], *, fixed: Collection[str]) -> list[str]:
    """Compare `settings` with those of the run that saved `checkpoint`. Returns a message for each allowed change.

    Ignores resume, output_dir and num_processes. Raises UsageError if a setting in `fixed` has changed. With adamw,
    `memory` may change to a smaller tier.
    """
    _, saved = saved_settings(checkpoint)
    changes = {
        name: f"--{name}={settings[name]} (was {saved[name]})"
        for name in settings
        if name in saved and name not in ("resume", "output_dir", "num_processes")
        if _effect(name, saved[name]) != _effect(name, settings[name])
    }
    then, now = (TIERS.index(each.get("memory") or "off") for each in (saved, settings))
    if settings.get("optimizer") == "adamw" and then < now:
        fixed = {*fixed} - {"memory"}
    if refused := [change for name, change in changes.items() if name in fixed]:
        raise UsageError(f"{checkpoint} is from another run: {'; '.join(refused)}. Restore these values or start over")
    return list(changes.values())


def _effect(name: str, value: object) -> object:
    """Return the part of a setting that has an effect: of weights, only the rounded ratios count."""
    is_mixed = name == "train_weights" and value is not None
    return whole_weights(weights_in(value)) if is_mixed else value


def check_same_tokenizer(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, *, accept: bool) -> list[str]:
    """If `checkpoint` was saved with another tokenizer, return a message if `accept` is set, else raise UsageError."""
    saved = saved_settings(checkpoint)[0].get("tokenizer")  # None in checkpoints of early versions
    if saved in (None, tokenizer_digest(tokenizer)):
        return []
    if tokenizer.pad_token is None:  # earlier versions used the end token for padding, which no row depends on
        padded = copy.deepcopy(tokenizer)
        padded.pad_token = padded.eos_token
        if saved == tokenizer_digest(padded):
            return []
    if accept:
        return ["another tokenizer or chat template"]
    what = f"{checkpoint} was trained with another tokenizer or chat template"
    raise UsageError(f"{what}: restore it, or set --accept_changed_data=True to continue with this one")


def template_time(checkpoint: Path | None) -> str:
    """Return the time that chat templates print: that of the run which saved `checkpoint`, or rank 0's current time."""
    saved = checkpoint and saved_settings(checkpoint)[1].get("template_time")
    return saved or gather_json(datetime.now().isoformat(timespec="seconds"))[0]


def rows_per_step(checkpoint: Path | None, world_size: int, **sizes: int | None) -> int:
    """Return the rows per optimizer step over all processes. A resumed run keeps this number on any world size.

    The flags `sizes` set this number. Raises UsageError if they have changed since `checkpoint` and would change it.
    """
    wanted = sizes["global_batch_size"] or sizes["batch_size"] * sizes["gradient_accumulation_steps"] * world_size
    if checkpoint is None:
        return wanted
    state, saved = saved_settings(checkpoint)
    kept = state["stream"]["global_batch_size"]
    if wanted != kept and any(size != saved.get(name, size) for name, size in sizes.items()):
        found = f"{checkpoint} trained on {kept} rows per step, but these flags set {wanted}"
        raise UsageError(f"{found}: set --global_batch_size={kept}")
    return kept


def keep_best(state: TrainState, folder: Path, save: Callable[[], object], tell: Callable[[str], object]) -> None:
    """If `folder` lacks the checkpoint of the best evaluation, save it or, if the model has changed since, forget it.

    It may be in the folder of the run that this one resumes, or may never have been saved.
    """
    is_there = on_main_rank(lambda: state.best is None or checkpoint_of(state.best["step"], folder).exists())
    if gather_json(is_there)[0]:
        return
    if state.is_best:
        save()
    else:
        tell(f"the best evaluation, of step {state.best['step']}, has no checkpoint in {folder}: it no longer counts")
        state.best, state.evaluations_since_best = None, 0


def load_best(state: TrainState, folder: Path, accelerator: Accelerator) -> int:
    """Load weights and optimizer of the best evaluation's checkpoint; return its step. Step and position stay.

    Without an evaluation whose loss was finite, loads nothing and returns the current step.
    """
    if state.best is None or state.is_best:
        return state.step
    best = checkpoint_of(state.best["step"], folder)
    load_checkpoint(dataclasses.replace(state, stream=None), best, accelerator)
    return state.best["step"]
