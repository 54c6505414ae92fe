"""Pack the prompts of several rows into one sequence of an encoder, and their responses into one of its decoder.

Positions restart in each document. They show which tokens may attend to each other (see `documents_apart`).
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from lowmem.data.batch import IGNORED, EncodedRow
from lowmem.data.packing import Document, PackedRow, check_keys, packed_weights

_MORE_BINS = 2  # fewer documents per bin pack less evenly, so trying still more bins rarely helps


class PackedPair(PackedRow):
    """A packed row, in which `labels` are of the decoder, and restart where `decoder_position_ids` are 0."""

    decoder_position_ids: list[int]


def pack_pairs(rows: Sequence[Document], *, max_seq_len: int, micro_batches: int) -> list[list[PackedPair]]:
    """Pack one rank's encoded rows of an optimizer step into exactly `micro_batches` non-empty micro-batches.

    Packed rows have at most `max_seq_len` inputs and as many labels. No row is split. The micro-batches hold about
    equally many tokens; the first is the largest when padded. Needs at least `micro_batches` rows. Raises ValueError if
    a row cannot be packed.
    """
    for document in rows:
        _check(*document, max_seq_len)
    lengths = np.array([_lengths(row) for _, row in rows]).T  # (2, rows): of prompts, of responses
    # Long prompts are rare, and widen all rows of their micro-batch, so put them together.
    order = np.argsort(-lengths[0], kind="stable")
    parts = [_even_bins(lengths, part, max_seq_len) for part in _split(lengths.sum(0), order, micro_batches)]
    parts.sort(key=lambda bins: _padded_tokens(lengths, bins), reverse=True)
    return [[_packed([rows[index] for index in documents]) for documents in bins] for bins in parts]


def _split(tokens: np.ndarray, order: np.ndarray, parts: int) -> Iterator[np.ndarray]:
    """Split documents, in this order, into non-empty parts of about equally many tokens."""
    assert len(order) >= parts, f"{len(order)} rows cannot fill {parts} micro-batches"
    total, start = tokens[order].cumsum(), 0
    for part in range(1, parts + 1):
        stop = int(np.searchsorted(total * parts, total[-1] * part)) + 1
        stop = min(max(stop, start + 1), len(order) - (parts - part))
        yield order[start:stop]
        start = stop


def _even_bins(lengths: np.ndarray, documents: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack the documents with these numbers into few bins, so that the bins have least padding."""
    lengths, found = lengths[:, documents], []
    number = -(-int(lengths.sum(1).max()) // capacity)
    while len(found) <= _MORE_BINS and number <= len(documents):
        bin_of = _placed(lengths, number, capacity)
        if bin_of is not None:
            _exchange(bin_of, lengths, capacity)
            found.append([np.flatnonzero(bin_of == index) for index in range(number)])
        number += 1
    best = min(found, key=lambda bins: _padded_tokens(lengths, bins))
    return [documents[members] for members in best]


def _placed(lengths: np.ndarray, number: int, capacity: int) -> np.ndarray | None:
    """Return a bin for each document, or None if they do not fit. Longer ones choose first, and the emptiest bin."""
    filled, bin_of = np.zeros((2, number), lengths.dtype), np.empty(lengths.shape[1], np.intp)
    too_much = 2 * capacity**2 + 1
    for index in np.argsort(-lengths.sum(0), kind="stable"):
        length = lengths[:, index]
        added = length @ filled  # half of what this document adds to the sum of squares, up to a constant
        added[(filled + length[:, None] > capacity).any(0)] = too_much
        chosen = added.argmin()
        if added[chosen] == too_much:
            return None
        filled[:, chosen] += length
        bin_of[index] = chosen
    return bin_of


def _exchange(bin_of: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
    """Make the bins more even: while it lowers the sum of squares, exchange documents of the fullest bin with others.

    Changes `bin_of` in place. Sums are of prompts and of responses. A document may also move without one in exchange.
    """
    filled = np.stack([np.bincount(bin_of, side) for side in lengths]).astype(lengths.dtype)
    size, number = lengths.shape[1], filled.shape[1]
    lengths = np.concatenate([lengths, np.zeros_like(filled)], axis=1)  # with an empty document in each bin
    where = np.concatenate([bin_of, np.arange(number)])
    mean = filled.mean(1, keepdims=True)
    while True:
        fullest = (filled - mean).max(0).argmax()
        own, room = np.flatnonzero(where == fullest), filled[:, where]
        moved = lengths[:, own, None] - lengths[:, None]  # from the fullest bin, for each pair of documents
        change = (moved * (room[:, None] - filled[:, fullest, None, None] + moved)).sum(0)
        change[(room[:, None] + moved > capacity).any(0)] = 0
        change[(filled[:, fullest, None, None] - moved > capacity).any(0)] = 0
        mine, other = np.unravel_index(change.argmin(), change.shape)
        if change[mine, other] >= 0:
            break
        filled[:, fullest] -= moved[:, mine, other]
        filled[:, where[other]] += moved[:, mine, other]
        where[own[mine]], where[other] = where[other], fullest
    bin_of[:] = where[:size]


def _padded_tokens(lengths: np.ndarray, bins: Sequence[np.ndarray]) -> int:
    return len(bins) * int(np.array([lengths[:, members].sum(1) for members in bins]).max(0).sum())


def _lengths(row: EncodedRow) -> tuple[int, int]:
    """Return the tokens that a row takes: at least one in each sequence (see `_never_empty`)."""
    return max(1, len(row["input_ids"])), max(1, len(row["labels"]))


def _packed(documents: Sequence[Document]) -> PackedPair:
    encoded = [_never_empty(row) for _, row in documents]
    lengths = list(map(_lengths, encoded))
    return PackedPair(
        input_ids=list(chain.from_iterable(row["input_ids"] for row in encoded)),
        labels=list(chain.from_iterable(row["labels"] for row in encoded)),
        position_ids=list(chain.from_iterable(range(length) for length, _ in lengths)),
        decoder_position_ids=list(chain.from_iterable(range(length) for _, length in lengths)),
        row_ids=[row_id for row_id, _ in documents],
        **packed_weights(encoded),
    )


def _never_empty(row: EncodedRow) -> EncodedRow:
    """Return a row with at least one token in each sequence, to tell documents apart."""
    row = row if row["input_ids"] else {**row, "input_ids": [0]}
    return row if row["labels"] else {**row, "labels": [IGNORED], **({"weights": [0.0]} if "weights" in row else {})}


def _check(row_id: int | None, row: EncodedRow, max_seq_len: int) -> None:
    check_keys(row_id, row)
    for name in ("input_ids", "labels"):
        if len(row[name]) > max_seq_len:
            what = f"row {row_id} has {len(row[name])} {name}, but max_seq_len={max_seq_len}"
            raise ValueError(f"{what}: shorten the row")
