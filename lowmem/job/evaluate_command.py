"""What `evaluate` does: load a model, measure it on held-out rows, print one line of JSON."""

import json
from functools import partial

import torch

from lowmem.config.train_config import TrainConfig
from lowmem.data.batch import collate
from lowmem.data.encode import make_encoder
from lowmem.data.eval_batches import open_eval
from lowmem.data.rows import Rows
from lowmem.distributed.consistency import check_same, code, model_digest, rows_digest, tokenizer_digest
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.evaluation import measure
from lowmem.loss import LOSSES
from lowmem.model import load_model
from lowmem.report import tell, tell_answers


def evaluate_model(config: TrainConfig, test_rows: Rows) -> None:
    """Evaluate the model at `model_name_or_path` and print what was measured as one line of JSON."""
    accelerator = init_distributed(mixed_precision=config.autocast)
    model, tokenizer = load_model(
        config.model_name_or_path,
        tokenizer_name_or_path=config.tokenizer_name_or_path,
        dtype=torch.bfloat16 if config.has_bf16_weights else torch.float32,
    )
    if accelerator.num_processes > 1:
        check_same(
            code()
            | {"the model": model_digest(model, weights=True), "the tokenizer": tokenizer_digest(tokenizer)}
            | {"test rows": rows_digest(test_rows)}
        )
    model = parallelize(model, accelerator)
    open_batches = partial(
        open_eval,
        encode=make_encoder(tokenizer, is_encoder_decoder=model.config.is_encoder_decoder, **config.encoding),
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        collate=partial(collate, causal=not model.config.is_encoder_decoder),
    )
    metrics, answers = measure(
        model,
        tokenizer,
        test_rows,
        open_batches,
        LOSSES[config.loss],
        accelerator,
        num_answers=config.max_predict_samples if config.prompt_column else 0,
        max_new_tokens=config.generation_max_new_tokens,
        prefix="test",
    )
    if accelerator.is_main_process:
        tell_answers(answers[:3])
        tell(json.dumps(metrics))
    accelerator.end_training()
