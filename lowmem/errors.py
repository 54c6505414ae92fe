"""The errors that lowmem raises on purpose. Each message says what was asked, what was found, and what to do."""


class UsageError(ValueError):
    """A mistake in flags, files or environment; the command line tells it in one line and exits 2."""


class StartError(UsageError):
    """A process cannot join the others, for a reason that may be its own: unlike other mistakes, each one tells it."""


class RankError(RuntimeError):
    """Another rank failed; the message names it and says with what."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; those that stood before stand."""


class OutOfMemory(RuntimeError):
    """Memory did not hold what `rank` was doing in a step; the message tells what filled it and what takes less."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class StepTooLarge(OutOfMemory):
    """Forward or backward ran out of memory on some rank, all ranks raise it alike, and nothing was updated."""


class RowError(ValueError):
    """A row that cannot be read or encoded; the message tells which, and why."""


class ReadError(RowError):
    """A file that was there and cannot be read any more: no row of it is to blame."""


class ChangedError(OSError):
    """A file is not the one that was opened."""
