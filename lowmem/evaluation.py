"""Evaluate a model: the loss on held-out rows, and greedily decoded answers."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem.data.batch import IGNORED, Batch, check_batches, collate
from lowmem.data.encoder import Encode
from lowmem.data.eval_batches import EvalBatches, open_eval
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import FileRows
from lowmem.distributed.collectives import any_rank, gather_bytes, raise_on_all_ranks, sum_over_ranks
from lowmem.distributed.fully_sharded import forward_only
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.pipeline import logits_on_all_stages, stages_of
from lowmem.distributed.placement import data_place, handle_rank_errors, has_collectives, is_sharded, unwrapped
from lowmem.distributed.reduce import all_reduce_sum
from lowmem.errors import StoreError, UsageError
from lowmem.memory.precision import autocast
from lowmem.model.build import num_embeddings
from lowmem.model.metrics import LossFunction, MetricSums, loss_and_metrics

# What a model needs to start and end an answer. Other generation settings of the model (sampling, beams, stop strings,
# several answers per prompt, ...) are not used: answers are greedy, so that runs are comparable.
_NUM_POSITIONS = ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions", "max_seq_len")
_KEPT_IN_GENERATION = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")

_MEASURED = {"loss", "perplexity", "rows", "exact_match", "chrf"}  # the names of what an evaluation measures itself


class Answer(NamedTuple):
    """The model's answer to one row, with the prompt and the reference."""

    row_id: int
    prompt: str
    reference: str
    prediction: str


@phase("evaluating")
def evaluate(
    model: nn.Module, batches: Iterable[Batch], loss_fn: LossFunction, accelerator: Accelerator, *, prefix: str = "eval"
) -> dict[str, float]:
    """Return mean loss per target token, perplexity and row count. All ranks need the same number of batches.

    The mean is weighted if batches have weights. Metrics that `loss_fn` returns are sum / count over all ranks; NaN if
    nothing was counted. Raises UsageError if no rank has a target of weight above 0.
    """
    loss = torch.zeros((), device=accelerator.device)
    denominator, num_targets, num_rows = 0.0, 0, 0
    sums = MetricSums(accelerator.device)
    with forward_only(model), _in_precision(model, accelerator), handle_rank_errors(model):
        for batch in _checked(batches):
            of_batch, metrics = loss_and_metrics(loss_fn, model, batch.to(accelerator.device))
            loss += of_batch
            sums.add(metrics)
            denominator += batch.denominator
            num_targets += batch.num_targets
            num_rows += len(batch.row_ids)
    rank, totals = data_place(model), sums.totals()
    if taken := _MEASURED.intersection(sums.names):
        raise UsageError(
            f"evaluate measures {', '.join(sorted(taken))} itself: rename that metric of the loss function"
        )
    if accelerator.num_processes > 1:
        all_reduce_sum([loss, *totals], rank.group)
    mine = (denominator, num_targets, num_rows) if rank.is_counted else (0, 0, 0)
    denominator, num_targets, num_rows = sum_over_ranks(*mine, dtype=torch.float64)
    if not num_targets:
        raise UsageError("the evaluation rows have no target token: check their responses")
    if not denominator:
        raise UsageError("all target tokens of the evaluation rows have the weight 0: check their weights")
    mean = loss.item() / denominator
    perplexity = math.exp(min(mean, 700.0))
    measured = {"loss": mean, "perplexity": perplexity, "rows": int(num_rows)}
    measured |= {name: value.item() for name, value in sums.means().items()}
    return {f"{prefix}_{name}": value for name, value in measured.items()}


def _in_precision(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Enter autocast. It casts each weight once, unless the model is sharded: it would then keep all weights whole."""
    return autocast(accelerator, cached=not is_sharded(model))


@phase("answering prompts")
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    *,
    max_new_tokens: int,
) -> list[Answer]:
    """Answer the prompts of all ranks' batches by greedy decoding. Every rank returns all answers, in row order.

    Of the model's generation settings, only start and end tokens count. Answers are cut at the model's last position.
    """
    base = unwrapped(model)
    is_encoder_decoder, is_collective = base.config.is_encoder_decoder, is_sharded(model)
    greedy = _greedy(base, tokenizer)
    written = []
    in_precision = _in_precision(model, accelerator)
    greedy.use_cache = stages_of(base) is None  # a stage caches its own layers only, but the length is the first's
    on_all_stages = logits_on_all_stages(model)
    with forward_only(model), _own_settings(base, greedy), in_precision, handle_rank_errors(model), on_all_stages:
        for batch in _checked(batches):
            if not batch.row_ids and not is_collective:
                continue
            # The forward of a sharded model has collectives, so a rank without rows runs a dummy prompt. A prompt
            # without tokens gets a pad token, because `generate` needs something to continue.
            prompts, references = _prompts_and_references(batch, is_encoder_decoder)
            prompts = [prompt or [greedy.pad_token_id] for prompt in prompts]
            # pad an encoder's prompts on the right, but a causal model's on the left, because new tokens follow them
            padded = _padded(prompts or [[greedy.pad_token_id]], greedy.pad_token_id, on_left=not is_encoder_decoder)
            width = 0 if is_encoder_decoder else padded["input_ids"].shape[1]
            greedy.max_new_tokens = max(1, min(max_new_tokens, _num_positions(base) - width))
            on_device = {name: tensor.to(accelerator.device) for name, tensor in padded.items()}
            tokens = base.generate(**on_device, generation_config=greedy, synced_gpus=is_collective)
            written += zip(batch.row_ids, prompts, references, tokens[:, width:].tolist(), strict=False)
    special = set(tokenizer.all_special_ids)
    written = [(row_id, prompt, *_cut(reference, answer, special)) for row_id, prompt, reference, answer in written]
    answers = [(row_id, *(_text(tokenizer, ids) for ids in sequences)) for row_id, *sequences in written]
    gathered = gather_bytes(json.dumps(answers if data_place(model).is_counted else []).encode())
    return sorted(Answer(*answer) for part in gathered for answer in json.loads(part))


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches. Raises TypeError at one that is not a Batch."""
    for batch in batches:
        if error := check_batches([batch]):
            raise error
        yield batch


def text_metrics(answers: Sequence[Answer], *, prefix: str = "eval") -> dict[str, float]:
    """Return the fraction of exact matches (outer whitespace cut); if sacrebleu is installed, also chrF (0-100)."""
    if not answers:
        return {}
    exact = [answer.prediction.strip() == answer.reference.strip() for answer in answers]
    metrics = {f"{prefix}_exact_match": sum(exact) / len(answers)}
    if find_spec("sacrebleu"):
        from sacrebleu.metrics import CHRF  # Popovic, 2015

        score = CHRF().corpus_score([answer.prediction for answer in answers], [[a.reference for a in answers]])
        metrics[f"{prefix}_chrf"] = score.score
    return metrics


class Evaluation:
    """Measure the loss on held-out rows, and answer the first `num_answers` of them.

    `bar` wraps batches to show progress. `tell` gets a message if the model cannot answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        encode: Encode,
        loss_fn: LossFunction,
        accelerator: Accelerator,
        quarantine: Quarantine | None = None,
        *,
        batch_size: int,
        num_answers: int,
        max_new_tokens: int,
        max_seq_len: int | None = None,
        bar: Callable[[EvalBatches, str], Iterable[Batch]] = lambda batches, name: batches,
        tell: Callable[[str], None] = print,
    ):
        pad = partial(collate, causal=not unwrapped(model).config.is_encoder_decoder, max_seq_len=max_seq_len)
        batching = {"batch_size": batch_size, "collate": pad, "quarantine": quarantine}
        self._rank, self._unknown_token = data_place(model), _unknown_token(tokenizer)
        self._open = partial(open_eval, encode=encode, **self._rank.coordinates, **batching)
        self._loss = partial(evaluate, model, loss_fn=loss_fn, accelerator=accelerator)
        self._answers = partial(generate, model, tokenizer, accelerator=accelerator)
        self._has_collectives = has_collectives(model)
        self._num_answers, self._max_new_tokens, self._bar, self._tell = num_answers, max_new_tokens, bar, tell

    def __call__(self, rows: FileRows, prefix: str = "eval") -> tuple[dict[str, float], list[Answer]]:
        """Return the metrics and answers. If answering fails, tell why, and return the loss without answers.

        With sharding or tensor parallelism, the error is raised, because the other ranks wait in collectives. So is
        StoreError, because without its weights a run cannot go on.
        """
        metrics = self._loss(self._bar(self._open(rows), prefix), prefix=prefix)
        if not self._num_answers:
            return metrics, []
        try:
            answers = self._answers(self._bar(self._to_answer(rows), prefix), max_new_tokens=self._max_new_tokens)
        except Exception as error:
            if self._has_collectives or isinstance(error, StoreError):
                raise
            self._tell(f"no answers, because generating them failed: {error}")
            return metrics, []
        return metrics | text_metrics(answers, prefix=prefix), answers

    def check(self, rows: FileRows, name: str) -> None:
        """Try an evaluation before a run: encode all rows, compute one batch's loss, and generate two-token answers.

        Raises RowError for a bad row unless a quarantine skips it, and UsageError if the rows have no target or the
        model cannot answer.
        """
        tried, empty, unknown = None, 0, 0
        with raise_on_all_ranks():
            for batch in self._bar(self._open(rows), f"checking {name} rows"):
                tried = batch if tried is None or not tried.num_targets else tried  # the first batch with a target
                labels = batch.inputs["labels"][: len(batch.row_ids)]
                empty += int((labels == IGNORED).all(1).sum())
                unknown += int((labels == self._unknown_token).any(1).sum())
        if not any_rank(tried.num_targets):
            found = f"none of the {len(rows):,} {name} rows has a target token"
            raise UsageError(f"{found}: check their responses, or raise --max_seq_len if it cuts them off")
        empty, unknown = sum_over_ranks(*((empty, unknown) if self._rank.is_counted else (0, 0)))
        if empty:
            self._tell(f"{empty:,} of {len(rows):,} {name} rows have no target, or lose theirs to --max_seq_len")
        if unknown:
            found = f"{unknown:,} of {len(rows):,} {name} rows have unknown tokens in their responses"
            self._tell(f"{found}: the tokenizer lacks some of their characters, which the model cannot learn to write")
        self._loss([tried])
        if self._num_answers:
            try:
                self._answers(islice(self._to_answer(rows), 1), max_new_tokens=2)
            except StoreError:
                raise
            except Exception as error:
                raise UsageError(f"the model cannot generate answers ({error}): set --max_predict_samples=0") from error

    def _to_answer(self, rows: FileRows) -> EvalBatches:
        return self._open(rows.slice(0, min(len(rows), self._num_answers)))


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the unknown token, or -1 if there is none, or if it is also another special token (GPT-2)."""
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return -1 if unknown is None or unknown in others else unknown


def _prompts_and_references(batch: Batch, is_encoder_decoder: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Return each row's prompt, its tokens without padding, and its targets.

    In a causal model, the targets are the last that no other token separates, such as a chat's last answer, and the
    prompt ends before them.
    """
    input_ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    mask = batch.inputs.get("attention_mask")  # without a mask, any padding comes after the last target
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    prompts, references = [], []
    for ids, length, row in zip(input_ids.tolist(), lengths, labels.tolist(), strict=True):
        targets = [at for at, label in enumerate(row) if label != IGNORED]
        if targets and not is_encoder_decoder:
            start = next((at for at in range(targets[-1], 0, -1) if row[at - 1] == IGNORED), 0)
            length, targets = start, range(start, targets[-1] + 1)
        prompts.append(ids[:length])
        references.append([row[at] for at in targets])
    return prompts, references


def _cut(reference: list[int], answer: list[int], special: Set[int]) -> tuple[list[int], list[int]]:
    """Cut both after the special token that ends the reference: a chat's end of turn may not end `generate`."""
    ends = [token for token in reference[-2:] if token in special]  # a newline may follow it
    return tuple(ids[: ids.index(ends[-1]) + 1] if ends and ends[-1] in ids else ids for ids in (reference, answer))


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Make settings for greedy decoding, with the start and end tokens of the model's own settings."""
    sources = getattr(model, "generation_config", None), model.config
    kept = {}
    for name in _KEPT_IN_GENERATION:
        found = (getattr(source, name, None) for source in sources)
        kept[name] = next((value for value in found if value is not None), None)
    if kept["eos_token_id"] is None:
        kept["eos_token_id"] = tokenizer.eos_token_id
    ends = kept["eos_token_id"] if isinstance(kept["eos_token_id"], list) else [kept["eos_token_id"]]
    # without a pad token that has an embedding, use any: the mask hides it in prompts, and an answer without an end
    # token is not padded
    tokens, size = (tokenizer.pad_token_id, *ends), num_embeddings(model)
    pad = next((token for token in tokens if token is not None and token < size), 0)
    return GenerationConfig(**kept, pad_token_id=pad, do_sample=False, num_beams=1)


@contextmanager
def _own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    # for fields not set in `settings`, `generate` uses the model's own generation config, so replace that too
    given = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = given


def _num_positions(model: PreTrainedModel) -> int:
    """Return the decoder's number of positions, or the largest integer if the config has no such number."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in _NUM_POSITIONS]
    return min((number for number in found if isinstance(number, int) and number > 0), default=sys.maxsize)


def _padded(sequences: Sequence[Sequence[int]], pad: int, *, on_left: bool) -> dict[str, torch.Tensor]:
    side = "left" if on_left else "right"
    pad_to_longest = partial(pad_sequence, batch_first=True, padding_side=side)
    ids = [torch.tensor(sequence) for sequence in sequences]
    mask = pad_to_longest([torch.ones_like(sequence) for sequence in ids])
    return {"input_ids": pad_to_longest(ids, padding_value=pad), "attention_mask": mask}


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode token ids, but ignore ids that only the model has: its tokenizer may have fewer."""
    known = [token for token in ids if token < len(tokenizer)]
    try:
        return tokenizer.decode(known, skip_special_tokens=True)
    except Exception as error:
        return f"<{len(ids)} tokens that cannot be decoded: {error}>"
