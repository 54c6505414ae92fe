"""Encode rows as token ids. An encoder is any function `row -> {"input_ids": list[int], "labels": list[int]}`.

Labels are token ids, or IGNORED where there is no target. For causal models, a target equals the input id at the
same index; the loss shifts labels by one. The first label must be IGNORED, because nothing predicts the first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from lowmem.config.prompt_template import fill, parse_template
from lowmem.data.batch import IGNORED, EncodedRow
from lowmem.data.chat import Messages, chat_tokenizer
from lowmem.data.chat_messages import with_role
from lowmem.data.files.columns import TOOLS_COLUMN, is_message, is_number
from lowmem.data.rows import Row, Rows
from lowmem.errors import ReadError, RowError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Encode = Callable[[Mapping[str, object]], EncodedRow]

# The lock is needed because two threads share a tokenizer, and translation tokenizers switch languages during a call.
_TOKENIZER_IN_USE = Lock()
_MAX_ROWS_TRIED = 500
_REMEDY = "fix the row or name another column"


def make_encoder(
    tokenizer: Tokenizer,
    *,
    is_encoder_decoder: bool,
    max_seq_len: int,
    prompt_column: str | None = "prompt",
    response_column: str | None = "response",
    prompt_template: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    template_time: str | None = None,
    num_embeddings: int | None = None,
) -> Encode:
    """Make an encoder for the given columns: text, messages, or (by default) prompts and responses.

    A `prompt_template` (see `parse_template`) makes prompts of several columns, instead of `prompt_column`.
    Raises UsageError for columns that exclude each other or do not fit the model, and for messages without a chat
    template. The encoder raises ValueError for a row in which a column is missing or has the wrong type, or that has a
    token id of `num_embeddings` (the model's number of embeddings) or more.
    """
    given = {"text_column": text_column, "messages_column": messages_column}
    named = [f"{name}={column}" for name, column in given.items() if column is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other: set one")
    if named and is_encoder_decoder:
        raise UsageError(f"{named[0]} needs a causal model, got an encoder-decoder: set prompt_column, response_column")
    if text_column is not None:
        kind, columns = encode_text, {"text_column": text_column}
    elif messages_column is not None:
        kind, columns = encode_chat, {"messages_column": messages_column, "template_time": template_time}
    else:
        kind = encode_seq2seq if is_encoder_decoder else encode_causal
        columns = {"response_column": response_column}
        columns |= {"prompt_column": prompt_column} if prompt_template is None else {"prompt_template": prompt_template}
    encode = kind(tokenizer, max_seq_len=max_seq_len, **columns)
    return encode if num_embeddings is None else _checked(encode, tokenizer, num_embeddings)


def with_weights(encode: Encode, column: str) -> Encode:
    """Make an encoder that also gives each label the weight in a column, a number of 0 or more.

    It raises ValueError for a row without such a number.
    """

    def encode_with_weights(row: Mapping[str, object]) -> EncodedRow:
        weight = row.get(column)
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(
                f"column {column!r} must hold a weight, a number of 0 or more, found {_found(row, column)}"
            )
        encoded = encode(row)
        return {**encoded, "weights": [float(weight)] * len(encoded["labels"])}

    return encode_with_weights


def _checked(encode: Encode, tokenizer: Tokenizer, num_embeddings: int) -> Encode:
    def encode_and_check(row: Mapping[str, object]) -> EncodedRow:
        encoded = encode(row)
        largest = max(chain(encoded["input_ids"], encoded["labels"]), default=0)
        if largest >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(largest)
            what = f"token {token!r} has the id {largest}, but the model has {num_embeddings} embeddings"
            raise ValueError(f"{what}: use the model's tokenizer, build a model with more, or remove the token")
        return encoded

    return encode_and_check


def encode_seq2seq(
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
    prompt_template: str | None = None,
) -> Encode:
    """Encode prompt -> response for encoder-decoder models. Truncates each to `max_seq_len`, but keeps end tokens.

    Raises UsageError if a translation tokenizer has no target language.
    """
    source = getattr(tokenizer, "src_lang", None)
    if source is not None and getattr(tokenizer, "tgt_lang", "") is None:
        found = f"{type(tokenizer).__name__} has no tgt_lang, so it would encode responses as {source}"
        raise UsageError(f"{found}: set src_lang and tgt_lang in its tokenizer_config.json (the same for one language)")
    of_prompt, of_response = _added(tokenizer, "text"), _added(tokenizer, "text_target")
    prompt_of = _prompt_of(prompt_column, prompt_template)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        prompt_text, response_text = prompt_of(row), _text(row, response_column)
        with _TOKENIZER_IN_USE:
            prompt = of_prompt.around(_ids(tokenizer, prompt_text))
            response = of_response.around(_ids(tokenizer, text_target=response_text))
        num_cut = sum(max(0, len(ids) - max_seq_len) for ids in (prompt, response))
        return _encoded(of_prompt.cut(prompt, max_seq_len), of_response.cut(response, max_seq_len), num_cut=num_cut)

    return encode


def encode_causal(
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    prompt_column: str = "prompt",
    response_column: str = "response",
    prompt_template: str | None = None,
) -> Encode:
    """Concatenate prompt, response and end token without a separator, with the prompt masked out of the loss.

    To fit `max_seq_len`, first truncates the response, but not below half of `max_seq_len`, then the prompt.
    """
    added, tokenize_response = _with_end(tokenizer), _tokenize_after_text(tokenizer)
    of_prompt, of_response = added._replace(end=[]), added._replace(begin=[])
    prompt_of = _prompt_of(prompt_column, prompt_template)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        prompt = of_prompt.around(_ids(tokenizer, prompt_of(row)))
        response = of_response.around(tokenize_response(_text(row, response_column)))
        num_tokens = len(prompt) + len(response)
        response = response[: max(max_seq_len - len(prompt), (max_seq_len + 1) // 2)]
        prompt = prompt[: max_seq_len - len(response)]
        return _masked(prompt + response, num_masked=len(prompt), num_cut=num_tokens - len(prompt) - len(response))

    return encode


def encode_text(tokenizer: Tokenizer, *, max_seq_len: int, text_column: str = "text") -> Encode:
    """Encode text + end token for causal models, truncated to `max_seq_len`. All tokens but the first are targets."""
    added = _with_end(tokenizer)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids = added.around(_ids(tokenizer, _text(row, text_column)))
        return _masked(ids[:max_seq_len], num_masked=0, num_cut=max(0, len(ids) - max_seq_len))

    return encode


def encode_chat(
    tokenizer: Tokenizer, *, max_seq_len: int, messages_column: str = "messages", template_time: str | None = None
) -> Encode:
    """Encode chats for causal models, truncated to `max_seq_len`. Targets are the assistant's tokens.

    A row may have a column "tools" for the template. Templates print `template_time` (ISO 8601) as the current time.
    """
    tokenize = chat_tokenizer(tokenizer, time=template_time)

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids, is_assistant = tokenize(_messages(row, messages_column), row.get(TOOLS_COLUMN))
        labels = [token if is_target else IGNORED for token, is_target in zip(ids, is_assistant, strict=True)]
        labels[0] = IGNORED
        return _encoded(ids[:max_seq_len], labels[:max_seq_len], num_cut=max(0, len(ids) - max_seq_len))

    return encode


def _masked(ids: list[int], *, num_masked: int, num_cut: int) -> EncodedRow:
    num_masked = min(len(ids), max(1, num_masked))
    return _encoded(ids, [IGNORED] * num_masked + ids[num_masked:], num_cut=num_cut)


def _encoded(input_ids: list[int], labels: list[int], *, num_cut: int) -> EncodedRow:
    row = EncodedRow(input_ids=input_ids, labels=labels)
    return row | {"num_cut": num_cut} if num_cut else row


class _Added(NamedTuple):
    """The special tokens that a tokenizer adds before and after a text."""

    begin: list[int]
    end: list[int]

    def around(self, ids: list[int]) -> list[int]:
        """Add these tokens to a text's ids, except those that the text itself already begins or ends with."""
        begin = [] if ids[: len(self.begin)] == self.begin else self.begin
        end = [] if ids[len(ids) - len(self.end) :] == self.end else self.end
        return begin + ids + end

    def cut(self, ids: list[int], length: int) -> list[int]:
        """Cut ids that end with `end` to `length`, but keep `end`."""
        return ids if len(ids) <= length else (ids[: max(0, length - len(self.end))] + self.end)[:length]


def _ids(tokenizer: Tokenizer, text: str | None = None, **target: str) -> list[int]:
    # without `truncation`, which would change the tokenizer, and threads share it
    return tokenizer(text, **target, add_special_tokens=False, verbose=False).input_ids


def _added(tokenizer: Tokenizer, kind: str) -> _Added:
    """Return what the tokenizer adds to a text of this kind: "text" or "text_target" (of translation tokenizers)."""
    with _TOKENIZER_IN_USE:
        plain, whole = _ids(tokenizer, **{kind: "a"}), tokenizer(**{kind: "a"}, verbose=False).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return _Added(whole[:start], whole[start + len(plain) :])
    return _Added([], [])


def _with_end(tokenizer: Tokenizer) -> _Added:
    """Return what to add to a text for a causal model: if the tokenizer adds no end token, its eos token."""
    added = _added(tokenizer, "text")
    return added._replace(end=added.end or _eos(tokenizer))


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _tokenize_after_text(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Make a function that tokenizes text which follows other text. SentencePiece puts a space before a first word."""
    newline = _ids(tokenizer, "\n")
    is_known = newline and tokenizer.unk_token_id not in newline
    if not is_known or _ids(tokenizer, "\na") == newline + _ids(tokenizer, "a"):
        return partial(_ids, tokenizer)

    def tokenize(text: str) -> list[int]:
        ids = _ids(tokenizer, "\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else _ids(tokenizer, text)

    return tokenize


def _text(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text, found {_found(row, column)}")
    return value


def _prompt_of(column: str, template: str | None) -> Callable[[Mapping[str, object]], str]:
    """Return a function that makes the prompt of a row. It raises ValueError if a column is not text."""
    if template is None:
        return partial(_text, column=column)
    lines = parse_template(template)
    return lambda row: fill(lines, partial(_text, row))


def _messages(row: Mapping[str, object], column: str) -> Messages:
    value = row.get(column)
    what = f"column {column!r} must hold messages"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what}, [{{'role': ..., 'content': ...}}, ...], found {_found(row, column)}")
    for number, message in enumerate(value, 1):
        if not is_message(message):
            found = f"message {number} is {message!r:.80}"
            raise ValueError(f"{what} with a role and text or tool calls, {found}: {_REMEDY}")
    try:
        return [with_role(message) for message in value]
    except ValueError as error:
        raise ValueError(f"column {column!r} has a message that cannot be used: {error}") from error


def _found(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    found = "null" if value is None else f"{type(value).__name__} {value!r:.80}"
    found = found if column in row else f"columns {', '.join(map(repr, row))}"
    return f"{found}: {_REMEDY}"


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an encoded response: eos or, in tokenizers such as BERT's, what they add instead."""
    return _eos(tokenizer) or _with_end(tokenizer).end


class BadRow(NamedTuple):
    """A bad row: its content (None if it cannot be read), and the error, which names the row's location."""

    content: Row | None
    error: RowError


def encode_rows(
    rows: Rows, row_ids: Iterable[int], encode: Encode, *, may_skip: bool
) -> tuple[list[tuple[int, EncodedRow]], list[BadRow]]:
    """Encode rows. Returns pairs (row number, encoded row) and, with `may_skip`, the bad rows.

    Without `may_skip`, raises RowError for a bad row. In both cases, raises ReadError if a file is no longer readable.
    """
    encoded, bad = [], []
    for row_id in row_ids:
        row = None
        try:
            row = rows[row_id]  # raises RowError if the row is unreadable
            try:
                encoded.append((row_id, encode(row)))
            except Exception as error:
                where = rows.where(row_id) if hasattr(rows, "where") else f"row {row_id}"
                raise RowError(f"{where} cannot be encoded: {error}") from error
        except RowError as error:
            if not may_skip or isinstance(error, ReadError):
                raise
            bad.append(BadRow(row, error))
    return encoded, bad


def blank_row(rows: Rows, encode: Encode, *, near: int) -> EncodedRow:
    """Make a row without targets from the first row at or after `near` that can be encoded. All labels are IGNORED.

    Raises RowError if none of the next 500 rows can be encoded, or if the encoder returns no labels.
    """
    first_error = None
    for row_id in range(near, near + min(len(rows), _MAX_ROWS_TRIED)):
        encoded, bad = encode_rows(rows, [row_id % len(rows)], encode, may_skip=True)
        for _, row in encoded:
            if "labels" not in row:
                raise RowError(f"a blank row needs `labels`, the encoder returned {', '.join(row)}: remove bad rows")
            return {**row, "labels": [IGNORED] * len(row["labels"])}
        first_error = first_error or bad[0].error
    raise RowError(f"{first_error}; all rows read after it fail too: fix the rows or the encoder") from first_error
