"""A DeepSpeed config: read, held against our flags, completed by them. Imports no torch."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

from lowmem.config.train_config import TrainConfig
from lowmem.errors import UsageError

# Those whose update of an element looks at that element alone: ZeRO cuts all weights laid end to end into equal parts.
_ELEMENTWISE = "adamw adam nadam radam adamax adadelta rmsprop sgd".split()
# Sections of a DeepSpeed config that say what our flags say.
_OURS = {
    "optimizer": "--optimizer",
    "scheduler": "--lr_scheduler_type",
    "torch_autocast": "--mixed_precision",
    "tensor_parallel": "--tp_size",
}


def read_zero_config(told: str) -> dict[str, object]:
    """The DeepSpeed config that `told` is, as JSON text, or that the file of this name holds. Raises UsageError."""
    is_text = told.lstrip().startswith("{")
    name = "the DeepSpeed config" if is_text else f"--deepspeed={told}"
    try:
        values = json.loads(told if is_text else Path(told).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{name} is not JSON: {error}") from error
    zero = values.get("zero_optimization") if isinstance(values, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        found = zero.get("stage") if isinstance(zero, dict) else None
        raise UsageError(
            f"{name} needs zero_optimization with a stage of 1, 2 or 3 (found: {found}); without ZeRO leave DeepSpeed "
            "out, as all processes hold the whole model then"
        )
    return values


def zero_problems(config: TrainConfig) -> list[str]:
    """What the DeepSpeed config of `config` and its other fields say against each other, and what is not built."""
    if config.deepspeed is None:
        return []
    if not find_spec("deepspeed"):
        return ["--deepspeed needs DeepSpeed, which is not installed: pip install 'lowmem[deepspeed]'"]
    try:
        values = read_zero_config(config.deepspeed)
    except UsageError as error:
        return [str(error)]
    problems = []
    same = {
        "train_micro_batch_size_per_gpu": ("batch_size", config.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "train_batch_size": ("global_batch_size", config.global_batch_size),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "bf16.enabled": ("mixed_precision", config.mixed_precision == "bf16"),
    }
    for key, (flag, ours) in same.items():
        theirs = _value(values, key)
        if theirs not in (None, "auto", ours):
            problems.append(
                f"the DeepSpeed config sets {key}={json.dumps(theirs)}, but --{flag}={getattr(config, flag)}: "
                'write "auto" there'
            )
    if _value(values, "fp16.enabled") not in (None, "auto", False):
        problems.append(
            "the DeepSpeed config sets fp16, which is not built: take bf16 (--mixed_precision=bf16) or fp32"
        )
    for section, flag in _OURS.items():
        if section in values:
            problems.append(f"the DeepSpeed config sets {section}: take it out there and set {flag} and its like here")
    for section in ("bf16", "data_types"):
        if not isinstance(values.get(section, {}), dict):
            problems.append(f"the DeepSpeed config sets {section}={json.dumps(values[section])}: write {{...}} there")
    for part in ("offload_optimizer", "offload_param"):
        offload = _value(values, f"zero_optimization.{part}.device")
        if offload == "nvme" and not _value(values, f"zero_optimization.{part}.nvme_path"):
            problems.append(f"the DeepSpeed config sets {part} to nvme: set its nvme_path too")
        if part == "offload_param" and offload not in (None, "none") and values["zero_optimization"]["stage"] != 3:
            problems.append("the DeepSpeed config sets offload_param, which does nothing below stage 3: take it out")
    if values.get("zero_force_ds_cpu_optimizer"):
        problems.append(
            "the DeepSpeed config sets zero_force_ds_cpu_optimizer, whose Adam would not get --adam_beta1, "
            "--adam_beta2 and --adam_epsilon: set it to false"
        )
    if _value(values, "zero_optimization.compute_grad_norm") is False:
        problems.append("the DeepSpeed config sets compute_grad_norm to false, but every step tells it: leave it out")
    if config.has_bf16_weights:
        problems.append(f"--memory={config.memory} keeps the optimizer's state itself, as ZeRO does: set --memory=off")
    if config.optimizer not in _ELEMENTWISE:
        told = ", ".join(_ELEMENTWISE)
        problems.append(f"--optimizer={config.optimizer} needs whole matrices, ZeRO cuts them up: use one of {told}")
    for name in ("release", "compile"):
        if getattr(config, name):
            problems.append(f"--{name} works on gradients or layers that DeepSpeed manages: leave one of the two out")
    if config.resume != "never":
        problems.append(
            f"--resume={config.resume} was asked for, but runs under DeepSpeed have no checkpoints: leave it out"
        )
    return problems


def complete_zero_config(told: str, *, batch_size: int, max_grad_norm: float, bf16: bool) -> dict[str, object]:
    """The DeepSpeed config `told` with what our flags say, and defaults that keep sums in fp32."""
    values = copy.deepcopy(read_zero_config(told))
    values |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # the step tells which micro-batch is its last
        "gradient_clipping": max_grad_norm,
        # without the second, stage 1 in bf16 loses gradients of a step with several micro-batches (DeepSpeed 0.19.8)
        "bf16": values.get("bf16", {}) | {"enabled": bf16, "immediate_grad_update": True},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam would be compiled here
    }
    values.pop("train_batch_size", None)  # the product of the others
    values.setdefault("communication_data_type", "fp32")
    values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return values


def _value(values: dict[str, object], key: str) -> object:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
