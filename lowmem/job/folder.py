"""Check that a run may write into its output folder, and lock the folder against other runs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem.errors import LockedError, LostFolderError, UsageError
from lowmem.storage.files import describe, is_same_file, open_regular
from lowmem.storage.lock import NO_LOCKS, acquire, owner_of, release

_SECONDS_TO_LOCK = 5.0  # how long to wait for a lock: a killed process keeps its lock until its memory is freed


def check_output(output: Path, resume: str) -> None:
    """Raise UsageError if a run cannot use `output`, or would mix its files with another run's there.

    `resume` is "never", "auto" or the path of a checkpoint.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"--output_dir={output} {describe(output)}: set a folder")
    present = sorted(path.name for path in output.glob("checkpoints/step-*"))
    model = output / "model"
    replaced = "would be replaced at the end of the run: set another --output_dir"
    if model.exists() and not (model / "lowmem.json").is_file():
        raise UsageError(f"{model} was not written by lowmem and {replaced}")
    if resume == "never" and present:
        found = f"--output_dir={output} already contains checkpoints ({', '.join(present)})"
        raise UsageError(f"{found}: set another --output_dir, or --resume=auto to continue that run")
    if resume == "never" and model.exists():
        raise UsageError(f"{model} is from another run and {replaced}")
    if resume not in ("never", "auto"):
        path = Path(resume)
        if (path / "trainer_state.json").is_file():
            found = f"--resume={path} is a checkpoint of transformers' Trainer"
            raise UsageError(f"{found}: set --model_name_or_path={path} to train its weights from the first step")
        if not (path / "manifest.json").is_file():
            raise UsageError(f"--resume={path} is not a checkpoint: set never, auto, or a folder with a manifest.json")
        if present and path.resolve().parent != (output / "checkpoints").resolve():
            raise UsageError(f"{output} contains checkpoints, but {path} is not one of them: set another --output_dir")
        if later := [name for name in present if name > path.name]:
            found = f"{output} contains later checkpoints than {path.name} ({', '.join(later)})"
            raise UsageError(f"{found}: move them out of the folder, or set another --output_dir")


@contextmanager
def lock_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Make `folder` and lock it within this block. At the end, remove the folder if this call made it and it is empty.

    The file .lock names this process. The lock (flock) ends with the process. Yields a function that raises
    LostFolderError if .lock is no longer this process's file, because the folder or the file was removed or replaced.
    Raises UsageError if `folder` cannot be written, or if another process, which the message names, holds the lock for
    5 seconds.
    """
    path = folder / ".lock"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _lock(path)
    except LockedError as error:
        found = f"--output_dir={folder} is in use by {error.owner}"
        raise UsageError(f"{found}: wait until it ends, or set another folder") from None
    except OSError as error:
        _remove_empty(made)
        where = f" ({path})" if error.filename == str(path) else ""
        found = f"--output_dir={folder} cannot be written: {error.strerror}{where}"
        raise UsageError(f"{found}; set another folder") from error

    def check() -> None:
        with suppress(OSError):  # of a disk that fails, perhaps only now; writing to it then raises the error
            if not is_same_file(path, lock):
                now = f" and is now in use by {owner_of(path)}" if path.exists() else ""
                what = f"--output_dir={folder} was removed or replaced during this run{now}"
                raise LostFolderError(f"{what}: this run ends without writing there; set another folder for each run")

    try:
        yield check
    finally:
        release(path, lock)
        _remove_empty(made)


def _lock(path: Path) -> int:
    try:
        return acquire(path, limit_seconds=_SECONDS_TO_LOCK)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{path} cannot be locked ({error.strerror}): make sure that no other run uses this folder")
        return open_regular(path, os.O_RDWR | os.O_CREAT)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def has_files(folder: Path) -> bool:
    """Whether `folder` contains anything but the file .lock."""
    return folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())
