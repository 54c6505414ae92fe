"""Bring a row's messages and tools into the form that its chat template prints."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

Message = Mapping[str, object]
Messages = Sequence[Message]
Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's thoughts; transformers gives a template all of them if a message has one."""


_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}


def with_role(message: Message) -> Message:
    """Return a message with "role" and "content", also if it has "from" and "value". Raises ValueError for others."""
    if "role" in message:
        return message
    if message["from"] not in _ROLES:
        found = f"it is from {message['from']!r}, but must be from one of {', '.join(_ROLES)}"
        raise ValueError(f"{found}: rename the sender, or remove the row")
    return {"role": _ROLES[message["from"]], "content": message["value"]}


def plain_messages(messages: Messages, render: Render) -> Messages:
    """Drop keys with the value None, which Arrow gives to keys that a message lacks, and choose a form of the rest.

    Templates differ in what they take: a content as text or as a list of parts; the content of a message that only
    calls tools as a missing key, "" or None; a call's arguments as an object or as JSON text. Of the forms of which the
    template prints every content and call, returns the one with the shortest text: in others, a template prints empty
    turns or quotes JSON twice. Raises ValueError if it prints none of the forms whole, or jinja's error if it fails.
    """
    from jinja2 import TemplateError

    plain = [_without_nulls(message) for message in messages]
    for message in plain:
        if not message.get("tool_calls", True):
            del message["tool_calls"]
    error = None
    for kind in (str, list):
        printed = []
        for form in _forms(plain, kind):
            try:
                text = render([_marked(message, _mark(turn), _mark(turn)) for turn, message in enumerate(form)])
            except (TemplateError, TypeError) as failure:
                error = error or failure
                continue
            counts = Counter(_MARK.findall(text))
            if missing := next((what for what, mark, count in _expected(form) if counts[mark] < count), None):
                error = ValueError(f"the chat template does not print {missing}: remove this, or use another template")
            else:
                printed.append((len(text), form))
        if printed:
            return min(printed, key=lambda item: item[0])[1]
    raise error


def plain_tools(tools: object) -> list:
    """Return tools as a list of JSON schemas. To suit Arrow, each tool or the whole list may be JSON text."""
    try:
        listed = json.loads(tools) if isinstance(tools, str) else tools
        return [json.loads(tool) if isinstance(tool, str) else _without_nulls(tool) for tool in listed or ()]
    except (ValueError, TypeError) as error:
        what = "column 'tools' must hold a list of JSON schemas"
        raise ValueError(f"{what}, found {tools!r:.80}: fix the row") from error


def with_mark(messages: Messages, turn: int, mark: str) -> Messages:
    """Put a mark in place of a turn's content or, if the turn only calls tools, of the first function's name."""
    only_calls = messages[turn].get("tool_calls") and not messages[turn].get("content")
    marked = _marked(messages[turn], None, mark, calls=1) if only_calls else _marked(messages[turn], mark, None)
    return [*messages[:turn], marked, *messages[turn + 1 :]]


def name_of_first_call(message: Message) -> str | None:
    """Return the name of the function that a message without content calls first, None for another message."""
    if message.get("content") or not message.get("tool_calls"):
        return None
    return _function(message["tool_calls"][0])["name"]


def _marked(message: Message, content: str | None, name: str | None, calls: int | None = None) -> Message:
    """Put `content` in place of a content that is not empty, and `name` of the first `calls` (None: all) functions."""
    changed = dict(message)
    if content is not None and (message.get("content") or "tool_calls" not in message):
        changed["content"] = to_content(content, type(message.get("content", "")))
    if name is not None and (all_calls := message.get("tool_calls")):
        renamed = [_with_function(call, name=name) for call in all_calls[:calls]]
        changed["tool_calls"] = renamed + all_calls[len(renamed) :]
    return changed


_MARK = re.compile(r"lowmem0mark\d+x")


def _mark(turn: int) -> str:
    return f"lowmem0mark{turn}x"


def _expected(form: Messages) -> Iterator[tuple[str, str, int]]:
    """Yield what a template must print of each message, marked: a description, the mark, and its least count."""
    for turn, message in enumerate(form):
        what = f"message {turn + 1} ({message['role']})"
        num_calls = len(message.get("tool_calls") or ())
        has_content = bool(message.get("content"))
        if has_content or num_calls:
            part = " with its tool calls" if has_content and num_calls else "'s tool calls" if num_calls else ""
            yield what + part, _mark(turn), has_content + num_calls


def _forms(messages: Messages, kind: type) -> Iterator[Messages]:
    """Yield forms of the messages with contents of a kind: text or a list of parts. The likeliest comes first."""
    messages = [
        message | {"content": to_content(message["content"], kind)} if "content" in message else message
        for message in messages
    ]
    lacks_content = not all(message.get("content") for message in messages)
    has_calls = any(message.get("tool_calls") for message in messages)
    for convert in (_parsed, _dumped) if has_calls else (None,):
        converted = [_with_arguments(message, convert) for message in messages]
        yield converted
        for nothing in ("", None) if lacks_content else ():
            yield [message | {"content": message.get("content") or nothing} for message in converted]


def to_content(content: object, kind: type) -> object:
    """Convert a content, which is text or a list of parts, to a kind: str or list."""
    parts = content if isinstance(content, list) else [content]
    text = "".join(part if isinstance(part, str) else part["text"] for part in parts)
    return text if kind is not list else [{"type": "text", "text": text}] if text else []


def _with_arguments(message: Message, convert: Callable[[object], object] | None) -> Message:
    if not (calls := message.get("tool_calls")):
        return message
    return message | {
        "tool_calls": [
            _with_function(call, arguments=convert(_function(call)["arguments"]))
            if "arguments" in _function(call)
            else call
            for call in calls
        ]
    }


def _parsed(arguments: object) -> object:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:  # the template may still print such text
        return arguments


def _dumped(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _function(call: Mapping[str, object]) -> Mapping[str, object]:
    """Return the called function, which OpenAI's form of a call holds under "function"."""
    return call.get("function", call)


def _with_function(call: Mapping[str, object], **changes: object) -> Mapping[str, object]:
    function = _function(call) | changes
    return call | {"function": function} if "function" in call else function


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
