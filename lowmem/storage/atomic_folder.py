"""A folder is whole or absent: written under another name, hashed, synced to disk, and only then given its own name.

Imports no torch. Several processes may write into one folder: one of them begins and finishes it.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lowmem.storage.files import (
    make_folder,
    make_folders,
    remove_folder,
    rename,
    sync,
)

_UNFINISHED = ".unfinished-"
STEP_FOLDER = re.compile(r"step-\d{8,}")


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Within it, write into the folder that it gives; that folder becomes `path` when the block ends without an error.

    After an error nothing of it is left, and what stood at `path` stands. Raises what `begin` raises.
    """
    unfinished = begin(path)
    try:
        yield unfinished
        finish(path)
    except BaseException:
        abandon(path)
        raise


def begin(path: Path, *, may_replace: Callable[[Path], bool] = lambda path: False) -> Path:
    """Make the folder, beside `path`, that `finish` will rename to `path`; remove what killed processes left of it.

    What stands at `path` makes room, once the new folder is on disk, only if `may_replace(path)`. Raises
    FileExistsError, before anything is written, if it may not be replaced, and for a file.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file: save into another folder, or move it away")
    if path.exists() and not may_replace(path):
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
    name = "step-*" if STEP_FOLDER.fullmatch(path.name) else escape(path.name)
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
