"""What no run can do: values out of range, and values that contradict one another. Imports no torch."""

import math
import re
from importlib.util import find_spec
from pathlib import Path

from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import CHOICES, FIELDS, MODEL_SHAPES, TIERED_OPTIMIZERS, TRACKERS, TrainConfig
from lowmem.config.zero import zero_problems
from lowmem.errors import UsageError

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


def conflicts(config: TrainConfig, presets: list[str]) -> list[str]:
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
    for name in ("max_shard_size", "device_memory", "host_memory"):
        size = getattr(config, name)
        try:
            if size is not None and parse_bytes(size) < 1:
                problems.append(f"--{name}={size} leaves no room for a tensor")
        except UsageError as error:
            problems.append(f"--{name}: {error}")
    if config.deepspeed and (config.device_memory or config.host_memory):
        problems.append("--deepspeed lays out memory by itself: leave --device_memory and --host_memory")
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
            f"--shard_size does nothing with --sharding_strategy={strategy}: set HYBRID_SHARD, or leave --shard_size"
        )
    if strategy != "NO_SHARD":
        if config.optimizer == "adafactor":
            problems.append(
                f"--optimizer=adafactor needs whole matrices: leave --sharding_strategy={strategy}, or take adamw"
            )
        if config.release:
            problems.append("--release has no gradient left to sum over processes: leave --sharding_strategy")
    if None not in (config.shard_size, config.num_processes) and config.num_processes % config.shard_size:
        problems.append(
            f"--num_processes={config.num_processes} is no multiple of --shard_size={config.shard_size}: change one"
        )
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
                f"--tp_size={config.tp_size} divides causal models, --model_config={config.model_config} is a T5: take "
                "another model, or --sharding_strategy=FULL_SHARD"
            )
        if config.num_processes is not None and config.num_processes % config.tp_size:
            problems.append(
                f"--num_processes={config.num_processes} is no multiple of --tp_size={config.tp_size}: change one"
            )
    return problems
