"""Losses: functions `(model, batch) -> sum of token losses`, an fp32 scalar. The caller divides by the token count.

An encoder-decoder model shifts labels itself; position i of a causal one predicts label i + 1. Label -100: no target.
"""

import inspect
import json
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem.data.batch import IGNORED, Batch
from lowmem.data.packing import check_packing
from lowmem.distributed.fully_sharded import forward_only
from lowmem.distributed.placement import device_of, unwrapped, uses_zero3
from lowmem.errors import UsageError
from lowmem.memory.out_of_memory import is_out_of_memory

SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits per slice, by device: few enough to fit a CPU's cache, or enough that a GPU launches few kernels."""


def plain_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy, an fp32 scalar, from all logits (rows, length, vocabulary) at once."""
    inputs, targets = _inputs_and_targets(model, batch)
    logits = model(**inputs).logits
    options = {"ignore_index": IGNORED, "reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), **options)


def chunked_loss(
    model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, slice_elements: int | None = None
) -> Tensor:
    """Compute `plain_loss`, but hold only about `slice_elements` (None: SLICE_ELEMENTS) logits, also in backward.

    Calls the whole model, so that its wrapper's hooks run, but replaces the output head's forward, so that only
    positions with a target get logits. Raises UsageError if the head is not linear or if the model changes its logits
    after the head, and RuntimeError if `batch.num_targets` is not the number of targets.
    """
    inputs, targets = _inputs_and_targets(model, batch)
    head = unwrapped(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        name = type(unwrapped(model)).__name__
        raise UsageError(f"chunked loss needs a linear output head, {name} has {type(head).__name__}: set --loss=plain")
    options = {"label_smoothing": label_smoothing, "slice_elements": slice_elements}
    loss_of = partial(_loss_of, head=head, targets=targets, num_targets=batch.num_targets, **options)
    if uses_zero3(model):  # DeepSpeed gathers the head's weight only for the head's forward and backward
        return _call_with_head(loss_of, model, head, inputs)
    return loss_of(_call_with_head(_pass_through, model, head, inputs))


def _call_with_head(
    function: Callable[[Tensor], Tensor], model: nn.Module, head: nn.Linear, inputs: dict[str, object]
) -> Tensor:
    """Call the model with `function` as its head's forward. Raises UsageError if the model changes the logits."""
    returned: Tensor | None = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal returned
        returned = function(hidden)
        return returned

    changes = UsageError(
        f"{type(unwrapped(model)).__name__} changes its logits after the output head (soft-capping, scaling or "
        "a bias), which chunked_loss does not support: use plain_loss (--loss=plain)"
    )
    head.forward = forward
    try:
        logits = model(**inputs).logits
    except RuntimeError as error:
        if "size of tensor" in str(error):  # the model added a vector of the vocabulary's size, such as BART's bias
            raise changes from error
        raise
    finally:
        del head.forward
    # unchanged logits are the returned tensor itself; after DeepSpeed's hooks, another tensor that shares its memory
    if logits is not returned and not (uses_zero3(model) and logits.data_ptr() == returned.data_ptr()):
        raise changes
    return logits


def _pass_through(hidden: Tensor) -> Tensor:
    # convert to fp32 here, so that accelerate's autocast wrapper returns this same tensor instead of a converted copy
    hidden = hidden.float() if torch.is_autocast_enabled(hidden.device.type) else hidden
    if torch.is_grad_enabled() and not hidden.requires_grad:
        # needed after frozen layers, because fully_shard reduces gradients only if backward reaches this output
        hidden = hidden.detach().requires_grad_()
    return hidden


def _loss_of(hidden: Tensor, *, head: nn.Linear, targets: Tensor, num_targets: int, **options: object) -> Tensor:
    if hidden.shape[:-1] != targets.shape:
        found = f"hidden states of shape {tuple(hidden.shape[:-1])} but labels of shape {tuple(targets.shape)}"
        raise ValueError(f"{found}: give every position a label, -100 for a position to ignore")
    is_target, targets = (targets != IGNORED).flatten(), targets.flatten()
    # to avoid a device sync, take the number of targets from the host; the device checks it and finds their positions
    torch._assert_async(is_target.sum() == num_targets, "batch.num_targets must be the number of labels except -100")
    positions = is_target.to(torch.uint8).argsort(descending=True, stable=True)[:num_targets]
    hidden, targets = hidden.flatten(0, 1).index_select(0, positions), targets[positions]
    weight, bias = head.weight, head.bias  # full tensors, because a sharded model keeps them gathered after its forward
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = bias if bias is None else bias.detach()
    kind = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return chunked_cross_entropy(hidden, weight, bias, targets, compute_dtype=compute_dtype, **options)


# settings with which models of transformers add a loss to the cross-entropy, and the values with which they do not
_WITHOUT_OWN_LOSS = {"output_router_logits": False, "z_loss_coefficient": 0.0, "disable_ngram_loss": True}


def check_model(
    model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], *, packing: bool, max_seq_len: int
) -> None:
    """Raise UsageError if the model adds a loss itself, or does not support this loss, this length or packing."""
    base = unwrapped(model)
    text_config = base.config.get_text_config()
    for name, wanted in _WITHOUT_OWN_LOSS.items():
        if (found := getattr(text_config, name, None)) not in (None, wanted):
            what = f"with {name}={found}, {type(base).__name__} adds a loss of its own, which is not trained here"
            raise UsageError(f"{what}: set it to {json.dumps(wanted)} in the model's config.json")
    check_loss(loss_fn, model)
    _check_positions(loss_fn, model, max_seq_len)
    if packing:
        check_packing(model)


def check_loss(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module) -> None:
    """Run `loss_fn` on rows of two tokens. Raise UsageError if it rejects the model or returns a mean instead of a sum,
    or if a causal model sees its targets.
    """
    device, base = device_of(model), unwrapped(model)
    with forward_only(model):
        loss_fn(model, _zeros(device, rows=1, length=2, num_targets=0))
        once, twice = (loss_fn(model, _zeros(device, rows=rows, length=2, num_targets=rows)) for rows in (1, 2))
        if abs(twice - 2 * once) > 0.1 * abs(once):
            found = f"it is {once.item():.4g} for a row and {twice.item():.4g} for that row twice"
            raise UsageError(f"the loss must be a sum over target tokens, but {found}: sum the losses, do not average")
        if not base.config.is_encoder_decoder:
            tokens = torch.tensor([[0, 0], [0, 1]], device=device)
            logits = base(input_ids=tokens, use_cache=False).logits.float()
            at_first, at_second = (logits[0] - logits[1]).abs().amax(1)
            if at_first > 0.02 * at_second:  # except for rounding, the first logits must not depend on the second token
                name = type(base).__name__
                raise UsageError(f"{name} sees the tokens that it must predict: use a causal or encoder-decoder model")


def _check_positions(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module, max_seq_len: int) -> None:
    """Raise UsageError if the model fails on a row of `max_seq_len` tokens, such as for lack of position embeddings."""
    try:
        with forward_only(model), _CheckedEmbeddings():
            loss_fn(model, _zeros(device_of(model), rows=1, length=max_seq_len, num_targets=min(1, max_seq_len - 1)))
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{type(unwrapped(model)).__name__} fails on a row of max_seq_len={max_seq_len} tokens"
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{what} ({reason}): lower --max_seq_len to the model's number of positions") from error


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


def _zeros(device: torch.device, *, rows: int, length: int, num_targets: int) -> Batch:
    """Make rows of token 0. In each of the first `num_targets` rows, the last token is a target."""
    tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
    labels = torch.full_like(tokens, IGNORED)
    labels[:num_targets, -1] = 0
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return Batch(inputs, num_targets=num_targets, row_ids=[])


LOSSES = {"chunked": chunked_loss, "plain": plain_loss}


def _inputs_and_targets(model: nn.Module, batch: Batch) -> tuple[dict[str, object], Tensor]:
    """Return the model's inputs, and each position's target. Without labels as input, the model computes no loss."""
    base, inputs = unwrapped(model), dict(batch.inputs)
    labels = inputs.pop("labels")
    if base.config.is_encoder_decoder:
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        targets = labels
    else:
        # no position predicts the first label, but num_targets would count it; this check needs no device sync
        torch._assert_async(
            (labels[:, 0] == IGNORED).all(), "the first label of a causal row must be -100: use collate(causal=True)"
        )
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return inputs | {"use_cache": False}, targets


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    slice_elements: int | None = None,
) -> Tensor:
    """Return cross_entropy(hidden @ weight.T + bias, targets), summed over rows, with softmax and sums in fp32 or more.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64; matrix products use `compute_dtype` (default:
    hidden.dtype). Forward saves its inputs and each row's log-sum-exp; backward computes the logits again. Both use
    a slice of the vocabulary at a time, for all rows, so each element of the head's gradient is one sum, rounded once.
    """
    elements = slice_elements or SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cuda"])
    slices = vocabulary_slices(len(hidden), len(weight), elements)
    dtype = compute_dtype or hidden.dtype
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, dtype, slices)


def vocabulary_slices(num_rows: int, vocabulary: int, elements: int) -> list[slice]:
    """Split the vocabulary into slices of about `elements` / `num_rows` columns, but at least one column."""
    width = max(1, elements // max(1, num_rows))
    width = width // 64 * 64 or width  # if possible a multiple of 64, to align the rows of each matrix product
    return [slice(first, min(first + width, vocabulary)) for first in range(0, vocabulary, width)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing, compute_dtype, slices):
        sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        sums = partial(torch.zeros, len(hidden), 1, dtype=sum_dtype, device=hidden.device)
        log_sum, at_target, total = sums().fill_(-math.inf), sums(), sums()
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.to(compute_dtype)
            for part in slices:
                logits = _logits(states, weight, bias, part).to(sum_dtype)
                column, inside = _column_in(part, targets)
                at_target += logits.gather(1, column).where(inside, 0)
                if label_smoothing:
                    total += logits.sum(1, keepdim=True)
                largest = logits.amax(1, keepdim=True).clamp(min=torch.finfo(sum_dtype).min)  # a row may be all -inf
                part_sum = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place, because logsumexp would copy
                log_sum = torch.logaddexp(log_sum, largest + part_sum.log())
            losses = log_sum - (1 - label_smoothing) * at_target - label_smoothing / weight.shape[0] * total
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum)
        ctx.label_smoothing, ctx.compute_dtype, ctx.slices = label_smoothing, compute_dtype, slices
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        hidden, weight, bias, targets, log_sum = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if wants_hidden else None
        grad_weight = torch.empty_like(weight, dtype=ctx.compute_dtype) if wants_weight else None
        grad_bias = torch.empty_like(bias, dtype=log_sum.dtype) if wants_bias else None
        vocabulary = weight.shape[0]
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.to(ctx.compute_dtype)
            for part in ctx.slices:
                # overwrite the logits with d loss / d logits = softmax - (smoothed) one-hot target
                grad = _logits(states, weight, bias, part).to(log_sum.dtype)
                grad = grad.sub_(log_sum).exp_()
                if ctx.label_smoothing:
                    grad -= ctx.label_smoothing / vocabulary
                column, inside = _column_in(part, targets)
                grad.scatter_add_(1, column, (ctx.label_smoothing - 1) * inside.to(grad.dtype))
                grad *= grad_loss
                if wants_bias:
                    grad_bias[part] = grad.sum(0)
                grad = grad.to(ctx.compute_dtype)
                if wants_hidden:
                    grad_hidden += grad @ weight[part].to(ctx.compute_dtype)
                if wants_weight:
                    torch.mm(grad.T, states, out=grad_weight[part])
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return F.linear(states, weight[part].to(states.dtype), None if bias is None else bias[part].to(states.dtype))


def _column_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's column in this slice (0 if outside) and whether it is inside the slice, both (N, 1)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return (targets - part.start).where(inside, 0).unsqueeze(1), inside.unsqueeze(1)
