"""Encoded rows -> one micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

IGNORED = -100
_PAD_TO_MULTIPLE_OF = 8  # tensor cores want it


class EncodedRow(TypedDict):
    """What our models are given of a row. Encoders for a `collate` of one's own may bring other keys."""

    input_ids: list[int]
    labels: list[int]
    num_cut: NotRequired[int]  # tokens left out of all its sequences together; absent if none were


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `inputs` as the model takes them (`labels` too), how many of its labels count, and its rows."""

    inputs: dict[str, Tensor]
    num_targets: int
    row_ids: list[int]

    def to(self, device: torch.device) -> "Batch":
        return replace(self, inputs={name: x.to(device, non_blocking=True) for name, x in self.inputs.items()})

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while the host goes on."""
        return replace(self, inputs={name: x.pin_memory() for name, x in self.inputs.items()})


class UnreadableStep(Sequence[Batch]):
    """Stands in for the batches of a step whose rows could not be had: it raises the error when it is looked into.

    So a rank that cannot read can still tell the others in the step's first collective, instead of leaving them to
    wait: `train_step` raises the same error on all of them.
    """

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        raise self.error

    def __getitem__(self, index: int) -> Batch:
        raise self.error


Collate = Callable[[Sequence[EncodedRow]], Batch]


def collate(rows: Sequence[EncodedRow], *, causal: bool = False) -> Batch:
    """Pad encoded rows on the right to the longest, with a mask only where padding would be seen; count their labels.

    Returns int64 `input_ids` of shape (rows, input length), `labels` (rows, label length) and perhaps `attention_mask`,
    shaped as `input_ids`. Rows of one input length stay as they are; otherwise widths are rounded up to a multiple of
    8. With `causal` the model must be one whose tokens see nothing after them: padding there needs no mask. Packed
    rows bring `position_ids`, which restart for padding as for a document of its own.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    # one rule for both, because labels of a causal row stand under its tokens
    multiple = 1 if min(lengths) == max(lengths) else _PAD_TO_MULTIPLE_OF
    # Nothing that counts sees what stands in padded places, so any token serves; every vocabulary has a token 0.
    inputs = {
        "input_ids": _pad([row["input_ids"] for row in rows], 0, multiple),
        "labels": _pad([row["labels"] for row in rows], IGNORED, multiple),
    }
    width = inputs["input_ids"].shape[1]
    counts = inputs["labels"] != IGNORED
    if "position_ids" in rows[0]:  # a mask beside them would hide where documents begin
        positions = [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in rows]
        inputs["position_ids"] = torch.tensor(positions, dtype=torch.int64)
        return Batch(inputs, num_targets=int(counts.sum()), row_ids=[])
    # A mask costs the attention kernels that know only "causal", and T5 a bias for each row in each layer. Beside
    # attention, `generate` looks for the end of prompts: at the first target, or, in a row without any, in the mask.
    is_seen = not causal or not counts.any(1).all()
    if is_seen and min(lengths) < width:
        inputs["attention_mask"] = _pad([[1] * length for length in lengths], 0, multiple)
    return Batch(inputs, num_targets=int(counts.sum()), row_ids=[])


def _pad(sequences: Sequence[Sequence[int]], value: int, multiple: int) -> Tensor:
    width = -(-max(1, *map(len, sequences)) // multiple) * multiple
    padded = torch.full((len(sequences), width), value, dtype=torch.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return padded
