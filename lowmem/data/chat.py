"""Encode a conversation by the tokenizer's chat template: return token ids, and which of them are the assistant's."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from itertools import chain, pairwise
from threading import Lock
from typing import TYPE_CHECKING

from lowmem.data.chat_messages import REASONING, Messages, plain_messages, plain_tools
from lowmem.data.chat_spans import Spans, assistant_spans, check_template
from lowmem.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TIME_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
_OTHER_TIME_USE = re.compile(r"strftime_now(?!\s+is\s+(not\s+)?defined)")

# transformers caches compiled templates by text. A cached one can record tagged spans for only one thread at a time. So
# render a copy under a lock. The copy has a comment, which prints nothing, so that it is cached separately.
_COPY = "{#- lowmem's own copy #}\n"
_COPY_IN_USE = Lock()


def chat_tokenizer(
    tokenizer: Tokenizer, *, time: str | None = None
) -> Callable[[Messages, Sequence | None], tuple[list[int], list[bool]]]:
    """Make a thread-safe function `(messages, tools) -> (ids, is_assistant)`, with True for the assistant's tokens.

    The assistant's text is what {% generation %} tags enclose. Without tags, it is what each assistant turn adds to the
    generation prompt. A token belongs to the turn of its last character. A template that asks for the current time gets
    `time` (ISO 8601; None: now). Raises UsageError if there is no chat template, or if the assistant's text cannot be
    found in its output. The returned function raises ValueError if the template rejects the turns or does not use
    `tools`, or if there is no assistant text.
    """
    from jinja2 import TemplateError

    templates = [_frozen(template, time) for template in _templates_of(tokenizer)]
    to_tokens = _tokenize_whole if tokenizer.is_fast else _tokenize_pieces
    for template in dict.fromkeys(templates):  # often one, which this checks once
        if not _GENERATION_TAG.search(template):
            check_template(partial(_text, tokenizer, template))

    def tokenize(messages: Messages, tools: Sequence | None = None) -> tuple[list[int], list[bool]]:
        turns = f"a conversation of turns {', '.join(str(message['role']) for message in messages)}"
        tools = (plain_tools(tools) or None) if tools else None
        template = templates[bool(tools)]
        thoughts = [name for name in REASONING if any(message.get(name) for message in messages)]
        if thoughts and not any(name in template for name in REASONING):
            raise ValueError(f"messages have {thoughts[0]}, but the chat template does not use it: remove it")
        render = partial(_text, tokenizer, template, tools=tools)
        try:
            messages = plain_messages(messages, render)
            if _GENERATION_TAG.search(template):
                text, spans = _by_tags(tokenizer, template, messages, tools)
            else:
                text, spans = assistant_spans(render, messages)
            if tools and text == _text(tokenizer, template, messages):
                raise ValueError("the row has tools, but the chat template does not print them: remove them")
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template rejects {turns} ({error}): fix the row") from error
        if not any(start < stop for start, stop in spans):
            raise ValueError(f"no assistant text in {turns}: remove the row or fix its roles")
        return to_tokens(tokenizer, text, spans)

    return tokenize


def prints_time(tokenizer: Tokenizer) -> bool:
    return any("strftime_now" in template for template in _templates_of(tokenizer))


def _templates_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the templates for conversations without and with tools, which most tokenizers have in one."""
    try:
        return tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    except ValueError as error:
        found = f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has"
        if isinstance(tokenizer.chat_template, dict):
            names = ", ".join(tokenizer.chat_template)
            raise UsageError(f"{found} several chat templates ({names}): name one of them 'default'") from error
        advice = "add chat_template.jinja to its folder, or set tokenizer_name_or_path to one that has it"
        raise UsageError(f"messages need a chat template, but {found} none: {advice}") from error


def _frozen(template: str, time: str | None) -> str:
    """Replace transformers' `strftime_now` calls, so that all rows of a run have the same time, also after a resume."""
    try:
        moment = datetime.now() if time is None else datetime.fromisoformat(time)
    except ValueError as error:
        raise UsageError(f"--template_time={time} is not a time such as 2026-01-31T12:00:00: {error}") from error
    frozen = _TIME_CALL.sub(lambda call: json.dumps(moment.strftime(call[2]), ensure_ascii=False), template)
    if _OTHER_TIME_USE.search(frozen):
        raise UsageError("the chat template prints the time in a computed format: write a constant format into it")
    return frozen


def _text(tokenizer: Tokenizer, template: str, messages: Messages, **options: object) -> str:
    return _texts_and_spans(tokenizer, template, messages, **options)[0][0]


def _by_tags(tokenizer: Tokenizer, template: str, messages: Messages, tools: Sequence | None) -> tuple[str, Spans]:
    options = {"tools": tools, "return_assistant_tokens_mask": True}
    with _COPY_IN_USE:
        texts, spans = _texts_and_spans(tokenizer, _COPY + template, messages, **options)
    return texts[0], spans[0]


def _texts_and_spans(
    tokenizer: Tokenizer, template: str, messages: Messages, **options: object
) -> tuple[list[str], list[Spans]]:
    # Do not call the tokenizer's apply_chat_template: it drops a content of None, for which some templates test.
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=template, **tokenizer.special_tokens_map, **options)


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
