"""The inputs of fuzz.py: small files of each format, how lowmem reads them, and how a second reader does."""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import pyarrow as pa
import xxhash
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lowmem.data.files.parquet import ParquetFile
from lowmem.data.files.record_batches import TableLimits
from lowmem.data.files.source import Source
from lowmem.data.rows import FileRows, open_rows
from lowmem.errors import RowError

Rows = list[str | None]
"""The `repr` of each row, or None for a row that cannot be read."""

MOST_ROWS = 200  # rows to read of a file that claims to have more


@dataclass(frozen=True)
class Case:
    """Files in a folder, and how they are read."""

    folder: Path
    targets: list[Path]
    """The files in `folder` to damage, one per input."""
    read: Callable[[], Rows]
    """Reads them with lowmem."""
    second: Callable[[], Rows] | None
    """Reads what the damaged files say without lowmem. None: checksums cover all rows."""
    structure: Callable[[bytes], list[range]] = lambda data: []
    """Finds where a file has lengths, counts and offsets."""
    reseal: Callable[[Path], None] = lambda target: None
    """Recomputes checksums after a file was damaged."""


# --- rows, as users have them


def texts() -> list[dict[str, object]]:
    return [{"prompt": f"Frage {n}? " + "ä" * (n % 7), "response": f"Antwort {n % 5}"} for n in range(24)]


def chats() -> list[dict[str, object]]:
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": f"{r} {n}"} for r in roles * (1 + n % 2)]} for n in range(24)]


def nested() -> list[dict[str, object]]:
    return [
        {
            "text": None if n % 9 == 4 else f"text {n}",
            "number": n * 1000,
            "score": n / 7,
            "is_good": n % 3 == 0,
            "when": datetime(2026, 1, 1 + n % 28, 12),
            "day": date(2026, 2, 1 + n % 28),
            "price": Decimal(n) / 4,
            "raw": bytes(range(n % 6)),
            "lists": [[n, n + 1], [], [n % 4]][: n % 4],
            "meta": None if n % 5 == 2 else {"tags": ["a", "b"][: n % 3], "size": n},
        }
        for n in range(24)
    ]


ROWS = {"text": texts, "chat": chats, "nested": nested}
COLUMNS = {"text": {"columns": ["prompt", "response"]}, "chat": {"messages_column": "messages"}, "nested": {}}
WANTED = {"text": {"prompt": "text", "response": "text"}, "chat": {"messages": "messages"}, "nested": None}
SCHEMAS = {
    "dictionary": pa.schema([(name, pa.dictionary(pa.int32(), pa.string())) for name in ("prompt", "response")]),
    "large": pa.schema([(name, pa.large_string()) for name in ("prompt", "response")]),
    "view": pa.schema([(name, pa.string_view()) for name in ("prompt", "response")]),
}


def _open(path: Path, rows: str) -> Rows:
    return _all(open_rows(path, **COLUMNS[rows]))


def _copy(path: Path, rows: str) -> Rows:
    """Read a parquet file as if it were large, through a copy."""
    limits = TableLimits(row_group_bytes=0, piece_rows=10)
    return _all(FileRows([ParquetFile(Source(str(path)), WANTED[rows], limits=limits)]))


def _all(rows: Sequence[dict]) -> Rows:
    found = []
    for index in range(min(len(rows), MOST_ROWS)):
        try:
            found.append(repr(rows[index]))
        except RowError as error:
            if "alloc" in str(error):
                raise MemoryError(str(error)) from error
            found.append(None)
    return found


def _records(read: Callable[[], pa.Table | pa.RecordBatch], rows: str) -> Rows:
    """Return the rows of a table; one None for all of them if they cannot be read."""
    try:
        table = read()
        table.validate(full=True)
        columns = {name: table.column(name) for name in WANTED[rows] or table.schema.names}
        return [_record(columns, index) for index in range(table.num_rows)]
    except (pa.ArrowException, OSError, ValueError, LookupError):
        return [None]


def _record(columns: dict[str, pa.ChunkedArray | pa.Array], index: int) -> str | None:
    try:
        return repr({name: column[index].as_py() for name, column in columns.items()})
    except OverflowError:  # a time is outside the range of Python's datetime
        return None


def _in_child(write: Callable[[], None]) -> None:
    """Call `write` in a fork: pyarrow imports pandas to convert rows, which would make all later forks slower."""
    if (child := os.fork()) == 0:
        try:
            write()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "an undamaged file could not be written"


# --- parquet and Arrow


def parquet_case(folder: Path, rows: str, read: Callable[[Path, str], Rows], **options: object) -> Case:
    path = folder / "rows.parquet"
    options = {"row_group_size": 10, "data_page_size": 64, "write_batch_size": 4, **options}
    _in_child(lambda: parquet.write_table(pa.Table.from_pylist(ROWS[rows]()), path, **options))

    def second() -> Rows:
        found = []
        with parquet.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                found += _records(partial(file.read_row_group, group, use_threads=False), rows)
            if None not in found and len(found) != file.metadata.num_rows:
                raise ValueError("the footer has another number of rows")
        return found

    return Case(folder, [path], partial(read, path, rows), second, _parquet_structure)


def _parquet_structure(data: bytes) -> list[range]:
    """Return the footer, and the headers of the first pages."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    metadata = parquet.read_metadata(pa.BufferReader(data))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    starts = {start for chunk in chunks for start in (chunk.dictionary_page_offset, chunk.data_page_offset) if start}
    return [range(footer, len(data)), *(range(start, start + 24) for start in sorted(starts))]


def arrow_case(folder: Path, rows: str, *, schema: str | None = None, is_file: bool = False, **options: str) -> Case:
    path = folder / "rows.arrow"

    def write() -> None:
        table = pa.Table.from_pylist(ROWS[rows](), schema=SCHEMAS.get(schema)).unify_dictionaries()
        new = pa.ipc.new_file if is_file else pa.ipc.new_stream
        with new(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table, max_chunksize=10)

    _in_child(write)

    def second() -> Rows:
        data, found = path.read_bytes(), []
        with pa.ipc.open_stream(data[8:] if data.startswith(b"ARROW1") else data) as stream:
            for batch in stream:
                found += _records(lambda batch=batch: batch, rows)
        return found

    def structure(data: bytes) -> list[range]:
        stream, ranges = pa.BufferReader(data), []
        stream.seek(8 if is_file else 0)
        while True:
            start = stream.tell()
            try:
                message = pa.ipc.read_message(stream)
            except EOFError:
                return [*ranges, range(start, len(data))]
            ranges.append(range(start, stream.tell() - (message.body.size if message.body else 0)))

    return Case(folder, [path], partial(_open, path, rows), second, structure)


# --- lines


def lines_case(folder: Path, rows: str, suffix: str = "") -> Case:
    path = folder / f"rows.jsonl{suffix}"
    text = "\n\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS[rows]())).encode()
    path.write_bytes(_packed(text, suffix))

    def second() -> Rows:
        data, found = _unpacked(path, suffix), []
        for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            if line.strip(bytes(range(9, 33))):
                try:
                    found.append(repr(json.loads(line.decode())))
                except (ValueError, RecursionError):
                    found.append(None)
        return found

    def structure(data: bytes) -> list[range]:
        return [range(18), range(len(data) - 8, len(data))] if suffix else []

    return Case(folder, [path], partial(_open, path, rows), second, structure)


def _packed(text: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(text[:600]) + gzip.compress(text[600:])
    if suffix == ".zst":  # pyarrow writes no checksum: set its bit in the frame's header, and append it
        frame = bytearray(pa.compress(text, "zstd", asbytes=True))
        frame[4] |= 4
        return bytes(frame) + xxhash.xxh64_intdigest(text).to_bytes(8, "little")[:4]
    return text


def _unpacked(path: Path, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    return pa.input_stream(path, compression="zstd" if suffix else None).read()


# --- indices and copies that lowmem made


def index_case(folder: Path, make: Callable[[Path], Case], *, is_resealed: bool = False) -> Case:
    case = make(folder)
    case.read()
    made = [path for path in sorted(folder.iterdir()) if path.suffix in (".index", ".rows")]
    indices = [path for path in made if path.suffix == ".index"]
    with safe_open(indices[0], framework="numpy") as file:
        stamp = file.metadata()

    def reseal(target: Path) -> None:
        """Recompute the checksum of an index, as an attacker would."""
        try:
            with safe_open(target, framework="numpy") as file:
                index = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return
        digest = xxhash.xxh3_128()
        for name in sorted(index):
            digest.update(f"{name} {index[name].dtype} {index[name].shape} ".encode() + index[name].tobytes())
        target.write_bytes(save(index, metadata=stamp | {"checksum": digest.hexdigest()}))

    def structure(data: bytes) -> list[range]:
        arrays = 8 + int.from_bytes(data[:8], "little")
        return [range(arrays, len(data))] if arrays < len(data) else []

    if is_resealed:
        return Case(folder, indices, case.read, None, structure, reseal)
    return Case(folder, made, case.read, None, structure)


# --- all inputs


def _checkpoint(folder: Path, **options: bool) -> Case:
    from benchmarks.fuzz_checkpoints import checkpoint_case  # imports torch

    return checkpoint_case(folder, **options)


def _parquet(read: Callable[[Path, str], Rows]) -> dict[str, Callable[[Path], Case]]:
    sealed = {"write_page_checksum": True}
    formats = {
        "text-plain": ("text", {"compression": "none", "use_dictionary": False}),
        "text-snappy-dictionary": ("text", sealed | {"compression": "snappy"}),
        "text-zstd-v2": ("text", {"compression": "zstd", "data_page_version": "2.0"}),
        "chat-snappy": ("chat", sealed | {"compression": "snappy"}),
        "chat-zstd-plain": ("chat", {"compression": "zstd", "use_dictionary": False}),
        "nested-plain": ("nested", {"compression": "none"}),
        "nested-gzip-v2": ("nested", sealed | {"compression": "gzip", "data_page_version": "2.0"}),
    }
    return {name: partial(parquet_case, rows=rows, read=read, **options) for name, (rows, options) in formats.items()}


_OF_LINES = partial(lines_case, rows="text", suffix=".gz")
_OF_PARQUET = partial(parquet_case, rows="text", read=_copy)
KINDS: dict[str, dict[str, Callable[[Path], Case]]] = {
    "parquet": _parquet(_open),
    "parquet-copied": _parquet(_copy),
    "arrow": {
        "text-stream": partial(arrow_case, rows="text"),
        "text-dictionary": partial(arrow_case, rows="text", schema="dictionary"),
        "text-large-file": partial(arrow_case, rows="text", schema="large", is_file=True),
        "text-view": partial(arrow_case, rows="text", schema="view"),
        "chat-file": partial(arrow_case, rows="chat", is_file=True),
        "chat-lz4": partial(arrow_case, rows="chat", compression="lz4"),
        "nested-stream": partial(arrow_case, rows="nested"),
        "nested-zstd-file": partial(arrow_case, rows="nested", is_file=True, compression="zstd"),
    },
    "jsonl": {name: partial(lines_case, rows=name) for name in ("text", "chat")},
    "gz": {name: partial(lines_case, rows=name, suffix=".gz") for name in ("text", "chat")},
    "zst": {name: partial(lines_case, rows=name, suffix=".zst") for name in ("text", "chat")},
    "checkpoint": {"llama": _checkpoint},
    "checkpoint-resealed": {"llama": partial(_checkpoint, is_resealed=True)},
    "index": {"lines": partial(index_case, make=_OF_LINES), "copy": partial(index_case, make=_OF_PARQUET)},
    "index-resealed": {
        "lines": partial(index_case, make=_OF_LINES, is_resealed=True),
        "copy": partial(index_case, make=_OF_PARQUET, is_resealed=True),
    },
}
