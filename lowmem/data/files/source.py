"""Data files by name: paths, globs and URLs, in a stated order, opened alike."""

import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lowmem.errors import UsageError

Row = dict[str, object]

# What fsspec reads the network with; their errors are no OSErrors.
_NETWORK_PACKAGES = {"aiohttp", "httpx", "httpx2", "botocore"}


@contextmanager
def reading() -> Iterator[None]:
    """Turn what network packages raise within into ConnectionError, an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if _NETWORK_PACKAGES.isdisjoint(kind.__module__.partition(".")[0] for kind in type(error).__mro__):
            raise
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def is_damage(error: Exception) -> bool:
    """Whether an error that reading raised tells of damaged content, and not of the system or the network.

    pyarrow tells damage as OSErrors, too; the system's have a number or a type of their own.
    """
    pyarrow = sys.modules.get("pyarrow")  # without it, it has raised nothing
    kinds = (ValueError, pyarrow.ArrowException) if pyarrow else ValueError
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


@dataclass(frozen=True)
class Source:
    """A data file, by the name that it was given: a path, or a URL that fsspec opens (hf://, s3://, https://, ...)."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path | None:
        """Where it is on this machine; None for a URL."""
        return None if is_url(self.name) else Path(self.name)

    @property
    def identity(self) -> str:
        """One text for all local names of a file: relative ones, absolute ones and links."""
        return self.name if self.path is None else str(self.path.resolve())

    @property
    def file_name(self) -> str:
        """The last part of the path, or of the URL without its query."""
        return PurePosixPath(self.name.partition("?")[0] if self.path is None else self.name).name

    @property
    def suffixes(self) -> list[str]:
        """Lower-case suffixes of the file's name, as [".jsonl", ".gz"]."""
        return [suffix.lower() for suffix in PurePosixPath(self.file_name).suffixes]

    @reading()
    def open(self) -> BinaryIO:
        """The file's bytes, seekable. Raises OSError, as its reads do within `reading`."""
        if self.path is not None:
            return open(self.path, "rb")
        file_system, place = _remote(self.name)
        return file_system.open(place, "rb")

    @reading()
    def stamp(self) -> tuple[int, str]:
        """Bytes of the file, and what changes when it is written again (time, inode, a URL's ETag). Raises OSError."""
        if self.path is not None:
            found = os.stat(self.path)
            return found.st_size, f"{found.st_mtime_ns} {found.st_ino}"  # unpacked files may all be of one time
        file_system, place = _remote(self.name)
        told = file_system.info(place)  # its ukey would be the same for ever over http
        return told["size"], blake2b(repr(sorted(told.items())).encode(), digest_size=8).hexdigest()


def is_url(name: str) -> bool:
    return "://" in name


def expand(files: str | Path | Sequence[str | Path]) -> list[Source]:
    """The files that a path, a glob, a comma list of both or a list of paths names.

    They stand in the order in which they are given, the matches of a glob sorted by name. A text is split at its commas
    unless a file has it as its name; the items of a list never are, so a URL with a comma goes there. Raises UsageError
    for a name that matches nothing and for a file named twice.
    """
    items = _split(files) if isinstance(files, str) else [files] if isinstance(files, Path) else files
    names = [name for item in map(str, items) for name in (_remote_names(item) if is_url(item) else _local_names(item))]
    if not names:
        raise UsageError(f"no file is named by {files!r}: name a parquet, Arrow, JSONL or text file, or a glob of them")
    sources = [Source(name) for name in names]
    times = Counter(source.identity for source in sources)
    if repeated := [name for name, number in times.items() if number > 1]:
        raise UsageError(f"{files} names {', '.join(repeated)} twice, so its rows would count twice: name it once")
    return sources


def check_columns(source: Source, wanted: Iterable[str], present: Sequence[str]) -> None:
    """Raise UsageError, naming the file, if it lacks a wanted column."""
    if missing := [repr(column) for column in wanted if column not in present]:
        raise UsageError(
            f"{source} has no {' and no '.join(f'column {name}' for name in missing)}, it has "
            f"{', '.join(map(repr, present))}: set --prompt_column and --response_column, --text_column or "
            "--messages_column"
        )


def _split(text: str) -> list[str]:
    names_one = not is_url(text) and os.path.exists(os.path.expanduser(text))
    return [text] if names_one else list(filter(None, map(str.strip, text.split(","))))


def _local_names(item: str) -> list[str]:
    path = Path(os.path.expanduser(item))
    try:
        is_glob = any(mark in item for mark in "*?[") and not path.exists()
        is_folder = path.is_dir()
    except OSError as error:  # too long a name, a folder that is closed to us
        raise UsageError(f"{item} cannot be looked for ({error}): mend its name or its folder's permissions") from error
    matches = map(Path, sorted(glob.glob(str(path), recursive=True))) if is_glob else [path]
    found = [str(match) for match in matches if match.is_file()]
    if is_folder:
        found = [str(file) for file in dataset_files(path) or ()]
    if not found:
        what = "matches no file" if is_glob else "is a folder" if is_folder else "does not exist"
        raise UsageError(f"{item} {what}: name a parquet, Arrow, JSONL or text file, or a glob of them")
    return found


def dataset_files(folder: Path) -> list[Path] | None:
    """The Arrow files, in order, of a folder that `datasets.save_to_disk` wrote; None if it is no such folder.

    Raises UsageError if it is one of several splits, or if its list of files cannot be read or names one that is gone.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            names = ", ".join(str(folder / name) for name in json.loads(splits.read_text("utf-8"))["splits"])
            raise UsageError(f"{folder} holds several splits of a dataset: name one of {names}")
        if not state.is_file():
            return None
        files = [folder / entry["filename"] for entry in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder} cannot be read as a saved dataset ({error!r}): save it again") from error
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UsageError(f"{folder} lacks {', '.join(missing)}, which its state.json names: save the dataset again")
    return files


def _remote_names(item: str) -> list[str]:
    file_system, place = _remote(item)
    try:
        with reading():
            if not any(mark in place.partition("?")[0] for mark in "*["):  # a query is no pattern
                file_system.info(place)
                return [item]
            found = sorted(file_system.glob(place))
    except OSError as error:
        raise UsageError(f"{item} cannot be reached: {error!r}; mind its name, your access and the network") from error
    if not found:
        raise UsageError(f"{item} matches no file: name a parquet, Arrow, JSONL or text file, or a glob of them")
    return [file_system.unstrip_protocol(place) for place in found]


def _remote(name: str):
    """The file system of a URL, and the file's place in it. Raises UsageError for one that is unknown here."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(name)
    except (ImportError, ValueError) as error:  # of a protocol without its package, and of an unknown one
        raise UsageError(
            f"{name} cannot be opened ({error}): pip install 'lowmem[hub]', or name a local file"
        ) from error
