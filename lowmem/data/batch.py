"""Collate encoded rows into one micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from lowmem.data.files.columns import is_number

IGNORED = -100
LARGEST_WEIGHT = torch.finfo(torch.float32).max
_PAD_TO_MULTIPLE_OF = 8  # multiples of 8 are faster on tensor cores


class EncodedRow(TypedDict):
    """One row as token ids. With a custom `collate`, encoders may return other keys."""

    input_ids: list[int]
    labels: list[int]
    weights: NotRequired[list[float]]  # what each label's loss is multiplied by; absent if 1
    num_cut: NotRequired[int]  # number of tokens that truncation removed; absent if 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch: model inputs (with `labels`), the number of labels that are targets, and the row numbers."""

    inputs: dict[str, Tensor]
    num_targets: int
    row_ids: list[int]
    needs_its_masks: bool = False
    """Whether each mask in `inputs` hides a token, and `position_ids` separate documents, so that no forward must look:
    that would sync the device. `collate` omits those that do not, and sets this."""
    weights: Tensor | None = None
    """What each label's loss is multiplied by, fp32, shaped like the labels. None: 1."""
    input_lengths: Tensor | None = None
    """The tokens of each row of `input_ids` without padding, int64, (rows,). None: unknown."""
    is_blank: bool = False
    """Whether a row replaces missing ones, so that all ranks run equally many forwards: nothing of it counts."""
    weight_sum: InitVar[float | None] = None
    """The sum of the targets' weights, if known. No attribute, so that `dataclasses.replace` computes it again: that
    syncs the device of `weights`."""
    denominator: float = field(init=False)
    """What the summed loss is divided by: the number of targets or, with weights, the sum of their weights."""

    def __post_init__(self, weight_sum: float | None):
        if self.weights is None:
            weight_sum = float(self.num_targets)
        elif weight_sum is None:
            weight_sum = self.weights[self.inputs["labels"] != IGNORED].sum(dtype=torch.float64).item()
        object.__setattr__(self, "denominator", weight_sum)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        weights, lengths = (None if x is None else function(x) for x in (self.weights, self.input_lengths))
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, weights=weights, input_lengths=lengths, weight_sum=self.denominator)


class UnreadableStep(Sequence[Batch]):
    """A step whose rows could not be prepared. Using it raises the error, and `train_step` makes all ranks raise."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        raise self.error

    def __getitem__(self, index: int) -> Batch:
        raise self.error


def check_batches(batches: Sequence[Batch]) -> TypeError | None:
    """Return a TypeError if a micro-batch is not a Batch, else None. The caller makes all ranks raise the error."""
    found = next((type(batch).__name__ for batch in batches if not isinstance(batch, Batch)), None)
    return found and TypeError(f"a micro-batch must be a lowmem.Batch, found {found}: make it with lowmem.collate")


Collate = Callable[[Sequence[EncodedRow]], Batch]


def is_weight(value: object) -> bool:
    """Whether `value` is a number, also of numpy or torch, from 0 to LARGEST_WEIGHT."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return is_number(value) and 0 <= value <= LARGEST_WEIGHT


def weights_of(row: EncodedRow) -> list[float]:
    """Return the weight of each label. Raises ValueError if there are more or fewer weights than labels."""
    weights, num_labels = row.get("weights"), len(row["labels"])
    if weights is None:
        return [1.0] * num_labels
    if len(weights) != num_labels:
        raise ValueError(f"a row has {len(weights)} weights for {num_labels} labels: return one for each label")
    return weights


def collate(rows: Sequence[EncodedRow], *, causal: bool = False, max_seq_len: int | None = None) -> Batch:
    """Pad encoded rows on the right to equal length, count their targets, and add a mask if one is needed.

    Returns int64 `input_ids` (rows, input length) and `labels` (rows, label length). Packed rows also get
    `position_ids` unless each is one document (pairs also `decoder_position_ids`, shaped like `labels`), and others an
    `attention_mask` if needed, shaped like `input_ids`. If a row has weights, the batch has them, with 0 for padding.
    Rounds lengths up to multiples of 8, but not beyond `max_seq_len`, and not if all inputs are equally long. Set
    `causal` if tokens never attend to later ones: training then needs no mask, and the first label of each row is no
    target: nothing predicts it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    # Use the same multiple for inputs and labels, because a causal row needs a label for each token.
    multiple = 1 if min(lengths) == max(lengths) else _PAD_TO_MULTIPLE_OF
    pad = partial(_pad, multiple=multiple, max_width=max_seq_len)
    # No target attends to the padding, so any token id will do. Use 0, which every vocabulary has.
    input_ids = pad([row["input_ids"] for row in rows], 0)
    labels = pad([row["labels"] for row in rows], IGNORED)
    if causal:
        labels[:, 0] = IGNORED
    inputs = {"input_ids": input_ids, "labels": labels}
    width, is_target = input_ids.shape[1], labels != IGNORED
    # Packed rows get no mask: given one, models do not separate documents. The padding counts as one more document,
    # but a decoder's belongs to the last one, so that each of its documents has a prompt.
    if "position_ids" in rows[0]:
        positions = {"position_ids": _pad_positions(rows, "position_ids", width, restart=True)}
        if "decoder_position_ids" in rows[0]:
            name = "decoder_position_ids"
            positions[name] = _pad_positions(rows, name, labels.shape[1], restart=False)
        if any((each[:, 1:] == 0).any() for each in positions.values()):
            inputs |= positions
    # Add a mask only if needed: causal-only attention kernels reject masks, and with a mask T5 stores a bias per row.
    # Rows without targets may be prompts, which need the mask, because it shows `generate` where each prompt ends.
    elif min(lengths) < width and not (causal and is_target.any(1).all()):
        inputs["attention_mask"] = pad([[1] * length for length in lengths], 0)
    weights = pad(list(map(weights_of, rows)), 0.0) if any("weights" in row for row in rows) else None
    options = {"needs_its_masks": True, "weights": weights, "input_lengths": torch.tensor(lengths)}
    return Batch(inputs, num_targets=int(is_target.sum()), row_ids=[], **options)


def _pad(sequences: Sequence[Sequence[float]], value: float, *, multiple: int, max_width: int | None) -> Tensor:
    longest = max(1, *map(len, sequences))
    width = -(-longest // multiple) * multiple
    width = width if max_width is None else max(longest, min(width, max_width))
    dtype = torch.float32 if isinstance(value, float) else torch.int64
    padded = torch.full((len(sequences), width), value, dtype=dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return padded


def _pad_positions(rows: Sequence[EncodedRow], name: str, width: int, *, restart: bool) -> Tensor:
    known = [row[name] for row in rows]
    starts = [0 if restart else positions[-1] + 1 for positions in known]
    longer = [[*x, *range(start, start + width - len(x))] for x, start in zip(known, starts, strict=True)]
    return torch.tensor(longer, dtype=torch.int64)
