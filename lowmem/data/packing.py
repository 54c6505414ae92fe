"""Pack several short documents into one row of a causal model, so that there is almost no padding.

Positions restart in each document. Without a mask, transformers uses positions to keep attention within documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain, islice

from lowmem.data.batch import IGNORED, EncodedRow, weights_of


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
        **packed_weights(encoded),
    )


def packed_weights(rows: Sequence[EncodedRow]) -> dict[str, list[float]]:
    """Return {"weights": those of all labels}, or {} if no row has weights."""
    if not any("weights" in row for row in rows):
        return {}
    return {"weights": list(chain.from_iterable(map(weights_of, rows)))}


def check_keys(row_id: int | None, row: EncodedRow) -> None:
    """Raise ValueError if the row has a key that packing does not know."""
    if others := ", ".join(sorted(row.keys() - EncodedRow.__annotations__.keys())):
        raise ValueError(
            f"packing takes only input_ids, labels and weights, row {row_id} also has {others}: remove these keys"
        )


def _length(document: Document) -> int:
    return len(document[1]["input_ids"])


def _num_tokens(documents: Sequence[Document]) -> int:
    return sum(map(_length, documents))


def _check(row_id: int | None, row: EncodedRow, max_seq_len: int) -> None:
    check_keys(row_id, row)
    num_tokens, num_labels = len(row["input_ids"]), len(row["labels"])
    if num_labels != num_tokens:
        what = f"packing needs a label for every token, row {row_id} has {num_labels} labels and {num_tokens} tokens"
        raise ValueError(f"{what}: use {IGNORED} for tokens without a target")
    if num_tokens > max_seq_len:
        raise ValueError(f"row {row_id} has {num_tokens} tokens, but max_seq_len={max_seq_len}: shorten the row")
