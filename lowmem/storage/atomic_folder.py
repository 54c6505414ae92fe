"""Write a folder atomically: under a temporary name, synced, then renamed. Imports no torch."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lowmem.storage.files import make_folder, make_folders, remove_folder, rename, sync

_UNFINISHED = ".unfinished-"
STEP_FOLDER = re.compile(r"step-\d{8,}")


@contextmanager
def atomic_folder(path: Path, *, may_replace: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, and rename it to `path` when the block ends without an error.

    Replaces an existing folder only if `may_replace(path)`; otherwise raises FileExistsError before writing anything.
    If the block fails, `path` is unchanged. Only one process may enter the block; others write to `unfinished_folder`.
    """
    unfinished = _begin(path, may_replace)
    try:
        yield unfinished
        _finish(path)
    except BaseException:
        if unfinished.exists():
            _try_to_remove(unfinished)
        raise


def unfinished_folder(path: Path) -> Path:
    """The temporary folder that `atomic_folder(path)` yields."""
    return path.parent / f"{_UNFINISHED}{path.name}"


def _begin(path: Path, may_replace: Callable[[Path], bool]) -> Path:
    if path.is_file():
        raise FileExistsError(f"{path} is a file: save to another folder or move the file")
    if path.exists() and not may_replace(path):
        raise FileExistsError(f"{path} already exists: save to another folder or move it")
    make_folders(path.parent)
    if not path.exists() and _replaced(path).exists():  # a process was killed between the renames of `_finish`
        rename(_replaced(path), path)
    clear_leftovers(path)
    unfinished = unfinished_folder(path)
    if unfinished.exists():
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(unfinished))
    make_folder(unfinished)
    return unfinished


def _finish(path: Path) -> None:
    """Sync the new folder, move any old one away, and rename the new one to `path`. `_begin` recovers from a kill."""
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


def _replaced(path: Path) -> Path:
    return path.parent / f"{_UNFINISHED}replaced-{path.name}"


def clear_leftovers(path: Path) -> None:
    """Remove temporary folders that killed processes left for `path` and, if it is a checkpoint, for its siblings."""
    name = "step-*" if STEP_FOLDER.fullmatch(path.name) else escape(path.name)
    for kind in ("", "replaced-", "removal-"):
        for leftover in path.parent.glob(f"{_UNFINISHED}{kind}{name}"):
            _try_to_remove(leftover)


def remove(path: Path) -> None:
    """Rename a folder, then remove it, so that a kill leaves no partial folder at `path`. Prints a line on failure."""
    renamed = path.parent / f"{_UNFINISHED}removal-{path.name}"
    with _removing(path):
        rename(path, renamed)
        _try_to_remove(renamed)


def _try_to_remove(path: Path) -> None:
    with _removing(path):
        remove_folder(path)


@contextmanager
def _removing(path: Path) -> Iterator[None]:
    """If a folder cannot be removed, print a line instead of failing."""
    try:
        yield
    except OSError as error:
        print(f"{path} could not be removed ({error.strerror}): remove it by hand", flush=True)
