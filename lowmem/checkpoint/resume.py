"""Which checkpoint a run goes on from, and whether it is still the same run."""

import json
from collections.abc import Mapping
from pathlib import Path

from lowmem.checkpoint.load import TIERS, first_accepted, saved_settings, verify_together
from lowmem.checkpoint.manifest import checkpoints
from lowmem.config.train_config import fields_where
from lowmem.distributed.collectives import gather_bytes, on_main_rank, rank_and_world_size
from lowmem.errors import UsageError


def checkpoint_to_resume(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means (never, auto or a path), whole and the same on every rank.

    All ranks read it, each its share. auto is the newest whole one of `output_dir`, or None, a fresh start; a line
    tells why another was passed over. Raises UsageError for a path that holds no whole checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        verify_together(resume)
        return Path(resume)
    found = on_main_rank(lambda: [str(path) for path in reversed(checkpoints(output_dir / "checkpoints"))])
    (told, *_) = gather_bytes(json.dumps(found).encode())
    rank, _ = rank_and_world_size()
    return first_accepted(map(Path, json.loads(told)), verify_together, silent=rank != 0)


def check_same_run(checkpoint: Path, settings: Mapping[str, object]) -> list[str]:
    """Compare settings with those of `checkpoint`. Returns a line for each change that a run may make on resume.

    Raises UsageError, naming them, if others differ: it would be another run.
    """
    _, saved = saved_settings(checkpoint)
    changes = {
        name: f"--{name}={settings[name]} (was {saved[name]})"
        for name in settings
        if name in saved and name not in ("resume", "output_dir", "num_processes") and saved[name] != settings[name]
    }
    fixed = fields_where(on_resume="fixed") - ({"memory"} if _keeps_less(saved, settings) else set())
    if refused := [change for name, change in changes.items() if name in fixed]:
        raise UsageError(f"{checkpoint} is of another run: {'; '.join(refused)}. Set them back, or start anew")
    return list(changes.values())


def _keeps_less(saved: Mapping[str, object], settings: Mapping[str, object]) -> bool:
    """Whether the run goes on in a tier that rounds what the checkpoint holds, as `load_checkpoint` can."""
    then, now = (each.get("memory") or "off" for each in (saved, settings))
    return settings.get("optimizer") == "adamw" and TIERS.index(then) < TIERS.index(now)


def rows_per_step(settings: Mapping[str, object], world_size: int, checkpoint: Path | None) -> int:
    """Rows of an optimizer step over all processes. A resumed run keeps its number, on any number of processes.

    Raises UsageError if the settings changed so that they ask for another number.
    """
    asked = settings["global_batch_size"]
    if asked is None:
        asked = settings["batch_size"] * settings["gradient_accumulation_steps"] * world_size
    if checkpoint is None:
        return asked
    state, saved = saved_settings(checkpoint)
    if state["stream"] is None:
        raise UsageError(f"{checkpoint} was saved without a stream, so no position to go on from is known: start anew")
    kept = state["stream"]["global_batch_size"]
    names = ("batch_size", "gradient_accumulation_steps", "global_batch_size")
    if asked != kept and any(settings[name] != saved.get(name, settings[name]) for name in names):
        raise UsageError(
            f"{checkpoint} trained on {kept} rows a step, these flags ask for {asked}: set --global_batch_size={kept}"
        )
    return kept
