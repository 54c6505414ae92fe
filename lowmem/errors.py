"""The error classes of lowmem. Most messages say what was requested, what was found, and what to do."""

import errno
import re
from collections.abc import Sequence
from pathlib import Path


def one_line(message: object) -> str:
    """Return `message` as one line: control characters escaped, and words of over 500 characters shortened."""
    printable = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(message))
    return re.sub(r"\S{500,}", lambda word: f"{word[0][:100]}...{word[0][-100:]}", printable)


class UsageError(ValueError):
    """A user error. The command line prints it in one line and exits with code 2."""


class ColumnsError(UsageError):
    """A file lacks columns; `present` are the columns that it has."""

    def __init__(self, message: str, file: str, present: Sequence[str]):
        super().__init__(message)
        self.file, self.present = file, present


class StartError(UsageError):
    """This process could not join the process group; every rank prints its own error."""


class LostFolderError(UsageError):
    """The output folder of a run was removed or replaced while the run was training."""


class RankError(RuntimeError):
    """Another rank failed or stopped responding; the message names it and its error, if known."""


class SaveError(RuntimeError):
    """A checkpoint or model could not be written; existing ones are intact."""


class StoreError(RuntimeError):
    """Offloaded weights could not be read or written; checkpoints are intact."""


class OutOfMemory(RuntimeError):
    """`rank` ran out of memory in a step; the message says what used the memory and which settings use less."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class StepTooLarge(OutOfMemory):
    """Forward or backward ran out of memory on a rank. Every rank raises this error, and no weights change."""


class RowError(ValueError):
    """A row cannot be read or encoded; the message names the row and the reason."""


class ReadError(RowError):
    """A file that was readable before can no longer be read, so the row is not the cause."""


class ChangedError(OSError):
    """A file was changed or replaced after it was opened."""


class LockedError(OSError):
    """Another process holds the lock of a file; `owner` names it."""

    def __init__(self, path: Path, owner: str):
        super().__init__(errno.EWOULDBLOCK, f"Is locked by {owner}", str(path))
        self.owner = owner


# Phrases in out-of-memory errors whose type is neither torch.OutOfMemoryError nor MemoryError.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, RankError | StoreError):  # these may quote another rank's error, or that of a file's disk
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
