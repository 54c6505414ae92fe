"""Check that a run may write into its output folder, and lock the folder against other runs."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lowmem.errors import UsageError
from lowmem.storage.files import is_same_file

_SECONDS_TO_LOCK = 5.0  # how long to wait for a lock: a killed process keeps its lock until its memory is freed
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def check_output(output: Path, resume: str) -> None:
    """Raise UsageError if a run cannot use `output`, or would mix its files with another run's there.

    `resume` is "never", "auto" or the path of a checkpoint.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir={output} is a file: set a folder")
    present = sorted(path.name for path in output.glob("checkpoints/step-*"))
    model = output / "model"
    replaced = "would be replaced at the end of the run: set another --output_dir"
    if model.exists() and not (model / "lowmem.json").is_file():
        raise UsageError(f"{model} was not written by lowmem and {replaced}")
    if resume == "never" and present:
        found = f"--output_dir={output} already contains checkpoints ({', '.join(present)})"
        raise UsageError(f"{found}: set --resume=auto to resume from the newest one, or set another --output_dir")
    if resume == "never" and model.exists():
        raise UsageError(f"{model} is from another run and {replaced}")
    if resume not in ("never", "auto"):
        path = Path(resume)
        if not (path / "manifest.json").is_file():
            raise UsageError(f"--resume={path} is not a checkpoint: set never, auto, or a folder with a manifest.json")
        if present and path.resolve().parent != (output / "checkpoints").resolve():
            raise UsageError(f"{output} contains checkpoints, but {path} is not one of them: set another --output_dir")
        if later := [name for name in present if name > path.name]:
            found = f"{output} contains later checkpoints than {path.name} ({', '.join(later)})"
            raise UsageError(f"{found}: move them out of the folder, or set another --output_dir")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it within this block. At the end, remove the folder if this call made it and it is empty.

    The file .lock names this process. The lock (flock) ends with the process. Raises UsageError if `folder` cannot be
    written, or if another process holds the lock for 5 seconds; the message names that process.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _acquire_lock(folder)
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"--output_dir={folder} cannot be written: {error.strerror}; set another folder") from error
    try:
        yield
    finally:
        if is_same_file(folder / ".lock", lock):
            os.unlink(folder / ".lock")  # before unlocking, so that a process waiting for this lock finds its file gone
        _remove_empty(made)
        os.close(lock)


def _acquire_lock(folder: Path) -> int:
    """Lock the file .lock in `folder` and return its descriptor."""
    path, deadline = folder / ".lock", time.monotonic() + _SECONDS_TO_LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_locked(lock, path) and is_same_file(path, lock):
            os.ftruncate(lock, 0)
            since = f"{datetime.now(UTC):%F %T} UTC"
            os.write(lock, f"process {os.getpid()} on host {socket.gethostname()} since {since}".encode())
            return lock
        owner = os.read(lock, 1000).decode() or "another process"
        os.close(lock)
        if time.monotonic() > deadline:
            raise UsageError(f"--output_dir={folder} is in use by {owner}: wait until it ends, or set another folder")
        time.sleep(0.1)


def _is_locked(lock: int, path: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{path} cannot be locked ({error.strerror}): make sure that no other run uses this folder")
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def has_files(folder: Path) -> bool:
    """Whether `folder` contains anything but the file .lock."""
    return folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())
