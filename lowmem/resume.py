"""Which checkpoint a run goes on from, and whether it is still the same run."""

from collections.abc import Mapping
from pathlib import Path

from lowmem.checkpoint import latest_checkpoint, saved_settings
from lowmem.config import CHANGEABLE_ON_RESUME, UsageError
from lowmem.parallel.agree import gather_bytes, on_main_rank


def checkpoint_to_resume(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` means (never, auto or a path), the same on every rank; None is a fresh start."""
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume)
    newest = on_main_rank(lambda: latest_checkpoint(output_dir / "checkpoints"))
    (name, *_) = gather_bytes(str(newest or "").encode())
    return Path(name.decode()) if name else None


def check_same_run(checkpoint: Path, settings: Mapping[str, object]) -> None:
    """Raise UsageError, naming them, if settings that decide what is trained differ from those of `checkpoint`."""
    _, saved = saved_settings(checkpoint)
    changed = [
        f"--{name} was {saved[name]!r} and is now {settings[name]!r}"
        for name in settings
        if name in saved and name not in CHANGEABLE_ON_RESUME and saved[name] != settings[name]
    ]
    if changed:
        raise UsageError(f"{checkpoint} is of another run: {'; '.join(changed)}. Set them back, or start anew")


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
    kept = state["stream"]["global_batch_size"]
    names = ("batch_size", "gradient_accumulation_steps", "global_batch_size")
    if asked != kept and any(settings[name] != saved[name] for name in names):
        raise UsageError(
            f"{checkpoint} trained on {kept} rows a step, these flags ask for {asked}: set --global_batch_size={kept}"
        )
    return kept
