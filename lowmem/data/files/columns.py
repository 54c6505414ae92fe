"""Check that a file has the wanted columns, and that each is of the wanted kind: "text", "messages" or "number".

Or "text or null", for the columns of a prompt template, of which a row may lack some; "optional text" is the same for a
column that a whole file may lack.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowmem.data.files.source import Row, Source
from lowmem.errors import ColumnsError, UsageError

TOOLS_COLUMN = "tools"
"""Chat rows may have this column: the tools that the assistant can call, as JSON schemas."""

if TYPE_CHECKING:
    import pyarrow as pa


def check_row(source: Source, row: Row, wanted: Mapping[str, str]) -> None:
    """Raise UsageError if a row lacks a wanted column, ValueError if a column has the wrong type."""
    _check_present(source, wanted, list(row))
    for column, kind in wanted.items():
        value = row.get(column)
        if not _IS_OF_KIND[kind](value):
            what = 'messages, [{"role": "user", "content": "..."}, ...]' if kind == "messages" else _WORDS[kind]
            found = f"{type(value).__name__} {value!r:.80}"
            raise ValueError(f"column {column!r} must hold {what}, found {found}: name another column or fix the file")


def select_columns(source: Source, schema: "pa.Schema", wanted: Mapping[str, str] | None) -> "pa.Schema":
    """Return the wanted columns' schema (None: all). Raises UsageError if one is missing, repeated or of wrong type."""
    import pyarrow as pa

    if wanted is not None:
        _check_present(source, wanted, schema.names)
        wanted = {name: kind for name, kind in wanted.items() if name in schema.names}
    names = schema.names if wanted is None else list(wanted)
    if repeated := [name for name in names if schema.names.count(name) > 1]:
        raise UsageError(f"{source} has column {repeated[0]!r} twice: rename one of them and write the file again")
    for column, kind in (wanted or {}).items():
        found = schema.field(column).type
        if not _holds(found, kind):
            what = (
                "messages (lists of structs with content and a text role, or from and value)"
                if kind == "messages"
                else _WORDS[kind]
            )
            raise UsageError(f"{source}: column {column!r} must hold {what}, found {found}: name another column")
    if "messages" in (wanted or {}).values():
        names = names + [name for name in (TOOLS_COLUMN,) if name in schema.names and name not in names]
    return pa.schema([schema.field(name) for name in names])


def _check_present(source: Source, wanted: Mapping[str, str], present: Sequence[str]) -> None:
    required = [name for name, kind in wanted.items() if kind != "optional text"]
    if missing := [f"column {name!r}" for name in required if name not in present]:
        what = f"{source} has no {' and no '.join(missing)}, it has {', '.join(map(repr, present))}"
        kinds = {wanted[name] for name in required if name not in present}
        flags = dict.fromkeys(flags for kind, flags in _FLAGS.items() if kind in kinds)
        raise ColumnsError(f"{what}: set {'; '.join(flags)} (for all files)", source.name, present)


def is_message(value: object) -> bool:
    """Whether `value` has a role, and either text, a list of text parts, or tool calls without content.

    Or, as in sharegpt rows, text in "from" and "value".
    """
    if not isinstance(value, Mapping):
        return False
    if "role" not in value:
        return isinstance(value.get("from"), str) and isinstance(value.get("value"), str)
    if not isinstance(value["role"], str):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return all(isinstance(part, str) or _is_text_part(part) for part in content)
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_FLAGS = dict.fromkeys(
    ("text", "messages"), "--prompt_column and --response_column, --text_column, --messages_column or --row_format"
)
_FLAGS |= {"text or null": "--prompt_template or --row_format to its columns", "number": "--weight_column to a column"}
_WORDS = {"text": "text", "number": "a number"} | dict.fromkeys(("text or null", "optional text"), "text or null")
_IS_OF_KIND = {
    "text": lambda value: isinstance(value, str),
    **dict.fromkeys(("text or null", "optional text"), lambda value: value is None or isinstance(value, str)),
    "number": is_number,
    "messages": lambda value: isinstance(value, list) and all(map(is_message, value)),
}


def _is_text_part(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type", "text") == "text" and isinstance(value.get("text"), str)


def _holds(found: "pa.DataType", kind: str) -> bool:
    from pyarrow import types

    if kind in ("text or null", "optional text") and types.is_null(found):
        return True
    if kind in ("text", "text or null", "optional text"):
        found = found.value_type if types.is_dictionary(found) else found
        return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    if kind == "number":
        return types.is_integer(found) or types.is_floating(found)
    is_list = types.is_list(found) or types.is_large_list(found)
    fields = (
        {field.name: field.type for field in found.value_type} if is_list and types.is_struct(found.value_type) else {}
    )
    if {"from", "value"} <= fields.keys():
        return _holds(fields["from"], "text") and _holds(fields["value"], "text")
    if not {"role", "content"} <= fields.keys() or not _holds(fields["role"], "text"):
        return False
    content = fields["content"]
    return _holds(content, "text") or types.is_null(content) or types.is_list(content) or types.is_large_list(content)
