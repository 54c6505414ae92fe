"""The text of --help: commands, presets, and each flag with the docstring of its field. Imports no torch."""

import re
from inspect import formatannotation, getsource
from textwrap import wrap

from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS, TrainConfig, choices

_COMMANDS = """\
usage: train_low_mem.py train|plan|evaluate|test|verify|export|convert|plot [--flag=value ...]
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


def help_text(*, full: bool = False) -> str:
    """Return the text of --help: a line per flag with the first sentence of its docstring (`full`: all sentences)."""
    lines = [_COMMANDS]
    for name, values in PRESETS.items():
        title = "with neither a preset nor a model" if name == "tiny" else f"--{name}=True"
        fields = ", ".join(f"{field}={value}" for field, value in values.items())
        lines += wrap(f"  {title}: {fields}", 120, subsequent_indent=" " * 6)
    lines.append("  --is_keep_training=True: resume=auto")
    group_or_field = re.compile(r'^    # --- (.+)|^    (\w+): (?s:.+?)"""((?s:.+?))"""', re.MULTILINE)
    for group, name, docstring in group_or_field.findall(getsource(TrainConfig)):
        if group:
            lines.append(f"\n{group}:")
            continue
        field, text = FIELDS[name], " ".join(docstring.split())
        default = field.metadata.get("fallback") if field.default is None else field.default
        kind = formatannotation(field.type).removesuffix(" | None").upper()
        values = "|".join(choices(name)) or (kind if default in (None, "") else str(default))
        if full:
            values = values if len(values) <= 80 else values.replace("|", " | ")  # so that it can be wrapped
            lines += wrap(f"  --{name}={values}: {text}", 120, subsequent_indent=" " * 6)
        else:
            values = values if len(values) <= 20 else f"{values.partition('|')[0]}|..."
            lines.append(f"  {f'--{name}={values}':<36} {text.partition('. ')[0].removesuffix('.')}")
    return "\n".join(lines)
