"""Advise on flags that are unknown here, or have a value that only another trainer knows. Imports no torch."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from lowmem.config.elsewhere import SAME_NAMES, SOURCES

_ROWS = {name: answer for rows in SOURCES.values() for names, answer in rows.items() for name in names.split()}


def advice_of(name: str, value: object) -> str | None:
    """Return what to write here for `name` with `value`; None if no other trainer has the name, or the flag's value."""
    if name not in _ROWS:
        return None
    answers = {"*": _ROWS[name]} if isinstance(_ROWS[name], str) else _ROWS[name]
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    patterns = {pattern: key for key in answers for pattern in key.split()}
    is_switch = "true" in patterns and text.lower() in ("1", "yes")
    lower = "true" if is_switch else text.lower()
    found = next((key for pattern, key in patterns.items() if fnmatchcase(lower, pattern)), None)
    answer = answers.get(found, "")
    if answer.startswith("not needed"):
        return f"{answer}: remove it"
    if name in SAME_NAMES and found is None:
        return None
    is_off = lower in ("false", "no", "none", "null", "") or (lower == "0" and "{}" not in answer)
    if found in (None, "*") and is_off:
        return "off by default: remove it"
    if found is None:
        return f"{text!r} is not a value that lowmem knows from another trainer: see docs/coming-from.md"
    return ("use " if answer.startswith("--") else "") + answer.replace("{}", text)


def flags_in(advice: str) -> dict[str, str]:
    """Return the flags of an advice that says nothing else, such as "use --a=1 --b=2"."""
    words = advice.split()
    is_flag = [re.fullmatch(r"--\w+=[^\s,()]+", word) for word in words[1:]]
    return dict(word[2:].split("=", 1) for word in words[1:]) if words[0] == "use" and all(is_flag) else {}


def near_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` of which `name` is a misspelling: nearly all letters agree, the first, and all digits.

    Names of other trainers that share a word with a flag are no misspellings of it.
    """
    plain, word = {each.replace("_", ""): each for each in known}, name.replace("_", "").lower()
    near = difflib.get_close_matches(word, plain, n=1, cutoff=0.88)
    return plain[near[0]] if near and _first_and_digits(near[0]) == _first_and_digits(word) else None


def _first_and_digits(word: str) -> list[str]:
    return [word[:1], *re.findall(r"\d", word)]
