"""One row -> token ids. An encoder is any function `row -> {"input_ids": list[int], "labels": list[int]}`.

Labels are token ids, or IGNORED where nothing is to be learned. For an encoder-decoder model they are a sequence of
their own. For a causal model they stand under their input tokens, the loss shifts them by one, and the first one must
be IGNORED: nothing predicts a first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lowmem.config import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

EncodedRow = dict[str, list[int]]
Encode = Callable[[Mapping[str, object]], EncodedRow]


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_encoder_decoder: bool,
    max_seq_len: int,
    prompt_column: str | None = "prompt",
    response_column: str | None = "response",
    text_column: str | None = None,
) -> Encode:
    """The encoder for a kind of model and the columns at hand. Raises UsageError for plain text to a T5-like model.

    All encoders raise ValueError for a row whose column holds no text.
    """
    if text_column is None:
        encode = encode_seq2seq if is_encoder_decoder else encode_causal
        return encode(tokenizer, max_seq_len=max_seq_len, prompt_column=prompt_column, response_column=response_column)
    if is_encoder_decoder:
        raise UsageError(
            f"text_column={text_column} needs a causal model, this one writes responses to prompts: "
            "set prompt_column and response_column"
        )
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

        return {
            "input_ids": cut(tokenizer(_text(row, prompt_column), verbose=False).input_ids),
            "labels": cut(tokenizer(text_target=_text(row, response_column), verbose=False).input_ids),
        }

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
        response = response[: max(max_seq_len - len(prompt), (max_seq_len + 1) // 2)]
        prompt = prompt[: max_seq_len - len(response)]
        return _causal_row(prompt + response, num_masked=len(prompt))

    return encode


def encode_text(tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, text_column: str = "text") -> Encode:
    """Plain text and an end token for causal models, cut to `max_seq_len` tokens; all but the first are targets."""

    def encode(row: Mapping[str, object]) -> EncodedRow:
        ids = tokenizer(_text(row, text_column), verbose=False).input_ids
        if ids[-1:] != _end(tokenizer):
            ids = ids + _end(tokenizer)
        return _causal_row(ids[:max_seq_len], num_masked=0)

    return encode


def _causal_row(ids: list[int], *, num_masked: int) -> EncodedRow:
    num_masked = max(1, num_masked)  # nothing predicts the first token
    return {"input_ids": ids, "labels": [IGNORED] * num_masked + ids[num_masked:]}


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _text(row: Mapping[str, object], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        found = f"{type(value).__name__} {value!r:.80}" if column in row else f"only {', '.join(map(repr, row))}"
        raise ValueError(f"column {column!r} must hold text, found {found}: mend the row or name another column")
    return value
