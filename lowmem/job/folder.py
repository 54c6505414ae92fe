"""The folder of a run: whether a run may write into it, and a lock so that only one at a time does."""

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
from lowmem.storage.files import stands_at

_SECONDS_TO_LOCK = 5.0  # a killed process holds its lock until its memory is freed
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def check_output(output: Path, resume: str) -> None:
    """Raise UsageError if a run, with `resume` never, auto or a path, would mix with another one in `output`."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir={output} is a file: name a folder")
    present = sorted(path.name for path in output.glob("checkpoints/step-*"))
    model = output / "model"
    if model.exists() and not (model / "lowmem.json").is_file():
        raise UsageError(f"{model} is not of a lowmem run, and would be replaced at the end: set another --output_dir")
    if resume == "never" and present:
        found = f"--output_dir={output} holds checkpoints already ({', '.join(present)})"
        raise UsageError(f"{found}: set --resume=auto to resume from the newest, or another --output_dir")
    if resume == "never" and model.exists():
        raise UsageError(f"{model} is of another run, and would be replaced at the end: set another --output_dir")
    if resume not in ("never", "auto"):
        path = Path(resume)
        if not (path / "manifest.json").is_file():
            raise UsageError(f"--resume={path} is no checkpoint: give never, auto, or a folder with a manifest.json")
        if present and path.resolve().parent != (output / "checkpoints").resolve():
            raise UsageError(f"{output} holds checkpoints of another run than {path}: set another --output_dir")
        if later := [name for name in present if name > path.name]:
            found = f"{output} holds later checkpoints than {path.name} ({', '.join(later)})"
            raise UsageError(f"{found}: move them away, or set another --output_dir")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make and lock `folder` within this block, by a file .lock that names this process; remove it if it stays empty.

    The lock (flock) ends with the process. Raises UsageError if `folder` cannot be written, or if another process keeps
    the lock for 5 seconds, which it names.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock = _take(folder)
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"--output_dir={folder} cannot be written: {error.strerror}. Name another folder") from error
    try:
        yield
    finally:
        if stands_at(folder / ".lock", lock):
            os.unlink(folder / ".lock")  # while we hold it: a process that has opened it sees that it is gone
        _remove_empty(made)
        os.close(lock)


def _take(folder: Path) -> int:
    """Return a descriptor of the locked file."""
    path, deadline = folder / ".lock", time.monotonic() + _SECONDS_TO_LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _is_locked(lock, path) and stands_at(path, lock):
            os.ftruncate(lock, 0)
            since = f"{datetime.now(UTC):%F %T} UTC"
            os.write(lock, f"process {os.getpid()} on host {socket.gethostname()} since {since}".encode())
            return lock
        owner = os.read(lock, 1000).decode() or "another process"
        os.close(lock)
        if time.monotonic() > deadline:
            raise UsageError(f"output_dir {folder} is in use by {owner}: wait for its end, or set another --output_dir")
        time.sleep(0.1)


def _is_locked(lock: int, path: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{path} cannot be locked ({error.strerror}): two runs in this folder would not notice each other")
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def holds_anything(folder: Path) -> bool:
    """Whether `folder` contains anything but our lock."""
    return folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir())
