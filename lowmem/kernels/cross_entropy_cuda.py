"""The cross-entropy of one slice of logits on a GPU, in Triton: one kernel per direction, with fp32 inside.

The product writes each logit once. Forward reads it once and writes none. Backward reads it once and writes its
gradient once, in place.

A program has one tile of TILE logits in registers, so the maximum and the exponentials need one read. A tile is a part
of one row or, if the slice is narrow, of several. With one program per row, 100 rows would be too few for a GPU, and
64 k rows of 256 columns too little work for each; a slice of 2**24 logits has 4096 tiles at any number of rows. Each
tile has its own running sums: 16 bytes read and written per row, for up to 8 KiB of logits in bf16. So no programs
share sums, and the order of additions is fixed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)

Scaling = tuple[float | Tensor, float | Tensor]
"""What a logit is multiplied by, and what is then added: numbers, or fp32 tensors (V,)."""


def tiles_in(columns: int) -> int:
    """Return how many tiles a row of a slice has."""
    return triton.cdiv(columns, TILE)


def prepare(
    weight: Tensor, bias: Tensor | None, changes: Sequence[tuple[str, object]], compute_dtype: torch.dtype
) -> tuple[torch.dtype, None, list[Scaling]]:
    """Return the dtype of logits, the bias that they include (none), and bias and changes merged into scalings.

    The changes may have one tanh; the scalings are one before it and one after it, or only one.
    """
    scale, shift, scalings = 1.0, 0.0 if bias is None else bias.float(), []
    for operation, constant in changes:
        if isinstance(constant, Tensor):
            is_number = constant.numel() == 1 and constant.device.type == "cpu"  # reading it needs no sync
            constant = constant.item() if is_number else constant.float().flatten().expand(len(weight))
        if operation == "tanh":
            scalings.append((scale, shift))
            scale, shift = 1.0, 0.0
        elif operation in ("mul", "div"):
            factor = constant if operation == "mul" else 1 / constant
            scale, shift = scale * factor, shift * factor
        else:
            shift = shift + (constant if operation == "add" else -constant)
    return compute_dtype, None, [*scalings, (scale, shift)]


def add_slice(
    logits: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    expected: Tensor,
    first: int,
    scalings: Sequence[Scaling],
    label_smoothing: float,
    vocabulary: int,
) -> None:
    """Add a slice of logits (N, columns), bf16, fp16 or fp32, to the sums of each row and tile, fp32 (tiles, N).

    `first` is the slice's first column in the vocabulary. `scalings` change the logits: one, or two with a tanh between
    them. `log_sums` are log-sum-exps (of no logits: -inf). `expected` sums logits times their probabilities in the
    smoothed targets; `targets`, int64 (N,), may be in other slices.
    """
    grid, options = _launch(logits, scalings)
    numbers, is_smoothed = _numbers(scalings, label_smoothing, vocabulary), label_smoothing > 0
    sizes = (*logits.shape, first)
    sums_kernel[grid](logits, targets, log_sums, expected, *sizes, *numbers, IS_SMOOTHED=is_smoothed, **options)


def to_gradient(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor,
    first: int,
    scalings: Sequence[Scaling],
    label_smoothing: float,
    vocabulary: int,
) -> None:
    """Overwrite logits with the gradient of the loss.

    `log_sum` (N,) is over the whole vocabulary, and `grad_losses` (N,) are the gradients of the rows' losses, both fp32
    and contiguous. See `add_slice` for the others.
    """
    grid, options = _launch(logits, scalings)
    numbers = _numbers(scalings, label_smoothing, vocabulary)
    gradient_kernel[grid](logits, targets, log_sum, grad_losses, *logits.shape, first, *numbers, **options)


def _numbers(scalings: Sequence[Scaling], label_smoothing: float, vocabulary: int) -> list[float | Tensor]:
    (scale, shift), (factor, offset) = [*scalings, (1.0, 0.0)][:2]
    on_others = label_smoothing / vocabulary
    return [scale, shift, factor, offset, 1 - label_smoothing + on_others, on_others]


def _launch(logits: Tensor, scalings: Sequence[Scaling]) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of a kernel, and the shape of its tiles."""
    num_rows, num_columns = logits.shape
    columns = min(TILE, triton.next_power_of_2(num_columns))
    rows = TILE // columns
    options = {"IS_CAPPED": len(scalings) == 2, "ROWS": rows, "COLUMNS": columns, "enable_fp_fusion": False}
    return (triton.cdiv(num_rows, rows), tiles_in(num_columns)), options


@triton.jit
def sums_kernel(
    logits,
    targets,
    log_sums,
    expected,
    num_rows,
    num_columns,
    first,
    scale,
    shift,
    factor,
    offset,
    on_target,
    on_others,
    IS_SMOOTHED: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, at, inside = _tile(num_rows, num_columns, ROWS, COLUMNS)
    exists = row < num_rows
    x = tl.load(logits + at, mask=inside, other=0).to(tl.float32)
    x = _scaled(x, scale, shift, first, column, num_columns)
    if IS_CAPPED:
        x = _scaled(_tanh(x), factor, offset, first, column, num_columns)

    target = (tl.load(targets + row, mask=exists, other=-1) - first).to(tl.int32)
    is_target = inside & (column[None, :] == target[:, None])
    if IS_SMOOTHED:
        terms = tl.where(inside, x * tl.where(is_target, on_target, on_others), 0)
    else:  # logits may be -inf where the probability is 0
        terms = tl.where(is_target, x, 0)
    sums = tl.program_id(1).to(tl.int64) * num_rows + row
    tl.store(expected + sums, tl.load(expected + sums, mask=exists, other=0) + tl.sum(terms, 1), mask=exists)

    x = tl.where(inside, x, float("-inf"))
    log_sum = tl.load(log_sums + sums, mask=exists, other=0)
    largest = tl.maximum(tl.maximum(tl.max(x, 1), log_sum), _LEAST)  # all may be -inf
    total = tl.exp(log_sum - largest) + tl.sum(tl.exp(x - largest[:, None]), 1)
    tl.store(log_sums + sums, largest + tl.log(total), mask=exists)


@triton.jit
def gradient_kernel(
    logits,
    targets,
    log_sum,
    grad_losses,
    num_rows,
    num_columns,
    first,
    scale,
    shift,
    factor,
    offset,
    on_target,
    on_others,
    IS_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, at, inside = _tile(num_rows, num_columns, ROWS, COLUMNS)
    exists = row < num_rows
    x = tl.load(logits + at, mask=inside, other=0).to(tl.float32)
    x = _scaled(x, scale, shift, first, column, num_columns)
    grad_loss = tl.load(grad_losses + row, mask=row < num_rows, other=0)[:, None]
    slope = _constant(scale, first, column, num_columns) * grad_loss
    if IS_CAPPED:
        capped = _tanh(x)
        x = _scaled(capped, factor, offset, first, column, num_columns)
        slope = slope * _constant(factor, first, column, num_columns) * (1 - capped * capped)
    target = (tl.load(targets + row, mask=exists, other=-1) - first).to(tl.int32)
    probability = tl.exp(x - tl.load(log_sum + row, mask=exists, other=0)[:, None])
    grad = (probability - tl.where(column[None, :] == target[:, None], on_target, on_others)) * slope
    tl.store(logits + at, grad, mask=inside)


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows (ROWS,) and columns (COLUMNS,) of a tile, and its offsets and mask (ROWS, COLUMNS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    return row, column, row[:, None] * num_columns + column[None, :], inside


@triton.jit
def _scaled(x, scale, shift, first, column, num_columns):
    scale, shift = _constant(scale, first, column, num_columns), _constant(shift, first, column, num_columns)
    return tl.fma(x, scale, shift)


@triton.jit
def _constant(constant, first, column, num_columns):
    """Return a number, or the elements of a tensor (V,) at these columns of the slice (1, COLUMNS)."""
    if getattr(constant, "dtype", tl.float32).is_ptr():  # in Triton's interpreter, a number has no dtype
        return tl.load(constant + first + column, mask=column < num_columns, other=0)[None, :]
    else:
        return constant


@triton.jit
def _tanh(x):
    """Return tanh(x), at most 1e-7 off. Near 0 its relative error is larger, which softmax does not see."""
    return 1 - 2 / (tl.exp(2 * x) + 1)
