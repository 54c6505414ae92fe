"""What is made once from a data file to reach its rows anywhere: an index of them, and perhaps a copy in another form.

Both stand in the folder that LOWMEM_CACHE names; if it is not set, beside the file under hidden names, or in
~/.cache/lowmem where the file is remote or its folder cannot be written. They are written under other names first, the
index last, so they are whole or absent; an index knows the size and time of its file and its own checksum, and is made
anew when one of them does not fit.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from lowmem.data.files.source import Source
from lowmem.errors import UsageError
from lowmem.storage.files import stands_at

_FORMAT = "1"
# A smaller file is indexed at each start, in a moment, and nothing is left beside it.
_BYTES_WORTH_AN_INDEX = 2**22
_LONGEST_NAME_BYTES = 255
_SECONDS_UNTOUCHED = 24 * 3600  # of a file that nobody will finish

# Writes the copy (None: there is none), tells bytes as they are done, and returns the index: arrays by name.
Build = Callable[[BinaryIO | None, Callable[[int], None]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Derived:
    """An index, arrays by name, and the file that its offsets are places in: a copy, or the data file itself (None)."""

    index: dict[str, np.ndarray]
    copy: Path | None


def derive(source: Source, build: Build, *, kind: str, copies: bool, num_bytes: int | None = None) -> Derived:
    """The index (and with `copies` the copy) of `source`, read if they were made before, else made by `build`.

    `kind` tells forms of one file apart; `num_bytes` is what `build` will have told when it is done (default: the
    file's size). Of several processes one builds while the others wait. Raises OSError, and UsageError if there is no
    place or no room for them, or if the file changes meanwhile.
    """
    size, changed = source.stamp()
    stamp = {"format": _FORMAT, "source_bytes": str(size), "source_changed": changed}
    bar = partial(
        tqdm, total=num_bytes or size, unit="B", unit_scale=True, desc=f"reading {source}", delay=1, leave=False
    )
    if not copies and size < _BYTES_WORTH_AN_INDEX:
        with bar() as progress:
            return Derived(build(None, progress.update), None)
    places = _places(source, kind)
    for place in places:
        if (found := _load(place, stamp, copies)) is not None:
            return found
    what = f"{'a copy' if copies else 'an index'} of its rows"
    place = next((place for place in places if _can_write(place.parent)), None)
    if place is None:
        told = " or ".join(str(place.parent) for place in places) or "a home, as none is known"
        raise UsageError(f"{source} needs {what}, which cannot be written in {told}: set LOWMEM_CACHE to a folder")
    with _alone(place, f"{source}: waiting for another process that makes {what}"):
        _remove_remains(place)
        if (found := _load(place, stamp, copies)) is not None:
            return found
        print(f"{source}: making {what} once, in {place.parent}", flush=True)
        with bar() as progress:
            return _make(source, place, stamp, build, progress.update, copies=copies)


def _places(source: Source, kind: str) -> list[Path]:
    """Where an index may stand, without its suffix; the first that can be written is taken."""
    named, places = os.environ.get("LOWMEM_CACHE"), []
    path = None if source.path is None else source.path.resolve()
    if path is not None and not named:
        places.append(path.with_name(f".{path.name}.lowmem-{kind}"))
    with suppress(RuntimeError):  # no home is known
        cache = Path(named or "~/.cache/lowmem").expanduser().absolute()
        name = source.file_name if path is None else path.name
        end_of_name = os.fsencode(name)[-80:].decode(errors="ignore")
        places.append(cache / f"{xxhash.xxh3_64_hexdigest(os.fsencode(source.identity))}-{end_of_name}.{kind}")
    return [place for place in places if len(os.fsencode(_unfinished(place).name)) <= _LONGEST_NAME_BYTES]


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # to ask for permissions is no proof on a shared disk
            return True
    except OSError:
        return False


def _named(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def _unfinished(place: Path) -> Path:
    # The name tells machines apart, too: on some shared disks one does not see the other's lock.
    return _named(place, f".{os.uname().nodename}.unfinished")


def _remove_remains(place: Path) -> None:
    """Remove what builders that were killed on other machines left: what lives is written to all the time."""
    for remains in place.parent.glob(f"{escape(place.name)}.*.unfinished"):
        with suppress(OSError):  # another has removed it, or only another may
            if time.time() - remains.stat().st_mtime > _SECONDS_UNTOUCHED:
                remains.unlink()


def _load(place: Path, stamp: dict[str, str], copies: bool) -> Derived | None:
    """What stands at `place`; None if nothing does, or it is damaged, or of the file as it was before."""
    try:
        with safe_open(_named(place, ".index"), framework="numpy") as file:
            facts = file.metadata() or {}
            index = {name: file.get_tensor(name) for name in file.keys()}
        copy = _named(place, ".rows") if copies else None
        copied = str(os.stat(copy).st_size) if copies else ""
    except (OSError, SafetensorError):
        return None
    expected = stamp | {"copied_bytes": copied, "checksum": _checksum(index)}
    return Derived(index, copy) if facts == expected else None


def _make(
    source: Source, place: Path, stamp: dict[str, str], build: Build, update: Callable, *, copies: bool
) -> Derived:
    copy, whole, unfinished = _named(place, ".rows"), _named(place, ".index"), _unfinished(place)
    try:
        whole.unlink(missing_ok=True)  # it does not fit, least of all beside a new copy
        if copies:
            with open(unfinished, "wb") as file:
                index = build(file, update)
                _to_disk(file)
            os.replace(unfinished, copy)
        else:
            index = build(None, update)
        size, changed = source.stamp()
        if (stamp["source_bytes"], stamp["source_changed"]) != (str(size), changed):
            raise UsageError(f"{source} changed while it was read: start again when it is whole")
        copied = str(os.stat(copy).st_size) if copies else ""
        with open(unfinished, "wb") as file:
            file.write(save(index, metadata=stamp | {"copied_bytes": copied, "checksum": _checksum(index)}))
            _to_disk(file)
        os.replace(unfinished, whole)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UsageError(
            f"{place.parent} has no room for {place.name} ({error.strerror}; {shutil.disk_usage(place.parent).free:,} "
            "bytes are free): make room, or set LOWMEM_CACHE to another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
        if not whole.exists():
            copy.unlink(missing_ok=True)
    return Derived(index, copy if copies else None)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _checksum(index: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(index):
        digest.update(f"{name} {index[name].dtype} {index[name].shape} ".encode() + index[name].tobytes())
    return digest.hexdigest()


@contextmanager
def _alone(place: Path, told: str) -> Iterator[None]:
    """Be the only process of this machine within it; `told` is printed before it waits for another.

    The lock of a process that dies is free again.
    """
    lock = _named(place, ".lock")
    while True:
        with open(lock, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if told:
                    print(told, flush=True)
                told = ""  # once, though several may hold it in turn
                fcntl.flock(file, fcntl.LOCK_EX)
            if not stands_at(lock, file.fileno()):  # the one waited for has removed it: others lock a new one
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
