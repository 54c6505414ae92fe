"""Rows -> the micro-batches of one optimizer step, for ever. The whole state of a stream is one integer."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowmem.config import UsageError
from lowmem.data.encode import IGNORED, Encode, EncodedRow
from lowmem.data.order import rows_at
from lowmem.data.rows import Row, RowError, open_rows

_PAD_TO_MULTIPLE_OF = 8  # tensor cores want it


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `inputs` as the model takes them (`labels` too), how many of its labels count, and its rows."""

    inputs: dict[str, Tensor]
    num_targets: int
    row_ids: list[int]

    def to(self, device: torch.device) -> "Batch":
        return replace(self, inputs={name: x.to(device, non_blocking=True) for name, x in self.inputs.items()})


Collate = Callable[[Sequence[EncodedRow]], Batch]


class Rows(Protocol):
    """Any sequence of rows: those of `open_rows`, a list of dicts, a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def collate(rows: Sequence[EncodedRow], *, causal: bool = False) -> Batch:
    """Pad encoded rows on the right to the longest, with a mask only where padding would be seen; count their labels.

    Returns int64 `input_ids` of shape (rows, input length), `labels` (rows, label length) and perhaps `attention_mask`,
    shaped as `input_ids`. Rows of one input length stay as they are; otherwise widths are rounded up to a multiple of
    8. With `causal` the model must be one whose tokens see nothing after them: padding there needs no mask.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    # one rule for both, because labels of a causal row stand under its tokens
    multiple = 1 if min(lengths) == max(lengths) else _PAD_TO_MULTIPLE_OF
    # Nothing that counts sees what stands in padded places, so any token serves; every vocabulary has a token 0.
    inputs = {
        "input_ids": _pad([row["input_ids"] for row in rows], 0, multiple),
        "labels": _pad([row["labels"] for row in rows], IGNORED, multiple),
    }
    counts = inputs["labels"] != IGNORED
    # A mask costs the attention kernels that know only "causal", and T5 a bias for each row in each layer. Beside
    # attention, `generate` looks for the end of prompts: at the first target, or, in a row without any, in the mask.
    is_seen = not causal or not counts.any(1).all()
    if is_seen and min(lengths) < inputs["input_ids"].shape[1]:
        inputs["attention_mask"] = _pad([[1] * length for length in lengths], 0, multiple)
    return Batch(inputs, num_targets=int(counts.sum()), row_ids=[])


def _pad(sequences: Sequence[Sequence[int]], value: int, multiple: int) -> Tensor:
    width = -(-max(1, *map(len, sequences)) // multiple) * multiple
    padded = torch.full((len(sequences), width), value, dtype=torch.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return padded


class Stream:
    """Endless iterator of `list[Batch]`: the micro-batches of one optimizer step on this rank.

    `position` counts the rows that all ranks together have trained on. Only `advance`, called by the optimizer step,
    moves it; the rows that one background thread encodes a step ahead do not. `iter(stream)` starts at `position`.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Encode,
        *,
        global_batch_size: int,
        micro_batches: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        collate: Collate,
    ):
        self.num_rows = len(rows)
        self.global_batch_size = global_batch_size
        self.micro_batches = micro_batches
        self.position = 0
        self.wait_seconds = 0.0  # what `next` has waited for rows, in all
        self._rows, self._encode, self._collate = rows, encode, collate
        self._group_sizes = getattr(rows, "group_sizes", (len(rows),))
        self._seed, self._shuffle = seed, shuffle
        self._pieces = [rank * micro_batches + i for i in range(micro_batches)]
        self._num_pieces = world_size * micro_batches
        self._cursor = 0
        self._ahead: Future[list[Batch]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowmem-stream")

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._cursor != self.position or self._ahead is None:
            self._cursor = self.position
            self._ahead = self._thread.submit(self._step_at, self._cursor)
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            iter(self)
        started = time.perf_counter()
        batches = self._ahead.result()
        self.wait_seconds += time.perf_counter() - started
        self._cursor += self.global_batch_size
        self._ahead = self._thread.submit(self._step_at, self._cursor)
        return batches

    def advance(self) -> None:
        """Count one optimizer step's rows as trained on."""
        self.position += self.global_batch_size

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint keeps: the position, and what decides which rows stand there, for `load_state_dict`."""
        return {
            "position": self.position,
            "num_rows": self.num_rows,
            "row_groups": blake2b(repr(self._group_sizes).encode(), digest_size=8).hexdigest(),
            "shuffle": self._shuffle,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Go on from a saved position. Raises UsageError if rows, their order or rows per step are others than then."""
        here = self.state_dict()
        if differing := [name for name in here if name != "position" and state[name] != here[name]]:
            told = ", ".join(f"{name} was {state[name]} and is {here[name]}" for name in differing)
            raise UsageError(f"this stream is not the one that was saved ({told}): open it over the same rows")
        self.position = state["position"]
        self._ahead = None

    def _step_at(self, position: int) -> list[Batch]:
        """Positions [position, position + global batch) are cut into equal pieces; each rank takes its own.

        Within its pieces the rank's rows stand longest first, those of one length by position: micro-batches need
        little padding, and those that take most memory come first.
        """
        bounds = [position + self.global_batch_size * i // self._num_pieces for i in range(self._num_pieces + 1)]
        first, stop = bounds[self._pieces[0]], bounds[self._pieces[-1] + 1]
        row_ids = rows_at(first, stop, self._group_sizes, seed=self._seed, shuffle=self._shuffle).tolist()
        rows = sorted(_encoded(self._rows, row_ids, self._encode), key=lambda row: -_num_ids(row[1]))
        return [_batch(rows[bounds[i] - first : bounds[i + 1] - first], self._collate) for i in self._pieces]


def open_stream(
    files: str | Path | Sequence[str | Path] | Rows,
    encode: Encode,
    *,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
    global_batch_size: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    collate: Collate = collate,
) -> Stream:
    """Open a Stream over files (as `open_rows` takes them) or over rows that are open already.

    An optimizer step takes `batch_size * gradient_accumulation_steps * world_size` rows; with `global_batch_size` it
    takes that many, in as few equally large micro-batches of at most `batch_size` rows as do. `rank` and `world_size`
    are data-parallel coordinates. Raises UsageError if a micro-batch would be empty.
    """
    rows = _as_rows(files)
    if global_batch_size is None:
        global_batch_size = batch_size * gradient_accumulation_steps * world_size
    elif gradient_accumulation_steps != 1:
        raise UsageError("gradient_accumulation_steps and global_batch_size say the same thing: give one")
    micro_batches = -(-global_batch_size // (batch_size * world_size))
    if global_batch_size < micro_batches * world_size:
        raise UsageError(
            f"{global_batch_size} rows a step leave one of {micro_batches} x {world_size} micro-batches (per process x "
            f"processes) empty: set global_batch_size to a multiple of {world_size}"
        )
    return Stream(
        rows,
        encode,
        global_batch_size=global_batch_size,
        micro_batches=micro_batches,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        collate=collate,
    )


class EvalBatches:
    """A finite, repeatable pass over rows in order: each row once over all ranks, equally many batches on each."""

    def __init__(self, rows: Rows, encode: Encode, *, batch_size: int, rank: int, world_size: int, collate: Collate):
        self._rows, self._encode, self._collate = rows, encode, collate
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            first = (turn * self._world_size + self._rank) * self._batch_size
            row_ids = list(range(first, min(first + self._batch_size, len(self._rows))))
            if row_ids:
                yield _batch(_encoded(self._rows, row_ids, self._encode), self._collate)
            else:  # no row is left for this rank: one that counts for nothing keeps the number of forwards equal
                spare = _batch(_encoded(self._rows, [0], self._encode), self._collate)
                spare.inputs["labels"].fill_(IGNORED)
                yield replace(spare, num_targets=0, row_ids=[])


def open_eval(
    files: str | Path | Sequence[str | Path] | Rows,
    encode: Encode,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    collate: Collate = collate,
) -> EvalBatches:
    """Open files or rows for evaluation. A rank that runs short gets batches with `num_targets` 0."""
    return EvalBatches(
        _as_rows(files), encode, batch_size=batch_size, rank=rank, world_size=world_size, collate=collate
    )


def _as_rows(files: str | Path | Sequence[str | Path] | Rows) -> Rows:
    names_files = isinstance(files, list | tuple) and files and all(isinstance(file, str | Path) for file in files)
    rows = open_rows(files) if names_files or isinstance(files, str | Path) else files
    if len(rows) == 0:
        raise UsageError("a stream over no rows was asked for: give at least one row")
    return rows


def _encoded(rows: Rows, row_ids: Iterable[int], encode: Encode) -> list[tuple[int, EncodedRow]]:
    encoded = []
    for row_id in row_ids:
        row = rows[row_id]  # tells by itself what cannot be read, and where
        try:
            encoded.append((row_id, encode(row)))
        except Exception as error:
            where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
            raise RowError(f"{where} cannot be encoded: {error}") from error
    return encoded


def _num_ids(row: EncodedRow) -> int:
    """How much an encoded row holds, whatever its keys: all of its lists and arrays, but no text or number."""
    values = (value for value in row.values() if isinstance(value, Sized) and not isinstance(value, str))
    return sum(math.prod(value.shape) if hasattr(value, "shape") else len(value) for value in values)


def _batch(rows: Sequence[tuple[int, EncodedRow]], collate: Collate) -> Batch:
    return replace(collate([row for _, row in rows]), row_ids=[row_id for row_id, _ in rows])
