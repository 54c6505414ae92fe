"""Once per data file, build an index for random access to its rows and, for some files, a converted copy.

Both are stored in the folder that LOWMEM_CACHE names. If it is not set, they are next to the data file (hidden; for a
symbolic link, next to the link), or in ~/.cache/lowmem if the data file is remote or its folder is not writable. Both
are written to temporary files, then renamed, the copy first. Both are built again if the index, the copy's size or the
data file has changed.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
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
from lowmem.storage.files import is_same_file

_FORMAT = "1"
_SMALLEST_INDEXED_BYTES = 2**22  # a smaller file that needs no copy is indexed at each start, in memory
_LONGEST_NAME_BYTES = 255
_ABANDONED_SECONDS = 24 * 3600  # a temporary file without a write for this long is abandoned

# `build(copy, report)` writes the converted file to `copy` (unless None), reports each part's size, returns the index.
Build = Callable[[BinaryIO | None, Callable[[int], None]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Derived:
    """An index (arrays by name). Its offsets refer to `copy` or, if that is None, to the data file."""

    index: dict[str, np.ndarray]
    copy: Path | None


def derive(source: Source, build: Build, *, kind: str, copies: bool, num_bytes: int | None = None) -> Derived:
    """Load the index (and with `copies` the copy) of `source`. Build them if missing, while other processes wait.

    `kind` distinguishes several indexes of a file. `num_bytes` is the total that `build` will report (None: the file's
    size). Raises OSError, and UsageError if no folder can be written, the disk is full or the file changes.
    """
    stamp = _stamp(source)
    size = int(stamp["source_bytes"])

    def build_with_bar(copy: BinaryIO | None) -> dict[str, np.ndarray]:
        options = {"desc": f"reading {source}", "unit": "B", "unit_scale": True, "delay": 1, "leave": False}
        with tqdm(total=num_bytes or size, **options) as bar:
            return build(copy, bar.update)

    if not copies and size < _SMALLEST_INDEXED_BYTES:
        return Derived(build_with_bar(None), None)
    stems = _stems(source, kind)
    for stem in stems:
        if found := _load(stem, stamp, copies):
            return found
    what = f"{'a copy' if copies else 'an index'} of its rows"
    stem = next((stem for stem in stems if _can_write(stem.parent)), None)
    if stem is None:
        tried = f"tried {' and '.join(str(stem.parent) for stem in stems)}" if stems else "there is no home folder"
        raise UsageError(f"{source} needs {what}, but no folder is writable ({tried}): set LOWMEM_CACHE to a folder")
    with _locked(stem, f"{source}: waiting for another process, which is making {what}"):
        _remove_abandoned(stem)
        if found := _load(stem, stamp, copies):
            return found
        print(f"{source}: making {what} once, in {stem.parent}", flush=True)
        return _make(source, stem, stamp, build_with_bar, copies)


def _stamp(source: Source) -> dict[str, str]:
    size, changed = source.stamp()
    return {"format": _FORMAT, "source_bytes": str(size), "source_changed": changed}


def _stems(source: Source, kind: str) -> list[Path]:
    """List the possible paths of index and copy, without suffixes. `derive` writes in the first writable folder."""
    named, stems = os.environ.get("LOWMEM_CACHE"), []
    if source.path is not None and not named:
        # only the folder is resolved, because the target of a link may be in another user's folder
        stems.append(source.path.parent.resolve() / f".{source.path.name}.lowmem-{kind}")
    with suppress(RuntimeError):  # raised if there is no home folder
        cache = Path(named or "~/.cache/lowmem").expanduser().absolute()
        name = source.file_name if source.path is None else source.path.resolve().name
        end_of_name = os.fsencode(name)[-80:].decode(errors="ignore")
        stems.append(cache / f"{xxhash.xxh3_64_hexdigest(os.fsencode(source.identity))}-{end_of_name}.{kind}")
    return [stem for stem in stems if len(os.fsencode(_temporary(stem).name)) <= _LONGEST_NAME_BYTES]


def _temporary(stem: Path) -> Path:
    # Include the host name, because hosts do not see each other's locks on some shared disks.
    return Path(f"{stem}.{os.uname().nodename}.unfinished")


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # create a file, because permission bits are not reliable on shared disks
            return True
    except OSError:
        return False


def _remove_abandoned(stem: Path) -> None:
    """Remove temporary files of killed processes: files to which no process has written for a day."""
    for path in stem.parent.glob(f"{escape(stem.name)}.*.unfinished"):
        with suppress(OSError):  # another process may have removed the file, or another user may own it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _load(stem: Path, stamp: dict[str, str], copies: bool) -> Derived | None:
    """Load what an earlier run built. Returns None if it is missing or damaged, or if the data file has changed."""
    copy = Path(f"{stem}.rows") if copies else None
    try:
        with safe_open(f"{stem}.index", framework="numpy") as file:
            index = {name: file.get_tensor(name) for name in file.keys()}
            return Derived(index, copy) if file.metadata() == stamp | _metadata(index, copy) else None
    except (OSError, SafetensorError):
        return None


def _make(source: Source, stem: Path, stamp: dict[str, str], build: Callable, copies: bool) -> Derived:
    copy, whole = Path(f"{stem}.rows"), Path(f"{stem}.index")
    try:
        whole.unlink(missing_ok=True)  # the old index must not be used with the new copy
        with _replacing(copy, stem) if copies else nullcontext() as file:
            index = build(file)
        if _stamp(source) != stamp:
            raise UsageError(f"{source} changed while it was read: start again when it is complete")
        made = Derived(index, copy if copies else None)
        with _replacing(whole, stem) as file:
            file.write(save(index, metadata=stamp | _metadata(index, made.copy)))
        return made
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_bytes = shutil.disk_usage(stem.parent).free
        what = f"{stem.parent} has no room for {stem.name} ({error.strerror}; {free_bytes:,} bytes are free)"
        raise UsageError(f"{what}: free disk space, or set LOWMEM_CACHE to another folder") from error
    finally:
        _temporary(stem).unlink(missing_ok=True)
        if not whole.exists():
            copy.unlink(missing_ok=True)


@contextmanager
def _replacing(path: Path, stem: Path) -> Iterator[BinaryIO]:
    with open(_temporary(stem), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(_temporary(stem), path)


def _metadata(index: dict[str, np.ndarray], copy: Path | None) -> dict[str, str]:
    """Return the size of the copy and the checksum of the index, which the index file records."""
    digest = xxhash.xxh3_128()
    for name in sorted(index):
        digest.update(f"{name} {index[name].dtype} {index[name].shape} ".encode() + index[name].tobytes())
    return {"copied_bytes": str(os.stat(copy).st_size) if copy else "", "checksum": digest.hexdigest()}


@contextmanager
def _locked(stem: Path, message: str) -> Iterator[None]:
    """Lock out other processes on this host. If one holds the lock, print `message` and wait. Unlocks on exit."""
    lock = Path(f"{stem}.lock")
    while True:
        with open(lock, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if message:
                    print(message, flush=True)
                message = ""  # print it once, even if several processes hold the lock in sequence
                fcntl.flock(file, fcntl.LOCK_EX)
            if is_same_file(lock, file.fileno()):  # if not, the last holder removed the file, so lock a new one
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
