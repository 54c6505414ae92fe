"""Evaluate a model: the loss on held-out rows, and greedily decoded answers."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem.data.batch import IGNORED, Batch, collate
from lowmem.data.encode import Encode
from lowmem.data.eval_batches import EvalBatches, open_eval
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import FileRows
from lowmem.distributed.collectives import gather_bytes, sum_over_ranks
from lowmem.distributed.fully_sharded import resharding
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.placement import data_place, handle_rank_errors, is_sharded, unwrapped
from lowmem.distributed.reduce import all_reduce_sum
from lowmem.memory.gradients import LossFunction


class Answer(NamedTuple):
    """The model's answer to one row, with the prompt and the reference."""

    row_id: int
    prompt: str
    reference: str
    prediction: str


Measure = Callable[..., tuple[dict[str, float], list[Answer]]]


@phase("evaluating")
@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], loss_fn: LossFunction, accelerator: Accelerator, *, prefix: str = "eval"
) -> dict[str, float]:
    """Return mean loss per target token, perplexity and row count. All ranks need the same number of batches."""
    loss = torch.zeros((), device=accelerator.device)
    num_targets = num_rows = 0
    with _evaluating(model), accelerator.autocast(), handle_rank_errors(model):
        for batch in batches:
            loss += loss_fn(model, batch.to(accelerator.device))
            num_targets += batch.num_targets
            num_rows += len(batch.row_ids)
    rank = data_place(model)
    if accelerator.num_processes > 1:
        all_reduce_sum([loss], rank.group)
    num_targets, num_rows = sum_over_ranks(*((num_targets, num_rows) if rank.is_counted else (0, 0)))
    if num_targets == 0:
        raise ValueError("the evaluation rows have no target token: check their responses")
    mean = loss.item() / num_targets
    perplexity = math.exp(min(mean, 700.0))
    return {f"{prefix}_loss": mean, f"{prefix}_perplexity": perplexity, f"{prefix}_rows": num_rows}


@phase("answering prompts")
@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    max_new_tokens: int,
) -> list[Answer]:
    """Answer the prompts of all ranks' batches by greedy decoding. Every rank returns all answers, in row order."""
    base = unwrapped(model)
    is_encoder_decoder, is_collective = base.config.is_encoder_decoder, is_sharded(model)
    # pad an encoder's prompts on the right, but a causal model's on the left, because new tokens follow on the right
    padding = {"padding_side": "right" if is_encoder_decoder else "left", "return_tensors": "pt"}
    greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": tokenizer.pad_token_id}
    limits = {"max_new_tokens": max_new_tokens, "synced_gpus": is_collective}
    answers = []
    with _evaluating(model), accelerator.autocast(), handle_rank_errors(model):
        for batch in batches:
            if not batch.row_ids and not is_collective:
                continue
            # the forward of a sharded model has collectives, so a rank without rows runs a dummy prompt
            prompts = _prompts(batch, is_encoder_decoder=is_encoder_decoder) or [[tokenizer.eos_token_id]]
            padded = tokenizer.pad({"input_ids": prompts}, **padding).to(accelerator.device)
            written = base.generate(**padded, **greedy, **limits)
            if not batch.row_ids:
                continue
            if not is_encoder_decoder:
                written = written[:, padded["input_ids"].shape[1] :]
            references = [row[row != IGNORED] for row in batch.inputs["labels"]]
            sequences = (prompts, references, written)
            texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in sequences]
            answers += zip(batch.row_ids, *texts, strict=True)
    gathered = gather_bytes(json.dumps(answers if data_place(model).is_counted else []).encode())
    return sorted(Answer(*answer) for part in gathered for answer in json.loads(part))


def text_metrics(answers: Sequence[Answer], *, prefix: str = "eval") -> dict[str, float]:
    """Return the fraction of exact matches (outer whitespace cut) and, with sacrebleu, chrF (0-100; Popovic, 2015)."""
    if not answers:
        return {}
    exact = [answer.prediction.strip() == answer.reference.strip() for answer in answers]
    metrics = {f"{prefix}_exact_match": sum(exact) / len(answers)}
    if find_spec("sacrebleu"):
        from sacrebleu.metrics import CHRF

        score = CHRF().corpus_score([answer.prediction for answer in answers], [[a.reference for a in answers]])
        metrics[f"{prefix}_chrf"] = score.score
    return metrics


def make_evaluation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode,
    loss_fn: LossFunction,
    accelerator: Accelerator,
    quarantine: Quarantine | None = None,
    bar: Callable[[EvalBatches, str], Iterable[Batch]] = lambda batches, name: batches,
    *,
    batch_size: int,
    num_answers: int,
    max_new_tokens: int,
) -> Measure:
    """Return a function `measure(rows, prefix="eval") -> (metrics, answers)`; `bar` wraps batches to show progress."""
    collate_rows = partial(collate, causal=not unwrapped(model).config.is_encoder_decoder)
    batching = {"batch_size": batch_size, "collate": collate_rows, "quarantine": quarantine}
    open_batches = partial(open_eval, encode=encode, **data_place(model).coordinates, **batching)

    def measure(rows: FileRows, prefix: str = "eval") -> tuple[dict[str, float], list[Answer]]:
        metrics = evaluate(model, bar(open_batches(rows), prefix), loss_fn, accelerator, prefix=prefix)
        if not num_answers:
            return metrics, []
        batches = bar(open_batches(rows.slice(0, min(len(rows), num_answers))), prefix)
        answers = generate(model, tokenizer, batches, accelerator, max_new_tokens=max_new_tokens)
        return metrics | text_metrics(answers, prefix=prefix), answers

    return measure


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with resharding(model):
            yield
    finally:
        model.train(was_training)


def _prompts(batch: Batch, *, is_encoder_decoder: bool) -> list[list[int]]:
    """Return each row's prompt: the tokens before the padding or, in a causal model, before the first target."""
    input_ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask")  # without a mask, any padding comes after the last target
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    prompts = []
    for ids, length, labels in zip(input_ids, lengths, batch.inputs["labels"], strict=True):
        targets = (labels != IGNORED).nonzero()
        prompts.append(ids[: length if is_encoder_decoder or not len(targets) else int(targets[0])].tolist())
    return prompts
