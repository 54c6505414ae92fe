"""Train with LLaMA-Factory's full fine-tuning and defaults, except for shared settings and rows encoded beforehand."""

import os
from types import SimpleNamespace

import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp
from loops.around import Recorder
from systems import OPTIMIZER, SCHEDULE, Run, System, encoded_rows


def train(settings: SimpleNamespace, system: System, run: Run) -> None:
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in encoded_rows(settings.folder)]
    media = {"images": None, "videos": None, "audios": None}
    encoded = f"{settings.output}/rows-{os.environ.get('RANK', '0')}"
    DatasetDict({"train": Dataset.from_list([row | media for row in rows])}).save_to_disk(encoded)
    arguments = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": settings.folder,
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": encoded,
        "cutoff_len": settings.seq_len,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": settings.recompute == "off",
        "output_dir": f"{settings.output}/llamafactory",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings.mixed_precision == "bf16",
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "optim": "adamw_torch_fused",
        "weight_decay": OPTIMIZER["weight_decay"],
        "learning_rate": SCHEDULE["peak"],
        "warmup_steps": SCHEDULE["warmup_steps"],
        "lr_scheduler_type": SCHEDULE["schedule"],
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    run_exp(arguments, callbacks=[Recorder(run)])
