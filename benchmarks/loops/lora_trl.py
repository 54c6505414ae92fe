"""Train LoRA adapters with TRL's SFTTrainer, on rows encoded beforehand."""

from types import SimpleNamespace

from datasets import Dataset
from loops.around import Recorder
from loops.lora_trainer import adapted
from loops.trainer import trainer_arguments
from systems import Run, System, encoded_rows
from transformers import ByT5Tokenizer
from trl import SFTConfig, SFTTrainer


def train(settings: SimpleNamespace, system: System, run: Run) -> dict[str, object]:
    # its loss needs a mask (or positions), so it keeps its own collator, which pads to the same widths
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "pad_to_multiple_of": 8}
    arguments = trainer_arguments(settings, system) | {"learning_rate": settings.learning_rate, **own}
    model = adapted(settings)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(encoded_rows(settings.folder)),
        processing_class=ByT5Tokenizer(),
        callbacks=[Recorder(run)],
    )
    trainer.compute_loss = run.timed("forward", trainer.compute_loss)
    trainer.train()
    return {"trained_weights": model.num_parameters(only_trainable=True)}
