"""Encode rows as token ids. An encoder is any function `row -> {"input_ids": list[int], "labels": list[int]}`.

Labels are token ids, or IGNORED where there is no target. For causal models, a target equals the input id at the
same index; the loss shifts labels by one. The first label must be IGNORED, because nothing predicts the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from lowmem.config.prompt_template import fill, parse_template, template_columns
from lowmem.data.batch import IGNORED, LARGEST_WEIGHT, EncodedRow, is_weight
from lowmem.data.chat import Messages, chat_tokenizer
from lowmem.data.chat_messages import with_role
from lowmem.data.encoder import Encode, TextEncoder, Then
from lowmem.data.files.columns import TOOLS_COLUMN, is_message
from lowmem.data.rows import Row
from lowmem.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# The lock is needed because two threads share a tokenizer, and translation tokenizers switch languages during a call.
_TOKENIZER_IN_USE = Lock()
_REMEDY = "fix the row or name another column"


def make_encoder(
    tokenizer: Tokenizer,
    *,
    is_encoder_decoder: bool,
    max_seq_len: int,
    prompt_column: str | None = None,
    response_column: str | None = "response",
    prompt_template: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    template_time: str | None = None,
    num_embeddings: int | None = None,
) -> Encode:
    """Make an encoder for the given columns: text, messages, or (by default) prompts and responses.

    A `prompt_template` (see `parse_template`) makes prompts of several columns, instead of `prompt_column` (None:
    "prompt").
    Raises UsageError for columns that exclude each other or do not fit the model, for a template that cannot be used,
    and for messages without a chat template. The encoder raises ValueError for a row in which a column is missing or
    has the wrong type, or that has a token id of `num_embeddings` (the model's number of embeddings) or more.
    """
    given = {"prompt_column": prompt_column, "prompt_template": prompt_template}
    given |= {"text_column": text_column, "messages_column": messages_column}
    named = [f"{name}={column}" for name, column in given.items() if column is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other: set one")
    if is_encoder_decoder and (text_column or messages_column):
        raise UsageError(f"{named[0]} needs a causal model, got an encoder-decoder: set prompt_column, response_column")
    if text_column is not None:
        kind, columns = encode_text, {"text_column": text_column}
    elif messages_column is not None:
        kind, columns = encode_chat, {"messages_column": messages_column, "template_time": template_time}
    else:
        kind = encode_seq2seq if is_encoder_decoder else encode_causal
        columns = {"response_column": response_column}
        columns |= {"prompt_column": prompt_column or "prompt", "prompt_template": prompt_template}
    encode = kind(tokenizer, max_seq_len=max_seq_len, **columns)
    return encode if num_embeddings is None else _checked(encode, tokenizer, num_embeddings)


def with_weights(encode: Encode, column: str) -> Encode:
    """Make an encoder that also gives each label the weight in a column, a number of 0 or more that fp32 holds.

    It raises ValueError for a row without such a number.
    """

    def add_weights(row: Row, encoded: EncodedRow) -> EncodedRow:
        weight = row.get(column)
        if not is_weight(weight):
            what = f"column {column!r} must hold a weight, a number from 0 to {LARGEST_WEIGHT:.2g}"
            raise ValueError(f"{what}, found {_found(row, column)}")
        return {**encoded, "weights": [float(weight)] * len(encoded["labels"])}

    return Then(encode, add_weights)


def _checked(encode: Encode, tokenizer: Tokenizer, num_embeddings: int) -> Encode:
    def check(row: Row, encoded: EncodedRow) -> EncodedRow:
        largest = max(chain(encoded["input_ids"], encoded["labels"]), default=0)
        if largest >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(largest)
            what = f"token {token!r} has the id {largest}, but the model has {num_embeddings} embeddings"
            raise ValueError(f"{what}: use the model's tokenizer, build a model with more, or remove the token")
        return encoded

    return Then(encode, check)


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

    def tokenize(kind: str, texts: list[str]) -> list[list[int]]:
        with _TOKENIZER_IN_USE:
            return _ids(tokenizer, **{kind: texts})

    def encode(prompt: list[int], response: list[int]) -> EncodedRow:
        prompt, response = of_prompt.around(prompt), of_response.around(response)
        num_cut = sum(max(0, len(ids) - max_seq_len) for ids in (prompt, response))
        return _encoded(of_prompt.cut(prompt, max_seq_len), of_response.cut(response, max_seq_len), num_cut=num_cut)

    texts_of = _texts_of(prompt_column, prompt_template, response_column)
    return TextEncoder(texts_of, [partial(tokenize, kind) for kind in ("text", "text_target")], encode)


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
    added, tokenize_responses = _with_end(tokenizer), _tokenize_after_text(tokenizer)
    of_prompt, of_response = added._replace(end=[]), added._replace(begin=[])

    def encode(prompt: list[int], response: list[int]) -> EncodedRow:
        prompt, response = of_prompt.around(prompt), of_response.around(response)
        num_tokens = len(prompt) + len(response)
        response = response[: max(max_seq_len - len(prompt), (max_seq_len + 1) // 2)]
        prompt = prompt[: max_seq_len - len(response)]
        return _masked(prompt + response, num_masked=len(prompt), num_cut=num_tokens - len(prompt) - len(response))

    texts_of = _texts_of(prompt_column, prompt_template, response_column)
    return TextEncoder(texts_of, [partial(_ids, tokenizer), tokenize_responses], encode)


def encode_text(tokenizer: Tokenizer, *, max_seq_len: int, text_column: str = "text") -> Encode:
    """Encode text + end token for causal models, truncated to `max_seq_len`. All tokens but the first are targets."""
    added = _with_end(tokenizer)

    def encode(ids: list[int]) -> EncodedRow:
        ids = added.around(ids)
        return _masked(ids[:max_seq_len], num_masked=0, num_cut=max(0, len(ids) - max_seq_len))

    return TextEncoder(lambda row: [_text(row, text_column)], [partial(_ids, tokenizer)], encode)


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


def _ids(tokenizer: Tokenizer, text: list[str] | None = None, **target: list[str]) -> list[list[int]]:
    # without `truncation`, which would change the tokenizer, and threads share it
    return tokenizer(text, **target, add_special_tokens=False, verbose=False).input_ids


def _added(tokenizer: Tokenizer, kind: str) -> _Added:
    """Return what the tokenizer adds to a text of this kind: "text" or "text_target" (of translation tokenizers)."""
    with _TOKENIZER_IN_USE:
        plain, whole = _ids(tokenizer, **{kind: ["a"]})[0], tokenizer(**{kind: "a"}, verbose=False).input_ids
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


def _tokenize_after_text(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """Make a function that tokenizes texts which follow other text. SentencePiece puts a space before a first word."""
    newline, word, after = _ids(tokenizer, ["\n", "a", "\na"])
    is_known = newline and tokenizer.unk_token_id not in newline
    if not is_known or after == newline + word:
        return partial(_ids, tokenizer)

    def tokenize(texts: list[str]) -> list[list[int]]:
        found = _ids(tokenizer, [f"\n{text}" for text in texts])
        return [
            ids[len(newline) :] if ids[: len(newline)] == newline else _ids(tokenizer, [text])[0]
            for text, ids in zip(texts, found, strict=True)
        ]

    return tokenize


def _text(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text, found {_found(row, column)}")
    return value


def _texts_of(prompt_column: str, prompt_template: str | None, response_column: str) -> Callable[[Row], list[str]]:
    """Return a function that returns a row's prompt and response. It raises ValueError if a column is not text.

    Of a template's columns, those that are null or missing in a row count as empty; not all may be empty.
    """
    if prompt_template is None:
        return lambda row: [_text(row, prompt_column), _text(row, response_column)]
    try:
        lines, columns = parse_template(prompt_template), template_columns(prompt_template)
    except ValueError as error:
        raise UsageError(f"prompt_template={prompt_template!r} cannot be used: {error}") from error

    def texts_of(row: Row) -> list[str]:
        values = {name: "" if row.get(name) is None else _text(row, name) for name in columns}
        if not any(values.values()):
            raise ValueError(f"{', '.join(map(repr, columns))} are all empty, so there is no prompt: {_REMEDY}")
        return [fill(lines, values.__getitem__), _text(row, response_column)]

    return texts_of


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
