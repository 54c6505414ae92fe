"""AdamW and sums of gradients on a CPU in one pass over memory, in C++ (kernels.cpp), with the bits of `adamw.py`.

setup.py compiles the kernels for each instruction set if it finds a compiler. Without them, tensor operations are used.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from lowmem.optim.adamw import Numbers, Update, is_rounded
from lowmem.optim.philox import Origin, Segments

_SETS = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}
"""The compiled instruction sets that a CPU has, best first, by the name that torch gives its capability."""
_SUMMED_ELEMENTS = 2**15  # whose squares make one sum
_SEGMENTS_PER_THREAD = 1024  # fewer are faster without another thread


class _Matrix(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in Segments._fields), ("key", ctypes.c_uint64)]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("matrix", _Matrix),
        *((name, ctypes.c_void_p) for name in ("weight", "weight_low", "gradient", "exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_void_p) for name in ("exp_avg_scale", "exp_avg_sq_scale")),
        *((name, ctypes.c_float) for name in (*Numbers._fields, "clip_factor")),
        *((name, ctypes.c_int32) for name in ("gradient_bytes", "moment_bytes")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernels for this CPU, or return None if they are not compiled from the kernels.cpp next to this file."""
    folder = Path(__file__).parent
    source = folder / "kernels.cpp"
    for name in _SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",)):
        for path in folder.glob(f"_kernels_{name}.*"):
            with suppress(OSError, AttributeError):  # of another machine, or cut short
                loaded = ctypes.CDLL(str(path))
                loaded.digest.restype = ctypes.c_uint32
                if loaded.digest() == crc32(source.read_bytes()):
                    return loaded
    return None


def adamw(updates: Iterable[Update], clip_factor: Tensor | None) -> None:
    """Update weights and moments; see `adamw.adamw`. If `clip_factor` is NaN, changes nothing."""
    factor = 1.0 if clip_factor is None else clip_factor.item()
    for tensors, gradient, numbers, key, origin in updates:
        segments = Segments.of(gradient, origin, is_rounded=is_rounded(tensors))
        parameter = _Parameter(
            _Matrix(*segments, key),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **numbers._asdict(),
            gradient=gradient.data_ptr(),
            clip_factor=factor,
            gradient_bytes=gradient.itemsize,
            moment_bytes=tensors["exp_avg"].itemsize,
        )
        if not math.isnan(factor):
            _run(partial(library().adamw, ctypes.byref(parameter)), segments.count(gradient))


def add(total: Tensor, gradient: Tensor, key: int, origin: Origin) -> None:
    """Add a gradient in bf16 to a sum in fp32, or in bf16 with stochastic rounding; both (rows, columns)."""
    segments = Segments.of(gradient, origin, is_rounded=total.itemsize < 4)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (total, gradient)]
    matrix, size = _Matrix(*segments, key), ctypes.c_int32(total.itemsize)
    _run(partial(library().add, *pointers, size, ctypes.byref(matrix)), segments.count(gradient))


def norm(tensor: Tensor) -> float:
    """Return the L2 norm of a contiguous tensor in bf16 or fp32. Adds squares in fp64, in an order that is fixed."""
    sums = torch.zeros(-(-tensor.numel() // _SUMMED_ELEMENTS), dtype=torch.float64)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (tensor, sums)]
    numbers = [ctypes.c_int64(tensor.numel()), ctypes.c_int64(_SUMMED_ELEMENTS), ctypes.c_int32(tensor.itemsize)]
    _run(partial(library().squares, *pointers, *numbers), len(sums), per_thread=8)
    return math.sqrt(math.fsum(sums.tolist()))


def _run(
    kernel: Callable[[ctypes.c_int64, ctypes.c_int64], None], segments: int, *, per_thread: int = _SEGMENTS_PER_THREAD
) -> None:
    """Call `kernel(first, last)` until it has done all segments, in several threads if it pays."""
    parts = min(torch.get_num_threads(), max(1, segments // per_thread))
    ends = [ctypes.c_int64(segments * index // parts) for index in range(parts + 1)]
    first, *others = zip(ends, ends[1:], strict=False)
    running = []
    try:
        for span in others:
            running.append(_threads().submit(kernel, *span))
        kernel(*first)
    finally:
        if running:
            wait(running)  # also after an error: they use the caller's tensors


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="kernels")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of its parent's threads
