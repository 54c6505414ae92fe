"""The L2 norms of gradients, without copying a whole bf16 gradient to fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lowmem.optim import kernels_cpu

_CONVERTED_ELEMENTS = 2**20  # at a time, without a kernel


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each gradient, fp32 (of fp64: fp64) scalars. All must be on the same device."""
    if gradients and gradients[0].device.type != "cpu":  # few launches; kernels add in a tree, which is accurate
        return list(torch._foreach_norm(gradients, 2, torch.promote_types(gradients[0].dtype, torch.float32)))
    return [_norm(gradient).to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]


def squared_norm(gradient: Tensor) -> Tensor:
    """Return the squared L2 norm, an fp64 scalar. On a CPU, those of parts add to that of the whole, to fp32's bits."""
    if gradient.device.type == "cpu":
        return _norm(gradient).square()
    (norm,) = gradient_norms([gradient])
    return norm.double().square()


def _norm(gradient: Tensor) -> Tensor:
    """Return the L2 norm of a gradient on the CPU, fp64."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    has_kernel = gradient.dtype in (torch.bfloat16, torch.float32) and kernels_cpu.library()
    if has_kernel and gradient.is_contiguous() and not isinstance(gradient, FakeTensor):
        return torch.tensor(kernels_cpu.norm(gradient), dtype=torch.float64)
    # take each row's norm, then the norm of these in fp64, because CPU kernels add in sequence (16M values: 1e-3 off)
    rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient.reshape(1, -1)
    height = max(1, _CONVERTED_ELEMENTS // max(1, rows.shape[1]))
    of_rows = [
        torch.linalg.vector_norm(piece, dim=1, dtype=wide)
        for piece in ([rows] if rows.dtype == wide else rows.split(height))
    ]
    return torch.linalg.vector_norm(torch.cat(of_rows), dtype=torch.float64)
