"""Read the small text files that flags name. Imports no torch."""

import os

from lowmem.errors import UsageError

_MOST_BYTES = 2**17


def read_text(path: str, what: str) -> str:
    """Return the text of a UTF-8 file of at most 128 KiB. Raises UsageError, which begins with `what`, if it fails."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a null byte in the path
        raise UsageError(f"{what} cannot be read: {error}") from error
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{what} is larger than {_MOST_BYTES:,} bytes: it is not a config")
    return text
