"""The fields of a config class and the rules that each carries. Imports no torch."""

import dataclasses
import inspect
import operator
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from lowmem.config.presets import PRESETS
from lowmem.errors import UsageError

_KINDS = (str, int, float, bool)
_ON_RESUME = ("may change", "fixed")
_RESERVED = {*PRESETS, "is_keep_training", "config", "local_rank", "help"}  # flags that are not fields


class Field(NamedTuple):
    """A field of a config class. `metadata` has the arguments of its `setting`; it is empty for a plain default."""

    type: Any
    default: Any
    metadata: Mapping[str, Any]


def setting(
    default: object = None,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: Literal["bytes"] | None = None,
    holds: Literal["path", "files", "names", "options"] | None = None,
    may_be_empty: bool = False,
    or_word: str | None = None,
    instead_of: Sequence[str] = (),
    fallback: object = None,
    on_resume: Literal["may change", "fixed"] = "may change",
    per_rank: bool = False,
    in_evaluate: bool = False,
) -> Any:
    """Make a field with rules.

    Of text fields, those that hold `files` or `names` are comma-separated lists, a `path` may begin with ~, and
    `options` may be a mapping. A number may also be the word `or_word`. `instead_of` lists the fields that this field
    replaces. `fallback` is this field's value if no alternative is set.
    A resumed run must keep `fixed` fields; `per_rank` fields may differ by rank; `evaluate` takes `in_evaluate` fields.
    """
    return dataclasses.field(default=default, metadata=locals())


def alternatives_of(fields: Mapping[str, Field]) -> list[tuple[str, str]]:
    """Return the pairs of fields of which at most one can be set."""
    return [(name, other) for name, field in fields.items() for other in field.metadata.get("instead_of", ())]


@cache
def fields_of(config_class: type) -> Mapping[str, Field]:
    """Return the fields of a config class by name. One with a plain default keeps the rules of the class it derives
    from.

    Raises UsageError that lists what is wrong with the class.
    """
    problems, found = [], {}
    for base in config_class.__mro__[:-1]:
        if inspect.get_annotations(base) and "__dataclass_fields__" not in vars(base):
            problems.append(f"{base.__name__} is not a dataclass: put @dataclass(frozen=True, kw_only=True) above it")
    types = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name, kind = field.name, types[field.name]
        bases = [base for base in config_class.__mro__ if name in vars(base).get("__dataclass_fields__", ())]
        of_bases = (base.__dataclass_fields__[name].metadata for base in bases)
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)  # Optional[int] is int | None
        kind = reduce(operator.or_, sorted(kinds, key=lambda each: each is NoneType))
        found[name] = Field(kind, field.default, next(filter(None, of_bases), {}))
        older = config_class.__mro__[config_class.__mro__.index(bases[-1]) + 1 :]
        where = f"{config_class.__name__}.{name}"
        if name in _RESERVED or any(name in vars(base) for base in older):
            problems.append(f"{where} has the name of something else in {bases[-1].__mro__[1].__name__}: rename it")
        shown, default, rules = inspect.formatannotation(kind), field.default, found[name].metadata
        if not {*kinds} - {NoneType} <= {*_KINDS} or len(kinds) > 2:
            problems.append(f"{where} has the type {shown}: use str, int, float or bool, perhaps with `| None`")
        elif default is dataclasses.MISSING:
            problems.append(f"{where} has no default: give it one, such as None")
        elif not isinstance(default, (*kinds, int) if float in kinds else kinds) and default != rules.get("or_word"):
            problems.append(f"{where} has the default {default!r}, but the type {shown}: change one of them")
        if rules.get("on_resume") not in (None, *_ON_RESUME):
            problems.append(f"{where} has on_resume={rules['on_resume']!r}: use one of {', '.join(_ON_RESUME)}")
        if unknown := [other for other in rules.get("instead_of", ()) if other not in types]:
            problems.append(f"{where} has instead_of={unknown[0]}, which is no field: correct the name")
    if problems:
        raise UsageError("; ".join(problems))
    return found
