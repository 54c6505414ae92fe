"""Find data files by path, glob or URL, in a fixed order, and open them."""

import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lowmem.errors import UsageError
from lowmem.storage.files import describe

Row = dict[str, object]
Files = str | Path | Sequence[str | Path]

# fsspec uses these packages for network access, and not all of their errors are OSErrors.
_NETWORK_PACKAGES = {"aiohttp", "httpx", "httpx2", "botocore"}
# A column of a parquet row group is read twice, first its page headers, so keep several blocks (of 5 MiB) in memory.
_CACHE = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
_WHAT_TO_NAME = "name a parquet, Arrow, JSONL or text file, or a glob of them"
_MOST_DECODED_BYTES, _MOST_DECODED_RATIO = 2**28, 500
_HOW_TO_NAME = rf"{_WHAT_TO_NAME} (if the name has a comma, write \,)"


@contextmanager
def reading() -> Iterator[None]:
    """Convert errors of network packages to ConnectionError, which is an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if _NETWORK_PACKAGES.isdisjoint(kind.__module__.partition(".")[0] for kind in type(error).__mro__):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def is_damage(error: Exception) -> bool:
    """Return whether a read failed because the content is damaged, not because of the system or the network."""
    # pyarrow raises a plain OSError for damage; the system's OSErrors have an errno or are of a subclass
    return isinstance(error, _damages()) or (type(error) is OSError and error.errno is None)


def _damages() -> tuple[type[Exception], ...]:
    pyarrow = sys.modules.get("pyarrow")  # if it is not imported, it cannot have raised an error
    return (ValueError, pyarrow.ArrowException) if pyarrow else (ValueError,)


@dataclass(frozen=True)
class Source:
    """A data file, named by a path or by a URL that fsspec opens (hf://, s3://, https://, ...)."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path | None:
        return None if is_url(self.name) else Path(self.name)

    @property
    def identity(self) -> str:
        return self.name if self.path is None else str(self.path.resolve())

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.name.partition("?")[0] if self.path is None else self.name).name

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in PurePosixPath(self.file_name).suffixes]

    @reading()
    def open(self) -> BinaryIO:
        """Open the file for reading and seeking. Raises OSError, as do later reads inside `reading`."""
        if self.path is not None:
            return open(self.path, "rb")
        file_system, path = _remote(self.name)
        return file_system.open(path, "rb", **_CACHE)

    @reading()
    def stamp(self) -> tuple[int, str]:
        """Return the size, and a text that changes if the file is rewritten (time, inode, ETag). Raises OSError."""
        if self.path is not None:
            found = os.stat(self.path)
            return found.st_size, f"{found.st_mtime_ns} {found.st_ino}"  # inode too, as unpacked files may share times
        file_system, path = _remote(self.name)
        info = file_system.info(path)  # not fsspec's `ukey`, which never changes for http
        return info["size"], blake2b(repr(sorted(info.items())).encode(), digest_size=8).hexdigest()


@contextmanager
def opening(source: Source, kind: str = "") -> Iterator[None]:
    """Convert read errors to a UsageError that names the file and the `kind` (such as " as parquet")."""
    try:
        with reading():
            yield
    except UsageError:
        raise
    except (OSError, EOFError, LookupError, *_damages()) as error:
        raise UsageError(f"{source} cannot be read{kind} ({error}): write it again or name another file") from error


def check_ratio(stored_bytes: int, decoded_bytes: int) -> None:
    """Raise ValueError if data takes over 256 MiB and over 500 times its stored size, which no real text does."""
    if decoded_bytes > max(_MOST_DECODED_BYTES, _MOST_DECODED_RATIO * stored_bytes):
        found = f"{stored_bytes:,} bytes decode to at least {decoded_bytes:,}"
        raise ValueError(f"{found}, the limit is {_MOST_DECODED_RATIO} times as many")


def is_url(name: str) -> bool:
    return "://" in name


def expand(files: Files) -> list[Source]:
    """List the data files. `files` is a path, glob or URL, several of these separated by commas, or a list of them.

    Keeps the given order; matches of a glob are sorted. Splits a string at commas, except after a backslash, unless it
    exists as a path. Does not split items of a list. Raises UsageError if a name matches nothing or a file is named
    twice.
    """
    items = items_of(files)
    advice = _HOW_TO_NAME if isinstance(files, str) and len(items) > 1 else _WHAT_TO_NAME
    lists = [_remote_names(item) if is_url(item) else _local_names(item, advice) for item in map(str, items)]
    names = [name for names in lists for name in names]
    if not names:
        raise UsageError(f"{files!r} names no file: {_WHAT_TO_NAME}")
    sources = [Source(name) for name in names]
    times = Counter(source.identity for source in sources)
    if repeated := [name for name, number in times.items() if number > 1]:
        named = files if isinstance(files, str | Path) else ", ".join(map(str, files))
        raise UsageError(f"{named} names {', '.join(repeated)} twice: name it once")
    return sources


def items_of(files: Files) -> list[str | Path]:
    """List the paths, globs and URLs that `files` names, as `expand` splits it."""
    if not isinstance(files, str):
        return [files] if isinstance(files, Path) else list(files)
    if not is_url(files) and os.path.exists(os.path.expanduser(files)):
        return [files]
    parts = (part.strip().replace(r"\,", ",") for part in re.split(r"(?<!\\),", files))
    return [part for part in parts if part]


def _local_names(item: str, advice: str) -> list[str]:
    path = Path(os.path.expanduser(item))
    try:
        is_glob = any(mark in item for mark in "*?[") and not path.exists()
        is_folder = path.is_dir()
        parent = next(folder for folder in path.parents if folder.is_dir()) if is_glob else path
    except OSError as error:  # the name is too long, or its folder is not accessible
        raise UsageError(f"{item} cannot be accessed ({error}): fix its name or its folder's permissions") from error
    if is_glob:
        # marks in the names of folders that exist are literal
        pattern = os.path.join(glob.escape(str(parent)), path.relative_to(parent))
        found, reason = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))], "matches no file"
    else:
        found, reason = (dataset_files(path) or []) if is_folder else [path], "is a folder"
    if other := [f"{file} {describe(file)}" for file in found if not (file.is_file() or file.is_dir())]:
        raise UsageError(f"{', '.join(other)}: {advice}")
    names = [str(file) for file in found if file.is_file()]
    if not names:
        raise UsageError(f"{item} {reason}: {advice}")
    return names


def dataset_files(folder: Path) -> list[Path] | None:
    """List the Arrow files of a folder that `datasets.save_to_disk` wrote, in order. Returns None for any other folder.

    Raises UsageError if the folder has splits, or if its list of files is broken or names a missing file.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            names = ", ".join(str(folder / name) for name in json.loads(splits.read_text("utf-8"))["splits"])
            raise UsageError(f"{folder} holds the splits of a dataset: name one of {names}")
        if not state.is_file():
            return None
        files = [folder / entry["filename"] for entry in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder} cannot be read as a saved dataset ({error!r}): save it again") from error
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UsageError(f"{folder} lacks {', '.join(missing)}: save the dataset again")
    return files


def _remote_names(item: str) -> list[str]:
    file_system, path = _remote(item)
    try:
        with reading():
            if not any(mark in path.partition("?")[0] for mark in "*["):  # in a URL, "?" begins the query
                file_system.info(path)
                return [item]
            found = sorted(file_system.glob(path))
    except OSError as error:
        raise UsageError(f"{item} cannot be reached ({error!r}): check name, access and network") from error
    if not found:
        raise UsageError(f"{item} matches no file: {_WHAT_TO_NAME}")
    return [file_system.unstrip_protocol(path) for path in found]


def _remote(name: str):
    """Return the file system of a URL, and the path in it. Raises UsageError if fsspec cannot use the protocol."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(name)
    except (ImportError, ValueError) as error:  # the protocol's package is missing, or the protocol is unknown
        raise UsageError(f"{name} cannot be opened ({error}): install lowmem[hub], or name a local file") from error
