"""The cross-entropy of a linear output head, without all logits at once."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits per slice, by device: few enough to fit a CPU's cache, or enough that a GPU launches few kernels."""

Change = tuple[str, float | Tensor | None]
"""What a model does to logits (N, V) after its head: ("tanh", None), or "add", "sub", "mul" or "div" and a number, or a
tensor of one or V elements that is not trained.
"""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    slice_elements: int | None = None,
    changes: Sequence[Change] = (),
) -> Tensor:
    """Return cross_entropy(hidden @ weight.T + bias, targets), summed over rows, with softmax and sums in fp32 or more.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64. `changes` are applied to the logits in order.
    Matrix products use `compute_dtype` (default: hidden.dtype). Forward saves its inputs and each row's log-sum-exp;
    backward computes the logits again. Both use a slice of the vocabulary at a time, for all rows, so each element of
    the head's gradient is one sum, rounded once.
    """
    elements = slice_elements or SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cuda"])
    slices = vocabulary_slices(len(hidden), len(weight), elements)
    dtype = compute_dtype or hidden.dtype
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, dtype, slices, changes)


def vocabulary_slices(num_rows: int, vocabulary: int, elements: int) -> list[slice]:
    """Split the vocabulary into slices of about `elements` / `num_rows` columns, but at least one column."""
    width = max(1, elements // max(1, num_rows))
    width = width // 64 * 64 or width  # if possible a multiple of 64, to align the rows of each matrix product
    return [slice(first, min(first + width, vocabulary)) for first in range(0, vocabulary, width)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing, compute_dtype, slices, changes):
        sum_dtype = torch.promote_types(compute_dtype, torch.float32)
        sums = partial(torch.zeros, len(hidden), 1, dtype=sum_dtype, device=hidden.device)
        log_sum, at_target, total = sums().fill_(-math.inf), sums(), sums()
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.to(compute_dtype)
            for part in slices:
                logits = _logits(states, weight, bias, part).to(sum_dtype)
                _change(logits, changes, part)
                column, inside = _column_in(part, targets)
                at_target += logits.gather(1, column).where(inside, 0)
                if label_smoothing:
                    total += logits.sum(1, keepdim=True)
                largest = logits.amax(1, keepdim=True).clamp(min=torch.finfo(sum_dtype).min)  # a row may be all -inf
                part_sum = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place, because logsumexp would copy
                log_sum = torch.logaddexp(log_sum, largest + part_sum.log())
                del logits  # before the next slice needs the memory
            losses = log_sum - (1 - label_smoothing) * at_target - label_smoothing / weight.shape[0] * total
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum)
        ctx.label_smoothing, ctx.compute_dtype = label_smoothing, compute_dtype
        ctx.slices, ctx.changes = slices, changes
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
                logits = _logits(states, weight, bias, part).to(log_sum.dtype)
                kept = _change(logits, ctx.changes, part, keep=True)
                grad = logits.sub_(log_sum).exp_()
                if ctx.label_smoothing:
                    grad -= ctx.label_smoothing / vocabulary
                column, inside = _column_in(part, targets)
                grad.scatter_add_(1, column, (ctx.label_smoothing - 1) * inside.to(grad.dtype))
                grad *= grad_loss
                _change_back(grad, ctx.changes, part, kept)
                if wants_bias:
                    grad_bias[part] = grad.sum(0)
                grad = grad.to(ctx.compute_dtype)
                if wants_hidden:
                    grad_hidden += grad @ weight[part].to(ctx.compute_dtype)
                if wants_weight:
                    torch.mm(grad.T, states, out=grad_weight[part])
                del logits, grad, kept
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return F.linear(states, weight[part].to(states.dtype), None if bias is None else bias[part].to(states.dtype))


def _change(logits: Tensor, changes: Sequence[Change], part: slice, *, keep: bool = False) -> list[Tensor]:
    """Change logits (N, columns) of a slice in place. With `keep`, return a copy of each result that backward needs."""
    kept = []
    for operation, constant in changes:
        if operation == "tanh":
            logits.tanh_()
            kept += [logits.clone()] if keep else []
        else:
            getattr(logits, f"{operation}_")(_columns(constant, part))
    return kept


def _change_back(grad: Tensor, changes: Sequence[Change], part: slice, kept: list[Tensor]) -> None:
    """Turn the gradient of changed logits (N, columns) in place into that of the logits."""
    for operation, constant in reversed(changes):
        if operation == "tanh":
            torch.ops.aten.tanh_backward.grad_input(grad, kept.pop(), grad_input=grad)
        elif operation in ("mul", "div"):
            getattr(grad, f"{operation}_")(_columns(constant, part))


def _columns(constant: float | Tensor, part: slice) -> float | Tensor:
    if not isinstance(constant, Tensor):
        return constant
    return constant.flatten()[part] if constant.numel() > 1 else constant.reshape(())


def _column_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's column in this slice (0 if outside) and whether it is inside the slice, both (N, 1)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return (targets - part.start).where(inside, 0).unsqueeze(1), inside.unsqueeze(1)
