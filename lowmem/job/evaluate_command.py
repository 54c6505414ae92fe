"""The `evaluate` command: load a model, evaluate it on held-out rows, print answers and a line of JSON."""

import dataclasses
import json

import torch

from lowmem.config.train_config import TrainConfig
from lowmem.data.encode import make_encoder
from lowmem.data.rows import Rows
from lowmem.distributed.consistency import check_same_inputs, check_same_model
from lowmem.distributed.offloaded import offload_weights
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.evaluation import Evaluation
from lowmem.loss import LOSSES
from lowmem.model.build import num_embeddings
from lowmem.model.checks import check_model
from lowmem.model.load import load_model
from lowmem.optim.make import convert_frozen
from lowmem.report import print_answers
from lowmem.run_output import print_lines


def evaluate_model(config: TrainConfig, test_rows: Rows) -> None:
    accelerator = init_distributed(**config.precision)
    check_same_inputs({}, {"test": test_rows})
    dtype = torch.bfloat16 if config.has_bf16_weights else getattr(torch, config.loaded_dtype)
    is_offloaded = config.offload_weights is not None
    model, tokenizer = load_model(**config.model_source, dtype=dtype, on_meta=is_offloaded, device=accelerator.device)
    check_same_model(model, tokenizer, weights=True)
    model = parallelize(model, accelerator, fill=not is_offloaded)
    if is_offloaded:
        offload_weights(model, config.offload_weights, accelerator.device)
    if config.has_bf16_weights:
        convert_frozen(model.requires_grad_(False))  # adapters are loaded in fp32
    max_seq_len = check_model(model, LOSSES[config.loss], **config.model_requirements)
    config = dataclasses.replace(config, max_seq_len=max_seq_len)
    shape = {"is_encoder_decoder": model.config.is_encoder_decoder, "num_embeddings": num_embeddings(model)}
    encode = make_encoder(tokenizer, **shape, **config.encoding)
    measure = Evaluation(
        model, tokenizer, encode, LOSSES[config.loss], accelerator, tell=print_lines, **config.evaluation
    )
    metrics, answers = measure(test_rows, "test")
    if accelerator.is_main_process:
        print_answers(answers)
        print_lines(json.dumps(metrics))
    accelerator.end_training()
