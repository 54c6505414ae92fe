"""Storage formats for fp32 values: exact formats keep every bit, rounded formats are unbiased."""

import math

import pytest
import torch

from lowmem.optim.formats import keep, merge_halves, read, round_stochastically, split, write, zeros
from lowmem.optim.philox import BLOCK, shuffled

DRAWS = 4096


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_halves(shape, source):
    return torch.randint(2**16, shape, dtype=torch.int32, generator=source)


def test_split_keeps_every_bit():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator()).to(torch.int32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, 1e-45, 1 + 2**-8, -1 - 2**-8])
    values = torch.cat([bits.view(torch.float32), special])
    high, low = split(values)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(merge_halves(high, low).view(torch.int32), values.view(torch.int32))


def test_the_upper_half_is_the_nearest_bf16():
    values = torch.randn(100_000, generator=generator())
    high, _ = split(values)
    ties = values.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~ties], values.bfloat16()[~ties])
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8])  # torch rounds ties to even, but `split` rounds them away from zero
    assert torch.equal(split(tie)[0].float(), torch.tensor([1 + 2**-7, -1 - 2**-7]))


@pytest.mark.parametrize("value", [1 + 2**-10, -3.14159, 1e-30, 0.999 * 2**-8])
def test_stochastic_rounding_is_unbiased(value):
    values = torch.full((DRAWS,), value)
    rounded = round_stochastically(values, random_halves((DRAWS,), generator()))
    low, high = sorted({*rounded.float().tolist()})
    assert low < value < high and (high - low) <= 2**-7 * abs(value)
    up = (value - low) / (high - low)
    spread = (high - low) * math.sqrt(up * (1 - up) / DRAWS)
    assert abs(rounded.double().mean().item() - value) < 4 * spread


def test_values_that_bf16_can_represent_are_never_rounded():
    values = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf])
    for seed in range(20):
        assert torch.equal(round_stochastically(values, random_halves(values.shape, generator(seed))).float(), values)
    # a NaN that a CPU computes, the NaN that CUDA computes, and a NaN with all bits set
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    assert round_stochastically(bits.view(torch.float32), torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


def test_shuffled_numbers_are_a_permutation_without_correlation():
    bits = torch.arange(65536, dtype=torch.int32)
    other = shuffled(bits)
    assert torch.equal(other.sort().values, bits)
    assert abs(torch.corrcoef(torch.stack([bits, other]).double())[0, 1]) < 0.01


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses():
    steps, change = 3000, 2.0**-13  # `change` is 1/64 of the gap between 1 and the next bf16 value
    tensors, frozen = keep("x", torch.ones(64, 64), "bf16"), torch.ones(64, 64, dtype=torch.bfloat16)
    source = generator()
    for _ in range(steps):
        values = read(tensors, "x", slice(None)) + change
        write(tensors, "x", slice(None), values, random_halves(values.shape, source))
        frozen = (frozen.float() + change).bfloat16()
    assert (frozen == 1).all()
    assert tensors["x"].float().mean().item() == pytest.approx(1 + steps * change, rel=3e-3)


@pytest.mark.parametrize(("form", "sign"), [("int8", -1), ("int8", 1), ("uint8", 1)])
def test_8_bit_floats_are_unbiased_and_relatively_precise(form, sign):
    values = sign * torch.logspace(-4, 0, BLOCK + 44).repeat(3, 1) * torch.tensor([[1e-12], [1.0], [1e3]])
    tensors, source = zeros("m", values, form), generator()
    assert tensors["m_scale"].shape == (3, 2)
    total, squares = torch.zeros_like(values, dtype=torch.float64), torch.zeros_like(values, dtype=torch.float64)
    for _ in range(DRAWS):
        write(tensors, "m", slice(None), values, random_halves(values.shape, source))
        kept = read(tensors, "m", slice(None)).double()
        assert ((kept - values).abs() <= values.abs() / 7.9).all()  # because the mantissa has 3 bits
        total += kept
        squares += (kept - values).square()
    spread = (squares / DRAWS).sqrt() / math.sqrt(DRAWS)
    # By chance, one value in 16,000 is off by more than 4 standard deviations, so a limit of 5 is safe for these 900
    # values. Because this limit is loose, the mean square of the deviations is checked too.
    distance = (total / DRAWS - values) / (spread + 1e-6 * values.abs())
    assert distance.abs().max() < 5 and distance.square().mean() < 1.3


def test_a_tiny_second_moment_stays_above_zero_and_a_zero_first_moment_stays_zero():
    values = torch.tensor([[1.0, 1e-30, 0.0] + [0.5] * 7, [0.0] * 10])
    tensors = zeros("v", values, "uint8")
    assert (read(tensors, "v", slice(None)) == 0).all()
    write(tensors, "v", slice(None), values, torch.zeros(values.shape, dtype=torch.int32))
    kept = read(tensors, "v", slice(None))
    assert 0 < kept[0, 1] < 1e-8 and (kept[1] == 0).all()
    first = zeros("m", values, "int8")
    write(first, "m", slice(None), values, torch.full(values.shape, 65535, dtype=torch.int32))
    assert read(first, "m", slice(None))[0, 2] == 0  # otherwise, a weight with a gradient of 0 would move


def test_each_row_has_its_own_blocks():
    """The 8-bit codes of a row do not depend on other rows, so a tensor can be sharded by rows."""
    values = torch.randn(6, 300, generator=generator()) * torch.logspace(-3, 3, 6).unsqueeze(1)
    random = random_halves(values.shape, generator(1))
    whole, part = zeros("m", values, "int8"), zeros("m", values, "int8")
    write(whole, "m", slice(None), values, random)
    for row in range(6):
        write(part, "m", slice(row, row + 1), values[row : row + 1], random[row : row + 1])
    assert torch.equal(whole["m"], part["m"]) and torch.equal(whole["m_scale"], part["m_scale"])
    assert torch.equal(read(whole, "m", slice(2, 4)), read(whole, "m", slice(None))[2:4])


@pytest.mark.parametrize(("form", "byte_count"), [("fp32", 4), ("split", 4), ("bf16", 2), ("int8", 1.0157)])
@pytest.mark.parametrize("shape", [(128, 512), (7,), ()])
def test_the_shape_and_bytes_of_a_format(form, byte_count, shape):
    like = torch.zeros(shape)
    tensors = (zeros if form in ("fp32", "int8") else keep)("x", like, form)
    assert tensors["x"].shape == shape
    if len(shape) == 2:
        assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(128 * 512 * byte_count, rel=1e-3)
