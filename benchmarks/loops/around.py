"""What the benchmark puts around loops with transformers: the model's class, what is measured, two workarounds."""

import torch
from accelerate import PartialState
from systems import Run, System
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, TrainerCallback


def load(folder: str, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The model in a folder, as transformers loads it."""
    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


class Recorder(TrainerCallback):
    """Measures a training of transformers' Trainer from outside."""

    def __init__(self, run: Run):
        self._run = run

    def on_step_end(self, args, state, control, **kwargs):
        self._run.mark()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self._run.losses.append(logs["loss"])


def device_arguments(system: System, mixed_precision: str) -> dict[str, object]:
    """What TrainingArguments takes to find the device, DeepSpeed on a CPU too."""
    on_cuda = torch.cuda.is_available()
    if on_cuda or not system.zero_stage:
        return {"use_cpu": not on_cuda, "bf16": mixed_precision == "bf16"}
    # accelerate, told to use DeepSpeed and not the CPU, sees one process; told the CPU too it leaves DeepSpeed out.
    # Trainer takes bf16 only if it finds a GPU or is asked for the CPU: `train` sets it afterwards.
    PartialState(cpu=True)
    return {"accelerator_config": {"use_configured_state": True}}


def checkpointing_arguments(is_wanted: bool) -> dict[str, object]:
    """What TrainingArguments takes to recompute every layer, or none."""
    from transformers import TrainingArguments

    # transformers 5.17 has only the older name, which later ones deprecate
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: is_wanted, f"{name}_kwargs": {"use_reentrant": False}}
