"""Which checkpoint a run goes on from, and whether it is still the same run."""

from collections.abc import Mapping
from pathlib import Path

from lowmem.checkpoint import latest_checkpoint, saved_settings
from lowmem.commit import verify_checkpoint
from lowmem.config import CHANGEABLE_ON_RESUME, UsageError
from lowmem.parallel.agree import gather_bytes, on_main_rank


def checkpoint_to_resume(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means (never, auto or a path), whole and the same on every rank.

    None is a fresh start. Raises UsageError for a path that holds no whole checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        on_main_rank(lambda: verify_checkpoint(resume))
        return Path(resume)
    newest = on_main_rank(lambda: latest_checkpoint(output_dir / "checkpoints"))
    (name, *_) = gather_bytes(str(newest or "").encode())
    return Path(name.decode()) if name else None


def check_same_run(checkpoint: Path, settings: Mapping[str, object]) -> list[str]:
    """Compare settings with those of `checkpoint`. Returns a line for each change that a run may make on resume.

    Raises UsageError, naming them, if others differ: it would be another run.
    """
    _, saved = saved_settings(checkpoint)
    changes = {
        name: f"--{name}={settings[name]} (was {saved[name]})"
        for name in settings
        if name in saved and name not in ("resume", "output_dir") and saved[name] != settings[name]
    }
    if refused := [change for name, change in changes.items() if name not in CHANGEABLE_ON_RESUME]:
        raise UsageError(f"{checkpoint} is of another run: {'; '.join(refused)}. Set them back, or start anew")
    return list(changes.values())


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
