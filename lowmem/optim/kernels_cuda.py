"""AdamW and sums of gradients on a GPU in one pass over memory, in Triton, with the bits of `adamw.py`.

One launch updates all parameters of the same formats: the kernel reads their addresses and numbers from a table.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from struct import pack, unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem.optim.adamw import Numbers, Update, is_rounded
from lowmem.optim.formats import CUT_BITS, LARGEST, LEAST, unit
from lowmem.optim.philox import BLOCK, COUNTERS, Origin, Segments

SEGMENTS = 4  # that a program works on
_ALIGNMENT = 16
_COLUMNS = (
    *("weight", "weight_low", "gradient", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"),
    *(*Numbers._fields, "key", *Segments._fields, "segments", "programs"),
)
"""Of the table, int64: addresses, then fp32 bits, then integers. The last counts programs up to this parameter."""

_WIDTH = tl.constexpr(len(_COLUMNS))
_NUMBERS, _MATRIX = tl.constexpr(_COLUMNS.index("decay")), tl.constexpr(_COLUMNS.index("columns"))
_BLOCK, _COUNTERS, _CUT_BITS = tl.constexpr(BLOCK), tl.constexpr(COUNTERS), tl.constexpr(CUT_BITS)
_FIRST_UNIT, _SECOND_UNIT = tl.constexpr(unit(torch.int8)), tl.constexpr(unit(torch.uint8))
_FIRST_LARGEST, _SECOND_LARGEST = tl.constexpr(LARGEST[torch.int8]), tl.constexpr(LARGEST[torch.uint8])
_SECOND_LEAST = tl.constexpr(LEAST[torch.uint8])


def adamw(updates: Iterable[Update], clip_factor: Tensor | None) -> None:
    """Update weights and moments; see `adamw.adamw`. If `clip_factor` is NaN, changes nothing."""
    by_form: dict[tuple[tuple[str, object], ...], list[dict[str, int]]] = defaultdict(list)
    updates = list(updates)  # keeps gradients that were copied until the launch
    for tensors, gradient, numbers, key, origin in updates:
        device = gradient.device
        segments = Segments.of(gradient, origin, is_rounded=is_rounded(tensors))
        row = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        row["gradient"] = gradient.data_ptr()
        form = {"IS_SPLIT": "weight_low" in tensors, "MOMENT_BYTES": tensors["exp_avg"].itemsize}
        form |= {"GRADIENT_BYTES": gradient.itemsize, "IS_ALIGNED": _is_aligned(segments, row.values())}
        row |= {name: unpack("i", pack("f", number))[0] for name, number in numbers._asdict().items()}
        row |= segments._asdict() | {"segments": segments.count(gradient), "key": _signed(key)}
        by_form[tuple(form.items())].append(row)
    for form, rows in by_form.items():
        programs = 0
        for row in rows:
            programs += triton.cdiv(row["segments"], SEGMENTS)
            row["programs"] = programs
        values = [[row.get(name, 0) for name in _COLUMNS] for row in rows]
        table = torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        factor = torch.ones((), device=device) if clip_factor is None else clip_factor
        options = dict(form) | {"SEGMENTS": SEGMENTS, "enable_fp_fusion": False}
        with _on(device):
            adamw_kernel[(programs,)](table, factor, len(rows), **options)


def add(total: Tensor, gradient: Tensor, key: int, origin: Origin) -> None:
    """Add a gradient in bf16 to a sum in fp32, or in bf16 with stochastic rounding; both (rows, columns)."""
    if total.itemsize == 4:
        total.add_(gradient)  # the same bits, with less work on the host than a launch by Triton
        return
    segments = Segments.of(gradient, origin, is_rounded=True)
    count = segments.count(gradient)
    grid = (triton.cdiv(count, SEGMENTS),)
    with _on(total.device):
        add_kernel[grid](total, gradient, count, *segments, _signed(key), SEGMENTS=SEGMENTS, enable_fp_fusion=False)


def _on(device: torch.device) -> AbstractContextManager[None]:
    # Triton launches on the current device; on a CPU, its interpreter runs the kernels
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_aligned(segments: Segments, addresses: Iterable[int]) -> bool:
    """Return whether each segment begins at a multiple of 16 bytes, so that a thread can load 16 bytes at a time."""
    return not (segments.columns % _ALIGNMENT or segments.offset or any(address % _ALIGNMENT for address in addresses))


def _signed(key: int) -> int:
    """Return the int64 that has the bits of an unsigned key."""
    return key - 2**64 if key >= 2**63 else key


@triton.jit(do_not_specialize=["num_parameters"])  # it may be 1, with gradient release
def adamw_kernel(
    table,
    clip_factor,
    num_parameters,
    IS_SPLIT: tl.constexpr,
    MOMENT_BYTES: tl.constexpr,
    GRADIENT_BYTES: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    # find the parameter: the first whose programs end after this one
    program = tl.program_id(0).to(tl.int64)
    low, high = 0, num_parameters - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(table + middle * _WIDTH + _WIDTH - 1) > program:
            high = middle
        else:
            low = middle + 1
    row = table + low * _WIDTH
    begin = tl.load(row - 1, mask=low > 0, other=0)

    numbers, matrix = row + _NUMBERS, row + _MATRIX
    decay, beta1_rest = _number(numbers), _number(numbers + 1)
    beta2, beta2_rest = _number(numbers + 2), _number(numbers + 3)
    step_size, inverse_bias, eps = _number(numbers + 4), _number(numbers + 5), _number(numbers + 6)
    columns, offset = tl.load(matrix), tl.load(matrix + 1)
    if IS_ALIGNED:  # the compiler then loads 16 bytes at a time
        columns, offset = tl.multiple_of(columns, 16), 0
    first, stride, segments = tl.load(matrix + 2), tl.load(matrix + 3), tl.load(matrix + 4)
    factor = tl.load(clip_factor)
    segments = tl.where(factor == factor, segments, 0)  # NaN: the step is skipped
    begin = (program - begin) * SEGMENTS
    segment, at, inside, block = _elements(begin, segments, columns, offset, first, stride, SEGMENTS)

    weight = _address(row, tl.int16, IS_ALIGNED) + at
    w = (tl.load(weight, mask=inside, other=0).to(tl.int32) << 16).to(tl.uint32)
    if IS_SPLIT:
        weight_low = _address(row + 1, tl.int16, IS_ALIGNED) + at
        w += tl.load(weight_low, mask=inside, other=0).to(tl.int32).to(tl.uint32)
    w = w.to(tl.float32, bitcast=True)
    if GRADIENT_BYTES == 4:
        g = tl.load(_address(row + 2, tl.float32, IS_ALIGNED) + at, mask=inside, other=0)
    else:
        g = tl.load(_address(row + 2, tl.bfloat16, IS_ALIGNED) + at, mask=inside, other=0).to(tl.float32)
    if MOMENT_BYTES == 4:
        exp_avg = _address(row + 3, tl.float32, IS_ALIGNED) + at
        exp_avg_sq = _address(row + 4, tl.float32, IS_ALIGNED) + at
        m, v = tl.load(exp_avg, mask=inside, other=0), tl.load(exp_avg_sq, mask=inside, other=0)
    elif MOMENT_BYTES == 2:
        exp_avg = _address(row + 3, tl.int16, IS_ALIGNED) + at
        exp_avg_sq = _address(row + 4, tl.int16, IS_ALIGNED) + at
        m = (tl.load(exp_avg, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        v = (tl.load(exp_avg_sq, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        exp_avg = _address(row + 3, tl.int8, IS_ALIGNED) + at
        exp_avg_sq = _address(row + 4, tl.uint8, IS_ALIGNED) + at
        first_scale = _address(row + 5, tl.float32, IS_ALIGNED) + segment
        second_scale = _address(row + 6, tl.float32, IS_ALIGNED) + segment
        exists = segment < segments
        code = tl.load(exp_avg, mask=inside, other=0).to(tl.int32)
        m = ((tl.abs(code) << _CUT_BITS) | (code & -2147483648)).to(tl.float32, bitcast=True)
        m = m * (1 / _FIRST_UNIT) * tl.load(first_scale, mask=exists, other=0)[:, None]
        v = (tl.load(exp_avg_sq, mask=inside, other=0).to(tl.int32) << _CUT_BITS).to(tl.float32, bitcast=True)
        v = v * (1 / _SECOND_UNIT) * tl.load(second_scale, mask=exists, other=0)[:, None]

    g = g * factor
    w = w * decay
    m = m + (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    w = w - tl.div_rn(m * step_size, tl.sqrt_rn(v) * inverse_bias + eps)

    if not IS_SPLIT or MOMENT_BYTES < 4:
        random = _random_halves(tl.load(matrix - 1), block, SEGMENTS)
        other = (random * 40503) & 0xFFFF
    if IS_SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        tl.store(weight, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(weight_low, bits.to(tl.int16), mask=inside)
    else:
        tl.store(weight, _rounded(w, random), mask=inside)
    if MOMENT_BYTES == 4:
        tl.store(exp_avg, m, mask=inside)
        tl.store(exp_avg_sq, v, mask=inside)
    elif MOMENT_BYTES == 2:
        tl.store(exp_avg, _rounded(m, other), mask=inside)
        tl.store(exp_avg_sq, _rounded(v, random), mask=inside)
    else:
        code, scale = _to_8_bits(tl.where(inside, m, 0.0), other, _FIRST_UNIT, 0, _FIRST_LARGEST)
        tl.store(exp_avg, code.to(tl.int8), mask=inside)
        tl.store(first_scale, scale, mask=exists)
        code, scale = _to_8_bits(tl.where(inside, v, 0.0), random, _SECOND_UNIT, _SECOND_LEAST, _SECOND_LARGEST)
        tl.store(exp_avg_sq, code.to(tl.uint8), mask=inside)
        tl.store(second_scale, scale, mask=exists)


@triton.jit(do_not_specialize=["segments", "first", "stride", "key"])  # some are multiples of 16 by chance
def add_kernel(
    total,
    gradient,
    segments,
    columns,
    offset,
    first,
    stride,
    key,
    SEGMENTS: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * SEGMENTS
    _, at, inside, block = _elements(begin, segments, columns, offset, first, stride, SEGMENTS)
    value = tl.load(total + at, mask=inside, other=0).to(tl.float32)
    value += tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    rounded = _rounded(value, _random_halves(key, block, SEGMENTS))
    tl.store(total.to(tl.pointer_type(tl.int16)) + at, rounded, mask=inside)


@triton.jit
def _number(address):
    return tl.load(address).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _address(field, dtype: tl.constexpr, IS_ALIGNED: tl.constexpr):
    address = tl.load(field).to(tl.pointer_type(dtype))
    return tl.multiple_of(address, 16) if IS_ALIGNED else address


@triton.jit
def _elements(begin, segments, columns, offset, first, stride, SEGMENTS: tl.constexpr):
    """Return indices of segments (S,), their elements' offsets (S, BLOCK) and masks, and their blocks (S,)."""
    segment = begin + tl.arange(0, SEGMENTS)
    per_row = (offset + columns + _BLOCK - 1) // _BLOCK
    row, block = segment // per_row, segment % per_row
    column = (block * _BLOCK - offset)[:, None] + tl.arange(0, _BLOCK)[None, :]
    inside = (segment < segments)[:, None] & (column >= 0) & (column < columns)
    return segment, row[:, None] * columns + column, inside, first + row * stride + block


@triton.jit
def _random_halves(key, block, SEGMENTS: tl.constexpr):
    """Return 16 random bits for each element of blocks, int32 (S, BLOCK), in the order of philox.py."""
    counter = (block[:, None] * _COUNTERS + tl.arange(0, _COUNTERS)[None, :]).to(tl.uint64)
    zero = tl.zeros_like(counter).to(tl.uint32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # (S, COUNTERS, 2, 2); read backwards, the last two count the words
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(tl.permute(halves, (0, 2, 3, 4, 1)), (SEGMENTS, _BLOCK)).to(tl.int32)


@triton.jit
def _rounded(value, random):
    """Round fp32 to bf16 stochastically; return its bits as int16."""
    bits = (value.to(tl.int32, bitcast=True) + random) >> 16
    return tl.where(value != value, 0x7FC0, bits).to(tl.int16)


@triton.jit
def _to_8_bits(value, random, UNIT: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """Return the codes of values (S, BLOCK) as int32, and the scale of each block (S,)."""
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of the values, NaN last
    scale = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    at_least = tl.where(scale < 1e-30, 1e-30, scale)
    inverse = tl.div_rn(tl.full(at_least.shape, 1.0, tl.float32), at_least)
    bits = (value * inverse[:, None] * UNIT).to(tl.int32, bitcast=True)
    sign = bits >> 31  # 0 or -1
    code = ((bits & 0x7FFFFFFF) + (random << (_CUT_BITS - 16))) >> _CUT_BITS
    code = tl.minimum(tl.maximum(code, LEAST), LARGEST)
    return (code ^ sign) - sign, scale
