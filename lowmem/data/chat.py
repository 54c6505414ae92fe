"""Encode a conversation by the tokenizer's chat template: return token ids, and which of them are the assistant's."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import chain, pairwise
from os.path import commonprefix
from threading import Lock
from typing import TYPE_CHECKING

from lowmem.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = Sequence[Mapping[str, object]]
Spans = list[tuple[int, int]]  # [start, stop) of the assistant's characters, in order
Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TIME_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_HOW_TO_TAG = "put {% generation %} and {% endgeneration %} around the assistant's text in the chat template"
_MARK, _MARK_BEFORE = "lowmem0mark0here", "lowmem0mark0before"  # unlikely to occur in a conversation

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
    for template in templates:
        if not _GENERATION_TAG.search(template):
            _check_template(partial(_text, tokenizer, template))

    def tokenize(messages: Messages, tools: Sequence | None = None) -> tuple[list[int], list[bool]]:
        turns = f"a conversation of turns {', '.join(str(message['role']) for message in messages)}"
        tools = (_plain_tools(tools) or None) if tools else None
        template = templates[bool(tools)]
        if tools and "tools" not in template:
            raise ValueError("the row has tools, but the chat template does not use them: remove the column 'tools'")
        render = partial(_text, tokenizer, template, tools=tools)
        try:
            messages = _plain_messages(messages, render)
            if _GENERATION_TAG.search(template):
                text, spans = _by_tags(tokenizer, template, messages, tools)
            else:
                text, spans = _by_turns(render, messages)
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
    if "strftime_now(" in frozen:
        raise UsageError("the chat template prints the time in a computed format: write a constant format into it")
    return frozen


def _plain_messages(messages: Messages, render: Render) -> Messages:
    """Join text parts, and drop keys with the value None, which Arrow gives to keys that a message or tool call lacks.

    Messages that only call tools have no content. Templates differ in what they accept instead: this first
    omits the key, then tries "", then None. Raises ValueError if the template does not print the calls.
    """
    from jinja2 import TemplateError

    messages = [_without_nulls(message) for message in messages]
    for message in messages:
        if isinstance(parts := message.get("content"), list):
            message["content"] = "".join(part if isinstance(part, str) else part["text"] for part in parts)
    num_calls = sum(len(message.get("tool_calls") or []) for message in messages)
    if not num_calls and all(message.get("content") for message in messages):
        return messages
    errors = []
    forms = messages, _fill_content(messages, ""), _fill_content(messages, None)
    for form in forms:
        try:
            text = render([_with_function_name(message, _MARK) for message in form])
        except (TemplateError, TypeError) as error:
            errors.append(error)
            continue
        if text.count(_MARK) >= num_calls:
            return form
    if len(errors) == len(forms):
        raise errors[0]
    raise ValueError("the chat template does not print the tool calls: use one that does")


def _fill_content(messages: Messages, none: str | None) -> Messages:
    return [{**message, "content": message.get("content") or none} for message in messages]


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain_tools(tools: object) -> list:
    """Return tools as a list of JSON schemas. To suit Arrow, each tool or the whole list may be JSON text."""
    try:
        listed = json.loads(tools) if isinstance(tools, str) else tools
        return [json.loads(tool) if isinstance(tool, str) else _without_nulls(tool) for tool in listed]
    except (ValueError, TypeError) as error:
        what = "column 'tools' must hold a list of JSON schemas"
        raise ValueError(f"{what}, found {tools!r:.80}: fix the row") from error


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


def _by_turns(render: Render, messages: Messages) -> tuple[str, Spans]:
    """Return the text, and each assistant turn's span, from the end of its generation prompt to the turn's end."""
    text, spans = render(messages), []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        before = render(messages[:turn], add_generation_prompt=True) if turn else ""
        through = render(messages[: turn + 1])
        is_prefix = turn and through.startswith(before) and text.startswith(through)
        spans.append((len(before), len(through)) if is_prefix else _span(render, messages, turn, text))
    return text, spans


def _span(render: Render, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """Find an assistant turn in `text`, for templates that render a turn differently if later turns follow it.

    Qwen3's, for instance, drops the thoughts of earlier turns. So render a mark in place of the turn's content: the
    text around the mark also surrounds the turn. Marking the previous turn, too, shows where this turn begins.
    """
    marked = _with_mark(messages, turn, _MARK)
    head, *tails = render(marked).split(_MARK)
    if turn:
        both = _with_mark(marked, turn - 1, _MARK_BEFORE)
        gap = render(both).partition(_MARK_BEFORE)[2].partition(_MARK)[0]  # between the two turns' contents
        prompt = render(both[:turn], add_generation_prompt=True).partition(_MARK_BEFORE)[2]
    else:
        gap = prompt = ""
    start = len(head) - len(gap) + len(commonprefix([gap, prompt]))
    rest = len(text) - len(tails[0]) if len(tails) == 1 else -1  # where in `text` the part after the mark begins
    if not (head.endswith(gap) and text.startswith(head[:start]) and start <= rest and text.endswith(tails[0])):
        what = f"the assistant's text in message {turn + 1} cannot be found in what the chat template prints"
        raise ValueError(f"{what}: {_HOW_TO_TAG}")
    ending = commonprefix([tails[0], render(marked[: turn + 1]).partition(_MARK)[2]])  # such as an end token
    return start, rest + len(ending)


def _with_mark(messages: Messages, turn: int, mark: str) -> Messages:
    """Replace a turn's content by a mark. If the turn only calls tools, replace the first function's name instead."""
    message = messages[turn]
    only_calls = message.get("tool_calls") and not message.get("content")
    marked = _with_function_name(message, mark, calls=1) if only_calls else {**message, "content": mark}
    return [*messages[:turn], marked, *messages[turn + 1 :]]


def _with_function_name(message: Mapping[str, object], name: str, calls: int | None = None) -> Mapping[str, object]:
    """Rename the functions in a message's first `calls` tool calls (None: in all)."""
    if not (all_calls := message.get("tool_calls")):
        return message
    renamed = [
        {**call, "function": {**call["function"], "name": name}} if "function" in call else {**call, "name": name}
        for call in all_calls[:calls]
    ]
    return {**message, "tool_calls": renamed + all_calls[len(renamed) :]}


def _check_template(render: Render) -> None:
    """Raise UsageError if the assistant's text cannot be found even in a simple conversation."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": f"{role} {number}"} for number in (1, 2) for role in ("user", "assistant")]
    try:
        _by_turns(render, turns)
    except (TemplateError, TypeError):  # the template may still accept the conversations of the rows
        return
    except ValueError as error:
        raise UsageError(str(error)) from error


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
