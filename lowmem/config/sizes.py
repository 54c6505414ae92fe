"""Parse sizes such as 5GB."""

import re

from lowmem.errors import UsageError


def parse_bytes(size: int | str) -> int:
    """Convert `size` to bytes. It is a number, or text such as "500MB" (500 * 10**6), "5GB" or "2GiB" (2 * 2**30)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if not match:
        raise UsageError(f"size {size!r} is not valid: use a number of bytes, or a size such as 500MB, 5GB or 2GiB")
    number, prefix, binary = match.groups()
    num_bytes = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " ")
    if not 1 <= num_bytes < 2**63:
        advice = "set a larger size" if num_bytes < 1 else "set a smaller size"
        raise UsageError(f"size {size!r} is not between one byte and 2**63 bytes: {advice}")
    return int(num_bytes)
