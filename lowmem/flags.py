"""From flags to a TrainConfig: presets, a config file, types, and every mistake told at once. Imports no torch."""

import difflib
import math
import re
import types
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from lowmem.config import (
    ALTERNATIVES,
    CHOICES,
    FIELDS,
    MODEL_SHAPES,
    PRESETS,
    TIERED_OPTIMIZERS,
    TRACKERS,
    TrainConfig,
    UsageError,
    parse_bytes,
)
from lowmem.zero_config import zero_problems

# What stands for the last field of a pair when neither side is set.
_FALLBACKS = {
    "validation_rows": 0,
    "prompt_column": "prompt",
    "response_column": "response",
    "epochs": 3.0,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
}

BUNDLED_VALIDATION_ROWS = 240

# what other trainers call it
_ELSEWHERE = {
    "lr": "learning_rate",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision=bf16",
    "fsdp": "sharding_strategy",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_checkpointing": "recompute=full",
    "max_length": "max_seq_len",
    "optim": "optimizer",
    "torch_compile": "compile",
    "resume_from_checkpoint": "resume",
}

_AT_LEAST_ONE = (
    "max_seq_len max_steps batch_size gradient_accumulation_steps global_batch_size num_processes shard_size tp_size "
    "generation_max_new_tokens logging_steps eval_steps save_steps heartbeat_timeout".split()
)
_NOT_NEGATIVE = (
    "seed validation_rows max_predict_samples warmup_steps warmup_ratio weight_decay max_grad_norm save_total_limit "
    "label_smoothing adam_beta1 adam_beta2 max_bad_rows prefetch_steps".split()
)
_POSITIVE = "learning_rate adam_epsilon epochs".split()
_BELOW_ONE = "label_smoothing adam_beta1 adam_beta2 warmup_ratio".split()


def resolve(flags: Mapping[str, object], *, given: Mapping[str, object] | None = None) -> TrainConfig:
    """Merge defaults < preset < `given` < `config` file < flags into a checked TrainConfig.

    `flags` maps field names, preset names, `config` (path of a YAML or JSON file) and `is_keep_training` to values of
    any type: what came from a command line as text is turned into the field's type. `given` are fields that a launcher
    or a model's folder sets. Raises UsageError with every problem in one message.
    """
    problems: list[str] = []
    flags = dict(flags)
    from_file = _read_config_file(flags.pop("config", None), problems)
    file_switches, file_values = _take_presets(from_file, problems)
    flag_switches, flag_values = _take_presets(flags, problems)
    presets = sorted(name for name, on in (file_switches | flag_switches).items() if on)
    if len(presets) > 1:
        problems.append(f"{' and '.join('--' + name for name in presets)} were both asked for: choose one preset")
    layers = [dict(given or {}), _coerce_all(file_values, problems), _coerce_all(flag_values, problems)]
    names_model = any(layer.get("model_name_or_path") or layer.get("model_config") for layer in layers)
    preset = PRESETS[presets[0]] if presets else {} if names_model else PRESETS["tiny"]

    merged: dict[str, object] = {}
    for layer in [preset, *layers]:
        for a, b in ALTERNATIVES:
            if layer.get(a) is not None and layer.get(b) is not None:
                problems.append(f"--{a} and --{b} were both set: they say the same thing in two ways, set one")
            for one, other in ((a, b), (b, a)):
                if layer.get(one) is not None:
                    merged.pop(other, None)
        merged |= layer
    if merged.get("train_file") is None and merged.get("validation_file") is None:
        merged.setdefault("validation_rows", BUNDLED_VALIDATION_ROWS)
    for name, value in _FALLBACKS.items():
        alternatives = {other for pair in ALTERNATIVES if name in pair for other in pair}
        if all(merged.get(other) is None for other in alternatives):
            merged[name] = value
    if merged.get("memory") is None and merged.get("mixed_precision") == "bf16":
        has_tier = merged.get("optimizer", FIELDS["optimizer"].default) in TIERED_OPTIMIZERS
        has_tier = has_tier and merged.get("deepspeed") is None
        merged["memory"] = "exact" if has_tier else "off"
    config = TrainConfig(**merged)
    problems += _conflicts(config, presets)
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)))
    return config


def _read_config_file(path: object, problems: list[str]) -> dict[str, object]:
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config={path} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"--config={path} is not YAML: {' '.join(str(error).split())}")
    else:
        if isinstance(values, dict) and all(isinstance(key, str) for key in values):
            return values
        problems.append(f"--config={path} holds no field: value pairs")
    return {}


def _take_presets(values: Mapping[str, object], problems: list[str]) -> tuple[dict[str, bool], dict[str, object]]:
    """Split `values` into the presets it switches on or off and the fields it sets."""
    rest = dict(values)
    switches = (PRESETS.keys() - {"tiny"} | {"is_keep_training"}) & rest.keys()
    presets = {name: _coerce(name, bool, rest.pop(name), problems) is True for name in switches}
    if presets.pop("is_keep_training", False):
        if rest.setdefault("resume", "auto") != "auto":
            problems.append(f"--is_keep_training means --resume=auto, but --resume={rest['resume']} was set: drop one")
    return presets, rest


def _coerce_all(values: Mapping[str, object], problems: list[str]) -> dict[str, object]:
    coerced = {}
    for name, value in values.items():
        if name not in FIELDS:
            if name in _ELSEWHERE:
                problems.append(f"unknown flag --{name}: it is --{_ELSEWHERE[name]} here")
                continue
            known = [*FIELDS, *PRESETS.keys() - {"tiny"}, "config", "is_keep_training"]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "`--help` lists all flags"
            problems.append(f"unknown flag --{name}: {hint}")
        else:
            coerced[name] = _coerce(name, FIELDS[name].type, value, problems)
    return coerced


def _coerce(name: str, kind: object, value: object, problems: list[str]) -> object:
    """`value` as the type `kind`, or a problem. Text comes from a command line, anything else from YAML or Python."""
    if isinstance(kind, types.UnionType):
        if value is None or str(value).lower() in ("none", "null"):
            return None
        kind = next(member for member in get_args(kind) if member is not types.NoneType)
    text = str(value).strip()
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(value, bool) and kind is not str:
            raise ValueError
        if kind is int:
            number = float(text)  # 1e3 is an integer in every language but Python
            if not number.is_integer():
                raise ValueError
            return int(text) if text.lstrip("+-").isdigit() else int(number)
        if kind is float:
            return float(text)
    except (KeyError, ValueError, OverflowError):
        problems.append(f"--{name}={value} is not {'an' if kind is int else 'a'} {kind.__name__}")
        return None
    if name == "resume":
        return {"true": "auto", "false": "never"}.get(text.lower(), text)
    if name == "mixed_precision" and value is False:
        return "no"  # YAML reads a bare `no` as false
    if text in ("True", "False"):  # what Fire makes of a flag without a value
        problems.append(f"--{name} needs a value: --{name}=...")
    parts = value if isinstance(value, list | tuple) else text.split(",")
    return ",".join(str(part).strip() for part in parts)


def _conflicts(config: TrainConfig, presets: list[str]) -> list[str]:
    """Every value that is out of range, and every pair of values that contradict each other."""
    problems = []

    def check(names, allowed, rule):
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and allowed(value)):
                problems.append(f"--{name}={value} must be {rule}")

    check(_AT_LEAST_ONE, lambda value: value >= 1, "at least 1")
    check(_NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    check(_POSITIVE, lambda value: value > 0, "above 0")
    check(_BELOW_ONE, lambda value: value < 1, "below 1")
    if config.seed >= 2**63:
        problems.append(f"--seed={config.seed} must be below 2**63")
    may_be_empty = ("freeze", "report_to")
    problems += [
        f"--{name} is empty: give it a value"
        for name in FIELDS
        if getattr(config, name) == "" and name not in may_be_empty
    ]
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if name == "mixed_precision" and value == "fp16":
            problems.append("--mixed_precision=fp16 needs loss scaling, which lowmem does not do: use bf16 or no")
        elif value is not None and value not in allowed:
            problems.append(f"--{name}={value} must be one of {', '.join(allowed)}")
    if config.model_config and config.model_config not in MODEL_SHAPES and not Path(config.model_config).is_file():
        shapes = ", ".join(MODEL_SHAPES)
        problems.append(f"--model_config={config.model_config} is neither a file nor one of {shapes}")
    for part in filter(None, config.freeze.split(",")):
        if part not in ("embeddings", "encoder"):
            problems.append(f"--freeze={config.freeze}: {part!r} is not one of embeddings, encoder")
    for tracker in filter(None, config.report_to.split(",")):
        if tracker not in TRACKERS:
            problems.append(f"--report_to={tracker} is none of {', '.join(TRACKERS)}")
        elif not find_spec(tracker):
            problems.append(f"--report_to={tracker} is not installed: pip install {tracker}")
    if "is_finetune" in presets and not config.model_name_or_path:
        problems.append("--is_finetune freezes trained parts, so it needs --model_name_or_path")
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        value = getattr(config, name)
        is_hub_name = value and re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", value)
        if value and not is_hub_name and not Path(value).is_dir():
            problems.append(f"--{name}={value} is neither a folder nor the name of a model on the hub")
    causal = [f"--{name}" for name in ("packing", "text_column", "messages_column") if getattr(config, name)]
    if causal and config.model_config in MODEL_SHAPES:
        problems.append(
            f"{', '.join(causal)} need{'' if causal[1:] else 's'} a causal model, --model_config={config.model_config} "
            "is a T5: set --model_name_or_path, or --model_config to a file"
        )
    if config.on_bad_row == "error" and config.max_bad_rows != FIELDS["max_bad_rows"].default:
        problems.append(f"--max_bad_rows={config.max_bad_rows} does nothing unless --on_bad_row=skip")
    if config.accept_changed_data and config.resume == "never":
        problems.append("--accept_changed_data=True does nothing unless a run is resumed: set --resume too")
    problems += _memory_conflicts(config) + _sharding_conflicts(config) + zero_problems(config)
    betas_used = config.optimizer in ("adamw", "adamw_bf16", "adam", "nadam", "radam", "adamax")
    if not betas_used and (config.adam_beta1, config.adam_beta2, config.adam_epsilon) != (0.9, 0.999, 1e-8):
        problems.append(f"--adam_beta1, --adam_beta2 and --adam_epsilon do nothing for --optimizer={config.optimizer}")
    try:
        if parse_bytes(config.max_shard_size) < 1:
            problems.append("--max_shard_size=0 leaves no room for a tensor")
    except UsageError as error:
        problems.append(f"--max_shard_size: {error}")
    return problems


def _memory_conflicts(config: TrainConfig) -> list[str]:
    problems = []
    if config.has_bf16_weights:
        if config.mixed_precision != "bf16":
            problems.append(f"--memory={config.memory} keeps weights in bf16: set --mixed_precision=bf16 too")
        if config.optimizer not in TIERED_OPTIMIZERS:
            tiered = ", ".join(TIERED_OPTIMIZERS)
            problems.append(f"--memory={config.memory} has no --optimizer={config.optimizer}: use one of {tiered}")
    elif config.optimizer == "adamw_bf16":
        problems.append(
            "--optimizer=adamw_bf16 needs weights in bf16: set --mixed_precision=bf16, with memory exact or lean"
        )
    if config.release:
        if config.gradient_accumulation_steps not in (None, 1):
            problems.append("--release updates within each backward: set --gradient_accumulation_steps=1")
        if config.global_batch_size is not None and config.global_batch_size > config.batch_size:
            told = f"set --global_batch_size to at most --batch_size={config.batch_size}"
            problems.append(f"--release updates within each backward: {told}")
        if config.max_grad_norm:
            problems.append("--release has no whole gradient to clip: set --max_grad_norm=0")
        if config.nonfinite != "stop":
            problems.append("--release cannot take an update back: set --nonfinite=stop")
        if config.num_processes not in (None, 1):
            problems.append("--release has no gradient left to sum over processes: set --num_processes=1")
    return problems


def _sharding_conflicts(config: TrainConfig) -> list[str]:
    problems = []
    strategy = config.sharding_strategy
    if config.deepspeed and (strategy != "NO_SHARD" or config.tp_size > 1):
        problems.append("--deepspeed divides by itself: leave --sharding_strategy and --tp_size, or leave --deepspeed")
    if config.cpu_offload and strategy == "NO_SHARD":
        problems.append("--cpu_offload keeps sharded weights in host memory: set --sharding_strategy=FULL_SHARD too")
    if config.shard_size is not None and strategy != "HYBRID_SHARD":
        problems.append(
            f"--shard_size is of --sharding_strategy=HYBRID_SHARD, this is {strategy}: set one or the other"
        )
    if strategy != "NO_SHARD":
        if config.optimizer == "adafactor":
            problems.append(
                f"--optimizer=adafactor needs whole matrices: leave --sharding_strategy={strategy}, or take adamw"
            )
        if config.release:
            problems.append("--release has no gradient left to sum over processes: leave --sharding_strategy")
    if None not in (config.shard_size, config.num_processes) and config.num_processes % config.shard_size:
        problems.append(f"--num_processes={config.num_processes} is no multiple of --shard_size={config.shard_size}")
    if config.tp_size > 1:
        if config.release:
            problems.append("--release has no gradient left to sum over processes: leave --tp_size")
        if strategy != "NO_SHARD":
            problems.append(
                f"--tp_size={config.tp_size} and --sharding_strategy={strategy} both divide weights: set one"
            )
        if config.optimizer == "adafactor":
            problems.append("--optimizer=adafactor needs whole matrices: leave --tp_size, or take adamw")
        if config.compile:
            problems.append("--compile does not know divided layers: leave --tp_size or --compile")
        if config.model_config in MODEL_SHAPES:
            problems.append(
                f"--tp_size={config.tp_size} divides causal models, --model_config={config.model_config} is a T5"
            )
        if config.num_processes is not None and config.num_processes % config.tp_size:
            problems.append(f"--num_processes={config.num_processes} is no multiple of --tp_size={config.tp_size}")
    return problems
