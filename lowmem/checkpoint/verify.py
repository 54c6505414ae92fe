"""The command `verify`: read every byte of one checkpoint, or of all checkpoints of a run. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

from lowmem.checkpoint.manifest import checkpoints, verify_checkpoint
from lowmem.checkpoint.saved import read_manifest
from lowmem.errors import UsageError


def verify(path: str | Path) -> Iterator[str]:
    """Yield a line per intact checkpoint of `path` (a checkpoint or a run), then raise UsageError if any is damaged."""
    path = Path(path)
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        yield _verified(path)
        return
    damages = []
    for checkpoint in reversed(found):
        try:
            yield f"{checkpoint.name}: {_verified(checkpoint)}"
        except UsageError as error:
            damages.append(str(error))
    if damages:
        raise UsageError(f"{len(damages)} of {len(found)} checkpoints are damaged: {'; '.join(damages)}")


def _verified(path: Path) -> str:
    verify_checkpoint(path)
    manifest = read_manifest(path)
    sizes = [record["bytes"] for record in manifest["files"].values()] + [(path / "manifest.json").stat().st_size]
    return f"intact: step {manifest['step']}, {len(sizes)} files, {sum(sizes):,} bytes"
