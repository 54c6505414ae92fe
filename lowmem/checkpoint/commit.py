"""A folder is whole or absent: written under another name, hashed, synced to disk, and only then given its own name.

Imports no torch. Several processes may write into one folder: one of them begins and finishes it.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import xxhash

from lowmem.config import UsageError
from lowmem.disk import (
    FileRecord,
    make_folder,
    make_folders,
    record_file,
    remove_folder,
    rename,
    sync,
    to_json,
    write_file,
)

_FORMAT = 1
_UNFINISHED = ".unfinished-"
_STEP = re.compile(r"step-\d{8,}")


@contextmanager
def whole_or_absent(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Within it, write into the folder that it gives; that folder becomes `path` when the block ends without an error.

    After an error nothing of it is left, and what stood at `path` stands. Raises what `begin` raises.
    """
    unfinished = begin(path, replace=replace)
    try:
        yield unfinished
        finish(path)
    except BaseException:
        abandon(path)
        raise


def begin(path: Path, *, replace: bool = False) -> Path:
    """Make the folder, beside `path`, that `finish` will rename to `path`; remove what killed processes left of it.

    A whole checkpoint at `path` is only written over with `replace`; a damaged one makes room once the new one is on
    disk. Raises FileExistsError, before anything is written, for a whole one and for a file.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file: save into another folder, or move it away")
    if path.exists() and not replace and _is_whole(path):
        raise FileExistsError(f"{path} stands already: save into another folder, or move it away")
    make_folders(path.parent)
    if not path.exists() and _replaced(path).exists():  # killed between the two renames of `finish`
        rename(_replaced(path), path)
    clear_leftovers(path)
    if unfinished_folder(path).exists():
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(unfinished_folder(path)))
    make_folder(unfinished_folder(path))
    return unfinished_folder(path)


def finish(path: Path) -> None:
    """Bring the unfinished folder's entries to disk and give it the name `path`, in place of what stood there.

    That goes only once the new one is on disk. If the process is killed between two renames it is kept under another
    name, which the next `begin` gives back.
    """
    unfinished, replaced = unfinished_folder(path), _replaced(path)
    for folder in (unfinished, *filter(Path.is_dir, unfinished.rglob("*"))):
        sync(folder)
    if path.exists():
        rename(path, replaced)
    try:
        rename(unfinished, path)
    except BaseException:
        if replaced.exists():
            rename(replaced, path)
        raise
    sync(path.parent)
    if replaced.exists():
        _try_to_remove(replaced)


def abandon(path: Path) -> None:
    """Remove the unfinished folder, if there is one. What cannot be removed is left for the next `begin`."""
    if unfinished_folder(path).exists():
        _try_to_remove(unfinished_folder(path))


def unfinished_folder(path: Path) -> Path:
    """Where the files of `path` are written before it stands."""
    return path.parent / f"{_UNFINISHED}{path.name}"


def _replaced(path: Path) -> Path:
    return path.parent / f"{_UNFINISHED}replaced-{path.name}"


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of `path`; of a checkpoint, which no other run saves beside, of all of them."""
    name = "step-*" if _STEP.fullmatch(path.name) else escape(path.name)
    for kind in ("", "replaced-", "removal-"):
        for leftover in path.parent.glob(f"{_UNFINISHED}{kind}{name}"):
            _try_to_remove(leftover)


@contextmanager
def _removing(path: Path) -> Iterator[None]:
    """A folder that is of no use any more is no reason to fail: a line tells if it stays."""
    try:
        yield
    except OSError as error:
        print(f"{path} could not be removed ({error.strerror}): remove it by hand", flush=True)


def _try_to_remove(path: Path) -> None:
    with _removing(path):
        remove_folder(path)


def remove(path: Path) -> None:
    """Take a folder's name away first, so that a kill in between leaves no half of it under that name.

    A folder that cannot be removed stays, and a line tells so.
    """
    condemned = path.parent / f"{_UNFINISHED}removal-{path.name}"
    with _removing(path):
        rename(path, condemned)
        _try_to_remove(condemned)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or damaged, oldest first."""
    named = (path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, step: int, records: Mapping[str, FileRecord]) -> None:
    """The last file of a checkpoint: what the others are, sealed with a hash of its own."""
    manifest = {"format": _FORMAT, "step": step, "files": dict(records)}
    write_file(folder / "manifest.json", [to_json({"manifest": manifest, "xxh3_128": _hash_of(manifest)})])


def verify_checkpoint(path: str | Path) -> None:
    """Check that every file is there, of its size and with its hash. Raises UsageError naming the first that is not."""
    records = read_manifest(path)["files"]
    check_sizes(Path(path), records)
    check_hashes(Path(path), records)


def check_sizes(path: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise UsageError naming the first file of `records` that is not in the checkpoint, or not of its size."""
    for name, record in records.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UsageError(f"{path / name} {found}, {record['bytes']} were saved: take another checkpoint")


def check_hashes(path: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise UsageError naming the first file of `records` whose content is not what was saved, or cannot be read."""
    for name, record in records.items():
        try:
            found = record_file(path / name)
        except OSError as error:
            raise UsageError(f"{path / name} cannot be read ({error.strerror}): take another checkpoint") from error
        if found != record:
            raise UsageError(f"{path / name} changed since it was saved (its hash differs): take another checkpoint")


def read_manifest(path: str | Path) -> dict:
    """{"format", "step", "files": {name: record}} of a checkpoint. Raises UsageError if it is not as it was sealed."""
    path = Path(path)
    try:
        sealed = json.loads((path / "manifest.json").read_text())
        manifest, seal = sealed["manifest"], sealed["xxh3_128"]
    except (FileNotFoundError, NotADirectoryError):
        found = "has no manifest.json, so it is no whole checkpoint" if path.exists() else "does not exist"
        raise UsageError(f"{path} {found}: take another one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / 'manifest.json'} is damaged ({error}): take another checkpoint") from error
    if seal != _hash_of(manifest):
        raise UsageError(f"{path / 'manifest.json'} changed since it was saved: take another checkpoint")
    if manifest["format"] > _FORMAT:
        raise UsageError(f"{path} is of format {manifest['format']}, this lowmem reads up to {_FORMAT}: upgrade lowmem")
    return manifest


def _is_whole(path: Path) -> bool:
    with suppress(UsageError):
        verify_checkpoint(path)
        return True
    return False


def _hash_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
