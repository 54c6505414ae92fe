"""Encoded rows -> one micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

IGNORED = -100
_PAD_TO_MULTIPLE_OF = 8  # for tensor cores


class EncodedRow(TypedDict):
    """One row as token ids. Encoders for a custom `collate` may return other keys."""

    input_ids: list[int]
    labels: list[int]
    num_cut: NotRequired[int]  # tokens truncated from all sequences; absent if none


@dataclass(frozen=True)
class Batch:
    """One micro-batch: model inputs including `labels`, the number of labels that are targets, and row numbers."""

    inputs: dict[str, Tensor]
    num_targets: int
    row_ids: list[int]

    def to(self, device: torch.device) -> "Batch":
        return replace(self, inputs={name: x.to(device, non_blocking=True) for name, x in self.inputs.items()})

    def pin_memory(self) -> "Batch":
        return replace(self, inputs={name: x.pin_memory() for name, x in self.inputs.items()})


class UnreadableStep(Sequence[Batch]):
    """A step whose rows could not be read: any access raises the error, which `train_step` raises on all ranks."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        raise self.error

    def __getitem__(self, index: int) -> Batch:
        raise self.error


Collate = Callable[[Sequence[EncodedRow]], Batch]


def collate(rows: Sequence[EncodedRow], *, causal: bool = False) -> Batch:
    """Pad encoded rows on the right to the longest, count their targets, and add a mask only if it is needed.

    Returns int64 `input_ids` (rows, input length), `labels` (rows, label length) and, if needed, `attention_mask` or
    `position_ids` (packed rows), shaped as `input_ids`. Widths are multiples of 8 unless all inputs have one length.
    With `causal`, padding needs no mask: the model's tokens must not attend to later ones.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    # one rule for inputs and labels, because a causal row needs a label for each token
    multiple = 1 if min(lengths) == max(lengths) else _PAD_TO_MULTIPLE_OF
    # No target sees the padding, so any token will do; every vocabulary has a token 0.
    input_ids = _pad([row["input_ids"] for row in rows], 0, multiple)
    labels = _pad([row["labels"] for row in rows], IGNORED, multiple)
    inputs = {"input_ids": input_ids, "labels": labels}
    width, is_target = input_ids.shape[1], labels != IGNORED
    # In a packed row, padding is one more document. With a mask, models would ignore where documents begin.
    if "position_ids" in rows[0]:
        positions = [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in rows]
        inputs["position_ids"] = torch.tensor(positions, dtype=torch.int64)
    # A mask excludes attention kernels that support only "causal", and costs T5 a bias per row and layer.
    # `generate` also needs the mask: it shows where a prompt without targets ends.
    elif min(lengths) < width and not (causal and is_target.any(1).all()):
        inputs["attention_mask"] = _pad([[1] * length for length in lengths], 0, multiple)
    return Batch(inputs, num_targets=int(is_target.sum()), row_ids=[])


def _pad(sequences: Sequence[Sequence[int]], value: int, multiple: int) -> Tensor:
    width = -(-max(1, *map(len, sequences)) // multiple) * multiple
    padded = torch.full((len(sequences), width), value, dtype=torch.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return padded
