"""Seeds that every rank computes by itself."""

from hashlib import blake2b


def seed_of(*key: int | str) -> int:
    """A seed of 64 bits for a generator of torch; keys that differ in one part have unrelated ones."""
    return int.from_bytes(blake2b(",".join(map(str, key)).encode(), digest_size=8).digest(), "little")
