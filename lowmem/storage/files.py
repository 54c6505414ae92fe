"""What a checkpoint does to the disk, each operation announced before it happens. (Files that only transformers can
write are announced when they are brought to disk.)

`sys.audit("lowmem.disk", operation, path)` goes ahead of every one, so that an audit hook (`sys.addaudithook`) can
follow a save, or let any of its operations fail.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import xxhash

_READ_BYTES = 2**24

# {"bytes": size of a file, "xxh3_128": its hash in hexadecimal}
FileRecord = dict[str, object]
Bytes = bytes | memoryview


def write_file(path: Path, parts: Iterable[Bytes]) -> FileRecord:
    """Write `parts` one after the other, hashed on the way, and bring them to disk (fsync)."""
    digest, size = xxhash.xxh3_128(), 0
    _announce("open", path)
    with open(path, "wb", buffering=0) as file:  # unbuffered: after an error, closing must not try once more
        for part in parts:
            _announce("write", path)
            digest.update(part)
            size += len(part)
            left = memoryview(part)
            while left:
                left = left[file.write(left) :]
        # Once: a failed fsync may drop what it was to write, so that a second one would succeed for nothing.
        _announce("fsync", path)
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def to_json(value: object) -> bytes:
    """The bytes of a JSON file that a person can read."""
    return json.dumps(value, indent=2).encode()


def record_file(path: Path) -> FileRecord:
    """The record of a file that is there already."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
        return {"bytes": file.tell(), "xxh3_128": digest.hexdigest()}


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries (new names, renames), to disk."""
    _announce("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder whose parent is there. Raises FileExistsError if it is there itself."""
    _announce("mkdir", path)
    os.mkdir(path)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, each one's name brought to disk."""
    if not path.exists():
        make_folders(path.parent)
        make_folder(path)
        sync(path.parent)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name in the same folder. What has that name already must be an empty folder."""
    _announce("rename", path)
    os.rename(path, new)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, or a link to one, whose target stays."""
    if path.is_symlink() or not path.is_dir():
        _announce("remove", path)
        path.unlink()
        return
    for entry in path.iterdir():
        remove_folder(entry)
    _announce("remove", path)
    path.rmdir()


def stands_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one that `path` names: whoever held a lock on it may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def free_bytes(path: Path) -> int:
    """Bytes that can still be written on the filesystem of `path`, or of the nearest folder above it that is there."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _announce(operation: str, path: Path) -> None:
    sys.audit("lowmem.disk", operation, str(path))
