"""Parse sizes such as 5GB."""

import re

from lowmem.errors import UsageError


def parse_bytes(size: int | str) -> int:
    """Convert a number, or text such as "500MB" (10**6), "5GB" (10**9) or "2GiB" (2**30), to a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if not match:
        raise UsageError(f"size {size!r} is not valid: use a number of bytes, or a size such as 500MB, 5GB or 2GiB")
    number, prefix, binary = match.groups()
    if (num_bytes := int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))) < 1:
        raise UsageError(f"size {size!r} is less than one byte: set a larger size")
    return num_bytes
