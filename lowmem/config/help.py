"""The text of --help: commands, presets, and every field with what its source says of it. Imports no torch."""

import re
from inspect import formatannotation, getsource

from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS, TrainConfig, choices

_COMMANDS = """\
usage: train_low_mem.py train|plan|evaluate|test|verify|export|plot [--flag=value ...]
  train                                      a tiny T5 learns bundled rows: no file, no network
  train --train_file=rows.parquet --model_name_or_path=FOLDER --output_dir=out
  train --use_large_config=True --train_file=rows.parquet --resume=auto
  plan ...flags of train...                  predicts memory and disk, and runs nothing
      with --device_memory=20GB --host_memory=12GB it chooses the fastest settings that fit; so does `train`
  evaluate --model_name_or_path=out/model --test_file=rows.parquet
  verify PATH                                checks that a checkpoint, or each one of a run, is as it was saved
  export PATH OUT --dtype=bfloat16 --max_shard_size=5GB
      writes the model of a checkpoint, or any model's folder, as a new folder for from_pretrained; dtype:
      float32 (of a checkpoint in memory=exact the fp32 master), float16, bfloat16, None (default: as saved)
  plot OUT [OUT2 ...]                        curves of runs: OUT/plot.png, or text without matplotlib

presets, which --config=FILE.yaml and flags override:"""


def help_text() -> str:
    """The help, whose explanations of fields are the docstrings below them."""
    lines = [_COMMANDS]
    for name, values in PRESETS.items():
        shown = "without a preset and a model" if name == "tiny" else f"--{name}=True"
        lines.append(f"  {shown}: " + ", ".join(f"{field}={value}" for field, value in values.items()))
    lines.append("  --is_keep_training=True: resume=auto")
    group_or_field = re.compile(r'^    # --- (.+)|^    (\w+): (?s:.+?)"""((?s:.+?))"""', re.MULTILINE)
    for group, name, explanation in group_or_field.findall(getsource(TrainConfig)):
        if group:
            lines.append(f"\n{group}:")
            continue
        field = FIELDS[name]
        kind = "|".join(choices(name)) or formatannotation(field.type).removesuffix(" | None")
        default = field.metadata.get("fallback") if field.default is None else field.default
        shown = kind if default in (None, "") else f"{kind}, {default}"
        lines.append(f"  --{name} ({shown}): {' '.join(explanation.split())}")
    return "\n".join(lines)
