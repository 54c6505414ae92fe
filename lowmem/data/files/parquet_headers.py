"""Parse a parquet file's footer and page headers, to check the sizes they claim before pyarrow allocates memory.

pyarrow trusts these sizes, and it ends the process if it meets damaged statistics while it lists a footer's columns.
Format: https://github.com/apache/parquet-format (structs of Thrift's compact protocol).
"""

import struct
from collections.abc import Iterator
from operator import index
from typing import BinaryIO, NamedTuple

_BYTE_ARRAY = 6  # the physical type of texts
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_DICTIONARY_ENCODINGS = {2, 8}
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_HEADER_BYTES, _LARGEST_HEADER_BYTES = 2**12, 2**24  # statistics in a header can be long
_MOST_VALUES = 2**25  # of a page; pyarrow allocates up to 12 bytes for each, even if the page repeats one value
_MOST_NESTED = 32
_LARGEST_CHUNK = 2**48  # bytes or values, and the largest offset; sums of larger numbers could exceed int64
_MASK = 2**64 - 1


class Chunk(NamedTuple):
    """A column of a row group, as the footer describes it: seven integers. Offsets and sizes are in bytes."""

    first_byte: int
    stored_bytes: int
    decoded_bytes: int  # without compression, but with repeated values stored once
    num_values: int
    has_dictionary: int  # 0 or 1
    codec: int
    is_text: int  # 0 or 1


class Page(NamedTuple):
    first_byte: int  # of its content, which follows its header
    stored_bytes: int
    decoded_bytes: int
    num_values: int
    is_dictionary: bool
    is_encoded: bool  # its values are indices into the dictionary


def parse_footer(footer: bytes) -> Iterator[tuple[int, dict[str, Chunk]]]:
    """Yield each row group's number of rows and its columns by path. `footer` is without the file's last 8 bytes.

    Raises ValueError if it is damaged, or if its numbers contradict each other.
    """
    at = number = num_rows = 0
    claimed = None
    try:
        while head := footer[at]:
            number, at = (number + (head >> 4), at + 1) if head > 15 else _read_int(footer, at + 1)
            if number != 4:
                value, at = _read_value(footer, at, head & 15, 0)
                claimed = value if number == 3 else claimed
                continue
            num_groups, kind, at = _read_list_head(footer, at)
            for _ in range(num_groups):
                group, at = _read_value(footer, at, kind, 0)
                rows, chunks = index(group[3]), dict(_chunk(column[3]) for column in group[1])
                # every row has at least one value in each column, which may be null
                if rows < 0 or any(
                    min(chunk[:3]) < 0 or max(chunk[:4]) > _LARGEST_CHUNK or chunk.num_values < rows
                    for chunk in chunks.values()
                ):
                    raise ValueError(f"its footer has impossible sizes for a row group of {rows:,} rows")
                num_rows += rows
                yield rows, chunks
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError("its footer is damaged") from error
    if num_rows != claimed:
        raise ValueError(f"its footer claims {claimed} rows, but its row groups have {num_rows:,}")


def _chunk(data: dict[int, object]) -> tuple[str, Chunk]:
    first, dictionary = data[9], data.get(11, 0)
    return ".".join(part.decode() for part in data[3]), Chunk(
        first_byte=index(dictionary if 0 < dictionary < first else first),  # raises TypeError for another type
        stored_bytes=index(data[7]),
        decoded_bytes=index(data[6]),
        num_values=index(data[5]),
        has_dictionary=int(not _DICTIONARY_ENCODINGS.isdisjoint(data[2])),
        codec=index(data[4]),
        is_text=int(data[1] == _BYTE_ARRAY),
    )


def read_pages(file: BinaryIO, chunk: Chunk, *, limit: int, ratio: int = 0) -> list[Page]:
    """Read the headers of a chunk's pages. Raises OSError, and ValueError for impossible headers and large pages.

    A page is large if it decodes to more than `limit` bytes, and to more than `ratio` times its stored size.
    """
    pages, byte, end, num_values = [], chunk.first_byte, chunk.first_byte + chunk.stored_bytes, 0
    while byte < end and num_values < chunk.num_values:
        page = _read_page(file, byte)
        what = f"the page at byte {byte:,}"
        if min(page.stored_bytes, page.decoded_bytes, page.num_values) < 0 or page.first_byte + page.stored_bytes > end:
            raise ValueError(f"{what} has an impossible size, so the file is damaged")
        if page.decoded_bytes > max(limit, ratio * page.stored_bytes):
            found = f"has {page.stored_bytes:,} bytes and decodes to {page.decoded_bytes:,}"
            raise ValueError(f"{what} {found}, the limit is {limit:,}: write smaller pages or split long rows")
        if page.num_values > _MOST_VALUES:
            raise ValueError(
                f"{what} has {page.num_values:,} values, the limit is {_MOST_VALUES:,}: write smaller pages"
            )
        pages.append(page)
        num_values += 0 if page.is_dictionary else page.num_values
        byte = page.first_byte + page.stored_bytes
    return pages


def longest_value(file: BinaryIO, chunk: Chunk, pages: list[Page]) -> int:
    """Return the size of the longest value in a chunk's dictionary, 0 without one. Raises OSError and ValueError."""
    from pyarrow import decompress

    longest = 0
    for page in pages:
        if not page.is_dictionary:
            continue
        if not chunk.is_text or (chunk.codec and chunk.codec not in _CODECS):
            longest = max(longest, page.decoded_bytes)  # an upper bound
            continue
        file.seek(page.first_byte)
        data = file.read(page.stored_bytes)
        if chunk.codec:
            data = decompress(data, page.decoded_bytes, _CODECS[chunk.codec], asbytes=True)
        byte, read_size = 0, struct.Struct("<I").unpack_from
        try:
            for _ in range(page.num_values):
                (size,) = read_size(data, byte)
                byte += 4 + size
                if size > longest:
                    longest = size
        except struct.error as error:
            raise ValueError(f"the dictionary at byte {page.first_byte:,} is shorter than its header says") from error
    return longest


def _read_page(file: BinaryIO, byte: int) -> Page:
    size = _HEADER_BYTES
    while True:
        file.seek(byte)
        start = file.read(size)
        try:
            header, num_bytes = _read_struct(start, 0)
            kind, details = header[1], header.get(5) or header.get(7) or header.get(8) or {}
            counts = kind in (_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2)
            encoding = details.get(4 if kind == _DATA_PAGE_V2 else 2) if counts else None
            return Page(
                first_byte=byte + num_bytes,
                stored_bytes=index(header[3]),
                decoded_bytes=index(header[2]),
                num_values=index(details[1]) if counts else 0,
                is_dictionary=kind == _DICTIONARY_PAGE,
                is_encoded=kind != _DICTIONARY_PAGE and encoding in _DICTIONARY_ENCODINGS,
            )
        except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
            if not isinstance(error, IndexError) or len(start) < size or size >= _LARGEST_HEADER_BYTES:
                raise ValueError(f"the page header at byte {byte:,} is damaged") from error
            size *= 64


# --- Thrift's compact protocol. Structs become {field number: value}, lists become lists. Raises IndexError at the end.
def _read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, object], int]:
    fields, number = {}, 0
    while head := data[at]:
        kind = head & 15
        if head > 15:
            number += head >> 4
            at += 1
        else:
            number, at = _read_int(data, at + 1)
        if kind <= 2:
            fields[number] = kind == 1
        elif kind <= 6 and kind > 3 and (byte := data[at]) < 128:  # the most common case, without a call
            fields[number] = (byte >> 1) ^ -(byte & 1)
            at += 1
        else:
            fields[number], at = _read_value(data, at, kind, depth)
    return fields, at + 1


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[object, int]:
    if depth > _MOST_NESTED:
        raise TypeError("nested too deeply")
    if 4 <= kind <= 6:
        return _read_int(data, at)
    if kind == 8:
        size, at = _read_varint(data, at)
        if at + size > len(data):
            raise IndexError("the text goes beyond the end")
        return data[at : at + size], at + size
    if kind == 12:
        return _read_struct(data, at, depth + 1)
    if kind in (9, 10):
        return _read_list(data, at, depth + 1)
    if kind == 7:
        return struct.unpack_from("<d", data, at)[0], at + 8
    if kind in (1, 2, 3):
        return data[at], at + 1
    raise TypeError(f"unknown type {kind}")


def _read_list(data: bytes, at: int, depth: int) -> tuple[list[object], int]:
    size, kind, at = _read_list_head(data, at)
    items = []
    for _ in range(size):
        item, at = _read_value(data, at, kind, depth)
        items.append(item)
    return items, at


def _read_list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the number of items, their type, and where the first begins."""
    size, kind = data[at] >> 4, data[at] & 15
    at += 1
    if size == 15:
        size, at = _read_varint(data, at)
    if size > len(data) - at:  # each item has at least one byte
        raise IndexError("the list goes beyond the end")
    return size, kind, at


def _read_int(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & _MASK, at + 1
        shift += 7
        if shift > 63:
            raise TypeError("a number has more than 64 bits")
