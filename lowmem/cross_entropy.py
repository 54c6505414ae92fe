"""The cross-entropy of a linear output head, without all logits at once."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.vocabulary import OffloadedRows
from lowmem.kernels.compilers import has_triton

SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
"""Logits per slice, by device: few enough to fit a CPU's cache, or enough that a GPU launches few kernels."""

_WEIGHT_ELEMENTS = 2**24  # of the head's weight per slice, which may be read from elsewhere

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
    fused: bool | None = None,
    rows: OffloadedRows | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Return cross_entropy(hidden @ weight.T + bias, targets), summed over rows, with softmax and sums in fp32 or more.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) int64. Each row's loss is multiplied by its element of
    `factors` (N,), fp32, which are not trained (None: 1). `changes` are applied to the logits in order.
    Matrix products use `compute_dtype` (default: hidden.dtype). Forward saves its inputs and each row's log-sum-exp;
    backward computes the logits again. Both use a slice of the vocabulary at a time, for all rows, so each element of
    the head's gradient is one sum, rounded once.

    With `fused` (None: on CUDA, if Triton can compile), a product writes each logit once, in `compute_dtype`. A kernel
    reads it once, in backward too, where it writes the gradient once, in place (the gradient of a bias reads that once
    more). Otherwise, and for fp64 or more than one tanh, tensor operations in fp32 or fp64 do the same.

    With `rows`, each slice of the weight is read from there, and its gradient is added there.
    """
    elements = slice_elements or SLICE_ELEMENTS.get(hidden.device.type, SLICE_ELEMENTS["cuda"])
    slices = vocabulary_slices(len(hidden), len(weight), elements, most=max(64, _WEIGHT_ELEMENTS // weight.shape[1]))
    dtype = compute_dtype or hidden.dtype
    operations = _operations_for(hidden, dtype, changes, fused)
    tensors = (hidden, weight, bias, targets.contiguous(), factors)
    return _ChunkedCrossEntropy.apply(*tensors, label_smoothing, dtype, slices, changes, operations, rows)


def vocabulary_slices(num_rows: int, vocabulary: int, elements: int, *, most: int) -> list[slice]:
    """Split the vocabulary into slices of about `elements` / `num_rows` columns, at least one and at most `most`."""
    width = min(most, max(1, elements // max(1, num_rows)))
    width = width // 64 * 64 or width  # if possible a multiple of 64, to align the rows of each matrix product
    return [slice(first, min(first + width, vocabulary)) for first in range(0, vocabulary, width)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, factors, label_smoothing, compute_dtype, slices, changes, operations, rows
    ):
        shape, sum_dtype = (operations.tiles_in(slices[0].stop), len(hidden)), _wide(compute_dtype)
        log_sums = hidden.new_full(shape, -math.inf, dtype=sum_dtype)
        expected = hidden.new_zeros(shape, dtype=sum_dtype)  # logits, averaged with the targets' probabilities
        smoothing = (label_smoothing, len(weight))
        with _rounding_once(hidden.device.type):
            states = hidden.to(compute_dtype)
            dtype, added, prepared = operations.prepare(weight, bias, changes, compute_dtype)
            for part, of_part in zip(slices, _slices_of(weight, slices, rows), strict=True):
                logits = _logits(states, of_part, added, part).to(dtype)
                operations.add_slice(logits, targets, log_sums, expected, part.start, prepared, *smoothing)
                del logits  # before the next slice needs the memory
            log_sum = log_sums.logsumexp(0)
            losses = log_sum - expected.sum(0)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sum, factors)
        ctx.smoothing, ctx.compute_dtype, ctx.slices = smoothing, compute_dtype, slices
        ctx.changes, ctx.operations, ctx.rows = changes, operations, rows
        return losses.sum() if factors is None else (losses * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        hidden, weight, bias, targets, log_sum, factors = ctx.saved_tensors
        grad_losses = grad_loss.expand(len(hidden)).contiguous() if factors is None else grad_loss * factors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if wants_hidden else None
        is_whole = wants_weight and ctx.rows is None
        grad_weight = torch.empty_like(weight, dtype=ctx.compute_dtype) if is_whole else None
        grad_bias = torch.empty_like(bias, dtype=log_sum.dtype) if wants_bias else None
        with _rounding_once(hidden.device.type):
            states = hidden.to(ctx.compute_dtype)
            dtype, added, prepared = ctx.operations.prepare(weight, bias, ctx.changes, ctx.compute_dtype)
            for part, of_part in zip(ctx.slices, _slices_of(weight, ctx.slices, ctx.rows), strict=True):
                grad = _logits(states, of_part, added, part).to(dtype)
                ctx.operations.to_gradient(grad, targets, log_sum, grad_losses, part.start, prepared, *ctx.smoothing)
                if wants_bias:
                    grad_bias[part] = grad.sum(0, dtype=log_sum.dtype)
                grad = grad.to(ctx.compute_dtype)
                if wants_hidden:
                    grad_hidden += grad @ of_part.to(ctx.compute_dtype)
                if is_whole:
                    torch.mm(grad.T, states, out=grad_weight[part])
                elif wants_weight:
                    ctx.rows.add_gradient(part, grad.T @ states)
                del grad, of_part
        return grad_hidden, grad_weight, grad_bias, *[None] * 8


@contextmanager
def _rounding_once(device_type: str) -> Iterator[None]:
    """Leave autocast, and keep cuBLAS from splitting a sum into parts that it rounds to 16 bits before adding them."""
    products = torch.backends.cuda.matmul
    allowed = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = allowed


def _slices_of(weight: Tensor, slices: Sequence[slice], rows: OffloadedRows | None) -> Iterable[Tensor]:
    return rows.read(slices) if rows else (weight[part] for part in slices)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """Return the logits (N, columns) of a slice, of which `weight` has the rows."""
    return F.linear(states, weight.to(states.dtype), None if bias is None else bias[part].to(states.dtype))


class _TensorOperations:
    """The reference. Takes logits in fp32 or fp64, and has one tile per row. See `kernels/cross_entropy_cuda.py`."""

    @staticmethod
    def tiles_in(columns: int) -> int:
        return 1

    @staticmethod
    def prepare(
        weight: Tensor, bias: Tensor | None, changes: Sequence[Change], compute_dtype: torch.dtype
    ) -> tuple[torch.dtype, Tensor | None, Sequence[Change]]:
        """Return the dtype of logits, the bias that they include, and the changes as the other functions take them."""
        return _wide(compute_dtype), bias, changes

    @staticmethod
    def add_slice(
        logits: Tensor,
        targets: Tensor,
        log_sums: Tensor,
        expected: Tensor,
        first: int,
        changes: Sequence[Change],
        label_smoothing: float,
        vocabulary: int,
    ) -> None:
        """Add a slice of logits to the sums; overwrites the logits."""
        part = slice(first, first + logits.shape[1])
        _change(logits, changes, part)
        column, inside = _column_in(part, targets)
        expected += (1 - label_smoothing) * logits.gather(1, column).where(inside, 0).T
        if label_smoothing:
            expected += label_smoothing / vocabulary * logits.sum(1)
        largest = logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # a row may be all -inf
        part_sum = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place, because logsumexp would copy
        torch.logaddexp(log_sums, (largest + part_sum.log()).T, out=log_sums)

    @staticmethod
    def to_gradient(
        logits: Tensor,
        targets: Tensor,
        log_sum: Tensor,
        grad_losses: Tensor,
        first: int,
        changes: Sequence[Change],
        label_smoothing: float,
        vocabulary: int,
    ) -> None:
        """Overwrite logits with softmax - (smoothed) one-hot target, times the gradients of the rows' losses (N,)."""
        part = slice(first, first + logits.shape[1])
        kept = _change(logits, changes, part, keep=True)
        grad = logits.sub_(log_sum.unsqueeze(1)).exp_()
        if label_smoothing:
            grad -= label_smoothing / vocabulary
        column, inside = _column_in(part, targets)
        grad.scatter_add_(1, column, (label_smoothing - 1) * inside.to(grad.dtype))
        grad *= grad_losses.unsqueeze(1)
        _change_back(grad, changes, part, kept)


class _FakeKernels:
    """Kernels for fake tensors, which have no data. Like real ones, they take no memory."""

    tiles_in = _TensorOperations.tiles_in
    prepare = staticmethod(lambda weight, bias, changes, compute_dtype: (compute_dtype, None, changes))
    add_slice = to_gradient = staticmethod(lambda *arguments: None)


def _operations_for(hidden: Tensor, dtype: torch.dtype, changes: Sequence[Change], fused: bool | None) -> object:
    """Return what computes a slice's sums and gradient: a class or module with the functions of _TensorOperations."""
    if fused is None:
        fused = hidden.device.type == "cuda" and has_triton()
        if hidden.device.type == "cuda" and not fused:
            _print_fallback()
    if not fused or dtype == torch.float64 or [operation for operation, _ in changes].count("tanh") > 1:
        return _TensorOperations
    return _FakeKernels if isinstance(hidden, FakeTensor) else import_module("lowmem.kernels.cross_entropy_cuda")


@cache
def _print_fallback() -> None:
    if rank_and_world_size()[0] == 0:
        advice = "install triton and a C compiler"
        print(f"the loss uses tensor operations, slower than lowmem's kernels: {advice}", flush=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
