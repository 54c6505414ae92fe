"""List checkpoints in a folder, and verify them by their manifests of file sizes and hashes. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from lowmem.errors import UsageError
from lowmem.storage.atomic_folder import STEP_FOLDER
from lowmem.storage.files import FileRecord, record_file, to_json, write_file

_FORMAT = 1


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder`, intact or damaged, ordered by step."""
    named = (path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, step: int, records: Mapping[str, FileRecord]) -> None:
    """Write manifest.json, the last file of a checkpoint. It holds `records` of all other files, sealed by a hash."""
    manifest = {"format": _FORMAT, "step": step, "files": dict(records)}
    write_file(folder / "manifest.json", [to_json({"manifest": manifest, "xxh3_128": _hash_of(manifest)})])


def verify_checkpoint(path: str | Path) -> None:
    """Check that every file of the manifest has the recorded size and hash. Raises UsageError naming a bad file."""
    records = read_manifest(path)["files"]
    check_sizes(Path(path), records)
    check_hashes(Path(path), records)


def check_sizes(path: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise UsageError naming the first file of `records` that is missing or has a different size."""
    for name, record in records.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != record["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UsageError(f"{path / name} {found}, but {record['bytes']} bytes were saved: use another checkpoint")


def check_hashes(path: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise UsageError naming the first file of `records` that changed since it was saved, or cannot be read."""
    for name, record in records.items():
        try:
            found = record_file(path / name)
        except OSError as error:
            raise UsageError(f"{path / name} cannot be read ({error.strerror}): use another checkpoint") from error
        if found != record:
            raise UsageError(f"{path / name} changed since it was saved (its hash differs): use another checkpoint")


def read_manifest(path: str | Path) -> dict:
    """Return {"format", "step", "files": {name: record}}. Raises UsageError if it is missing, changed or too new."""
    path = Path(path)
    try:
        sealed = json.loads((path / "manifest.json").read_text())
        manifest, seal = sealed["manifest"], sealed["xxh3_128"]
    except (FileNotFoundError, NotADirectoryError):
        found = "has no manifest.json, so it is not a complete checkpoint" if path.exists() else "does not exist"
        raise UsageError(f"{path} {found}: use another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / 'manifest.json'} is damaged ({error}): use another checkpoint") from error
    if seal != _hash_of(manifest):
        raise UsageError(f"{path / 'manifest.json'} changed since it was saved: use another checkpoint")
    if manifest["format"] > _FORMAT:
        raise UsageError(f"{path} has format {manifest['format']}, but lowmem reads up to {_FORMAT}: upgrade lowmem")
    return manifest


def is_damaged(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except UsageError:
        return True
    return False


def _hash_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
