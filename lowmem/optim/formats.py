"""Storage formats for fp32 values, 1 to 8 bytes each. A format is known by its tensors, under one name in a dict:

    {name: fp32}                               the values
    {name: bf16, name_low: int16}              split: the bits of fp32, the upper half being the bf16 weight
    {name: bf16}                               rounded stochastically
    {name: int8 or uint8, name_scale: fp32}    8-bit floats and their blocks' largest magnitudes, rounded stochastically

Stochastic rounding goes up with the probability of the part that is cut off, so that a sum of many small updates is
right on average; rounding to nearest would drop each one (Gupta et al., 2015).
"""

import math
import struct

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # 8-bit values that share a scale; a block never crosses a row
_SPLIT_ELEMENTS = 2**22  # split at a time: int32 temporaries of a whole embedding would be the peak of a run

# An 8-bit float is the bits 20 to 27 of an fp32 number: 3 of the mantissa and the lowest of the exponent, 4 for a first
# moment (int8, the sign apart) and 5 for a second (uint8). Relative precision is what they need, the second one as a
# divisor: with evenly spaced codes its small values would be 0 and their updates huge (Li et al., 2023).
_CUT_BITS = 20
_LARGEST = {torch.int8: 127, torch.uint8: 255}
_LEAST = {torch.int8: 0, torch.uint8: 8}  # a second moment never becomes 0; below 8 fp32 is subnormal, CPUs are slow


def keep(name: str, values: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors that hold `values` (fp32, any shape) in the format "split" or "bf16" (rounded to nearest)."""
    if form == "bf16":
        return {name: values.to(torch.bfloat16)}
    high, low = (torch.empty_like(values, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    parts = (tensor.view(-1).split(_SPLIT_ELEMENTS) for tensor in (values, high, low))
    for value, high_part, low_part in zip(*parts, strict=True):
        for part, half in zip((high_part, low_part), split(value), strict=True):
            part.copy_(half)
    return {name: high, f"{name}_low": low}


def zeros(name: str, like: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors that hold zeros of the shape of `like` in the format "fp32", "bf16", "int8" or "uint8"."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "uint8": torch.uint8}[form]
    tensors = {name: torch.zeros_like(like, dtype=dtype)}
    if dtype in _LARGEST:
        rows, columns = rows_and_columns(like)
        tensors[f"{name}_scale"] = torch.zeros(rows, -(-columns // BLOCK), device=like.device)
    return tensors


def read(tensors: dict[str, Tensor], name: str, rows: slice) -> Tensor:
    """The fp32 values of some rows, (rows, columns); of the format fp32 the memory itself, to update in place."""
    kept = by_rows(tensors[name])[rows]
    if kept.dtype == torch.float32:
        return kept
    if kept.dtype == torch.bfloat16:
        low = tensors.get(f"{name}_low")
        return kept.float() if low is None else merge_halves(kept, by_rows(low)[rows])
    return _from_8_bits(kept, tensors[f"{name}_scale"][rows])


def write(tensors: dict[str, Tensor], name: str, rows: slice, values: Tensor, random: Tensor | None) -> None:
    """Store `values` of some rows (fp32: already there); `random`: 16 random bits each, int32 in [0, 65536)."""
    kept = by_rows(tensors[name])[rows]
    if kept.dtype in _LARGEST:
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
    """A tensor as a matrix of its first dimension and all others; a vector is a column, a scalar one row."""
    return (tensor.shape[0] if tensor.dim() else 1), math.prod(tensor.shape[1:])


def by_rows(tensor: Tensor) -> Tensor:
    return tensor.view(rows_and_columns(tensor))


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as the nearest bf16 (a tie goes away from zero) and the int16 that is missing; no bit is lost."""
    bits = values.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16).to(torch.int16)
    return high.view(torch.bfloat16), bits.to(torch.int16)  # the lower 16 bits, as they are


def merge_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 values that `split` took apart."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up or down at random; `random` as in `write`. What is not finite stays what it is."""
    bits = (values.view(torch.int32) + random).bitwise_right_shift_(16)
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(values.isnan(), math.nan)  # CUDA's has all bits set, and would overflow to -0


def random_halves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """16 random bits for each element, as int32 in [0, 65536), drawn 64 at a time: four times as fast on CPU."""
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    halves = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[:count].view(shape)
    return halves.to(torch.int32).bitwise_and_(0xFFFF)


def shuffled(random: Tensor) -> Tensor:
    """The same bits in another order (a permutation of [0, 65536)), for a second rounding beside the first."""
    return (random * 40503).bitwise_and_(0xFFFF)


def _to_8_bits(values: Tensor, random: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns, is_signed = values.shape[1], dtype == torch.int8
    blocks = _blocks(values)
    scale = (blocks.abs() if is_signed else blocks).amax(2)
    scaled = (blocks / scale.clamp(min=1e-30).unsqueeze(2)).mul_(_unit(dtype)).flatten(1)[:, :columns].contiguous()
    magnitude = scaled.abs() if is_signed else scaled
    bits = magnitude.view(torch.int32).add_(random, alpha=1 << (_CUT_BITS - 16)).bitwise_right_shift_(_CUT_BITS)
    codes = bits.clamp_(_LEAST[dtype], _LARGEST[dtype]).to(dtype)
    return (codes.mul_(scaled.sign_().to(dtype)) if is_signed else codes), scale


def _from_8_bits(codes: Tensor, scale: Tensor) -> Tensor:
    bits = codes.to(torch.int32)
    if codes.dtype == torch.int8:
        sign = bits & -(2**31)
        bits.abs_().bitwise_left_shift_(_CUT_BITS).bitwise_or_(sign)
    else:
        bits.bitwise_left_shift_(_CUT_BITS)
    values = _blocks(bits.view(torch.float32)).mul_(1 / _unit(codes.dtype)).mul_(scale.unsqueeze(2))
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def _unit(dtype: torch.dtype) -> float:
    """The fp32 number whose bits 20 to 27 are the largest code: a block's largest magnitude becomes this one."""
    return struct.unpack("f", struct.pack("I", _LARGEST[dtype] << _CUT_BITS))[0]


def _blocks(values: Tensor) -> Tensor:
    """(rows, columns) as (rows, blocks, BLOCK), the last block filled up with zeros."""
    if values.shape[1] % BLOCK:
        values = F.pad(values, (0, -values.shape[1] % BLOCK))
    return values.view(len(values), -1, BLOCK)
