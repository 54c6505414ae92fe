"""Checkpoint file operations. Each change or sync first raises the audit event "lowmem.disk" with (operation, path)."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import xxhash

from lowmem.errors import UsageError

_READ_BYTES = 2**24
_MOST_JSON_BYTES = 2**28

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


def read_json(path: Path, *, advice: str) -> object:
    """Parse a JSON file of at most 256 MiB. Raises UsageError, which ends with `advice`, if that fails."""
    try:
        if not path.is_file():  # opening a FIFO would wait for a writer
            raise ValueError("it is not a file" if path.exists() else "it does not exist")
        with open(path, "rb") as file:
            content = file.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it is larger than {_MOST_JSON_BYTES:,} bytes")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): {advice}") from error


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
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of `path`, which need not exist yet."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _announce(operation: str, path: Path) -> None:
    sys.audit("lowmem.disk", operation, str(path))
