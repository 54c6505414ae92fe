"""Formats that store an fp32 value in about 1 to 4 bytes. A format is a set of tensors under one name in a dict:

    {name: fp32}                               the values
    {name: bf16, name_low: int16}              split: all bits of fp32; the upper half is the bf16 weight
    {name: bf16}                               bf16, rounded stochastically
    {name: int8 or uint8, name_scale: fp32}    8-bit floats, rounded stochastically, and the maximum of each block of
                                               256 columns of a row

Stochastic rounding rounds up with a probability equal to the fraction that is cut off, so that many small updates add
up correctly on average; rounding to nearest would lose each one (Gupta et al., 2015).
"""

import math
import struct

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem.optim.philox import BLOCK

_SPLIT_ELEMENTS = 2**22  # elements split at a time, because int32 temporaries of a whole embedding would be large

# An 8-bit float consists of bits of an fp32 number, from bit 20: 3 mantissa bits and the lowest exponent bits. A first
# moment (int8) has 4 exponent bits and a separate sign; a second moment (uint8) has 5. Moments need relative precision:
# evenly spaced codes would round small second moments to 0, and dividing by these makes updates huge (Li et al., 2023).
CUT_BITS = 20
LARGEST = {torch.int8: 127, torch.uint8: 255}
LEAST = {torch.int8: 0, torch.uint8: 8}  # second moments stay above 0; codes below 8 are subnormal floats, slow on CPU


def keep(name: str, values: Tensor, form: str) -> dict[str, Tensor]:
    """Convert `values` (fp32, any shape) to the tensors of the format "split" or "bf16" (rounded to nearest)."""
    if form == "bf16":
        return {name: values.to(torch.bfloat16)}
    high, low = (torch.empty_like(values, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    parts = (tensor.view(-1).split(_SPLIT_ELEMENTS) for tensor in (values, high, low))
    for value, high_part, low_part in zip(*parts, strict=True):
        for part, half in zip((high_part, low_part), split(value), strict=True):
            part.copy_(half)
    return {name: high, f"{name}_low": low}


def zeros(name: str, like: Tensor, form: str) -> dict[str, Tensor]:
    """Make zeros in the shape of `like`, in the format "fp32", "bf16", "int8" or "uint8"."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "uint8": torch.uint8}[form]
    tensors = {name: torch.zeros(like.shape, dtype=dtype, device=like.device)}
    if dtype in LARGEST:
        rows, columns = rows_and_columns(like)
        tensors[f"{name}_scale"] = torch.zeros(rows, -(-columns // BLOCK), device=like.device)
    return tensors


def read(tensors: dict[str, Tensor], name: str, rows: slice) -> Tensor:
    """Return the fp32 values of some rows, (rows, columns). For the format fp32, returns a view to update in place."""
    kept = by_rows(tensors[name])[rows]
    if kept.dtype == torch.float32:
        return kept
    if kept.dtype == torch.bfloat16:
        low = tensors.get(f"{name}_low")
        return kept.float() if low is None else merge_halves(kept, by_rows(low)[rows])
    return _from_8_bits(kept, tensors[f"{name}_scale"][rows])


def write(tensors: dict[str, Tensor], name: str, rows: slice, values: Tensor, random: Tensor | None) -> None:
    """Store `values` in some rows. `random` is from `random_halves`. Skips fp32, of which `read` returned a view."""
    kept = by_rows(tensors[name])[rows]
    if kept.dtype in LARGEST:
        codes, scale = _to_8_bits(values, random, kept.dtype)
        kept.copy_(codes)
        tensors[f"{name}_scale"][rows] = scale
    elif f"{name}_low" in tensors:
        high, low = split(values)
        kept.copy_(high)
        by_rows(tensors[f"{name}_low"])[rows] = low
    elif kept.dtype == torch.bfloat16:
        kept.copy_(round_stochastically(values, random))


def rows_and_columns(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's shape as a matrix: the first dimension and the product of all others. A vector is a column."""
    return (tensor.shape[0] if tensor.dim() else 1), math.prod(tensor.shape[1:])


def by_rows(tensor: Tensor) -> Tensor:
    return tensor.view(rows_and_columns(tensor))


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 (ties away from zero) and an int16 low half, without loss."""
    bits = values.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16).to(torch.int16)
    return high.view(torch.bfloat16), bits.to(torch.int16)  # the lower 16 bits


def merge_halves(high: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 values: the inverse of `split`."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """Round fp32 to bf16 stochastically; `random` as in `write`. Infinity and NaN are unchanged."""
    bits = (values.view(torch.int32) + random).bitwise_right_shift_(16)
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(values.isnan(), math.nan)  # adding `random` turns CUDA's NaN, 0x7FFFFFFF, into -0


def _to_8_bits(values: Tensor, random: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns, is_signed = values.shape[1], dtype == torch.int8
    blocks = _blocks(values)
    scale = (blocks.abs() if is_signed else blocks).amax(2)
    inverse = scale.clamp(min=1e-30).reciprocal_().unsqueeze(2)
    scaled = (blocks * inverse).mul_(unit(dtype)).flatten(1)[:, :columns].contiguous()
    magnitude = scaled.abs() if is_signed else scaled
    bits = magnitude.view(torch.int32).add_(random, alpha=1 << (CUT_BITS - 16)).bitwise_right_shift_(CUT_BITS)
    codes = bits.clamp_(LEAST[dtype], LARGEST[dtype]).to(dtype)
    return (codes.mul_(scaled.sign_().to(dtype)) if is_signed else codes), scale


def _from_8_bits(codes: Tensor, scale: Tensor) -> Tensor:
    bits = codes.to(torch.int32)
    if codes.dtype == torch.int8:
        sign = bits & -(2**31)
        bits.abs_().bitwise_left_shift_(CUT_BITS).bitwise_or_(sign)
    else:
        bits.bitwise_left_shift_(CUT_BITS)
    values = _blocks(bits.view(torch.float32)).mul_(1 / unit(codes.dtype)).mul_(scale.unsqueeze(2))
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def unit(dtype: torch.dtype) -> float:
    """Return the fp32 number whose bits 20 to 27 are the largest code. Blocks are scaled to this maximum."""
    return struct.unpack("f", struct.pack("I", LARGEST[dtype] << CUT_BITS))[0]


def _blocks(values: Tensor) -> Tensor:
    """Reshape (rows, columns) to (rows, blocks, BLOCK), with the last block padded with zeros."""
    if values.shape[1] % BLOCK:
        values = F.pad(values, (0, -values.shape[1] % BLOCK))
    return values.view(len(values), -1, BLOCK)
