"""Encode a conversation by the tokenizer's chat template: return token ids, and which of them are the assistant's."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from threading import Lock
from typing import TYPE_CHECKING

from lowmem.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = Sequence[Mapping[str, object]]
Spans = list[tuple[int, int]]  # [start, stop) of the assistant's characters, in order

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_HOW_TO_TAG = "put {% generation %} and {% endgeneration %} around the assistant's text in the chat template"

# transformers caches compiled templates by text, and each can record tagged spans for only one thread at a time. So
# render a copy under a lock. Its comment renders as nothing, yet changes the text, so the copy is cached separately.
_COPY = "{#- lowmem's own copy #}\n"
_COPY_IN_USE = Lock()


def chat_tokenizer(tokenizer: Tokenizer) -> Callable[[Messages], tuple[list[int], list[bool]]]:
    """Make a thread-safe function `messages -> (ids, is_assistant)`, where `is_assistant` marks the assistant's tokens.

    The assistant's text is what {% generation %} tags enclose. Without tags, it is what each assistant turn adds to
    the earlier turns and the generation prompt. A token belongs to the turn of its last character. Raises UsageError
    without a chat template. The returned function raises ValueError if turns are rejected or lack assistant text.
    """
    from jinja2 import TemplateError

    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # no template, or several without a default
        kind = f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r}"
        raise UsageError(f"messages need a chat template, but {kind} has none: use an instruct model") from error
    render = _by_tags if _GENERATION_TAG.search(template) else _by_prefixes
    to_tokens = _tokenize_whole if tokenizer.is_fast else _tokenize_pieces

    def tokenize(messages: Messages) -> tuple[list[int], list[bool]]:
        # In parquet, fields that a message lacks are None. Remove them, because a template would render them.
        messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
        turns = f"a conversation of turns {', '.join(str(message['role']) for message in messages)}"
        try:
            text, spans = render(tokenizer, template, messages)
        except TemplateError as error:
            raise ValueError(f"the chat template rejects {turns} ({error}): fix the row") from error
        if not any(start < stop for start, stop in spans):
            raise ValueError(f"no assistant text in {turns}: remove the row or fix its roles")
        return to_tokens(tokenizer, text, spans)

    return tokenize


def _by_tags(tokenizer: Tokenizer, template: str, messages: Messages) -> tuple[str, Spans]:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"chat_template": _COPY + template, "return_assistant_tokens_mask": True}
    with _COPY_IN_USE:
        texts, spans = render_jinja_template([messages], **options, **tokenizer.special_tokens_map)
    return texts[0], spans[0]


def _by_prefixes(tokenizer: Tokenizer, template: str, messages: Messages) -> tuple[str, Spans]:
    """Return the text and each assistant turn's span, found by rendering the turns before it, without and with it."""
    render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    text, spans = render(messages), []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        if turn == 0:
            raise ValueError(f"turn 0 is the assistant's, with no turn before it: add a user's turn, or {_HOW_TO_TAG}")
        before = render(messages[:turn], add_generation_prompt=True)
        through = render(messages[: turn + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(f"the template changes earlier text at turn {turn} (the assistant's): {_HOW_TO_TAG}")
        spans.append((len(before), len(through)))
    return text, spans


def _tokenize_whole(tokenizer: Tokenizer, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
    # Do not truncate or pad, because either changes the state of the fast tokenizer, which two threads share.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [stop for _, stop in encoded["offset_mapping"]]  # not starts, which may exclude a leading space
    is_assistant = [False] * len(ends)
    for start, stop in spans:
        first, last = bisect_right(ends, start), bisect_right(ends, stop)
        is_assistant[first:last] = [True] * (last - first)
    return encoded["input_ids"], is_assistant


def _tokenize_pieces(tokenizer: Tokenizer, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
    # Slow tokenizers give no offsets. Tokenize each piece separately, so that no token crosses the bounds of a turn.
    ids, is_assistant = [], []
    bounds = [0, *chain.from_iterable(spans), len(text)]
    for piece, (start, stop) in enumerate(pairwise(bounds)):
        tokens = tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        is_assistant += [piece % 2 == 1] * len(tokens)  # pieces alternate: outside a span, inside, outside, ...
    return ids, is_assistant
