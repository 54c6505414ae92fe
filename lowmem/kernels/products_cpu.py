"""Matrix products of bf16 matrices in fp32, for CPUs without instructions for bf16.

There, torch computes bf16 products in plain loops, up to 200 times as slow as its fp32 products.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_HEIGHT, _ELEMENTS = 1024, 2**20  # rows of the first matrix, and elements of the second, cast at a time

_library: torch.library.Library | None = None


def speed_up_bf16(device: torch.device) -> None:
    """From now on, on a CPU that lacks bf16 instructions, compute the products of bf16 matrices in fp32.

    Casts parts of the matrices and rounds each result once, as a GPU does. Changes torch for the whole process.
    """
    global _library
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type != "cpu" or has_bf16 or _library:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns that these replace kernels
        products = {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "bmm": _bmm, "baddbmm": _baddbmm}
        for name, product in products.items():
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            _library.impl(name, _for_bf16(product, kernel.call_boxed), "CPU", with_keyset=True)


def _for_bf16(product: Callable[..., Tensor], kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def compute(keys: torch.DispatchKeySet, *tensors: Tensor, **options: object) -> Tensor:
        given = [*tensors, *(x for x in options.values() if isinstance(x, Tensor))]
        a, b = tensors[-2:]
        if all(x.dtype == torch.bfloat16 for x in given) and a.shape[-1] == b.shape[-2]:
            return product(*tensors, **options)
        return kernel(keys, *tensors, **options)  # which also raises torch's errors

    return compute


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _mm_out(a, b, out=a.new_empty(len(a), b.shape[1]))


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if out.shape != (len(a), b.shape[1]):
        out.resize_(len(a), b.shape[1])
    for rows, columns in _blocks(a, b):
        out[rows, columns] = torch.mm(a[rows].float(), b[:, columns].float())
    return out


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = a.new_empty(len(a), b.shape[1])
    bias = bias.expand_as(out)
    for rows, columns in _blocks(a, b):
        added = bias[rows, columns].float()
        out[rows, columns] = torch.addmm(added, a[rows].float(), b[:, columns].float(), beta=beta, alpha=alpha)
    return out


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    height = max(1, _ELEMENTS // max(1, *(x.shape[1] * x.shape[2] for x in (a, b, out))))
    for first in range(0, len(a), height):
        matrices = slice(first, first + height)
        out[matrices] = torch.bmm(a[matrices].float(), b[matrices].float())
    return out


def _baddbmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    added = added.expand(len(a), a.shape[1], b.shape[2])
    return torch.stack([_addmm(*each, beta=beta, alpha=alpha) for each in zip(added, a, b, strict=True)])


def _blocks(a: Tensor, b: Tensor) -> list[tuple[slice, slice]]:
    """Split the rows of `a` and the columns of `b`."""
    height, width = _HEIGHT, max(1, _ELEMENTS // max(1, len(b)))
    return [
        (slice(row, row + height), slice(column, column + width))
        for row in range(0, len(a), height)
        for column in range(0, b.shape[1], width)
    ]
