"""Sections of `gpu.py` about kernels: bits and times of the optimizers' updates, and first lengths in attention."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from gpu_measure import Case, models, part_that_fits, synchronize, timed
from kernel_states import FORMS, ODD, differing, module, states
from records import Record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

from lowmem.model.build import build_model
from lowmem.optim.make import make_optimizer
from lowmem.optim.tiers import kernels_for

BNB = "bitsandbytes 8-bit"
OPTIMIZERS = {"lean": 6, "exact": 14, "off": 16, BNB: 6}
"""Bytes per weight, gradients included, of each tier and of what they are compared with. off: torch's fused AdamW."""


# --- bits
def bits(device: torch.device) -> Iterator[Case]:
    """Compare the device's kernels with tensor operations on the CPU, bit for bit."""
    sizes = {"odd": (ODD, {"steps": 5})}
    if device.type == "cuda":
        large = {"matrix": (4096, 1024), "embedding": (32128, 768)}
        sizes = {"odd": (ODD, {"steps": 100}), "large": (large, {"steps": 5, "slice_elements": None})}
    dtypes = (torch.bfloat16, torch.float32)
    for (size, (shapes, options)), (name, memory), dtype in product(sizes.items(), FORMS, dtypes):
        labels = {"shapes": size, "optimizer": name, "memory": memory, "gradients": str(dtype)}
        yield labels, partial(_bits, shapes, device, name, memory, dtype=dtype, **options)


def _bits(
    shapes: dict[str, tuple[int, ...]], device: torch.device, name: str, memory: str, **options: object
) -> Iterator[Record]:
    kernels = kernels_for(torch.empty(0, device=device))
    if kernels is None:
        raise RuntimeError(f"there are no kernels for {device}: a CPU needs a C++ compiler, a GPU needs triton too")
    expected = states(name, memory, None, model=module(shapes), **options)
    found = states(name, memory, kernels, model=module(shapes).to(device), **options)
    yield {"updates": options["steps"], "tensors": len(expected), "differing": differing(found, expected)}


# --- times
def update(device: torch.device) -> Iterator[Case]:
    """Time one update of all weights, and a copy, whose bytes per second an update can at best reach."""
    yield {"optimizer": "none: a copy"}, partial(_copy, device)
    for (name, spec), optimizer in product(
        models(device, "t5-base", "qwen2.5-0.5b", "llama-3.1-8b").items(), OPTIMIZERS
    ):
        yield {"model": name, "optimizer": optimizer}, partial(_update, spec.shape, optimizer, device)


def _copy(device: torch.device) -> Iterator[Record]:
    source = torch.ones(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield _with_speed(timed(lambda: target.copy_(source), rounds=10), 2 * source.nbytes)


def _update(shape: Record, name: str, device: torch.device) -> Iterator[Record]:
    if name == BNB and not find_spec("bitsandbytes"):
        yield {"skipped": "bitsandbytes is not installed"}
        return
    shape = part_that_fits(shape, OPTIMIZERS[name], device)
    with device:
        model = build_model(AutoConfig.for_model(**shape), "sdpa")
    if name == BNB:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(model.bfloat16().parameters(), lr=1e-4)
    else:
        optimizer = make_optimizer(model, memory=name)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight).mul_(1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    times = timed(optimizer.step, rounds=10)
    state = [tensor for of_one in optimizer.state.values() for tensor in of_one.values() if torch.is_tensor(tensor)]
    # gradients are read, all else is read and written
    moved = sum(weight.grad.nbytes for weight in weights) + 2 * sum(tensor.nbytes for tensor in (*weights, *state))
    sizes = {"weights": sum(weight.numel() for weight in weights), "layers": shape.get("num_hidden_layers")}
    yield sizes | _with_speed(times, moved)


def _with_speed(times: Record, moved_bytes: int) -> Record:
    return times | {"moved_bytes": moved_bytes, "gb_per_second": moved_bytes / times["ms"] / 1e6}


# --- attention
def sdpa(device: torch.device) -> Iterator[Case]:
    """Time the first calls of attention at lengths that the process has not used before.

    TORCH_CUDNN_SDPA_DEPRIORITIZED=1 would make torch choose flash without a mask, and else the memory-efficient kernel.
    """
    on_gpu = device.type == "cuda"
    flash, efficient, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    of_mask = {False: [None, cudnn, flash], True: [None, cudnn, efficient]}
    if not on_gpu:
        of_mask = dict.fromkeys(of_mask, [None, SDPBackend.MATH])
    chosen = [(backend, has_mask) for has_mask, backends in of_mask.items() for backend in backends]
    shape, shortest = ((4, 16, 64), 1024) if on_gpu else ((1, 2, 8), 16)
    for number, (backend, has_mask) in enumerate(chosen):  # each has other lengths, because cuDNN keeps its plans
        lengths = [shortest + 8 * (len(chosen) * index + number) for index in range(6)]
        yield (
            {"backend": backend.name if backend else "torch's choice", "mask": has_mask},
            partial(_lengths, backend, shape, lengths, device, has_mask=has_mask),
        )


def _lengths(
    backend: SDPBackend | None, shape: tuple[int, int, int], lengths: list[int], device: torch.device, *, has_mask: bool
) -> Iterator[Record]:
    rows, heads, width = shape
    options = {"device": device, "dtype": torch.bfloat16}

    def call(length: int) -> float:
        query, key, value = (torch.randn(rows, heads, length, width, **options).requires_grad_() for _ in range(3))
        mask = torch.zeros(rows, 1, length, length, **options) if has_mask else None
        synchronize()
        started = time.perf_counter()
        scaled_dot_product_attention(query, key, value, mask, is_causal=not has_mask).sum().backward()
        synchronize()
        return (time.perf_counter() - started) * 1e3

    like = torch.empty(rows, heads, lengths[0], width, **options)
    mask = torch.zeros(rows, 1, lengths[0], lengths[0], **options) if has_mask else None
    by_torch = SDPBackend(torch._fused_sdp_choice(like, like, like, mask, 0.0, not has_mask)).name
    with sdpa_kernel(backend) if backend else nullcontext():
        call(lengths[0])  # loads libraries
        for length in lengths[1:]:
            names = ("first_ms", "second_ms", "third_ms")
            yield {"torch_chooses": by_torch, "length": length} | {name: call(length) for name in names}
