"""Lock a file against other processes (flock). The lock ends with its process, and the file names that process."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from lowmem.errors import LockedError
from lowmem.storage.files import is_same_file, open_regular

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""The errors of file systems that have no locks."""
_POLL_SECONDS = 0.05
_OWNER_BYTES = 1000


def acquire(path: Path, *, limit_seconds: float, on_wait: Callable[[], object] = lambda: None) -> int:
    """Lock the file `path`, made with its folder if it is missing, and return its descriptor.

    If another process holds the lock, calls `on_wait` once, and waits as long as the holder keeps touching the file.
    Raises LockedError if nobody has touched it for `limit_seconds`, and OSError, also if `path` is not a regular file.
    """
    seen, deadline = None, 0.0
    while True:
        lock, touched = _try_to_lock(path)
        if lock is not None:
            return lock
        if seen is None:
            on_wait()
        if touched != seen:
            seen, deadline = touched, time.monotonic() + limit_seconds
        elif time.monotonic() > deadline:
            raise LockedError(path, owner_of(path))
        time.sleep(_POLL_SECONDS)


def _try_to_lock(path: Path) -> tuple[int | None, tuple[int, int]]:
    """Return the descriptor of the locked file, or None, and the file's inode and modification time in ns."""
    path.parent.mkdir(parents=True, exist_ok=True)  # at each attempt: the last holder may have removed its folder
    lock = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        found = os.fstat(lock)
        if found.st_nlink > 1:  # writing here would change a file that has another name too
            raise OSError(errno.EMLINK, "Is a hard link", str(path))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_same_file(path, lock):  # if not, the last holder has removed the file, so a lock on it is worthless
            os.ftruncate(lock, 0)
            owner = f"process {os.getpid()} on host {socket.gethostname()} since {datetime.now(UTC):%F %T} UTC"
            os.write(lock, owner.encode(errors="backslashreplace"))
            return lock, (found.st_ino, found.st_mtime_ns)
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None, (found.st_ino, found.st_mtime_ns)


def release(path: Path, lock: int) -> None:
    """Remove the file `path`, unless another process has replaced it, and unlock it."""
    with suppress(OSError):
        if is_same_file(path, lock):
            os.unlink(path)  # before unlocking, so that a process waiting for this lock finds its file gone
    os.close(lock)


def owner_of(path: Path) -> str:
    """Return the text of a lock file, which names its holder, in one line."""
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            text = file.read(_OWNER_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    return "".join(mark if mark.isprintable() else "?" for mark in text) or "another process"
