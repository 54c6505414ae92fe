"""Train LoRA adapters with peft and transformers' Trainer: a base in bf16, and adapters in fp32, as peft makes them."""

from types import SimpleNamespace

import torch
from loops.around import Recorder, load
from loops.trainer import SameObjective, trainer_arguments
from peft import PeftModel
from systems import Run, System, encoded_rows
from transformers import TrainingArguments

from lowmem import collate


def adapted(settings: SimpleNamespace) -> PeftModel:
    """Load the base in bf16 and the adapters in fp32."""
    return PeftModel.from_pretrained(load(settings.folder, dtype=torch.bfloat16), settings.adapters, is_trainable=True)


def train(settings: SimpleNamespace, system: System, run: Run) -> dict[str, object]:
    arguments = trainer_arguments(settings, system) | {"learning_rate": settings.learning_rate}
    model = adapted(settings)
    trainer = SameObjective(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=encoded_rows(settings.folder),
        data_collator=lambda rows: collate(rows, causal=True).inputs,
        callbacks=[Recorder(run)],
    )
    trainer.compute_loss = run.timed("forward", trainer.compute_loss)
    trainer.train()
    return {"trained_weights": model.num_parameters(only_trainable=True)}
