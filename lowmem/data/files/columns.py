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
        if not (isinstance(row[column], str) if kind == "text" else _holds_messages(row[column])):
            what = "text" if kind == "text" else 'messages, [{"role": "user", "content": "..."}, ...]'
            raise ValueError(
                f"column {column!r} must hold {what}, found {type(row[column]).__name__} {row[column]!r:.80}: name "
                "another column or fix the file"
            )


def check_schema(source: Source, schema: "pa.Schema", wanted: Mapping[str, str] | None) -> None:
    """Raise UsageError if a table lacks a wanted column (None: all that it has), repeats it, or has another type."""
    _check_present(source, wanted or (), schema.names)
    if repeated := [column for column in wanted or schema.names if schema.names.count(column) > 1]:
        raise UsageError(f"{source} has column {repeated[0]!r} twice: rename one of them and write the file again")
    for column, kind in (wanted or {}).items():
        found = schema.field(column).type
        if not (_is_text(found) if kind == "text" else _is_chat(found)):
            what = "text" if kind == "text" else "chats (lists of a struct of the texts role and content)"
            raise UsageError(f"{source}: column {column!r} must hold {what}, it holds {found}: name another column")


def _check_present(source: Source, wanted: Iterable[str], present: Sequence[str]) -> None:
    """Raise UsageError if a wanted column is missing."""
    if missing := [repr(column) for column in wanted if column not in present]:
        raise UsageError(
            f"{source} has no {' and no '.join(f'column {name}' for name in missing)}, it has "
            f"{', '.join(map(repr, present))}: set --prompt_column and --response_column, --text_column or "
            "--messages_column"
        )


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
