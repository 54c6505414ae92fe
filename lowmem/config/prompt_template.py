r"""Prompts made of several columns: a text with the names of columns in braces, such as "{instruction}\n{input}\n"."""

import re
from collections.abc import Callable
from string import Formatter

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

Line = list[tuple[str, str | None]]
"""The parts of a line: text and the column that follows it (None: no column)."""


def parse_template(template: str) -> list[Line]:
    r"""Split a template into lines. Raises ValueError if it has no column, or braces that name none.

    `\n`, `\t` and `\\` are a newline, a tab and a backslash, because they are hard to type in a shell; `{{` and `}}`
    are braces.
    """
    text = re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], template)
    lines: list[Line] = [[]]
    for literal, column, form, conversion in Formatter().parse(text):
        if column is not None and (not column or form or conversion):
            raise ValueError("braces must hold the name of a column; write {{ and }} for braces")
        *ended, last = literal.split("\n")
        for piece in ended:
            lines[-1].append((f"{piece}\n", None))
            lines.append([])
        lines[-1].append((last, column))
    if not any(column for line in lines for _, column in line):
        raise ValueError("it names no column in braces")
    return lines


def template_columns(template: str) -> list[str]:
    return list(dict.fromkeys(column for line in parse_template(template) for _, column in line if column))


def fill(lines: list[Line], value_of: Callable[[str], str]) -> str:
    """Return the text with the columns' values, without the lines that have columns, all of which are empty."""
    texts = []
    for line in lines:
        values = [value_of(column) if column else "" for _, column in line]
        if any(values) or not any(column for _, column in line):
            texts += [literal + value for (literal, _), value in zip(line, values, strict=True)]
    return "".join(texts)
