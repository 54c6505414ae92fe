"""The options of learning rate schedules, with the names that transformers gives them. Imports no torch."""

import json
from collections.abc import Callable
from typing import NamedTuple


class _Rule(NamedTuple):
    """What an option is: `allows` checks a value, `words` describe it."""

    words: str
    allows: Callable[[object], bool]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


_POSITIVE = _Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = _Rule("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
_FRACTION = _Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_COUNT = _Rule("an integer of 1 or more", lambda value: type(value) is int and value >= 1)
_SHAPE = _Rule("linear, cosine or 1-sqrt", lambda value: value in ("linear", "cosine", "1-sqrt"))

OPTIONS: dict[str, dict[str, _Rule]] = {
    "cosine": {},
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": _COUNT},
    "cosine_with_min_lr": {"min_lr": _NOT_NEGATIVE, "min_lr_rate": _FRACTION, "num_cycles": _POSITIVE},
    "polynomial": {"lr_end": _NOT_NEGATIVE, "power": _POSITIVE},
    "inverse_sqrt": {"timescale": _POSITIVE},
    "warmup_stable_decay": {
        "num_decay_steps": _COUNT,
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": _FRACTION,
        "num_cycles": _POSITIVE,
    },
}
"""The options of each schedule."""

# of each tuple, exactly one must be set
_NEEDED = {"cosine_with_min_lr": ("min_lr", "min_lr_rate"), "warmup_stable_decay": ("num_decay_steps",)}


def lr_options(text: str) -> dict[str, object]:
    """Return the options in `text`, a JSON object or `name=value,name=value`. Raises ValueError for other text.

    A number may be text, because YAML reads 1e-6, without a point, as text.
    """
    if text.lstrip().startswith("{"):
        return {name: _value(value) if isinstance(value, str) else value for name, value in json.loads(text).items()}
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError('write name=value,name=value, or {"name": value}')
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def lr_problems(schedule: str, text: str, *, peak: float | None) -> list[str]:
    """List what is wrong with the options `text` of a schedule whose highest learning rate is `peak`."""
    rules, needed = OPTIONS.get(schedule, {}), _NEEDED.get(schedule, ())
    flag = f"--lr_scheduler_kwargs={text}"
    try:
        options = lr_options(text)
    except ValueError as error:
        return [f"{flag} cannot be read: {error}"]
    problems = []
    for name, value in options.items():
        if name not in rules:
            known = f"has {', '.join(rules)}" if rules else "has no options"
            problems.append(f"{flag}: --lr_scheduler_type={schedule} {known}: remove {name}")
        elif not rules[name].allows(value):
            problems.append(f"{flag}: {name} must be {rules[name].words}")
        elif name in ("min_lr", "lr_end") and peak is not None and value >= peak:
            problems.append(f"{flag}: {name} must be below --learning_rate={peak}")
    if needed and len(options.keys() & {*needed}) != 1:
        example = f"--lr_scheduler_kwargs={needed[-1]}={100 if needed[-1] == 'num_decay_steps' else 0.1}"
        problems.append(f"--lr_scheduler_type={schedule} needs one of {', '.join(needed)}: set {example}, for example")
    return problems
