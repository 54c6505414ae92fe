"""The errors that lowmem raises on purpose. Each message says what was asked, what was found, and what to do."""


class UsageError(ValueError):
    """A user error. The command line prints it in one line and exits with code 2."""


class StartError(UsageError):
    """This process could not join the others; the cause may be local, so every rank reports it."""


class RankError(RuntimeError):
    """Another rank failed; the message names it and its error."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; existing checkpoints are intact."""


class OutOfMemory(RuntimeError):
    """`rank` ran out of memory in a step; the message says what filled it and what takes less."""

    def __init__(self, message: str, rank: int):
        super().__init__(message)
        self.rank = rank


class StepTooLarge(OutOfMemory):
    """Forward or backward ran out of memory on some rank; every rank raises it, and nothing was updated."""


class RowError(ValueError):
    """A row that cannot be read or encoded; the message names it and says why."""


class ReadError(RowError):
    """A file that could be read before and cannot be read now, whatever the row."""


class ChangedError(OSError):
    """A file is not the one that was opened."""
