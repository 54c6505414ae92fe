"""A folder is whole or absent: written under another name, hashed, synced to disk, and only then given its own name."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from lowmem.config import UsageError
from lowmem.weights import FileRecord, record_file, sync, to_json, write_file

_FORMAT = 1
_UNFINISHED = ".unfinished-"


@contextmanager
def whole_or_absent(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Within it, write into the folder that it gives; that folder becomes `path` when the block ends without an error.

    After an error nothing of it is left, and `path` is as it was. A whole checkpoint at `path` is only written over
    with `replace`; a damaged one makes room once the new one is on disk. Raises FileExistsError before anything is
    written. What killed processes left beside `path` is removed.
    """
    if path.exists() and not replace and _is_whole(path):
        raise FileExistsError(f"{path} stands already: save into another folder, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished = path.parent / f"{_UNFINISHED}{path.name}"
    unfinished.mkdir()
    try:
        yield unfinished
        for folder in (unfinished, *filter(Path.is_dir, unfinished.rglob("*"))):
            sync(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    replaced = path.parent / f"{_UNFINISHED}replaced-{path.name}"
    if path.exists():
        os.rename(path, replaced)
    os.rename(unfinished, path)
    sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except UsageError:
        return False
    return True


def write_manifest(folder: Path, step: int, records: Mapping[str, FileRecord]) -> None:
    """The last file of a checkpoint: what the others are, sealed with a hash of its own."""
    manifest = {"format": _FORMAT, "step": step, "files": dict(records)}
    write_file(folder / "manifest.json", [to_json({"manifest": manifest, "xxh3_128": _hash_of(manifest)})])


def remove(path: Path) -> None:
    """Take a folder's name away first, so that a kill in between leaves no half of it under that name."""
    condemned = path.parent / f"{_UNFINISHED}removal-{path.name}"
    os.rename(path, condemned)
    shutil.rmtree(condemned)


def verify_checkpoint(path: str | Path) -> None:
    """Check that every file is there, of its size and with its hash. Raises UsageError naming the first that is not."""
    path = Path(path)
    records = _read_manifest(path)["files"]
    for name, record in records.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UsageError(f"{path / name} {found}, {record['bytes']} were saved: take another checkpoint")
    for name, record in records.items():
        if record_file(path / name) != record:
            raise UsageError(f"{path / name} changed since it was saved (its hash differs): take another checkpoint")


def _read_manifest(path: Path) -> dict:
    try:
        sealed = json.loads((path / "manifest.json").read_text())
        manifest, seal = sealed["manifest"], sealed["xxh3_128"]
    except FileNotFoundError:
        raise UsageError(f"{path} has no manifest.json, so it is no whole checkpoint: take another one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / 'manifest.json'} is damaged ({error}): take another checkpoint") from error
    if seal != _hash_of(manifest):
        raise UsageError(f"{path / 'manifest.json'} changed since it was saved: take another checkpoint")
    if manifest["format"] > _FORMAT:
        raise UsageError(f"{path} is of format {manifest['format']}, this lowmem reads up to {_FORMAT}: upgrade lowmem")
    return manifest


def _hash_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
