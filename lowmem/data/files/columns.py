"""Check that a file has the columns a run wants, each of the kind it wants: "text" or "messages"."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lowmem.data.files.source import Row, Source
from lowmem.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


def check_row(source: Source, row: Row, wanted: Mapping[str, str]) -> None:
    """Raise UsageError if a row lacks a wanted column, ValueError if one holds something else."""
    _check_present(source, wanted, list(row))
    for column, kind in wanted.items():
        value = row[column]
        if not (isinstance(value, str) if kind == "text" else _holds_messages(value)):
            what = "text" if kind == "text" else 'messages, [{"role": "user", "content": "..."}, ...]'
            found = f"{type(value).__name__} {value!r:.80}"
            raise ValueError(f"column {column!r} must hold {what}, found {found}: name another column or fix the file")


def select_columns(source: Source, schema: "pa.Schema", wanted: Mapping[str, str] | None) -> "pa.Schema":
    """Return the wanted columns of a table (None: all). Raises UsageError if one is missing, repeated or mistyped."""
    import pyarrow as pa

    names = schema.names if wanted is None else list(wanted)
    _check_present(source, names, schema.names)
    if repeated := [name for name in names if schema.names.count(name) > 1]:
        raise UsageError(f"{source} has column {repeated[0]!r} twice: rename one of them and write the file again")
    for column, kind in (wanted or {}).items():
        found = schema.field(column).type
        if not (_is_text(found) if kind == "text" else _is_chat(found)):
            what = "text" if kind == "text" else "chats (lists of a struct of the texts role and content)"
            raise UsageError(f"{source}: column {column!r} must hold {what}, it holds {found}: name another column")
    return pa.schema([schema.field(name) for name in names])


def _check_present(source: Source, wanted: Iterable[str], present: Sequence[str]) -> None:
    if missing := [f"column {name!r}" for name in wanted if name not in present]:
        what = f"{source} has no {' and no '.join(missing)}, it has {', '.join(map(repr, present))}"
        raise UsageError(f"{what}: set --prompt_column and --response_column, --text_column or --messages_column")


def _holds_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_chat(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    return {"role", "content"} <= {field.name for field in kind.value_type if _is_text(field.type)}
