"""Code shared by the loops that use transformers: load a model, record a run, and choose arguments of Trainer."""

import torch
from accelerate import PartialState
from systems import Run, System
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, TrainerCallback


def load(folder: str, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Load the model in `folder` with transformers."""
    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


class Recorder(TrainerCallback):
    """Record the steps and losses of transformers' Trainer."""

    def __init__(self, run: Run):
        self._run = run

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self._run.watch(getattr(optimizer, "optimizer", optimizer))  # inside accelerate's wrapper

    def on_step_end(self, args, state, control, **kwargs):
        self._run.mark()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self._run.losses.append(logs["loss"])
            self._run.grad_norms.append(logs.get("grad_norm"))


def device_arguments(system: System, mixed_precision: str) -> dict[str, object]:
    """Return keyword arguments of TrainingArguments that select the device. They also let DeepSpeed run on a CPU."""
    on_cuda = torch.cuda.is_available()
    if on_cuda or not system.zero_stage:
        return {"use_cpu": not on_cuda, "bf16": mixed_precision == "bf16"}
    # For DeepSpeed on a CPU, create accelerate's state here, because `use_cpu` does not work: if it is True,
    # accelerate ignores DeepSpeed; if it is False, accelerate sees only one process. `train` sets bf16 later, because
    # TrainingArguments accept bf16 on a CPU only if `use_cpu` is True.
    PartialState(cpu=True)
    return {"accelerator_config": {"use_configured_state": True}}


def checkpointing_arguments(is_wanted: bool) -> dict[str, object]:
    """Return keyword arguments of TrainingArguments that turn activation checkpointing on or off."""
    from transformers import TrainingArguments

    # transformers 5.17 has only the name `gradient_checkpointing`, which later versions deprecate
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: is_wanted, f"{name}_kwargs": {"use_reentrant": False}}
