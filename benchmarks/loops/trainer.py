"""Train with transformers' Trainer and its defaults, except for shared settings and rows encoded beforehand."""

from types import SimpleNamespace

import torch
from loops.around import Recorder, checkpointing_arguments, device_arguments, load
from systems import OPTIMIZER, SCHEDULE, Run, System, encoded_rows
from transformers import Trainer, TrainingArguments

from lowmem import collate


class SameObjective(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The objective is the sum of a step's token losses / the number of its targets. Llama computes this: it divides
        # the sum by `num_items_in_batch`. T5 ignores that argument and returns the micro-batch's mean. Trainer adds up
        # these means, so its loss and gradient are `gradient_accumulation_steps` times too large. Weighting each mean
        # by the micro-batch's share of the step's targets corrects this without changing the model's loss or memory.
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.accelerator.unwrap_model(model).config.is_encoder_decoder:
            return loss
        return loss * (inputs["labels"] != -100).sum() / num_items_in_batch


def trainer_arguments(settings: SimpleNamespace, system: System) -> dict[str, object]:
    """Return keyword arguments of TrainingArguments for the shared settings."""
    return dict(
        output_dir=f"{settings.output}/trainer",
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
        **device_arguments(system, settings.mixed_precision),
    )


def train(settings: SimpleNamespace, system: System, run: Run) -> None:
    arguments = TrainingArguments(**trainer_arguments(settings, system))
    arguments.bf16 = settings.mixed_precision == "bf16"
    model = load(settings.folder, dtype=getattr(torch, system.weights), attention=system.attention)
    is_causal = not model.config.is_encoder_decoder
    trainer = SameObjective(
        model=model,
        args=arguments,
        train_dataset=encoded_rows(settings.folder),
        data_collator=lambda rows: collate(rows, causal=is_causal).inputs,
        callbacks=[Recorder(run)],
    )
    trainer.compute_loss = run.timed("forward", trainer.compute_loss)
    trainer.train()
