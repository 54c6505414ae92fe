"""List checkpoints in a folder, and verify them by their manifests of file sizes and hashes. Imports no torch."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lowmem.checkpoint.saved import FORMAT, hash_of, read_manifest, saved_settings
from lowmem.errors import UsageError
from lowmem.storage.atomic_folder import STEP_FOLDER
from lowmem.storage.files import FileRecord, record_file, to_json, write_file
from lowmem.storage.shard_files import model_stem, open_shard, shard_files

EXTRA_NAME = re.compile(r"[A-Za-z0-9_]+")
_EXTRA_FILE = re.compile(rf"extra/({EXTRA_NAME.pattern})\.(json|safetensors|safetensors\.index\.json)")


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder`, intact or damaged, ordered by step."""
    named = (path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def checkpoint_of(step: int, folder: str | Path) -> Path:
    return Path(folder) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, step: int, records: Mapping[str, FileRecord]) -> None:
    """Write manifest.json, the last file of a checkpoint. It holds `records` of all other files, sealed by a hash."""
    manifest = {"format": FORMAT, "step": step, "files": dict(records)}
    write_file(folder / "manifest.json", [to_json({"manifest": manifest, "xxh3_128": hash_of(manifest)})])


def verify_checkpoint(path: str | Path) -> None:
    """Check that every file of the manifest has the recorded size and hash, and can be read.

    Raises UsageError naming a bad file. Finds damage, not forgery: anyone who changes a file can also change its hash.
    """
    records = read_manifest(path)["files"]
    check_sizes(Path(path), records)
    check_hashes(Path(path), records)
    check_contents(Path(path), records)


def check_sizes(path: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise UsageError naming the first file of `records` that is missing or has a different size."""
    for name, record in records.items():
        size = os.path.getsize(path / name) if os.path.isfile(path / name) else None  # False if the name is too long
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


def check_contents(path: Path, names: Collection[str]) -> None:
    """Raise UsageError naming the first JSON field that is invalid, or the first tensor file with a damaged header."""
    saved_settings(path)
    extra = [f"extra/{name}" for name, is_tensors in extra_names(names).items() if is_tensors]
    for stem in (model_stem(names), "optimizer", *extra):
        for file in shard_files(path, stem, names):
            with open_shard(file, "np"):
                pass


def extra_names(files: Collection[str]) -> dict[str, bool]:
    """Return the names of the extra values in a checkpoint of these files, and whether each is tensors or JSON."""
    found = filter(None, map(_EXTRA_FILE.fullmatch, sorted(files)))
    return {match[1]: match[2] != "json" for match in found}


def is_damaged(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except UsageError:
        return True
    return False
