"""Check before a run that a model supports the loss, the sequence length and packing."""

import inspect
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem.data.batch import IGNORED, Batch
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.fully_sharded import forward_only
from lowmem.distributed.pipeline import logits_on_all_stages
from lowmem.distributed.placement import device_of, handle_rank_errors, is_quantized, unwrapped
from lowmem.errors import StoreError, UsageError, is_out_of_memory
from lowmem.model.metrics import LossFunction, summed_loss
from lowmem.model.packing_checks import check_packed_loss, check_packing, check_windows
from lowmem.model.quantized import dequantize

# settings with which models of transformers add a loss to the cross-entropy, and the values with which they do not
_WITHOUT_OWN_LOSS = {"output_router_logits": False, "z_loss_coefficient": 0.0, "disable_ngram_loss": True}

# settings of transformers' models that are at least 1; some models accept less, and then train without some layers
_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_layers"}
_SIZES |= {"num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer"}


def check_model(
    model: nn.Module,
    loss_fn: LossFunction,
    *,
    packing: bool = False,
    max_seq_len: int | None = None,
    may_shorten: bool = False,
    weighted: bool = False,
    batch: Batch | None = None,
) -> int | None:
    """Raise UsageError if the model adds a loss itself, or does not support this loss, this length or packing.

    With `packing`, also if packed documents affect each other's loss; with `weighted`, if the loss ignores the weights
    of a batch. This tries rows of tokens, up to `max_seq_len` of them. For a loss of other inputs, give a `batch` and
    no other option: raises UsageError if the loss of it is not finite, if the loss of all its rows twice is not twice
    that loss, because it is no sum over them, or if it ignores the batch's weights. Every rank then raises.

    Returns `max_seq_len`. With `may_shorten`, a model with fewer positions is no error: returns their number.
    """
    if (batch is None) == (max_seq_len is None) or (batch is not None and (packing or may_shorten or weighted)):
        raise UsageError("check_model tries rows of max_seq_len tokens, or a batch without other options: set one")
    base = unwrapped(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        found = f"{type(base).__name__} has no weights yet (fill=False)"
        raise UsageError(f"{found}: call make_optimizer before check_model")
    if batch is not None:
        with handle_rank_errors(model):  # ranks may have other batches
            check_loss_of(batch, loss_fn, model)
        return None
    text_config = base.config.get_text_config()
    for name, value in text_config.to_dict().items():
        if name in _SIZES and type(value) is int and value < 1:
            raise UsageError(f"the model's config.json has {name}={value}, but it must be at least 1: correct it")
        if type(value) is float and math.isnan(value):
            raise UsageError(f"the model's config.json has {name}=NaN, but it must be a number: correct it")
    for name, wanted in _WITHOUT_OWN_LOSS.items():
        if (found := getattr(text_config, name, None)) not in (None, wanted):
            what = f"with {name}={found}, {type(base).__name__} adds a loss of its own, which is not trained here"
            raise UsageError(f"{what}: set it to {json.dumps(wanted)} in the model's config.json")
    check_loss(loss_fn, model, weighted=weighted)
    if error := _error_at(max_seq_len, loss_fn, model):
        fails = partial(_error_at, loss_fn=loss_fn, model=model)
        positions = bisect_left(range(1, max_seq_len), True, key=lambda length: fails(length) is not None)
        reason = str(error).partition("\n")[0]
        what = f"{type(base).__name__} fails on a row of max_seq_len={max_seq_len} tokens ({reason})"
        if not may_shorten or positions < 2:
            raise UsageError(f"{what}: lower --max_seq_len to its number of positions, {positions}") from error
        if rank_and_world_size()[0] == 0:
            print(f"max_seq_len is {positions}, the model's number of positions, instead of {max_seq_len}", flush=True)
        max_seq_len = positions
    if packing:
        check_packing(model)
        check_packed_loss(model, loss_fn)
        if base.config.is_encoder_decoder:
            check_windows(base, max_seq_len)
    return max_seq_len


def check_loss(loss_fn: LossFunction, model: nn.Module, *, weighted: bool = False) -> None:
    """Run `loss_fn` on rows of two tokens. Raise UsageError if it rejects the model or returns a mean instead of a sum,
    if it does not shift a causal model's labels, if the model sees its targets, or if the loss is not finite because
    weights are not. With `weighted`, also if it ignores the weights of a batch.
    """
    base, loss_of = unwrapped(model), partial(summed_loss, loss_fn)
    rows_of = partial(_rows, model)
    with forward_only(model):
        try:
            loss_of(model, rows_of(rows=1, length=2, num_targets=0))
            row = rows_of(rows=1, length=2, num_targets=1)
            once, twice = loss_of(model, row), loss_of(model, rows_of(rows=2, length=2, num_targets=2))
            if not base.config.is_encoder_decoder:
                tokens = row.inputs["input_ids"].clone()
                tokens[:, -1] += 1
                unseen = loss_of(model, replace(row, inputs=row.inputs | {"input_ids": tokens}))
            if weighted:
                doubled = torch.full(row.inputs["labels"].shape, 2.0, device=device_of(model))
                heavy = loss_of(model, replace(row, weights=doubled))
        except Exception as error:
            if isinstance(error, UsageError | StoreError) or is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UsageError(f"{type(base).__name__} cannot compute the loss of two tokens ({reason})") from error
        if not math.isfinite(twice):
            _check_finite(base)
        if abs(twice - 2 * once) > 0.1 * abs(once):
            found = f"it is {once.item():.4g} for a row and {twice.item():.4g} for that row twice"
            raise UsageError(f"the loss must be a sum over target tokens, but {found}: sum the losses, do not average")
        if weighted and abs(heavy - 2 * once) > 0.1 * abs(once):
            found = f"it is {once.item():.4g} for a target token of weight 1 and {heavy.item():.4g} for weight 2"
            raise UsageError(f"the loss ignores weights: {found}: multiply token losses by batch.weights")
        one, other = [token for token in range(3) if token != getattr(base.config, "pad_token_id", None)][:2]

        def first_logits(second: int) -> Tensor:
            """Return the logits after the first of two tokens."""
            tokens = torch.tensor([[one, second]], device=device_of(model))
            inputs = {"input_ids": tokens}
            if base.config.is_encoder_decoder:
                inputs = {"input_ids": torch.full_like(tokens, one), "decoder_input_ids": tokens}
            with logits_on_all_stages(model):
                return base(**inputs, use_cache=False).logits[0, 0].float()

        # they must not depend on the second token. Both forwards run the same operations, and sum over ranks in the
        # same order, so this holds in bf16 too, in which attention of a new model would change few digits
        logits, others = first_logits(one), first_logits(other)
        if (logits - others).abs().max() > 4 * torch.finfo(torch.float32).eps * logits.abs().max():
            found = f"{type(base).__name__} sees the tokens that it must predict"
            if base.config.is_encoder_decoder:  # UMT5 with sdpa attention in transformers 5.17
                raise UsageError(f"{found}: update transformers, or use another model")
            is_bert = hasattr(base.config, "is_decoder")
            remedy = "set is_decoder to true in the model's config.json, or " if is_bert else ""
            raise UsageError(f"{found}: {remedy}use a causal or encoder-decoder model")
        if not base.config.is_encoder_decoder and abs(unseen - once) > 1e-4 * abs(once):
            found = "the loss of a label depends on the input token at the same position"
            remedy = "shift the labels, as plain_loss does: position i of a causal model predicts label i + 1"
            raise UsageError(f"{found}, as if the model predicted a token that it has seen: {remedy}")


def check_loss_of(batch: Batch, loss_fn: LossFunction, model: nn.Module) -> None:
    """Run `loss_fn` on a batch, and on its rows twice. Raise UsageError as `check_model` does."""
    batch = batch.to(device_of(model))
    with forward_only(model):
        loss_of = partial(summed_loss, loss_fn, model)
        once = loss_of(batch)
        # each row twice in succession, or all rows twice: a loss of pairs may take pairs of neighbours, or of halves
        doubled = [loss_of(_twice(batch, each)) for each in (_in_succession, _one_after_the_other)]
        weights = batch.weights
        heavy = 2 * once if weights is None else loss_of(replace(batch, weights=2 * weights, weight_sum=1.0))
    if once.shape or not math.isfinite(once):
        _check_finite(unwrapped(model))
        raise UsageError(f"the loss of the batch is {once}: return a finite scalar, the sum over the batch's targets")
    if all(abs(twice - 2 * once) > 0.01 * abs(once) for twice in doubled):
        found = f"it is {once.item():.4g} for the batch and {doubled[0].item():.4g} for its rows twice"
        if all(abs(twice) > 2 * abs(once) for twice in doubled):
            found = f"the loss of a row depends on the others in its batch, as with in-batch negatives ({found})"
            raise UsageError(
                f"{found}: if the split into micro-batches may matter, skip this check and keep batch_size"
            )
        raise UsageError(f"the loss must be a sum over the batch's targets, but {found}: sum, do not average")
    if abs(heavy - 2 * once) > 0.01 * abs(once):
        found = f"it is {once.item():.4g}, and {heavy.item():.4g} with weights twice as large"
        raise UsageError(f"the loss ignores weights: {found}: multiply each target's loss by batch.weights")


def _twice(batch: Batch, double: Callable[[Tensor], Tensor]) -> Batch:
    tensors = {name: double(x) if x.dim() else x for name, x in batch.inputs.items()}
    weights, lengths = (None if x is None else double(x) for x in (batch.weights, batch.input_lengths))
    row_ids = double(torch.tensor(batch.row_ids)).tolist()
    sums = {"row_ids": row_ids, "num_targets": 2 * batch.num_targets, "weight_sum": 2 * batch.denominator}
    return replace(batch, inputs=tensors, weights=weights, input_lengths=lengths, **sums)


def _in_succession(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, 0)


def _one_after_the_other(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _check_finite(model: nn.Module) -> None:
    """Raise UsageError if this rank's part of the weights has NaN or infinity."""
    if bad := [name for name, x in model.named_parameters() if not _values(x).isfinite().all()]:
        found = f"{len(bad)} weights of the model have values that are not finite ({', '.join(bad[:3])}, ...)"
        raise UsageError(f"{found}: download the model again, or use another")


def _values(parameter: Tensor) -> Tensor:
    return dequantize(parameter, torch.bfloat16) if is_quantized(parameter) else local_of(parameter)


def check_backward(model: nn.Module, loss_fn: LossFunction) -> None:
    """Run forward and backward on two tokens. Raise UsageError if the model changes in place what a saver has kept."""
    try:
        summed_loss(loss_fn, model, _rows(model, rows=1, length=2, num_targets=1)).backward()
    except RuntimeError as error:
        if not re.search("inplace|in-place|mutated", str(error)):
            raise
        reason = str(error).partition("\n")[0]
        found = f"{type(unwrapped(model)).__name__} changes results in place that recompute=cheap keeps ({reason})"
        raise UsageError(f"{found}: set recompute=full") from error
    finally:
        model.zero_grad()


def _error_at(length: int, loss_fn: LossFunction, model: nn.Module) -> IndexError | RuntimeError | None:
    """Return the error of a row of `length` tokens, such as for lack of position embeddings; None if there is none."""
    try:
        with forward_only(model), _CheckedEmbeddings():
            loss_fn(model, _rows(model, rows=1, length=length, num_targets=min(1, length - 1)))
    except (IndexError, RuntimeError) as error:
        if isinstance(error, StoreError) or is_out_of_memory(error):
            raise
        return error
    return None


_EMBEDDING = inspect.signature(F.embedding)


class _CheckedEmbeddings(TorchFunctionMode):
    """Raise IndexError for a missing embedding, because the lookup itself would end the process on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.embedding:
            bound = _EMBEDDING.bind(*args, **kwargs).arguments
            indices, weight = bound["input"], bound["weight"]
            is_split = isinstance(indices, DTensor) or isinstance(weight, DTensor)
            if not is_split and indices.numel() and indices.max() >= len(weight):
                raise IndexError(f"index {indices.max().item()} of {len(weight)} embeddings")
        return function(*args, **kwargs)


def _rows(model: nn.Module, *, rows: int, length: int, num_targets: int) -> Batch:
    """Make rows of one token. In each of the first `num_targets` rows, the last token is a target."""
    token = 0 if getattr(unwrapped(model).config, "pad_token_id", None) != 0 else 1
    tokens = torch.full((rows, length), token, dtype=torch.int64, device=device_of(model))
    labels = torch.full_like(tokens, IGNORED)
    labels[:num_targets, -1] = token
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return Batch(inputs, num_targets=num_targets, row_ids=[])
