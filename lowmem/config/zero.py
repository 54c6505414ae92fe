"""Read a DeepSpeed config, check it against our flags, and complete it from the flags. Imports no torch."""

import json
from collections.abc import Mapping
from importlib.util import find_spec

from lowmem.errors import UsageError
from lowmem.storage.files import read_text

# Fields of a DeepSpeed config that must agree with our flags, and sections that our flags replace.
_SAME = {"train_micro_batch_size_per_gpu": "batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps"}
_SAME |= {"train_batch_size": "global_batch_size", "bf16.enabled": "mixed_precision"}
_SAME |= {"gradient_clipping": "max_grad_norm"}
_REPLACED = {"optimizer": "--optimizer", "scheduler": "--lr_scheduler_type"}
_REPLACED |= {"torch_autocast": "--mixed_precision", "tensor_parallel": "--tp_size", "pipeline": "--pp_size"}


def read_zero_config(source: str) -> dict[str, object]:
    """Parse a DeepSpeed config (`source`: JSON or file name). Raises UsageError unless it is JSON with a ZeRO stage."""
    is_text = source.lstrip().startswith("{")
    name = "the DeepSpeed config" if is_text else f"--deepspeed={source}"
    text = source if is_text else read_text(source, name, advice="name a DeepSpeed config")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {error}") from error
    if (stage := _value(values, "zero_optimization.stage")) not in (1, 2, 3):
        needs = f"{name} needs zero_optimization with a stage of 1, 2 or 3 (found: {stage})"
        raise UsageError(f"{needs}; without ZeRO nothing is sharded: remove --deepspeed")
    return values


def zero_problems(flags: Mapping[str, object]) -> list[str]:
    """List where the DeepSpeed config contradicts our flags, and what lowmem does not support in the config."""
    if flags["deepspeed"] is None:
        return []
    if not find_spec("deepspeed"):
        return ["--deepspeed needs DeepSpeed, which is not installed: pip install 'lowmem[deepspeed]'"]
    try:
        values = read_zero_config(str(flags["deepspeed"]))
    except UsageError as error:
        return [str(error)]
    problems = []
    for key, flag in _SAME.items():
        ours = flags[flag] == "bf16" if flag == "mixed_precision" else flags[flag]
        if (theirs := _value(values, key)) not in (None, "auto", ours):
            found = f"{key}={json.dumps(theirs)}, but --{flag}={flags[flag]}"
            problems.append(f'{found}: set {key} to "auto", or make the two equal')
    for section, flag in _REPLACED.items():
        if section in values:
            problems.append(f"{section}: remove it and set {flag} or related flags instead")
    for section in ("bf16", "data_types"):
        if not isinstance(values.get(section, {}), dict):
            problems.append(f"{section}={json.dumps(values[section])}: set it to an object {{...}}")
    if _value(values, "fp16.enabled") not in (None, "auto", False):
        problems.append("fp16, which needs a run without DeepSpeed: set --mixed_precision=bf16, or no for fp32")
    zero = values["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        device = _value(zero, f"{part}.device")
        if device == "nvme" and not _value(zero, f"{part}.nvme_path"):
            problems.append(f"{part} to nvme: set its nvme_path too")
        if device == "nvme" and (flags["save_steps"] or flags["resume"] != "never"):
            found = f"{part} to nvme, where lowmem cannot save or load checkpoints"
            problems.append(f"{found}: offload to cpu, or set --save_steps=0 and remove --resume")
        if part == "offload_param" and device not in (None, "none") and zero["stage"] != 3:
            problems.append(f"{part}, which does nothing below stage 3: remove it")
    if zero.get("compute_grad_norm") is False:
        problems.append("compute_grad_norm to false, but every step reports the norm: remove compute_grad_norm")
    if values.get("zero_force_ds_cpu_optimizer"):
        problems.append("zero_force_ds_cpu_optimizer, an Adam that ignores the --adam_ flags: set it to false")
    return [f"the DeepSpeed config sets {problem}" for problem in problems]


def complete_zero_config(source: str, *, batch_size: int, max_grad_norm: float, bf16: bool) -> dict[str, object]:
    """Parse the DeepSpeed config `source` and complete it from our flags. By default gradients are summed in fp32."""
    values = read_zero_config(source)
    values |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # because `deepspeed_step` tells the engine which micro-batch is last
        "gradient_clipping": max_grad_norm,
        # without immediate_grad_update, DeepSpeed 0.19.8 loses gradients (stage 1, bf16, several micro-batches)
        "bf16": values.get("bf16", {}) | {"enabled": bf16, "immediate_grad_update": True},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,  # because DeepSpeed's CPU Adam must first be compiled on this machine
    }
    values.pop("train_batch_size", None)  # DeepSpeed computes it from the other sizes
    values.setdefault("communication_data_type", "fp32")
    values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return values


def _value(values: object, key: str) -> object:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
