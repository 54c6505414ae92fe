"""File operations. Each change or sync of a checkpoint first raises the audit event "lowmem.disk" (operation, path)."""

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from lowmem.errors import UsageError

MOST_JSON_BYTES = 2**28
_READ_BYTES = 2**24
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "FIFO"}
_KINDS |= {stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}

# {"bytes": size of a file, "xxh3_128": its hash in hexadecimal}
FileRecord = dict[str, object]
Bytes = bytes | memoryview


def write_file(path: Path, parts: Iterable[Bytes]) -> FileRecord:
    """Write and hash `parts` in order, and sync the file to disk."""
    digest, size = xxhash.xxh3_128(), 0
    _announce("open", path)
    with open(path, "wb", buffering=0) as file:  # unbuffered, so that closing after an error does not write again
        for part in parts:
            _announce("write", path)
            digest.update(part)
            size += len(part)
            left = memoryview(part)
            while left:
                left = left[file.write(left) :]
        # Sync only once: a failed fsync may drop unwritten data, and a second one would then succeed without that data.
        _announce("fsync", path)
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def to_json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


def read_text(path: str | Path, what: str, *, advice: str, most_bytes: int = MOST_JSON_BYTES) -> str:
    """Read a UTF-8 file of at most `most_bytes`. Raises UsageError, from `what` to `advice`, if that fails."""
    path = os.path.expanduser(path)
    try:
        if os.path.lexists(path) and not os.path.isfile(path):  # reading a FIFO or a device may never end
            raise UsageError(f"{what} {describe(path)}: {advice}")
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise UsageError(f"{what} has more than {most_bytes:,} bytes: {advice}")
        return content.decode()
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # a ValueError if it is not UTF-8, or for a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{what} cannot be read: {reason}; {advice}") from error


def read_json(path: Path, *, advice: str) -> object:
    """Parse a JSON file of at most 256 MiB. Raises UsageError, which ends with `advice`, if that fails."""
    text = read_text(path, str(path), advice=advice)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {advice}") from error


def record_file(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
        return {"bytes": file.tell(), "xxh3_128": digest.hexdigest()}


def sync(path: Path) -> None:
    """Sync a file's data, or a folder's list of names (after a rename, for example), to disk."""
    _announce("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder whose parent exists. Raises FileExistsError if the folder exists."""
    _announce("mkdir", path)
    os.mkdir(path)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, and sync their names to disk."""
    if not path.exists():
        make_folders(path.parent)
        make_folder(path)
        sync(path.parent)


def rename(path: Path, new: Path) -> None:
    _announce("rename", path)
    os.rename(path, new)


def remove_folder(path: Path) -> None:
    """Remove a folder and its contents; for a symbolic link, only the link."""
    is_folder = path.is_dir() and not path.is_symlink()
    for entry in path.iterdir() if is_folder else ():
        remove_folder(entry)
    _announce("remove", path)
    (os.rmdir if is_folder else os.unlink)(path)


def is_same_file(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`: another process may have removed or replaced it."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # ESTALE: another host has removed the file
            return False
        raise


def open_regular(path: Path, flags: int) -> int:
    """Open a file and return its descriptor. Never follows a link, and never waits for the other end of a FIFO.

    Raises OSError, also if `path` is a link, FIFO, device, socket or folder.
    """
    with suppress(FileNotFoundError):  # check first, because opening a device may have an effect
        _check_regular(path, os.lstat(path))
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        _check_regular(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"Is a {_KINDS[stat.S_IFMT(found.st_mode)]}", str(path))


def check_owner(path: Path, found: os.stat_result) -> None:
    """Raise PermissionError if neither this process's user nor root owns a file or folder."""
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"Belongs to user {found.st_uid}", str(path))


def describe(path: str | Path) -> str:
    """Say what is at `path`: "is a folder", "is a FIFO", "is a broken link to ...", "does not exist". Follows links."""
    try:
        return f"is a {_KINDS[stat.S_IFMT(os.stat(path).st_mode)]}"
    except (OSError, ValueError):  # a ValueError for a name with a NUL
        if os.path.islink(path):
            return f"is a broken link to {os.readlink(path)}"
        if os.path.lexists(path):
            raise
        return "does not exist"


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of `path`, which need not exist yet."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _announce(operation: str, path: Path) -> None:
    sys.audit("lowmem.disk", operation, str(path))
