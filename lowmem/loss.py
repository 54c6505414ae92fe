"""Losses: every one is `(model, batch) -> sum of token losses`, a scalar in fp32 that the caller divides.

Encoder-decoder models are fed the labels shifted right by the model itself; for causal models position i predicts
label i + 1. Labels of -100 count for nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem.data.batch import IGNORED, Batch
from lowmem.data.packing import check_packing
from lowmem.distributed.fully_sharded import resharding
from lowmem.distributed.placement import device_of, divides_weights, unwrapped
from lowmem.errors import UsageError

SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits held at a time, 4 bytes each and 2 in bf16: a CPU keeps them in its cache, a GPU starts fewer kernels."""


def plain_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy in fp32, a scalar, over the logits (rows, length, vocabulary) held all at once."""
    inputs, targets = _inputs_and_targets(model, batch)
    logits = model(**inputs).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def chunked_loss(
    model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, slice_elements: int | None = None
) -> Tensor:
    """The sum of `plain_loss` with the logits of a slice of the vocabulary at a time, taken again in backward.

    `slice_elements` logits are held at a time (default: SLICE_ELEMENTS of the device).
    The model is called as a whole (so that its wrapper's hooks run) with its output head passing hidden states
    through; the head is applied here, to the `batch.num_targets` positions whose label counts. Raises UsageError for a
    head that is not linear, and for a model that changes its logits after the head (soft-capping, scaling, a bias),
    because here they would not be changed; RuntimeError if another number of labels counts.
    """
    inputs, targets = _inputs_and_targets(model, batch)
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"chunked_loss needs a linear output head, {type(base).__name__} has {type(head).__name__}: "
            "use plain_loss (--loss=plain)"
        )
    options = {"label_smoothing": label_smoothing, "slice_elements": slice_elements}
    loss_of = partial(_loss_of, head=head, targets=targets, num_targets=batch.num_targets, **options)
    if divides_weights(model):
        return _loss_within_head(model, head, inputs, loss_of)
    try:
        with _passing_through(head) as seen:
            logits = model(**inputs).logits
    except RuntimeError as error:
        if "size of tensor" in str(error):  # hidden states met something of the vocabulary's size, as BART's bias
            raise _changes_its_logits(base) from error
        raise
    if logits is not seen.hidden:
        raise _changes_its_logits(base)
    return loss_of(seen.hidden)


def _loss_within_head(
    model: nn.Module, head: nn.Linear, inputs: dict[str, object], loss_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """`loss_of` taken within the head's forward, where DeepSpeed makes its weight whole, for backward too."""
    seen = SimpleNamespace(loss=None)

    def forward(hidden: Tensor) -> Tensor:
        seen.loss = loss_of(hidden)
        return seen.loss

    head.forward = forward
    try:
        loss = model(**inputs).logits
    finally:
        del head.forward
    if loss.data_ptr() != seen.loss.data_ptr():  # another tensor of the same memory, as DeepSpeed's hooks go around it
        raise _changes_its_logits(unwrapped(model))
    return loss


def _loss_of(hidden: Tensor, *, head: nn.Linear, targets: Tensor, num_targets: int, **options: object) -> Tensor:
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape[:-1])} met labels of {tuple(targets.shape)}: "
            "every position needs a label, -100 where nothing is to be learned"
        )
    counts, targets = (targets != IGNORED).flatten(), targets.flatten()
    # both without a sync: the positions that count, as many as the host knows them to be
    torch._assert_async(counts.sum() == num_targets, "batch.num_targets must be the labels that are not -100")
    counting = counts.to(torch.uint8).argsort(descending=True, stable=True)[:num_targets]
    hidden, targets = hidden.flatten(0, 1).index_select(0, counting), targets[counting]
    weight, bias = head.weight, head.bias  # of a sharded model still gathered from its forward, whole
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = bias if bias is None else bias.detach()
    kind = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return chunked_cross_entropy(hidden, weight, bias, targets, compute_dtype=compute_dtype, **options)


def check_model(model: nn.Module, loss_fn: Callable[[nn.Module, Batch], Tensor], *, packing: bool) -> None:
    """Raise UsageError, before a run begins, for a model that `loss_fn` or, with `packing`, `check_packing` refuses."""
    check_loss(loss_fn, model)
    if packing:
        check_packing(model)


def check_loss(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module) -> None:
    """Take the loss of two tokens. Raises UsageError, before a run has begun, for a model that `loss_fn` refuses.

    And for one that is trained to predict the next token while it sees it, such as BERT.
    """
    device = device_of(model)
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.full_like(tokens, IGNORED),
    }
    base = unwrapped(model)
    with torch.no_grad(), resharding(model):
        loss_fn(model, Batch(inputs, num_targets=0, row_ids=[]))
        if not base.config.is_encoder_decoder:
            was_training = base.training
            tokens = torch.tensor([[0, 0], [0, 1]], device=device)
            logits = base.eval()(input_ids=tokens, use_cache=False).logits.float()
            base.train(was_training)
            at_first, at_second = (logits[0] - logits[1]).abs().amax(1)
            if at_first > 0.02 * at_second:  # what another second token changes: more than rounding
                raise UsageError(
                    f"{type(base).__name__} sees the tokens that it is to predict, so it would learn nothing: "
                    "take a causal or an encoder-decoder model"
                )


def _changes_its_logits(base: nn.Module) -> UsageError:
    return UsageError(
        f"{type(base).__name__} changes its logits after the output head (soft-capping, scaling or a bias), "
        "which chunked_loss would leave out: use plain_loss (--loss=plain)"
    )


LOSSES = {"chunked": chunked_loss, "plain": plain_loss}


def _inputs_and_targets(model: nn.Module, batch: Batch) -> tuple[dict[str, object], Tensor]:
    """What the model is called with (never the labels: it would compute its own mean), and each position's target."""
    base = unwrapped(model)
    inputs = dict(batch.inputs)
    labels = inputs.pop("labels")
    if base.config.is_encoder_decoder:
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        targets = labels
    else:
        # without a sync; it would be in num_targets, but nothing predicts it
        torch._assert_async((labels[:, 0] == IGNORED).all(), "the first label of a causal row must be -100")
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return inputs | {"use_cache": False}, targets


@contextmanager
def _passing_through(head: nn.Module) -> Iterator[SimpleNamespace]:
    """Within it `head(hidden)` returns its input, which is kept as `seen.hidden`."""
    seen = SimpleNamespace(hidden=None)

    def forward(hidden: Tensor) -> Tensor:
        # accelerate's autocast wrapper turns outputs into fp32; in fp32 already, the very tensor comes back
        seen.hidden = hidden.float() if torch.is_autocast_enabled(hidden.device.type) else hidden
        if torch.is_grad_enabled() and not seen.hidden.requires_grad:
            # all before the head is frozen: fully_shard reduces only if backward goes through what a module returned
            seen.hidden = seen.hidden.detach().requires_grad_()
        return seen.hidden

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward


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
    """Sum over rows of cross-entropy(hidden @ weight.T + bias, target), softmax and sums in fp32 (or wider), a scalar.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64; products are in `compute_dtype` (default: that
    of hidden). Forward and backward go over slices of the vocabulary, each (N, slice) of about `slice_elements`:
    forward keeps the logarithm of each row's sum, backward takes the logits again. So every element of the head's
    gradient is one product over all N rows, rounded once, and no gradient of the head's size is ever read back to be
    added to. (Slices of rows would sum it in N / slice roundings or in fp32.)
    """
    elements = slice_elements or SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cuda"])
    slices = vocabulary_slices(len(hidden), len(weight), elements)
    dtype = compute_dtype or hidden.dtype
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, dtype, slices)


def vocabulary_slices(num_rows: int, vocabulary: int, elements: int) -> list[slice]:
    """Slices of the vocabulary that have about `elements` logits over `num_rows` rows, at least one column each."""
    width = max(1, elements // max(1, num_rows))
    width = width // 64 * 64 or width  # rows of a product start aligned
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
                place, inside = _place_in(part, targets)
                at_target += logits.gather(1, place).where(inside, 0)
                if label_smoothing:
                    total += logits.sum(1, keepdim=True)
                largest = logits.amax(1, keepdim=True).clamp(min=torch.finfo(sum_dtype).min)  # a slice may be all -inf
                part_sum = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place: logsumexp makes a copy
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
                # d loss / d logits, in the place of the logits: softmax - (smoothed) one-hot target
                grad = _logits(states, weight, bias, part).to(log_sum.dtype)
                grad = grad.sub_(log_sum).exp_()
                if ctx.label_smoothing:
                    grad -= ctx.label_smoothing / vocabulary
                place, inside = _place_in(part, targets)
                grad.scatter_add_(1, place, (ctx.label_smoothing - 1) * inside.to(grad.dtype))
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


def _place_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's target as a column of this slice, and whether it lies inside (an outer one: column 0), both (N, 1)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return (targets - part.start).where(inside, 0).unsqueeze(1), inside.unsqueeze(1)
