"""Test bf16 products on a CPU: rounded once, and in fp32 if the CPU has no instructions for bf16."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from lowmem.kernels import products_cpu
from lowmem.kernels.products_cpu import speed_up_bf16

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def matrix(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


PRODUCTS = {
    "mm": lambda a, b, bias: a @ b,
    "mm of transposed matrices": lambda a, b, bias: (b.T @ a.T).T,
    "mm.out": lambda a, b, bias: torch.mm(a, b, out=a.new_empty(len(a), b.shape[1])),
    "mm.out in columns of a matrix": lambda a, b, bias: torch.mm(a, b, out=a.new_empty(len(a), 4000)[:, : b.shape[1]]),
    "linear": lambda a, b, bias: F.linear(a[None], b.T, bias)[0],
    "addmm": lambda a, b, bias: torch.addmm(bias, a, b, beta=0.5, alpha=2.0),
    "baddbmm": lambda a, b, bias: torch.baddbmm(bias, a.expand(3, -1, -1), b.expand(3, -1, -1), beta=0.5, alpha=2.0),
    "bmm": lambda a, b, bias: a.expand(3, -1, -1) @ b.expand(3, -1, -1),
}


@pytest.mark.parametrize("rows, inner, columns", [(5, 7, 3), (1030, 300, 3600), (0, 4, 3), (3, 0, 4), (1, 64, 1)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_bf16_matrices_are_rounded_once(name, rows, inner, columns):
    speed_up_bf16(torch.device("cpu"))
    tensors = matrix(rows, inner), matrix(inner, columns), matrix(columns)
    result, exact = PRODUCTS[name](*tensors), PRODUCTS[name](*(tensor.double() for tensor in tensors))
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    # half a unit in the last place of bf16, and the error of sums in fp32
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-5 * (1 + inner) ** 0.5)


@pytest.mark.skipif(HAS_BF16, reason="needs a CPU without instructions for bf16")
@pytest.mark.parametrize("name", [name for name in PRODUCTS if "bmm" not in name])
def test_without_instructions_for_bf16_products_are_computed_in_fp32(name, monkeypatch):
    speed_up_bf16(torch.device("cpu"))
    blocks, calls = products_cpu._blocks, []
    monkeypatch.setattr(products_cpu, "_blocks", lambda a, b: calls.append(a) or blocks(a, b))
    PRODUCTS[name](matrix(70, 64), matrix(64, 50), matrix(50))
    assert len(calls) == 1


def test_what_torch_refuses_or_resizes_stays_so():
    speed_up_bf16(torch.device("cpu"))
    a, b = matrix(5, 7), matrix(7, 3)
    for wrong in (lambda: a @ b.float(), lambda: a @ b[:6], lambda: torch.mm(a, b, out=torch.empty(5, 3))):
        with pytest.raises(RuntimeError):
            wrong()
    with warnings.catch_warnings(action="ignore"):  # of an output that is resized
        assert torch.equal(torch.mm(a, b, out=a.new_empty(0)), a @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_products_of_other_dtypes_are_those_of_torch(dtype):
    speed_up_bf16(torch.device("cpu"))
    a, b = torch.arange(12).view(3, 4), torch.arange(20).view(4, 5)
    for name, product in PRODUCTS.items():
        if name not in ("linear", "addmm", "baddbmm"):
            assert torch.equal(product(a.to(dtype), b.to(dtype), None), product(a, b, None).to(dtype)), name
