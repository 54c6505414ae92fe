"""Find out how large Arrow data is before it is decoded: a compressed message, or rows whose values are dictionaries'.

Format of a message: https://arrow.apache.org/docs/format/Columnar.html (flatbuffers, whose bounds pyarrow checks).
"""

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def check_message(message: "pa.ipc.Message", *, limit: int, ratio: int) -> int:
    """Return the rows of a record batch, 0 for another message.

    Raises ValueError if a compressed message decodes to more than `limit` bytes and `ratio` times its size.
    """
    data, body = memoryview(message.metadata), memoryview(message.body or b"")
    try:
        table = _unpack("<I", data, 0)
        kind, at = _field(data, table, 1), _field(data, table, 2)
        kind = data[kind] if kind else None
        if at is None or kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
            return 0
        batch = _target(data, at)
        if kind == _DICTIONARY_BATCH:
            batch = _target(data, _field(data, batch, 1))
        length = _field(data, batch, 0)
        num_rows = _unpack("<q", data, length) if length and kind == _RECORD_BATCH else 0
        if _field(data, batch, 3) is None:  # not compressed
            return num_rows
        buffers = _target(data, _field(data, batch, 2))
        decoded = 0
        for number in range(_unpack("<I", data, buffers)):
            offset, size = struct.unpack_from("<qq", data, buffers + 4 + 16 * number)
            if size:  # a compressed buffer begins with its decoded size, or with -1 if it is stored as it is
                decoded += max(0, _unpack("<q", body, offset))
    except (struct.error, IndexError, TypeError) as error:
        raise ValueError("the header of a message is damaged") from error
    if decoded > max(limit, ratio * len(body)):
        found = f"a batch of {len(body):,} bytes decodes to {decoded:,}"
        raise ValueError(f"{found}, the limit is {limit:,}: write smaller batches or split long rows")
    return num_rows


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Return where a field of a flatbuffers table is, None if the table lacks it."""
    layout = table - _unpack("<i", data, table)
    if 4 + 2 * number >= _unpack("<H", data, layout):
        return None
    offset = _unpack("<H", data, layout + 4 + 2 * number)
    return table + offset if offset else None


def _target(data: memoryview, at: int) -> int:
    return at + _unpack("<I", data, at)


def _unpack(kind: str, data: memoryview, at: int) -> int:
    return struct.unpack_from(kind, data, at)[0]


def row_bytes(batch: "pa.RecordBatch") -> np.ndarray:
    """Return the size of each row in bytes, dictionaries decoded, int64, shape (rows,). The batch must be valid."""
    return sum(map(item_bytes, batch.columns), np.zeros(batch.num_rows, np.int64))


def item_bytes(array: "pa.Array") -> np.ndarray:
    """Return the size of each item in bytes, dictionaries decoded, int64, shape (items,). The array must be valid.

    For types without offsets that lowmem does not decode (unions, list views, ...), returns their mean.
    """
    from pyarrow import BaseExtensionType, types

    kind, first, stop = array.type, array.offset, array.offset + len(array)
    if not len(array):
        return np.zeros(0, np.int64)
    if isinstance(kind, BaseExtensionType):
        return item_bytes(array.storage)
    if types.is_dictionary(kind):
        sizes, indices = item_bytes(array.dictionary), array.indices.fill_null(0)  # a null's index may be anything
        return sizes[indices.to_numpy()] if len(sizes) else np.zeros(len(array), np.int64)
    if types.is_struct(kind):
        return sum((item_bytes(array.field(number)) for number in range(kind.num_fields)), np.zeros(stop - first, int))
    if types.is_fixed_size_list(kind):
        items = item_bytes(array.values)[first * kind.list_size : stop * kind.list_size]
        return items.reshape(stop - first, -1).sum(axis=1)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return np.frombuffer(array.buffers()[1], np.int32)[4 * first : 4 * stop : 4].astype(np.int64)
    is_large = types.is_large_string(kind) or types.is_large_binary(kind) or types.is_large_list(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind)
    if not (is_large or is_list or types.is_string(kind) or types.is_binary(kind)):
        return np.full(stop - first, array.nbytes // len(array))
    offsets = np.frombuffer(array.buffers()[1], np.int64 if is_large else np.int32)[first : stop + 1].astype(np.int64)
    if is_list:
        offsets = np.append(0, np.cumsum(item_bytes(array.values)))[offsets]
    return np.diff(offsets)
