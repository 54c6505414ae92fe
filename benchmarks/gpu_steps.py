"""Sections of `gpu.py` about whole steps: memory, speed, syncs, offload, lack of memory, kills."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import compare
import footprint
import torch
from footprint import Model, Work
from gpu_measure import Case, models, part_that_fits, peaks, timed, traced
from memory import WORKS
from records import Record
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lowmem import TrainState, chunked_loss, collate, init_distributed, make_optimizer, open_stream, resolve, train_step
from lowmem.config.train_config import TrainConfig
from lowmem.memory.offload import PinnedMemory
from lowmem.memory.out_of_memory import free_failed_step
from lowmem.memory.savers import SAVERS, Saver, entered
from lowmem.model.build import build_model
from lowmem.plan.parts import Cluster
from lowmem.plan.predict import CONTEXT, Prediction, planners, predicting
from lowmem.recover import fitting_step

TIER_BYTES = {"lean": 6, "exact": 16}
"""Bytes per weight when gradients are accumulated."""
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 operations per second by part of a GPU's name, from NVIDIA's data sheets; the first match counts."""


# --- memory
def memory(device: torch.device) -> Iterator[Case]:
    """Train two steps, and compare the allocator's peaks with what `plan` predicts."""
    cases = product(models(device, "llama-3.1-8b", "qwen2.5-0.5b", "t5-base").items(), TIER_BYTES, WORKS)
    with TemporaryDirectory() as name, planners() as pool:
        predict, planned = predicting(pool, Cluster(1, 1, device.type == "cuda")), []
        for number, ((model, spec), tier, work) in enumerate(cases):
            shape = part_that_fits(spec.shape, TIER_BYTES[tier], device)
            spec = Model(shape, spec.batch_size, spec.seq_len)
            folder = Path(name, str(number))
            folder.mkdir()
            config = _config(spec, tier, WORKS[work], folder)
            labels = {"model": model, "layers": shape.get("num_hidden_layers"), "memory": tier, "work": work}
            planned.append((labels, partial(_memory, spec, tier, WORKS[work], partial(predict, [config]))))
            predict([config])  # starts to count, in other processes, while this one measures
        yield from planned


def _config(spec: Model, tier: str, work: Work, folder: Path) -> TrainConfig:
    shape = folder / "config.json"
    shape.write_text(json.dumps(spec.shape))
    columns = {} if spec.shape["model_type"] == "t5" else {"text_column": "text"}
    step = {"batch_size": spec.batch_size, "max_seq_len": spec.seq_len, "recompute": "full"}
    step |= {"gradient_accumulation_steps": work.micro_batches, "max_grad_norm": work.max_grad_norm}
    step |= {name: True for name in work.savers} | {"mixed_precision": "bf16", "memory": tier}
    return resolve({"model_config": shape, "max_steps": 1, "output_dir": folder / "out"} | columns | step)


def _memory(spec: Model, tier: str, work: Work, predict: Callable[[], Iterator[Prediction]]) -> Iterator[Record]:
    system = footprint.System("lowmem", tier, savers=("recompute",))
    measured = footprint.run(spec, system, work, real=True, for_this_machine=True)
    found = {"counted_bytes": measured["peak_bytes"]} | peaks()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["context_bytes"] = total - free - torch.cuda.memory_reserved()
    (prediction,) = predict()
    assumed = prediction.device.get(CONTEXT, 0)
    yield found | {"predicted_bytes": prediction.device_bytes - assumed, "predicted_context_bytes": assumed}


# --- speed
def speed(device: torch.device) -> Iterator[Case]:
    """Train with each system in new processes, in interleaved rounds, as `compare.py` does."""
    systems = "--systems=trainer,lowmem-exact,lowmem-lean,plain"
    rounds = ["--repeats=2", "--steps=6"] if device.type == "cuda" else ["--repeats=1", "--steps=3", "--threads=1"]
    if device.type == "cuda":
        yield {"system": "matrix product"}, partial(_product, device)
    for name, spec in models(device, "qwen2.5-0.5b", "t5-base").items():
        work = [f"--model={name}", f"--batch_size={spec.batch_size}", f"--seq_len={spec.seq_len}"]
        flags = compare.parse_flags([*work, *rounds, systems])
        yield {"model": name, "batch": spec.batch_size, "seq_len": spec.seq_len}, partial(_speed, flags, spec)


def _product(device: torch.device) -> Iterator[Record]:
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = timed(lambda: matrix @ matrix, rounds=10)["ms"] / 1e3
    yield {"tflops": 2 * 8192**3 / seconds / 1e12}


def _speed(flags: object, spec: Model) -> Iterator[Record]:
    names = ("system", "repeat", "tokens_per_second", "seconds_per_step", "peak_device_bytes", "first_step_seconds")
    for record in compare.compare(flags):
        found = {name: record[name] for name in (*names, "left_out", "failed") if name in record}
        if "samples_per_second" in record:
            gpu, flops = record["machine"]["device"], record["samples_per_second"] * flops_per_row(spec)
            peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
            found |= {"tflops": flops / 1e12, "mfu": peak and flops / peak, "last_loss": record["loss"][-1]}
        yield found


def flops_per_row(spec: Model) -> float:
    """Return the operations of forward and backward for one row, without recomputation (PaLM, appendix B).

    Counts 6 per token and weight of a matrix product, and 12 x tokens^2 x width per attention. T5's inputs pass through
    its encoder, and as many targets through its decoder, so each weight meets one of the two.
    """
    config = AutoConfig.for_model(**spec.shape)
    with torch.device("meta"):
        model = build_model(config, "sdpa")
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if config.is_encoder_decoder:
        attentions, width = config.num_layers + 2 * config.num_decoder_layers, config.num_heads * config.d_kv
    else:
        attentions, width = config.num_hidden_layers, config.hidden_size
    return 6 * weights * spec.seq_len + 12 * attentions * width * spec.seq_len**2


# --- steps in this process
def rows_of(model: PreTrainedModel, count: int, seq_len: int, *, shorter: int = 0) -> list[dict[str, list[int]]]:
    """Make rows of random tokens; each is `shorter` tokens shorter than the one before."""
    lengths = [seq_len - shorter * number for number in range(count)]
    tokens = [torch.randint(3, model.config.vocab_size, (2, length)).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": other if model.config.is_encoder_decoder else ids} for ids, other in tokens]


def build(spec: Model, memory: str, device: torch.device, **changes: object) -> TrainState:
    torch.manual_seed(0)
    with device:
        model = build_model(AutoConfig.for_model(**spec.shape | changes), "sdpa")
    return TrainState(model, make_optimizer(model, memory=memory))


@contextmanager
def stepping(
    state: TrainState, spec: Model, savers: Iterable[Saver], *, micro_batches: int = 1, shorter: int = 0
) -> Iterator[Callable[[], object]]:
    """Yield a function that takes an optimizer step on the same rows."""
    rows = rows_of(state.model, spec.batch_size, spec.seq_len, shorter=shorter)
    batch = collate(rows, causal=not state.model.config.is_encoder_decoder)
    batches = [batch.pin_memory() if torch.cuda.is_available() else batch] * micro_batches
    options = {"learning_rate": 1e-4, "max_grad_norm": 1.0}
    with entered(savers, state.model, state.optimizer):
        yield partial(train_step, state, batches, chunked_loss, init_distributed(mixed_precision="no"), **options)


def syncs(device: torch.device) -> Iterator[Case]:
    """Count the host syncs and kernels of a step of two padded micro-batches through two layers."""
    savers = [("recompute",), ("recompute", "offload_activations")]
    for (name, spec), tier, used in product(models(device, "t5-base", "qwen2.5-0.5b").items(), TIER_BYTES, savers):
        yield {"model": name, "memory": tier, "savers": used}, partial(_syncs, spec, tier, used, device)


def _syncs(spec: Model, tier: str, savers: tuple[str, ...], device: torch.device) -> Iterator[Record]:
    state = build(spec, tier, device, num_hidden_layers=2, num_layers=2)
    with stepping(state, spec, [SAVERS[name] for name in savers], micro_batches=2, shorter=1) as step:
        step()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        yield {"syncs": len(places), "at": places} | traced(step)


def offload(device: torch.device) -> Iterator[Case]:
    """Time steps with and without `offload_activations`, and pinned copies, whose speed it can at best reach.

    Without a bound on the bytes in flight, forward would not wait for copies, and the peaks would be higher.
    """
    (name, spec), *_ = models(device, "t5-base").items()
    offloads = {"none": [], "offload_activations": [SAVERS["offload_activations"]]}
    if device.type == "cuda":
        yield {"savers": "none: pinned copies"}, partial(_pinned, device)
        unbounded = PinnedMemory(device, window_bytes=2**62)
        offloads["offload_activations, unbounded"] = [partial(SAVERS["offload_activations"], host=unbounded)]
    for recompute, (label, saver) in product([("recompute",), ()], offloads.items()):
        savers = [*(SAVERS[name] for name in recompute), *saver]
        yield {"model": name, "savers": [*recompute, label]}, partial(_step, spec, savers, device)


def _pinned(device: torch.device) -> Iterator[Record]:
    host, there = (
        torch.empty(2**30, dtype=torch.uint8, pin_memory=True),
        torch.ones(2**30, dtype=torch.uint8).to(device),
    )
    for name, target, source in (("to_host", host, there), ("to_device", there, host)):
        milliseconds = timed(partial(target.copy_, source, non_blocking=True), rounds=5)["ms"]
        yield {f"{name}_bytes": source.nbytes, f"{name}_ms": milliseconds}


def _step(spec: Model, savers: list[Saver], device: torch.device) -> Iterator[Record]:
    state = build(spec, "exact", device)
    with stepping(state, spec, savers) as step:
        times = timed(step, rounds=5)
        yield times | peaks() | traced(step)


# --- failures
def out_of_memory(device: torch.device) -> Iterator[Case]:
    """Let steps run out of memory, and compare their losses with those of steps that have enough."""
    (name, spec), *_ = models(device, "t5-base").items()
    yield {"model": name}, partial(_out_of_memory, spec, device)


def _out_of_memory(spec: Model, device: torch.device) -> Iterator[Record]:
    def run(limit: float | None) -> Record:
        state, halvings = build(spec, "exact", device), []
        rows = rows_of(state.model, 6 * spec.batch_size, spec.seq_len)
        padded = partial(collate, causal=not state.model.config.is_encoder_decoder)
        work = {"batch_size": spec.batch_size, "gradient_accumulation_steps": 2, "collate": padded, "prefetch": 0}
        state.stream = open_stream(rows, dict, **work)
        accelerator, before = init_distributed(mixed_precision="no"), torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if limit:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        options = {"learning_rate": 1e-4, "max_grad_norm": 1.0, "tell": lambda halving: halvings.append(str(halving))}
        found = [
            fitting_step(state, batches, chunked_loss, accelerator, **options).loss.item()
            for _, batches in zip(range(3), state.stream, strict=False)
        ]
        state.stream.close()
        return {"losses": found, "halvings": halvings, "before_bytes": before, **peaks()}

    enough = run(None)
    free_failed_step()
    # of the memory of activations, 0.6: more than a micro-batch of half as many rows needs
    limit = enough["before_bytes"] + 0.6 * (enough["reserved_bytes"] - enough["before_bytes"])
    less = run(limit)
    torch.cuda.set_per_process_memory_fraction(1.0)
    difference = mean(abs(a - b) / a for a, b in zip(enough["losses"], less["losses"], strict=True))
    yield {"needs_bytes": enough["reserved_bytes"], "limit_bytes": int(limit), "difference": difference} | less


def resume(device: torch.device) -> Iterator[Case]:
    """Kill and resume runs of the command line, and compare their bits with those of a run without kills."""
    for tier in TIER_BYTES if device.type == "cuda" else ["lean"]:
        yield {"memory": tier, "flags": "--deterministic=True"}, partial(_resume, tier, device)


def _resume(tier: str, device: torch.device) -> Iterator[Record]:
    from benchmarks.soak import soak  # finds lowmem and benchmarks by the path that `systems` adds

    with TemporaryDirectory() as folder:
        options = {"memory": tier, "deterministic": True, "hide_gpus": device.type == "cpu"}
        result = soak(Path(folder), kills=1, processes=1, **options)
    same = {name: getattr(result, name) for name in ("same_weights", "same_records", "same_answers")}
    (kill,) = result.kills
    yield {"steps": result.steps, "killed_at": kill.step, "resumed_from": kill.resumed_from} | same
