"""Find the assistant's text in what a chat template prints, without {% generation %} tags in the template."""

import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import pairwise
from os.path import commonprefix

from lowmem.data.chat_messages import Messages, Render, name_of_first_call, plain_messages, to_content, with_mark
from lowmem.errors import UsageError

Spans = list[tuple[int, int]]  # [start, stop) of the assistant's characters, in order

_HOW_TO_TAG = "put {% generation %} and {% endgeneration %} around the assistant's text in the chat template"
_WIDEST_KIND = 16  # messages; longer sequences of messages without contents rarely repeat
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
    """Measure three turns of each kind, each turn of a kind in which these differ, and each turn that differs from all.

    Turns are of one kind if the roles around them are the same, out to the closest contents. If the measured turns of a
    kind begin and end equally far from these contents, so do the other turns that have the same text in between.
    Returns None if the contents cannot be found in `text`.
    """
    filled = [turn for turn, message in enumerate(messages) if message.get("content")]
    # a template may print replies differently, such as without thoughts
    not_replies = [turn for turn in filled if messages[turn]["role"] != "assistant"]
    contents = _contents(render, messages, filled, text) or _contents(render, messages, not_replies, text)
    if contents is None:
        return None
    contents = {-1: (0, 0)} | contents | {len(messages): (len(text), len(text))}
    anchors, kinds, spans = list(contents), defaultdict(list), {}
    for turn in replies:
        first, last = anchors[bisect_left(anchors, turn) - 1], anchors[bisect_right(anchors, turn)]
        if last - first > _WIDEST_KIND:
            spans[turn] = _measure(render, messages, turn, text)
        else:
            roles = tuple(message["role"] for message in messages[max(0, first) : last + 1])
            kind = roles, turn - first, first < 0, last == len(messages)
            kinds[kind].append((turn, contents[first][1], contents[last][0]))
    for of_kind in kinds.values():
        distances, around = set(), set()
        for turn, left, right in {of_kind[0], of_kind[len(of_kind) // 2], of_kind[-1]}:
            start, stop = spans[turn] = _measure(render, messages, turn, text)
            distances.add((start - left, right - stop))
            around.add((text[left:start], text[stop:right]))
        for turn, left, right in of_kind:
            if turn not in spans:
                to_start, to_right = next(iter(distances))
                start, stop = left + to_start, right - to_right
                is_known = len(distances) == 1 and (text[left:start], text[stop:right]) in around
                spans[turn] = (start, stop) if is_known else _measure(render, messages, turn, text)
    return [spans[turn] for turn in replies]


def _contents(render: Render, messages: Messages, filled: list[int], text: str) -> dict[int, tuple[int, int]] | None:
    """Find where `text` has the contents of the turns `filled`, as they are, stripped or as JSON.

    Returns None if it lacks one.
    """
    marked = list(messages)
    for turn in filled:
        marked[turn] = messages[turn] | {"content": to_content(f"{_MARK}{turn}x", type(messages[turn]["content"]))}
    rendered, gaps, at = render(marked), [], 0
    for turn in filled:
        mark = f"{_MARK}{turn}x"
        stop = rendered.find(mark, at)
        if stop < 0:
            return None
        gaps.append(rendered[at:stop])
        at = stop + len(mark)
    gaps.append(rendered[at:])
    found, at = {}, 0
    for turn, gap, after in zip(filled, gaps, gaps[1:], strict=False):
        whole = to_content(messages[turn]["content"], str)
        start = at + len(gap)
        forms = (whole, whole.strip(), json.dumps(whole, ensure_ascii=False)[1:-1])
        content = next((form for form in forms if text.startswith(gap + form + after, at)), None)
        if content is None:
            return None
        at = start + len(content)
        found[turn] = start, at
    return found if text[at:] == gaps[-1] else None


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
