"""Losses: every one is `(model, batch) -> sum of token losses`, a scalar in fp32 that the caller divides.

Encoder-decoder models are fed the labels shifted right by the model itself; for causal models position i predicts
label i + 1. Labels of -100 count for nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem.config import UsageError
from lowmem.data.encode import IGNORED
from lowmem.data.stream import Batch
from lowmem.parallel.sharding import unwrapped

_CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in fp32


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


def chunked_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """The sum of `plain_loss` with the logits of a few tokens at a time, and their gradient taken at once.

    The model is called as a whole (so that its wrapper's hooks run) with its output head passing hidden states
    through; the head is applied here. Raises UsageError for a head that is not linear, and for a model that changes
    its logits after the head (soft-capping, scaling, a bias), because here they would not be changed.
    """
    inputs, targets = _inputs_and_targets(model, batch)
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"chunked_loss needs a linear output head, {type(base).__name__} has {type(head).__name__}: "
            "use plain_loss (--loss=plain)"
        )
    with _passing_through(head) as seen:
        logits = model(**inputs).logits
    if logits is not seen.hidden:
        raise _changes_its_logits(base)
    hidden, weight, bias = seen.hidden.flatten(0, 1), head.weight, head.bias
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = bias if bias is None else bias.detach()
    kind = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets.flatten(), label_smoothing, compute_dtype)


def check_loss(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module) -> None:
    """Take the loss of two tokens. Raises UsageError for a model that `loss_fn` refuses, before a run has begun."""
    device = next(model.parameters()).device
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.full_like(tokens, IGNORED),
    }
    try:
        with torch.no_grad():
            loss_fn(model, Batch(inputs, num_targets=0, row_ids=[]))
    except UsageError:
        raise
    except RuntimeError as error:  # hidden states met something of the vocabulary's size, such as BART's bias
        raise _changes_its_logits(unwrapped(model)) from error


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
        return seen.hidden

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross-entropy(hidden @ weight.T + bias, target), softmax and sums in fp32 (or wider).

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64. As the loss is the last thing computed, its
    gradients are taken in forward, chunk by chunk, while the logits are there; backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing, compute_dtype):
        sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if wants_bias else None
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        vocabulary = weight.shape[0]
        chunk_rows = max(1, _CHUNK_ELEMENTS // vocabulary)
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(compute_dtype)
            for first in range(0, len(hidden), chunk_rows):
                chunk = slice(first, first + chunk_rows)
                states = hidden[chunk].to(compute_dtype)
                counts = targets[chunk] != IGNORED
                target = targets[chunk].clamp(min=0).unsqueeze(1)
                logits = F.linear(states, head, None if bias is None else bias.to(compute_dtype)).to(sum_dtype)
                log_sum = logits.logsumexp(1, keepdim=True)
                losses = log_sum - (1 - label_smoothing) * logits.gather(1, target)
                if label_smoothing:
                    losses -= label_smoothing * logits.mean(1, keepdim=True)
                loss += losses.squeeze(1).where(counts, 0).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                # d loss / d logits, in the place of the logits: softmax - (smoothed) one-hot target
                grad = logits.sub_(log_sum).exp_()
                if label_smoothing:
                    grad -= label_smoothing / vocabulary
                grad.scatter_add_(1, target, torch.full_like(log_sum, label_smoothing - 1))
                grad = grad.mul_(counts.unsqueeze(1)).to(compute_dtype)
                if wants_hidden:
                    grad_hidden[chunk] = grad @ head
                if wants_weight:
                    grad_weight += grad.T @ states
                if wants_bias:
                    grad_bias += grad.sum(0, dtype=sum_dtype)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grads is None:
            raise RuntimeError(
                "chunked_loss was differentiated twice: its gradients are scaled in place, call it again"
            )
        grads, ctx.grads = ctx.grads, None
        return *(grad if grad is None else grad.mul_(grad_loss) for grad in grads), None, None, None
