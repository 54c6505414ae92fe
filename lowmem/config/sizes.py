"""Parse sizes such as 5GB."""

import re

from lowmem.errors import UsageError


def parse_bytes(size: int | str) -> int:
    """Convert `size` to bytes. It is a number, or text such as "500MB" (500 * 10**6), "5GB" or "2GiB" (2 * 2**30)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if not match:
        raise UsageError(f"size {size!r} is not valid: use a number of bytes, or a size such as 500MB, 5GB or 2GiB")
    number, prefix, binary = match.groups()
    if (num_bytes := int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))) < 1:
        raise UsageError(f"size {size!r} is less than one byte: set a larger size")
    return num_bytes
