"""Pack several short documents into one row of a causal model, so that there is almost no padding.

Positions restart in each document. Without a mask, transformers uses positions to keep attention within documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain, islice

import torch
from torch import Tensor, nn

from lowmem.data.batch import IGNORED, EncodedRow
from lowmem.errors import UsageError


class PackedRow(EncodedRow):
    """Concatenated documents: their tokens, labels, positions (each document starts at 0) and row numbers."""

    position_ids: list[int]
    row_ids: list[int | None]


Document = tuple[int | None, EncodedRow]  # (row number, or None for a blank row; encoded row)


def pack(rows: Sequence[Document], *, max_seq_len: int, micro_batches: int) -> list[list[PackedRow]]:
    """Pack one rank's encoded rows of an optimizer step into exactly `micro_batches` non-empty micro-batches.

    Packed rows have at most `max_seq_len` tokens. No row is split. Micro-batches differ by at most one packed row; the
    first is the largest when padded. Needs at least `micro_batches` rows. Raises ValueError if a row cannot be packed.
    """
    for document in rows:
        _check(*document, max_seq_len)
    bins = _even_bins(rows, max_seq_len, micro_batches)
    while len(bins) < micro_batches:
        fullest = max(bins, key=len)
        assert len(fullest) > 1, f"{len(rows)} rows cannot fill {micro_batches} micro-batches"
        bins.append(fullest[1::2])
        del fullest[1::2]
    # Sort: a micro-batch gets bins of similar length. Leftover bins go to the last micro-batches, whose bins are short.
    bins.sort(key=_num_tokens, reverse=True)
    rest, (size, num_larger) = iter(bins), divmod(len(bins), micro_batches)
    parts = [list(islice(rest, size + (index >= micro_batches - num_larger))) for index in range(micro_batches)]
    parts.sort(key=lambda bins: len(bins) * _num_tokens(bins[0]), reverse=True)
    return [[_packed(documents) for documents in bins] for bins in parts]


def check_packing(model: nn.Module) -> None:
    """Raise UsageError if the model is not causal, or if packed documents would affect each other in it.

    Compares logits for packed and separate random documents, up to rounding. This rejects state-space models and ALiBi.
    """
    from lowmem.distributed.fully_sharded import forward_only
    from lowmem.distributed.placement import unwrapped

    base = unwrapped(model)
    what = f"packing needs a causal model that takes position_ids, {type(base).__name__}"
    if base.config.is_encoder_decoder:
        raise UsageError(f"{what} is an encoder-decoder: train it without packing")
    device = next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)  # separate, to leave the run's random numbers unchanged
    rows = torch.randint(base.get_input_embeddings().num_embeddings, (2, 12), generator=generator).to(device)
    lengths = [(5, 7), (7, 5)]
    positions = torch.tensor([[*range(first), *range(second)] for first, second in lengths], device=device)

    def logits(input_ids: Tensor, **inputs: Tensor) -> Tensor:
        return base(input_ids=input_ids, use_cache=False, **inputs).logits.float()

    try:
        with forward_only(model):
            packed, as_one = logits(rows, position_ids=positions), logits(rows)
            documents = [row[None].split(parts, dim=1) for row, parts in zip(rows, lengths, strict=True)]
            apart = torch.cat([torch.cat([logits(part) for part in parts], dim=1) for parts in documents])
    except TypeError as error:
        if "position_ids" in str(error):
            raise UsageError(f"{what} does not: train it without packing") from error
        raise
    seen, seen_as_one, size = (x.square().mean().sqrt() for x in (packed - apart, as_one - apart, apart))
    # In tests, `seen` was at least 28 % of `seen_as_one` if documents affected each other, else 1e-6 of it (rounding).
    # The second term is for a new model in which no token affects another yet: both values are then just rounding.
    if not seen <= 0.1 * seen_as_one + 1e-6 * size:
        attention = base.config._attn_implementation
        found = f"in {type(base).__name__} with attn_implementation={attention}, packed documents affect each other"
        or_sdpa = ", or try sdpa attention" if base._supports_sdpa and attention != "sdpa" else ""
        raise UsageError(f"{found}: train without packing{or_sdpa}")


def _even_bins(rows: Sequence[Document], capacity: int, micro_batches: int) -> list[list[Document]]:
    """To reduce padding, pack with the least capacity that does not raise the number of bins per micro-batch."""
    number = -(-len(_bins(rows, capacity)) // micro_batches) * micro_batches
    shortest = max(max(map(_length, rows)), -(-_num_tokens(rows) // number))
    capacities = range(shortest, capacity)
    fitting = bisect_left(capacities, True, key=lambda capacity: len(_bins(rows, capacity)) <= number)
    return _bins(rows, shortest + fitting)


def _bins(rows: Sequence[Document], capacity: int) -> list[list[Document]]:
    """Pack by best-fit decreasing: O(n log n) comparisons, and at most 11/9 of the fewest bins + 4 (Johnson, 1974)."""
    bins: list[list[Document]] = []
    rooms: list[tuple[int, int]] = []  # (room left in a bin, number of the bin), ascending
    for document in sorted(rows, key=lambda document: -_length(document)):
        best = bisect_left(rooms, (_length(document), 0))
        if best < len(rooms):
            room, number = rooms.pop(best)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(document)
        insort(rooms, (room - _length(document), number))
    return bins


def _packed(documents: Sequence[Document]) -> PackedRow:
    encoded = [row for _, row in documents]
    return PackedRow(
        input_ids=list(chain.from_iterable(row["input_ids"] for row in encoded)),
        # the first token is no target, because nothing in its document predicts it
        labels=[label if index else IGNORED for row in encoded for index, label in enumerate(row["labels"])],
        position_ids=list(chain.from_iterable(range(len(row["input_ids"])) for row in encoded)),
        row_ids=[row_id for row_id, _ in documents],
    )


def _length(document: Document) -> int:
    return len(document[1]["input_ids"])


def _num_tokens(documents: Sequence[Document]) -> int:
    return sum(map(_length, documents))


def _check(row_id: int | None, row: EncodedRow, max_seq_len: int) -> None:
    num_tokens, num_labels = len(row["input_ids"]), len(row["labels"])
    if others := ", ".join(sorted(row.keys() - EncodedRow.__annotations__.keys())):
        raise ValueError(f"packing takes only input_ids and labels, row {row_id} also has {others}: remove these keys")
    if num_labels != num_tokens:
        what = f"packing needs a label for every token, row {row_id} has {num_labels} labels and {num_tokens} tokens"
        raise ValueError(f"{what}: use {IGNORED} for tokens without a target")
    if num_tokens > max_seq_len:
        raise ValueError(f"row {row_id} has {num_tokens} tokens, but max_seq_len={max_seq_len}: shorten the row")
