"""Update small parameters with AdamW, with or without kernels, to compare the bits of weights, state and sums."""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lowmem.distributed.dtensor import local_of
from lowmem.optim import tiers
from lowmem.optim.make import make_optimizer

FORMS = [("adamw", "exact"), ("adamw", "lean"), ("adamw_bf16", "exact"), ("adamw_bf16", "lean")]
"""Optimizers and memory tiers with kernels."""
# sizes that are no multiples of a block, a vector register or a power of two, and a matrix without any remainder
ODD = {"wide": (7, 701), "tall": (67, 62), "bias": (77,), "scalar": (), "deep": (4, 7, 181), "even": (16, 512)}


def drawn(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Return numbers in (-2, 2), the same on every instruction set, unlike those of torch.randn."""
    return torch.randint(-(2**20), 2**20, shape, generator=source) / 2**19


def module(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    made = nn.Module()
    for seed, (name, shape) in enumerate(shapes.items()):
        made.register_parameter(name, nn.Parameter(drawn(shape, torch.Generator().manual_seed(seed))))
    return made


def states(
    name: str,
    memory: str,
    kernels: ModuleType | None,
    *,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
    model: nn.Module | None = None,
    slice_elements: int | None = 2000,
) -> dict[str, Tensor]:
    """Return weights and state after some updates, every other of them clipped, and a sum of two gradients.

    The gradients have `dtype` and are drawn on the CPU, so that they are the same on every device.
    """
    model = model or module(ODD)
    optimizer = make_optimizer(model, name=name, memory=memory, weight_decay=0.1, slice_elements=slice_elements)
    optimizer.kernels = kernels
    source = torch.Generator().manual_seed(1)

    def gradient(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        whole = drawn(parameter.shape, source).to(parameter.device, dtype)
        if whole.dim() == 2:
            whole[0] = 0  # a block of zeros has the least scale
        if isinstance(parameter, DTensor):
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        return whole.t().contiguous().t() if whole.dim() == 2 else whole  # kernels need contiguous gradients

    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad_dtype = None  # let gradients have any dtype
            parameter.grad = gradient(parameter, dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.clip_factor = torch.tensor(0.37, device=parameter.device) if step % 2 else None
        optimizer.step()
        assert optimizer.clip_factor is None
    found = {}
    for path, parameter in model.named_parameters():
        found |= {f"{path}.{key}": tensor for key, tensor in {"": parameter.data, **optimizer.state[parameter]}.items()}
        is_rounded = memory == "lean" and tiers.is_large(parameter)
        total = gradient(parameter, torch.bfloat16 if is_rounded else torch.float32)
        total, term = (local_of(tensor).contiguous() for tensor in (total, gradient(parameter, torch.bfloat16)))
        optimizer.add(parameter, total, term, 2**63 + 5)
        found[f"{path}.sum"] = total
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose bits differ; the tensors may be on different devices."""
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(bits(found[name].cpu()), bits(expected[name].cpu()))]
