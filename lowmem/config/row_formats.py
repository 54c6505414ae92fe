"""Formats of rows that many data sets have: how they set the flags of columns, and how their columns show them."""

from collections.abc import Collection

ROW_FORMATS: dict[str, dict[str, str]] = {
    "alpaca": {"prompt_template": r"{instruction}\n{input}\n", "response_column": "output"},
    "sharegpt": {"messages_column": "conversations"},
}
COLUMN_FLAGS = frozenset(
    ("prompt_column", "response_column", "prompt_template", "text_column", "messages_column", "row_format")
)


def format_of(columns: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """Return the name and the settings of the format to which these columns belong; None if they belong to none."""
    if "conversations" in columns:
        return "sharegpt", ROW_FORMATS["sharegpt"]
    if {"instruction", "output"} <= set(columns):
        without_input = {} if "input" in columns else {"prompt_template": r"{instruction}\n"}
        return "alpaca", ROW_FORMATS["alpaca"] | without_input
    return None
