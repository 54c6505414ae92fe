"""One row -> token ids. An encoder is any function `row -> {"input_ids": list[int], "labels": list[int]}`.

Labels are token ids, or IGNORED where nothing is to be learned. For an encoder-decoder model they are a sequence of
their own. For a causal model they stand under their input tokens, the loss shifts them by one, and the first one must
be IGNORED: nothing predicts a first token. A row that was cut says how much it lost: `num_cut`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from lowmem.data.batch import IGNORED, EncodedRow
from lowmem.data.chat import Messages, chat_tokenizer
from lowmem.data.rows import Row, Rows
from lowmem.errors import ReadError, RowError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers for translation switch themselves to the target's language and back, and two threads use them at a time.
_TOKENIZER_IN_USE = Lock()
_ROWS_TRIED = 500  # until it is clear that none is good


class BadRow(NamedTuple):
    """A row that was left out: its content if it could be read, and the error that names its place."""

    content: Row | None
    error: RowError


Encode = Callable[[Mapping[str, object]], EncodedRow]


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_encoder_decoder: bool,
    max_seq_len: int,
    prompt_column: str | None = "prompt",
    response_column: str | None = "response",
    text_column: str | None = None,
    messages_column: str | None = None,
) -> Encode:
    """The encoder for a kind of model and the columns at hand: of text or of messages, else of prompts and responses.

    Raises UsageError for text and messages at once, for either to a T5-like model, for messages to a tokenizer
    without a chat template. All encoders raise ValueError for a row whose column holds something else.
    """
    if text_column is None and messages_column is None:
        encode = encode_seq2seq if is_encoder_decoder else encode_causal
        return encode(tokenizer, max_seq_len=max_seq_len, prompt_column=prompt_column, response_column=response_column)
    if text_column is not None and messages_column is not None:
        raise UsageError(
            f"text_column={text_column} and messages_column={messages_column} both say what is to be learned: set one"
        )
    if is_encoder_decoder:
        name, column = ("text", text_column) if messages_column is None else ("messages", messages_column)
        raise UsageError(
            f"{name}_column={column} needs a causal model, this one writes responses to prompts: "
            "set prompt_column and response_column"
        )
    if messages_column is not None:
        return encode_chat(tokenizer, max_seq_len=max_seq_len, messages_column=messages_column)
    return encode_text(tokenizer, max_seq_len=max_seq_len, text_column=text_column)


def encode_seq2seq(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> Encode:
    """Prompt -> response for encoder-decoder models, each cut to `max_seq_len` tokens with its end token kept."""

    def encode(row: Mapping[str, object]) -> EncodedRow:
        # Cut by hand: a fast tokenizer told to truncate changes itself, and two threads use it at a time.
        def cut(ids: list[int]) -> list[int]:
            end = [token for token in ids[-1:] if token == tokenizer.eos_token_id]
            return ids if len(ids) <= max_seq_len else ids[: max_seq_len - len(end)] + end

        asked, answered = _text(row, prompt_column), _text(row, response_column)
        with _TOKENIZER_IN_USE:
            prompt = tokenizer(asked, verbose=False).input_ids
            response = tokenizer(text_target=answered, verbose=False).input_ids
        num_cut = max(0, len(prompt) - max_seq_len) + max(0, len(response) - max_seq_len)
        return _encoded(cut(prompt), cut(response), num_cut=num_cut)

    return encode


def encode_causal(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> Encode:
    """Prompt, response and end token in one sequence, the prompt masked out of the loss; nothing stands between them.

    Of a sequence longer than `max_seq_len` the end of the response is cut first, but not below half of
    `max_seq_len`, then the end of the prompt: a row always keeps targets.
    """

    def encode(row: Mapping[str, object]) -> EncodedRow:
        prompt = tokenizer(_text(row, prompt_column), verbose=False).input_ids
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        response = tokenizer(_text(row, response_column), add_special_tokens=False, verbose=False).input_ids
        response += _end(tokenizer)
        num_tokens = len(prompt) + len(response)
        response = response[: max(max_seq_len - len(prompt), (max_seq_len + 1) // 2)]
        prompt = prompt[: max_seq_len - len(response)]
        return _causal_row(prompt + response, num_masked=len(prompt), num_tokens=num_tokens)

    return encode


def encode_text(tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, text_column: str = "text") -> Encode:
    """Plain text and an end token for causal models, cut to `max_seq_len` tokens; all but the first are targets."""

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids = tokenizer(_text(row, text_column), verbose=False).input_ids
        if ids[-1:] != _end(tokenizer):
            ids = ids + _end(tokenizer)
        return _causal_row(ids[:max_seq_len], num_masked=0, num_tokens=len(ids))

    return encode


def encode_chat(tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, messages_column: str = "messages") -> Encode:
    """Conversations for causal models: lists of {"role", "content"}, rendered by the tokenizer's chat template.

    Only what the assistant says is in the loss (see `chat_tokenizer`). Cut at the end to `max_seq_len` tokens; where
    all that the assistant says was cut, the row stays and counts for nothing. Raises UsageError for a tokenizer
    without a chat template; the encoder raises ValueError for a conversation in which the assistant says nothing.
    """
    tokenize = chat_tokenizer(tokenizer)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids, is_said = tokenize(_messages(row, messages_column))
        labels = [token if said else IGNORED for token, said in zip(ids, is_said, strict=True)]
        labels[0] = IGNORED  # nothing predicts the first token
        return _encoded(ids[:max_seq_len], labels[:max_seq_len], num_cut=max(0, len(ids) - max_seq_len))

    return encode


def encode_rows(
    rows: Rows, row_ids: Iterable[int], encode: Encode, *, may_skip: bool
) -> tuple[list[tuple[int, EncodedRow]], list[BadRow]]:
    """(number, encoded row) of all `row_ids`, and the rows that had to be left out, which only `may_skip` allows.

    Raises RowError for a bad row otherwise, and ReadError for a file that cannot be read any more in any case.
    """
    encoded, bad = [], []
    for row_id in row_ids:
        row = None
        try:
            row = rows[row_id]  # tells by itself what cannot be read, and where
            encoded.append((row_id, _encode_one(rows, row_id, row, encode)))
        except ReadError:
            raise
        except RowError as error:
            if not may_skip:
                raise
            bad.append(BadRow(row, error))
    return encoded, bad


def blank_row(rows: Rows, encode: Encode, *, near: int) -> EncodedRow:
    """A row that counts for nothing: one that can be encoded, the first from `near` on, with all labels ignored.

    Raises RowError if there is none among some hundreds, or if this encoder's rows have no labels.
    """
    first_error = None
    for row_id in range(near, near + min(len(rows), _ROWS_TRIED)):
        encoded, bad = encode_rows(rows, [row_id % len(rows)], encode, may_skip=True)
        if bad:
            first_error = first_error or bad[0].error
            continue
        _, row = encoded[0]
        if "labels" not in row:
            raise RowError(
                f"the micro-batch of row {near} has no row left that can be encoded, and what stands in for one "
                f"needs `labels` to ignore, these have {', '.join(row)}: take bad rows out of the files"
            )
        return {**row, "labels": [IGNORED] * len(row["labels"])}
    raise RowError(f"{first_error}; and so are those after it: mend the rows, or the encoder") from first_error


def _encode_one(rows: Rows, row_id: int, row: Row, encode: Encode) -> EncodedRow:
    try:
        return encode(row)
    except Exception as error:
        where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
        raise RowError(f"{where} cannot be encoded: {error}") from error


def _causal_row(ids: list[int], *, num_masked: int, num_tokens: int) -> EncodedRow:
    num_masked = min(len(ids), max(1, num_masked))  # nothing predicts the first token
    return _encoded(ids, [IGNORED] * num_masked + ids[num_masked:], num_cut=num_tokens - len(ids))


def _encoded(input_ids: list[int], labels: list[int], *, num_cut: int) -> EncodedRow:
    row = EncodedRow(input_ids=input_ids, labels=labels)
    return row | {"num_cut": num_cut} if num_cut else row


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _text(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text, found {_found(row, column)}")
    return value


def _messages(row: Mapping[str, object], column: str) -> Messages:
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"column {column!r} must hold messages, [{{'role': ..., 'content': ...}}, ...], found {_found(row, column)}"
        )
    for turn, message in enumerate(value):
        for name in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(name), str):
                raise ValueError(
                    f"column {column!r} must hold messages whose role and content are text, turn {turn} is "
                    f"{message!r:.80}: mend the row or name another column"
                )
    return value


def _found(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    found = f"{type(value).__name__} {value!r:.80}" if column in row else f"only {', '.join(map(repr, row))}"
    return f"{found}: mend the row or name another column"
