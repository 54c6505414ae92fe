"""transformers' Trainer with its defaults where nothing has to be equal; its rows are encoded before it starts."""

from types import SimpleNamespace

import torch
from accelerate import PartialState
from loops.pretrained import load
from loops.recorder import Recorder
from systems import OPTIMIZER, SCHEDULE, Run, System, encoded_rows
from transformers import Trainer, TrainingArguments

from lowmem import collate


class SameObjective(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Objective: token losses of the step / targets of the step. Llama's own loss divides by `num_items_in_batch`.
        # T5's ignores it and is its micro-batch's mean, which Trainer takes for divided: loss and gradient would be
        # `gradient_accumulation_steps` times too large. Weighing that mean by the micro-batch's share of the targets
        # mends just that, and leaves the model's loss and its memory alone.
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.accelerator.unwrap_model(model).config.is_encoder_decoder:
            return loss
        return loss * (inputs["labels"] != -100).sum() / num_items_in_batch


def train(settings: SimpleNamespace, system: System, run: Run) -> None:
    on_cuda = torch.cuda.is_available()
    zero_on_cpu = system.zero_stage > 0 and not on_cuda
    if zero_on_cpu:
        # accelerate, told to use DeepSpeed and not the CPU, sees one process; told the CPU too it leaves DeepSpeed out
        PartialState(cpu=True)
    arguments = TrainingArguments(
        output_dir=f"{settings.folder}/trainer",
        use_cpu=not on_cuda and not zero_on_cpu,
        accelerator_config={"use_configured_state": zero_on_cpu},
        bf16=settings.mixed_precision == "bf16" and not zero_on_cpu,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        train_sampling_strategy="sequential",
        optim={"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[system.optimizer],
        weight_decay=OPTIMIZER["weight_decay"],
        adam_beta1=OPTIMIZER["betas"][0],
        adam_beta2=OPTIMIZER["betas"][1],
        adam_epsilon=OPTIMIZER["eps"],
        learning_rate=SCHEDULE["peak"],
        warmup_steps=SCHEDULE["warmup_steps"],
        lr_scheduler_type=SCHEDULE["schedule"],
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **checkpointing_arguments(settings.recompute == "full"),
    )
    arguments.bf16 = settings.mixed_precision == "bf16"  # it takes bf16 only if it finds a GPU or is asked for the CPU
    model = load(settings.folder, dtype=getattr(torch, system.weights), attention=system.attention)
    is_causal = not model.config.is_encoder_decoder
    SameObjective(
        model=model,
        args=arguments,
        train_dataset=encoded_rows(settings.folder),
        data_collator=lambda rows: collate(rows, causal=is_causal).inputs,
        callbacks=[Recorder(run)],
    ).train()


def checkpointing_arguments(is_wanted: bool) -> dict[str, object]:
    """What TrainingArguments takes to recompute every layer, or none."""
    # transformers 5.17 has only the older name, which later ones deprecate
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    return {name: is_wanted, f"{name}_kwargs": {"use_reentrant": False}}
