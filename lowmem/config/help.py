"""The text of --help: commands, presets, and each flag with the docstring of its field. Imports no torch."""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from inspect import formatannotation, getsource
from itertools import pairwise
from textwrap import dedent, wrap

from lowmem.config.fields import fields_of
from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS, TrainConfig

_COMMANDS = """\
usage: {program} train|plan|evaluate|test|verify|export|convert|plot [--flag=value ...]
  train                                      trains a tiny T5 on bundled rows: no file, no network
  train --train_file=rows.parquet --model_name_or_path=FOLDER --output_dir=out
  plan ...flags of train...                  predicts memory and disk use, without training
      with --device_memory=20GB --host_memory=12GB, plan and train choose the fastest settings that fit
  evaluate (or test) --model_name_or_path=out/model --test_file=rows.parquet
  verify PATH                                checks that a checkpoint, or each checkpoint of a run, is intact
  export PATH OUT --dtype=float32            copies the model of a checkpoint or folder to a new folder; --dtype:
      float32 (the fp32 master weights if memory=exact), float16, bfloat16, None (as saved); --max_shard_size=5GB
      --merge=True merges adapters into the model that they belong to
  convert rows.json rows.jsonl               converts a JSON array of objects to one object per line
  plot OUT [OUT2 ...]                        draws curves of runs: OUT/plot.png, or text without matplotlib

presets (flags override them), then all flags with their default, choices (default first) or type; see docs/flags.md:"""


def help_text(
    config_class: type[TrainConfig] = TrainConfig, *, program: str = "train_low_mem.py", full: bool = False
) -> str:
    """Return the text of --help: a line per flag with the first sentence of its docstring (`full`: all sentences)."""
    lines, fields = [_COMMANDS.replace("{program}", program)], fields_of(config_class)
    changed = {name for name in FIELDS if fields[name].default != FIELDS[name].default}
    for name, values in PRESETS.items():
        title = "with neither a preset nor a model" if name == "tiny" else f"--{name}=True"
        replaced = changed if name == "tiny" else ()  # as in `resolve`
        settings = ", ".join(f"{field}={value}" for field, value in values.items() if field not in replaced)
        lines += wrap(f"  {title}: {settings}", 120, subsequent_indent=" " * 6)
    lines.append("  --is_keep_training=True: resume=auto")
    texts, last_group = _documented(config_class), ""
    for name, field in fields.items():
        group, text = texts.get(name) or (config_class.__name__, "")
        if group != last_group:
            lines.append(f"\n{group}:")
        last_group = group
        default = field.metadata.get("fallback") if field.default is None else field.default
        kind = formatannotation(field.type).removesuffix(" | None").upper()
        values = "|".join(field.metadata.get("choices", ())) or (kind if default in (None, "") else str(default))
        if full:
            values = values if len(values) <= 80 else values.replace("|", " | ")  # so that it can be wrapped
            lines += wrap(f"  --{name}={values}: {text}", 120, subsequent_indent=" " * 6)
        else:
            values = values if len(values) <= 20 else f"{values.partition('|')[0]}|..."
            lines.append(f"  {f'--{name}={values}':<36} {text.partition('. ')[0].removesuffix('.')}")
    return "\n".join(lines)


def _documented(config_class: type) -> dict[str, tuple[str, str]]:
    """Return the group and the docstring of each field that has one. A group begins with a comment "# --- name"."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(config_class.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        with suppress(OSError):  # a class that was defined without a file has no source
            for name, group, text in _documented_in(dedent(getsource(base)), base.__name__):
                found[name] = (found[name][0] if name in found else group, text)
    return found


def _documented_in(source: str, group: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, group and docstring of the fields in the source of a class; `group` is that of the first ones."""
    headers = {number: line for number, line in enumerate(source.splitlines(), 1) if re.match("    # --- ", line)}
    for node, after in pairwise(ast.parse(source).body[0].body):
        is_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and is_docstring:
            above = [line for number, line in headers.items() if number < node.lineno]
            yield node.target.id, above[-1].strip(" #-") if above else group, " ".join(str(after.value.value).split())
