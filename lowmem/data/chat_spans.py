"""Find the assistant's text in what a chat template prints, without {% generation %} tags in the template."""

import re
from collections import defaultdict
from itertools import chain, pairwise
from operator import add, sub
from os.path import commonprefix

from lowmem.data.chat_messages import Messages, Render, name_of_first_call, plain_messages, with_mark
from lowmem.errors import UsageError

Spans = list[tuple[int, int]]  # [start, stop) of the assistant's characters, in order

_HOW_TO_TAG = "put {% generation %} and {% endgeneration %} around the assistant's text in the chat template"
# unlikely to occur in a conversation
_MARK, _MARK_BEFORE, _MARK_AFTER = "lowmem0mark0here", "lowmem0mark0before", "lowmem0mark0after"


def assistant_spans(render: Render, messages: Messages, *, few_replies: int = 8) -> tuple[str, Spans]:
    """Return the text, and each assistant turn's span, from the end of its generation prompt to the turn's end.

    Measures each of up to `few_replies` turns, and only some of more turns, because a measurement renders all of them.
    Raises ValueError if the assistant's text cannot be found.
    """
    text = render(messages)
    replies = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = _spans_by_kind(render, messages, replies, text) if len(replies) > few_replies else None
    spans = spans or [_measure(render, messages, turn, text) for turn in replies]
    for turn, ((_, stop), (start, _)) in zip(replies, pairwise(spans), strict=False):
        if stop > start:  # such as when the template prints a tool's result within the assistant's turn
            raise _not_found(turn)
    return text, spans


def check_template(render: Render) -> None:
    """Raise UsageError if the assistant's text cannot be found even in a simple conversation."""
    turns = [{"role": role, "content": f"{role} {number}"} for number in (1, 2) for role in ("user", "assistant")]
    try:
        messages = plain_messages(turns, render)
        text, spans = assistant_spans(render, messages)
        always_prompts = render(messages[:2]) == render(messages[:2], add_generation_prompt=True)
        is_found = all(f"assistant {number}" in text[slice(*span)] for number, span in enumerate(spans, 1))
        if not is_found or (always_prompts and not text.startswith(render(messages[:2]))):
            raise _not_found(1)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except Exception:  # by the template, which may still accept the conversations of the rows
        return


def _measure(render: Render, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    before = render(messages[:turn], add_generation_prompt=True) if turn else ""
    through = render(messages[: turn + 1])
    is_prefix = turn and through.startswith(before) and text.startswith(through)
    return (len(before), len(through)) if is_prefix else _span(render, messages, turn, text)


def _spans_by_kind(render: Render, messages: Messages, replies: list[int], text: str) -> Spans | None:
    """Measure the first and the last turn of each kind, and each turn of a kind in which these differ.

    Turns are of one kind if the text before and after their contents and the roles around them are equal. If the first
    and the last turn of a kind begin and end equally far from their contents, so do the turns between them. Returns
    None if the contents cannot be found in `text`.
    """
    contents = _contents(render, messages, text)
    if contents is None:
        return None
    kinds, spans = defaultdict(list), {}
    bounds = [0, *chain.from_iterable(contents), len(text)]
    gaps = [text[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
    for turn in replies:
        roles = tuple(message["role"] for message in messages[max(0, turn - 1) : turn + 2])
        kinds[turn == 0, roles, gaps[turn], gaps[turn + 1]].append(turn)
    for of_kind in kinds.values():
        offsets = set()
        for turn in {of_kind[0], of_kind[-1]}:
            spans[turn] = _measure(render, messages, turn, text)
            offsets.add(tuple(map(sub, spans[turn], contents[turn])))
        if len(offsets) == 1:
            spans |= {turn: tuple(map(add, contents[turn], *offsets)) for turn in of_kind}
        else:
            spans |= {turn: _measure(render, messages, turn, text) for turn in of_kind[1:-1]}
    return [spans[turn] for turn in replies]


def _contents(render: Render, messages: Messages, text: str) -> Spans | None:
    """Find where `text` has each message's content, as it is or stripped; None if it does not have all of them."""
    if not all(isinstance(message.get("content"), str) and message["content"] for message in messages):
        return None
    marked = [message | {"content": f"{_MARK}{turn}x"} for turn, message in enumerate(messages)]
    rest, gaps = render(marked), []
    for message in marked:
        gap, mark, rest = rest.partition(message["content"])
        gaps.append(gap)
        if not mark:
            return None
    found, at = [], 0
    for message, gap, after in zip(messages, gaps, [*gaps[1:], rest], strict=True):
        start = at + len(gap)
        whole = message["content"]
        content = next((form for form in (whole, whole.strip()) if text.startswith(gap + form + after, at)), None)
        if content is None:
            return None
        at = start + len(content)
        found.append((start, at))
    return found if text.endswith(rest) and at + len(rest) == len(text) else None


def _span(render: Render, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """Find an assistant turn in `text`, for templates that render a turn differently if later turns follow it.

    Qwen3's, for instance, drops the thoughts of earlier turns. So render a mark in place of the turn's content: the
    text around the mark also surrounds the turn. Marking the previous turn, too, shows where this turn begins.
    """
    marked, name = with_mark(messages, turn, _MARK), name_of_first_call(messages[turn])

    def after_mark(marked: Messages) -> str:
        tail = render(marked).partition(_MARK)[2]
        return tail.replace(_MARK, name) if name else tail  # a tool's result may repeat the function's name

    head, tail = render(marked).partition(_MARK)[0], after_mark(marked)
    if turn:
        both = with_mark(marked, turn - 1, _MARK_BEFORE)
        gap = render(both).partition(_MARK_BEFORE)[2].partition(_MARK)[0]  # between the two turns' contents
        prompt = render(both[:turn], add_generation_prompt=True).partition(_MARK_BEFORE)[2]
    else:
        gap = prompt = ""
    header = len(head) - len(gap)
    start = header + len(_common([gap, prompt]))
    start = header + len(_common([head[header:start], text[header:]]))  # the prompt may also close an empty thought
    rest = len(text) - len(tail)  # where in `text` the part after the mark begins
    found = head.endswith(gap) and text.startswith(head[:start]) and start <= rest and text.endswith(tail)
    ending = _common([tail, after_mark(marked[: turn + 1])])  # such as an end token
    has_next = turn + 1 < len(messages)
    # a template may print a tool's result within the assistant's turn
    if has_next and _MARK_AFTER not in after_mark(with_mark(marked, turn + 1, _MARK_AFTER))[len(ending) :]:
        found = False
    if not found or _MARK in tail:
        raise _not_found(turn)
    return start, rest + len(ending)


def _common(texts: list[str]) -> str:
    """Return the common prefix of texts, without a part of a special token at its end."""
    return re.sub(r"[<\[][^<>\[\]\s]*$", "", commonprefix(texts))


def _not_found(turn: int) -> ValueError:
    what = f"the assistant's text in message {turn + 1} cannot be found in what the chat template prints"
    return ValueError(f"{what}: {_HOW_TO_TAG}")
