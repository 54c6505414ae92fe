"""Formats of rows that many data sets have: how they set the flags of columns, and how their columns show them."""

from collections.abc import Collection

from lowmem.config.prompt_template import template_columns

ROW_FORMATS: dict[str, dict[str, str]] = {
    "alpaca": {"prompt_template": r"{instruction}\n{input}\n", "response_column": "output"},
    "sharegpt": {"messages_column": "conversations"},
}


def format_of(columns: Collection[str]) -> tuple[str, dict[str, str]] | None:
    """Return the name and the settings of the format to which these columns belong; None if they belong to none."""
    if "conversations" in columns:
        return "sharegpt", ROW_FORMATS["sharegpt"]
    if {"instruction", "output"} <= set(columns):
        return "alpaca", ROW_FORMATS["alpaca"]
    return None


def kinds_of(template: str) -> dict[str, str]:
    """Map a template's columns to what a file must hold: "text or null" or, if it may lack the column, "optional text".

    Only `input` of alpaca rows is optional: a file without another column is more likely not what the template is for.
    """
    optional = {"input"} if template == ROW_FORMATS["alpaca"]["prompt_template"] else set()
    return {name: "optional text" if name in optional else "text or null" for name in template_columns(template)}
