"""One row -> token ids. An encoder is any function `row -> {"input_ids": list[int], "labels": list[int]}`.

Labels are token ids, or IGNORED where there is nothing to learn. For an encoder-decoder model they are a sequence of
their own. For a causal model each label is its own input token, the loss shifts them by one, and the first must be
IGNORED: nothing predicts a first token. `num_cut` counts the tokens that were cut off a row.
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

Encode = Callable[[Mapping[str, object]], EncodedRow]

# Translation tokenizers switch to the target language and back while they encode, and two threads use them at a time.
_TOKENIZER_IN_USE = Lock()
_MOST_ROWS_TRIED = 500


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
    """The encoder for a kind of model and the given columns: text, messages, or else prompts and responses.

    Raises UsageError for both text and messages, for either with an encoder-decoder model, and for messages with a
    tokenizer without a chat template. All encoders raise ValueError for a row whose column holds something else.
    """
    if text_column is not None and messages_column is not None:
        raise UsageError(
            f"text_column={text_column} and messages_column={messages_column} both say what is to be learned: set one"
        )
    for name, column in (("text_column", text_column), ("messages_column", messages_column)):
        if column is not None and is_encoder_decoder:
            raise UsageError(
                f"{name}={column} needs a causal model, this one writes responses to prompts: "
                "set prompt_column and response_column"
            )
    if text_column is not None:
        return encode_text(tokenizer, max_seq_len=max_seq_len, text_column=text_column)
    if messages_column is not None:
        return encode_chat(tokenizer, max_seq_len=max_seq_len, messages_column=messages_column)
    encode = encode_seq2seq if is_encoder_decoder else encode_causal
    return encode(tokenizer, max_seq_len=max_seq_len, prompt_column=prompt_column, response_column=response_column)


def encode_seq2seq(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> Encode:
    """Prompt -> response for encoder-decoder models, each cut to `max_seq_len` tokens with its end token kept."""

    def cut(ids: list[int]) -> list[int]:  # a fast tokenizer that truncates changes its state, and two threads use it
        end = ids[-1:] if ids[-1:] == [tokenizer.eos_token_id] else []
        return ids if len(ids) <= max_seq_len else ids[: max_seq_len - len(end)] + end

    def encode(row: Mapping[str, object]) -> EncodedRow:
        prompt_text, response_text = _text(row, prompt_column), _text(row, response_column)
        with _TOKENIZER_IN_USE:
            prompt = tokenizer(prompt_text, verbose=False).input_ids
            response = tokenizer(text_target=response_text, verbose=False).input_ids
        return _encoded(
            cut(prompt), cut(response), num_cut=sum(max(0, len(x) - max_seq_len) for x in (prompt, response))
        )

    return encode


def encode_causal(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> Encode:
    """Prompt, response and end token in one sequence, nothing between them, with the prompt masked out of the loss.

    In a sequence longer than `max_seq_len` the end of the response is cut first, but not below half of
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

    Only what the assistant says is in the loss (see `chat_tokenizer`). Cut at the end to `max_seq_len` tokens; a row
    in which this leaves nothing of the assistant stays, without targets. Raises UsageError for a tokenizer without a
    chat template; the encoder raises ValueError for a conversation in which the assistant says nothing.
    """
    tokenize = chat_tokenizer(tokenizer)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids, is_said = tokenize(_messages(row, messages_column))
        labels = [token if said else IGNORED for token, said in zip(ids, is_said, strict=True)]
        labels[0] = IGNORED  # nothing predicts the first token
        return _encoded(ids[:max_seq_len], labels[:max_seq_len], num_cut=max(0, len(ids) - max_seq_len))

    return encode


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
        is_message = isinstance(message, Mapping) and all(isinstance(message.get(x), str) for x in ("role", "content"))
        if not is_message:
            raise ValueError(
                f"column {column!r} must hold messages whose role and content are text, turn {turn} is "
                f"{message!r:.80}: mend the row or name another column"
            )
    return value


def _found(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    found = f"{type(value).__name__} {value!r:.80}" if column in row else f"only {', '.join(map(repr, row))}"
    return f"{found}: mend the row or name another column"


class BadRow(NamedTuple):
    """A row that was skipped: its content if it could be read, and the error that names its location."""

    content: Row | None
    error: RowError


def encode_rows(
    rows: Rows, row_ids: Iterable[int], encode: Encode, *, may_skip: bool
) -> tuple[list[tuple[int, EncodedRow]], list[BadRow]]:
    """Encode rows: (number, encoded row) of the good ones, and the bad ones, which only `may_skip` allows.

    Raises RowError for a bad row otherwise, and always ReadError for a file that can no longer be read.
    """
    encoded, bad = [], []
    for row_id in row_ids:
        row = None
        try:
            row = rows[row_id]  # raises RowError itself
            encoded.append((row_id, _encode_one(rows, row_id, row, encode)))
        except RowError as error:
            if not may_skip or isinstance(error, ReadError):
                raise
            bad.append(BadRow(row, error))
    return encoded, bad


def _encode_one(rows: Rows, row_id: int, row: Row, encode: Encode) -> EncodedRow:
    try:
        return encode(row)
    except Exception as error:
        where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
        raise RowError(f"{where} cannot be encoded: {error}") from error


def blank_row(rows: Rows, encode: Encode, *, near: int) -> EncodedRow:
    """A row without targets: the first from `near` on that can be encoded, with all labels ignored.

    Raises RowError if some hundreds of rows cannot be encoded, or if this encoder's rows have no labels.
    """
    first_error = None
    for row_id in range(near, near + min(len(rows), _MOST_ROWS_TRIED)):
        encoded, bad = encode_rows(rows, [row_id % len(rows)], encode, may_skip=True)
        if bad:
            first_error = first_error or bad[0].error
            continue
        _, row = encoded[0]
        if "labels" not in row:
            raise RowError(
                f"no row is left in the micro-batch of row {near}, and a blank row in its place needs `labels` to "
                f"ignore, these have {', '.join(row)}: remove bad rows from the files"
            )
        return {**row, "labels": [IGNORED] * len(row["labels"])}
    raise RowError(f"{first_error}; and so are those after it: fix the rows, or the encoder") from first_error
