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

from lowmem.data.files.record_batches import TableLimits
from lowmem.data.files.source import Source
from lowmem.data.files.tables import ParquetFile
from lowmem.data.rows import FileRows, open_rows
from lowmem.errors import RowError, UsageError

Rows = list[str | None]
"""The `repr` of each row, or None for a row that cannot be read."""

MOST_ROWS = 200  # rows to read of a file that claims to have more


@dataclass(frozen=True)
class Case:
    """Files in a folder, and how they are read."""

    targets: list[Path]
    """The files to damage, one per input."""
    read: Callable[[], Rows]
    """Reads them with lowmem."""
    second: Callable[[], Rows] | None
    """Reads what the damaged files say without lowmem. None: checksums cover all rows."""
    structure: Callable[[bytes], list[range]] = lambda data: []
    """Finds where a file has lengths, counts and offsets."""
    reseal: Callable[[Path], None] = lambda target: None
    """Recomputes checksums after a file was damaged."""


# --- rows, as users have them


def _texts() -> list[dict[str, object]]:
    return [{"prompt": f"Frage {n}? " + "ä" * (n % 7), "response": f"Antwort {n % 5}"} for n in range(40)]


def _chats() -> list[dict[str, object]]:
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": f"{r} {n}"} for r in roles * (1 + n % 2)]} for n in range(40)]


def _nested() -> list[dict[str, object]]:
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
        for n in range(40)
    ]


ROWS = {"text": _texts, "chat": _chats, "nested": _nested}
COLUMNS = {"text": {"columns": ["prompt", "response"]}, "chat": {"messages_column": "messages"}, "nested": {}}
COPIED_COLUMNS = {"text": {"prompt": "text", "response": "text"}, "chat": {"messages": "messages"}, "nested": None}
SCHEMAS = {
    "dictionary": pa.schema([(name, pa.dictionary(pa.int32(), pa.string())) for name in ("prompt", "response")]),
    "large": pa.schema([(name, pa.large_string()) for name in ("prompt", "response")]),
    "view": pa.schema([(name, pa.string_view()) for name in ("prompt", "response")]),
}


def _open(path: Path, rows: str) -> Rows:
    return _all(open_rows(path, **COLUMNS[rows]))


def _copy(path: Path, rows: str) -> Rows:
    """Read a parquet file as if it were large, through a copy."""
    limits = TableLimits(row_group_bytes=0, piece_rows=16)
    return _all(FileRows([ParquetFile(Source(str(path)), COPIED_COLUMNS[rows], limits=limits)]))


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
        columns = {name: table.column(name) for name in ROWS[rows]()[0]}
        return [repr({name: column[n].as_py() for name, column in columns.items()}) for n in range(table.num_rows)]
    except (pa.ArrowException, OSError, ValueError, LookupError):
        return [None]


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
    options = {"row_group_size": 16, "data_page_size": 128, "write_batch_size": 8, **options}
    _in_child(lambda: parquet.write_table(pa.Table.from_pylist(ROWS[rows]()), path, **options))

    def second() -> Rows:
        found = []
        with parquet.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                found += _records(partial(file.read_row_group, group, use_threads=False), rows)
            if None not in found and len(found) != file.metadata.num_rows:
                raise ValueError("the footer has another number of rows")
        return found

    return Case([path], partial(read, path, rows), second, _parquet_structure)


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
            writer.write_table(table, max_chunksize=16)

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

    return Case([path], partial(_open, path, rows), second, structure)


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

    ends = {"": [], ".gz": [range(10), range(-8, 0)], ".zst": [range(18), range(-4, 0)]}[suffix]

    def structure(data: bytes) -> list[range]:
        return [range(part.start % len(data), (part.stop - 1) % len(data) + 1) for part in ends]

    return Case([path], partial(_open, path, rows), second, structure)


def _packed(text: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(text[:900]) + gzip.compress(text[900:])
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
        is_index = int.from_bytes(data[:8], "little") < len(data)
        return [range(8 + int.from_bytes(data[:8], "little"), len(data))] if is_index and is_resealed else []

    return Case(indices if is_resealed else made, case.read, None, structure, reseal if is_resealed else lambda _: None)


# --- checkpoints


def checkpoint_case(folder: Path, *, is_resealed: bool = False) -> Case:
    import torch
    from accelerate import Accelerator
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowmem.checkpoint.load import load_checkpoint
    from lowmem.checkpoint.manifest import write_manifest
    from lowmem.checkpoint.resume import check_same_run, checkpoint_to_resume, rows_per_step, template_time
    from lowmem.checkpoint.save import save_checkpoint
    from lowmem.checkpoint.tensors import model_tensors, named_parameters
    from lowmem.data.stream import open_stream
    from lowmem.optim.make import make_optimizer
    from lowmem.optim.state import optimizer_tensors
    from lowmem.step import TrainState
    from lowmem.storage.files import record_file

    torch.set_num_threads(1)
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    optimizer = make_optimizer(model, name="adamw", memory="exact")
    stream = open_stream(_texts(), lambda row: {"input_ids": [1, 2], "labels": [1, 2]}, batch_size=4, prefetch=0)
    state = TrainState(model, optimizer, stream, seed=3)
    state.step, state.updates, state.best = 5, 5, {"step": 4, "eval_loss": 1.5}
    stream.position = 20
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 1, "global_batch_size": None}
    settings = sizes | {"memory": "exact", "optimizer": "adamw", "template_time": "2026-01-01T00:00:00"}
    accelerator = Accelerator(cpu=True)
    path = save_checkpoint(state, folder / "checkpoints", accelerator, config=settings)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]

    def items(tensors: dict[str, torch.Tensor], fields: dict[str, object]) -> Rows:
        found = {name: x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}
        return [f"{name} {value!r}" for name, value in sorted((found | fields).items())]

    def read() -> Rows:
        """Resume as `train` does, and use what was loaded."""
        checkpoint = checkpoint_to_resume("auto", folder)
        if checkpoint is None:
            raise UsageError("--resume=auto skips it")
        template_time(checkpoint)
        check_same_run(checkpoint, settings, fixed=["template_time"])
        size = rows_per_step(checkpoint, 1, **sizes)
        state.step = state.updates = state.seed = state.best = None
        load_checkpoint(state, checkpoint, accelerator, verify=False)
        position = state.stream.position
        state.note_best(2.0)
        torch.Generator().manual_seed(state.seed + state.step + state.updates + size)
        next(iter(state.stream))
        tensors = model_tensors(model) | optimizer_tensors(named_parameters(model, optimizer), optimizer)
        fields = {"step": state.step, "updates": state.updates, "seed": state.seed, "best": state.best}
        return items(tensors, fields | {"position": position})

    def second() -> Rows:
        saved = json.loads((path / "state.json").read_text())
        fields = {name: saved[name] for name in ("step", "updates", "seed", "best")}
        tensors = load_file(path / "model" / "model.safetensors") | load_file(path / "optimizer.safetensors")
        return items(tensors, fields | {"position": saved["stream"]["position"]})

    def structure(data: bytes) -> list[range]:
        header = int.from_bytes(data[:8], "little")
        return [range(8 + header)] if header < len(data) else []

    def reseal(target: Path) -> None:
        manifest = path / "manifest.json"
        if target != manifest:
            others = {file.relative_to(path).as_posix(): record_file(file) for file in files if file != manifest}
            write_manifest(path, 5, others)
            return
        try:
            sealed = json.loads(manifest.read_text())
            digest = xxhash.xxh3_128_hexdigest(json.dumps(sealed["manifest"], sort_keys=True).encode())
            manifest.write_text(json.dumps(sealed | {"xxh3_128": digest}))
        except (ValueError, LookupError, TypeError, RecursionError):
            return

    if is_resealed:
        return Case(files, read, second, structure, reseal)
    return Case(files, read, None, structure)


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
    "checkpoint": {"llama": checkpoint_case},
    "checkpoint-resealed": {"llama": partial(checkpoint_case, is_resealed=True)},
    "index": {"lines": partial(index_case, make=_OF_LINES), "copy": partial(index_case, make=_OF_PARQUET)},
    "index-resealed": {
        "lines": partial(index_case, make=_OF_LINES, is_resealed=True),
        "copy": partial(index_case, make=_OF_PARQUET, is_resealed=True),
    },
}
