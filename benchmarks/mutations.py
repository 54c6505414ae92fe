"""Random changes of bytes, some of which know how parquet, Arrow and JSON store numbers. Used by fuzz.py."""

import re
from random import Random

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 2**15 - 1, 2**16, 2**24, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)]
VALUES = [*map(str, NUMBERS), "null", '""', "[]", "{}", "1.5", "1e999", "true", '"../x"', "9" * 5000]


def mutate(data: bytes, chance: Random, structure: list[range]) -> bytes:
    """Make one to four random changes, half of them in the ranges of `structure`."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        part = chance.choice(structure) if structure and chance.random() < 0.5 else range(len(data))
        at = chance.choice(part)
        if at < len(changed):
            chance.choice(CHANGES)(changed, at, chance)
    return bytes(changed)


def flip_bit(data: bytearray, at: int, chance: Random) -> None:
    data[at] ^= 1 << chance.randrange(8)


def set_byte(data: bytearray, at: int, chance: Random) -> None:
    data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])


def set_number(data: bytearray, at: int, chance: Random) -> None:
    """Write a number of 2 to 8 bytes at a multiple of its size, as Arrow aligns them."""
    size = chance.choice([2, 4, 8])
    number = chance.choice(NUMBERS) % 2 ** (8 * size)
    data[at - at % size : at - at % size + size] = number.to_bytes(size, chance.choice(["little", "big"]))


def set_varint(data: bytearray, at: int, chance: Random) -> None:
    """Replace an integer of variable length, as parquet's Thrift has. Corrects the length of a parquet footer."""
    end = next((byte for byte in range(at, len(data)) if data[byte] < 0x80), len(data) - 1) + 1
    left, new = chance.choice(NUMBERS) * 2 % 2**64 ^ chance.randrange(2), bytearray()
    while left >= 0x80:
        new.append(left % 0x80 + 0x80)
        left //= 0x80
    new.append(left)
    footer = int.from_bytes(data[-8:-4], "little") if data.endswith(b"PAR1") else 0
    if len(data) - 8 - footer <= at < end <= len(data) - 8:
        data[-8:-4] = max(0, footer + len(new) - (end - at)).to_bytes(4, "little")
    data[at:end] = new


def set_value(data: bytearray, at: int, chance: Random) -> None:
    """Replace the next number or text of a JSON document."""
    if found := re.compile(rb'-?\d+|(?<=[:\[,] )"[^"]*"').search(data, at):
        data[slice(*found.span())] = chance.choice(VALUES).encode()


def truncate(data: bytearray, at: int, chance: Random) -> None:
    del data[at:]


def move_block(data: bytearray, at: int, chance: Random) -> None:
    """Remove or duplicate a block, or swap two."""
    size, to = chance.choice([1, 4, 8, 64, 512]), chance.randrange(len(data))
    block, other = data[at : at + size], data[to : to + size]
    how = chance.choice(["remove", "duplicate", "swap"])
    if how == "remove":
        del data[at : at + size]
    elif how == "duplicate":
        data[to:to] = block
    elif abs(at - to) >= size and len(block) == len(other):
        data[at : at + size], data[to : to + size] = other, block


CHANGES = [flip_bit, flip_bit, set_byte, set_number, set_varint, set_value, truncate, move_block]
