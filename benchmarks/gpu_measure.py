"""Time work on a device, trace it, and choose models that fit: what the sections of `gpu.py` share."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from compare import LLAMA_TINY, shapes
from footprint import Model
from memory import MODELS
from records import Record
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from lowmem.model.build import build_model

Case = tuple[Record, Callable[[], Iterable[Record]]]
"""What identifies a measurement, and a function that takes it and yields its results."""

_ROOM = 0.9  # of a GPU's free memory; the rest is for activations and fragments


def models(device: torch.device, *names: str) -> dict[str, Model]:
    """Return models with their micro-batches, by name; on a CPU, two tiny ones in place of any."""
    if device.type == "cuda":
        return {name: MODELS[name] for name in names}
    tiny = {"t5-tiny": shapes()["t5-tiny"], "llama-tiny": LLAMA_TINY}
    return {name: Model(shape, batch_size=2, seq_len=16) for name, shape in tiny.items()}


def part_that_fits(shape: Record, bytes_per_weight: float, device: torch.device) -> Record:
    """Return `shape` with as many of its layers as fit into the GPU's free memory. T5 and a CPU's models are whole.

    Raises RuntimeError if not even one layer fits.
    """
    if device.type == "cpu" or "num_hidden_layers" not in shape:
        return shape
    one, two = (num_weights(shape | {"num_hidden_layers": layers}) for layers in (1, 2))
    room = _ROOM * torch.cuda.mem_get_info(device)[0] / bytes_per_weight
    layers = min(shape["num_hidden_layers"], 1 + int((room - one) // (two - one)))
    if layers < 1:
        raise RuntimeError(f"one layer of {one:,} weights at {bytes_per_weight} bytes each does not fit")
    return shape | {"num_hidden_layers": layers}


def num_weights(shape: Record) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in build_model(AutoConfig.for_model(**shape), "sdpa").parameters())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], *, rounds: int) -> Record:
    """Run `work` twice, then `rounds` times; return medians of its time, and of the time until the call returns."""
    whole, host = [], []
    for _ in range(rounds + 2):
        synchronize()
        started = time.perf_counter()
        work()
        host.append(time.perf_counter() - started)
        synchronize()
        whole.append(time.perf_counter() - started)
    return {"ms": median(whole[2:]) * 1e3, "host_ms": median(host[2:]) * 1e3}


def peaks() -> Record:
    """Return the CUDA allocator's peaks since `torch.cuda.reset_peak_memory_stats`; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    statistics = torch.cuda.memory_stats()
    return {f"{kind}_bytes": statistics[f"{kind}_bytes.all.peak"] for kind in ("allocated", "active", "reserved")}


def traced(work: Callable[[], object]) -> Record:
    """Run `work` under torch's profiler; return its kernels, their time, and its copies; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    found: Record = {"kernels": len(kernels), "kernels_ms": sum(event["dur"] for event in kernels) / 1e3}
    for name, direction in (("to_host", "DtoH"), ("to_device", "HtoD")):
        copies = [event for event in events if event.get("cat") == "gpu_memcpy" and direction in event["name"]]
        found[f"{name}_bytes"] = sum(copy["args"]["bytes"] for copy in copies)
        found[f"{name}_ms"] = sum(copy["dur"] for copy in copies) / 1e3
    return found
