"""Once per data file, build an index for random access to its rows and, for some files, a converted copy.

Both are stored in the folder that LOWMEM_CACHE names. If it is not set, they are next to the data file (hidden; for a
symbolic link, next to the link), or in ~/.cache/lowmem if the data file is remote, or its folder is not writable or is
another user's. Both are written to temporary files, then renamed, the copy first. Both are built again if the index,
the copy's size or the data file has changed, and if the index does not fit the file.

Other users may be able to write to the folder, and a data folder may contain planted files. So only files of this user
or root are used, links are never followed, and the wait for a lock ends if its holder shows no sign of life.
"""

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

from lowmem.data.files.source import Source
from lowmem.errors import UsageError
from lowmem.storage.files import check_owner, open_regular
from lowmem.storage.lock import acquire, release

_FORMAT = "1"
_SMALLEST_INDEXED_BYTES = 2**22  # a smaller file that needs no copy is indexed at each start, in memory
_LONGEST_NAME_BYTES = 255
_LONGEST_HEADER_BYTES = 2**16  # besides its header, an index has fewer bytes than what it indexes
_ABANDONED_SECONDS = 24 * 3600  # a temporary file without a write for this long is abandoned
_TOUCH_SECONDS = 0.25  # how often a process that is building shows other processes that it is alive
_PATIENCE_SECONDS = 30.0  # how long to wait for a process that shows no sign of life

# `build(copy, report)` writes the converted file to `copy` (unless None), reports each part's size, returns the index.
Build = Callable[[BinaryIO | None, Callable[[int], None]], dict[str, np.ndarray]]
# `fits(index, file)` says whether `build` could have returned this index for an open copy or data file.
Fits = Callable[[Mapping[str, np.ndarray], BinaryIO], bool]


@dataclass(frozen=True)
class Derived:
    """An index (arrays by name). Its offsets refer to `copy` or, if that is None, to the data file."""

    index: dict[str, np.ndarray]
    copy: Path | None


def derive(
    source: Source,
    build: Build,
    *,
    kind: str,
    copies: bool,
    fits: Fits = lambda index, file: True,
    num_bytes: int | None = None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> Derived:
    """Load the index (and with `copies` the copy) of `source`. Build them if missing, while other processes wait.

    `kind` distinguishes several indexes of a file. `num_bytes` is the total that `build` will report (None: the file's
    size). If no folder can be used, an index is built and not stored. Raises OSError, and UsageError if no folder can
    be used for a copy, the disk is full or the file changes.
    """
    stamp = _stamp(source)
    size = int(stamp["source_bytes"])

    def build_with_bar(copy: BinaryIO | None) -> dict[str, np.ndarray]:
        options = {"desc": f"reading {source}", "unit": "B", "unit_scale": True, "delay": 1, "leave": False}
        with tqdm(total=num_bytes or size, **options) as bar:
            return build(copy, bar.update)

    if not copies and size < _SMALLEST_INDEXED_BYTES:
        return Derived(build_with_bar(None), None)
    stems, problems = _stems(source, kind)
    for stem in stems:
        if found := _load(source, stem, stamp, copies, fits):
            return found
    what = f"{'a copy' if copies else 'an index'} of its rows"
    waiting = f"{source}: waiting for another process, which is making {what}"
    for stem in stems:
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(Path(f"{stem}.lock"), waiting, patience_seconds))
                _remove_abandoned(stem)
                if found := _load(source, stem, stamp, copies, fits):
                    return found
                _make_way(stem)
            except OSError as error:
                problems.append(f"{error.filename or stem}: {error.strerror or error}")
                continue
            why = f" ({'; '.join(problems)})" if problems else ""
            print(f"{source}: making {what} once, in {stem.parent}{why}", flush=True)
            return _make(source, stem, stamp, build_with_bar, copies)
    why = f"no folder can be used ({'; '.join(problems)}): set LOWMEM_CACHE to a folder of your own"
    if copies:
        raise UsageError(f"{source} needs {what}, but {why}")
    print(f"{source}: making {what} at each start, because {why}", flush=True)
    return Derived(build_with_bar(None), None)


def _stamp(source: Source) -> dict[str, str]:
    size, changed = source.stamp()
    return {"format": _FORMAT, "source_bytes": str(size), "source_changed": changed}


def _stems(source: Source, kind: str) -> tuple[list[Path], list[str]]:
    """List the possible paths of index and copy, without suffixes, in order, and why there are no others."""
    named, stems, problems = os.environ.get("LOWMEM_CACHE"), [], []
    if source.path is not None and not named:
        # only the folder is resolved, because the target of a link may be in another user's folder
        folder = source.path.parent.resolve()
        try:
            check_owner(folder, os.stat(folder))
            stems.append(folder / f".{source.path.name}.lowmem-{kind}")
        except PermissionError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    try:
        cache = Path(named or "~/.cache/lowmem").expanduser().absolute()
    except RuntimeError:
        problems.append("there is no home folder")
    else:
        name = source.file_name if source.path is None else source.path.resolve().name
        end_of_name = os.fsencode(name)[-80:].decode(errors="ignore")
        stems.append(cache / f"{xxhash.xxh3_64_hexdigest(os.fsencode(source.identity))}-{end_of_name}.{kind}")
    return [stem for stem in stems if len(os.fsencode(_temporary(stem).name)) <= _LONGEST_NAME_BYTES], problems


def _temporary(stem: Path) -> Path:
    # Include the host name, because hosts do not see each other's locks on some shared disks.
    return Path(f"{stem}.{os.uname().nodename}.unfinished")


def _remove_abandoned(stem: Path) -> None:
    """Remove temporary files of killed processes: files to which no process has written for a day."""
    for path in stem.parent.glob(f"{escape(stem.name)}.*.unfinished"):
        with suppress(OSError):  # another process may have removed the file, or another user may own it
            if time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _make_way(stem: Path) -> None:
    """Remove old and planted files, so that `_make` finds no obstacle. Raises OSError if they cannot be removed."""
    copy = Path(f"{stem}.rows")
    with suppress(FileNotFoundError):
        found = copy.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            copy.unlink()  # but keep an old copy until it is replaced, because another run may read it
    for path in (Path(f"{stem}.index"), _temporary(stem)):  # the old index must not be used with the new copy
        path.unlink(missing_ok=True)


def _load(source: Source, stem: Path, stamp: dict[str, str], copies: bool, fits: Fits) -> Derived | None:
    """Load what an earlier run built. Returns None if it is missing or damaged, or if the data file has changed."""
    copy = Path(f"{stem}.rows") if copies else None
    try:
        with _open_own(copy) if copy else source.open() as rows, _open_own(Path(f"{stem}.index")) as file:
            size = os.fstat(file.fileno()).st_size
            if size > rows.seek(0, os.SEEK_END) + _LONGEST_HEADER_BYTES:
                return None
            data = file.read(size)
            index = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            is_whole = metadata == stamp | _metadata(index, copy) and fits(index, rows)
    except (OSError, SafetensorError, LookupError, ValueError):
        return None
    return Derived(index, copy) if is_whole else None


def _open_own(path: Path) -> BinaryIO:
    """Open a regular file of this user or root. Raises OSError for any other."""
    file = open(open_regular(path, os.O_RDONLY), "rb")
    try:
        check_owner(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _make(source: Source, stem: Path, stamp: dict[str, str], build: Callable, copies: bool) -> Derived:
    copy, whole = Path(f"{stem}.rows"), Path(f"{stem}.index")
    try:
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
    with open(_temporary(stem), "xb") as file:  # "x" opens only a new file, and follows no link
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
def _locked(path: Path, message: str, patience_seconds: float) -> Iterator[None]:
    """Lock out other processes, and show them that this one is alive. If one has the lock, print `message` and wait.

    Unlocks on exit. Raises OSError, also if the process that has the lock is another user's or shows no sign of life.
    """

    def on_wait() -> None:
        with suppress(FileNotFoundError):
            check_owner(path, os.lstat(path))  # do not wait for another user, whose files would not be used
        print(message, flush=True)

    lock, done = acquire(path, limit_seconds=patience_seconds, on_wait=on_wait), Event()

    def touch() -> None:
        with suppress(OSError):
            while not done.wait(_TOUCH_SECONDS):
                os.utime(lock)

    thread = Thread(target=touch, daemon=True, name="lowmem-lock")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release(path, lock)
