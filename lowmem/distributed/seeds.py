"""Derive seeds from keys: ranks with the same key get the same seed without communication."""

from hashlib import blake2b


def seed_of(*key: int | str) -> int:
    """Return a 64-bit seed for a torch generator. Different keys give unrelated seeds."""
    return int.from_bytes(blake2b(",".join(map(str, key)).encode(), digest_size=8).digest(), "little")
