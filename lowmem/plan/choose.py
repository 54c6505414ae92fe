"""Choose the fastest settings that fit the memory limits, and list alternative settings with their costs."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from lowmem.config.rules import conflicts
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import FIELDS, TIERED_OPTIMIZERS, TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.parts import Cluster
from lowmem.plan.predict import Predict, Prediction, context_bytes, gigabytes, programs_bytes


class Rung(NamedTuple):
    """One step of the ladder: a set of changes to the config that `choose` may try."""

    name: str
    changes: dict[str, object]
    """The changes of this rung and of all earlier rungs."""
    own: Set[str] = frozenset()
    """The fields that this rung itself changes."""
    refused: str = ""
    """Why this rung is not tried; empty if it is tried."""


def ladder(config: TrainConfig, cluster: Cluster, fixed: Iterable[str]) -> Iterator[Rung]:
    """Yield rungs from `config` down to the least memory, cheapest change first. Each keeps all earlier changes.

    No rung changes a field in `fixed`. No rung changes the loss: rows per step, tier and optimizer remain the same.
    """
    fixed, changes = set(fixed), {}
    yield Rung("no change", {})

    def rung(name: str, **more: object) -> Rung:
        if kept := sorted(name for name in fixed & more.keys() if more[name] != getattr(config, name)):
            return Rung(name, {}, refused=f"{', '.join('--' + field for field in kept)} is set")
        changes.update(more)
        return Rung(name, dict(changes), more.keys())

    if config.recompute == "off" and not config.layered:
        yield rung("recompute=cheap", recompute="cheap")
    if config.recompute != "full" and not config.layered:
        yield rung("recompute=full", recompute="full")
    may_release = config.max_grad_norm == 0 and config.nonfinite == "stop" and config.tp_size == 1
    if may_release and not (config.release or config.layered):
        yield rung("layered, release", layered=True, release=True, recompute="full")
    rows, micro_batches = config.batch_size, config.gradient_accumulation_steps
    while rows > 1 and (not config.release or config.layered):
        if config.global_batch_size is not None:
            rows = -(-rows // 2)
            yield rung(f"batch_size={rows}", batch_size=rows)
        elif rows % 2 == 0:
            rows, micro_batches = rows // 2, micro_batches * 2
            name = f"batch_size={rows} x accumulation {micro_batches}"
            yield rung(name, batch_size=rows, gradient_accumulation_steps=micro_batches)
        else:
            break
        if {"batch_size", "gradient_accumulation_steps"} & fixed:
            break  # this rung is refused, and smaller batch sizes would be too
    if not config.offload_activations:
        yield rung("offload_activations", offload_activations=True)
    strategy = config.sharding_strategy
    may_shard, may_offload = _may_shard(config), _may_offload(config, cluster)
    if may_shard and cluster.world_size > 1 and strategy == "NO_SHARD":
        yield rung("sharding_strategy=SHARD_GRAD_OP", sharding_strategy="SHARD_GRAD_OP")
    if may_shard and cluster.world_size > 1 and strategy in ("NO_SHARD", "SHARD_GRAD_OP"):
        yield rung("sharding_strategy=FULL_SHARD", sharding_strategy="FULL_SHARD")
    if may_shard and cluster.on_gpu and not config.cpu_offload:
        strategy = "FULL_SHARD" if strategy == "NO_SHARD" else strategy
        yield rung("cpu_offload", sharding_strategy=strategy, cpu_offload=True)
    if may_offload:
        strategy = "NO_SHARD" if cluster.world_size == 1 else "FULL_SHARD"
        others = {"layered": True, "sharding_strategy": strategy, "cpu_offload": False}
        if "recompute" in changes or config.recompute == "cheap":
            others["recompute"] = "full"
        if cluster.on_gpu and config.offload_weights is None:
            yield rung("offload_weights=host", offload_weights="host", **others)
        if config.offload_weights in (None, "host"):
            folder = os.path.join(config.output_dir, "offloaded")
            yield rung(f"offload_weights={folder}", offload_weights=folder, **others)


def _may_offload(config: TrainConfig, cluster: Cluster) -> bool:
    has_parts = cluster.world_size == 1 or config.optimizer != "adafactor"
    return has_parts and config.tp_size == 1 and config.memory in ("exact", "lean") and not config.compile


def _may_shard(config: TrainConfig) -> bool:
    is_free = config.tp_size == 1 and config.offload_weights is None
    return is_free and config.optimizer != "adafactor" and (config.layered or not config.release)


class _Tried(NamedTuple):
    rung: Rung
    config: TrainConfig
    predicted: Prediction
    excess: Mapping[str, int]
    """For each exceeded limit, the bytes by which the prediction exceeds it."""
    why: str
    """`excess` as text; empty if the prediction fits."""


def choose(
    config: TrainConfig, cluster: Cluster, fixed: Iterable[str], predict: Predict, log: Callable[[str], None]
) -> tuple[TrainConfig, Prediction]:
    """Find the first rung whose prediction fits the memory limits of `config`, and undo the rung's unneeded changes.

    Returns the resulting config and its prediction. Logs the rungs that it tries. Raises UsageError if no rung fits.
    """
    _check_programs(config, cluster)

    def tried(rungs: Sequence[Rung]) -> Iterator[_Tried]:
        configs = [dataclasses.replace(config, **rung.changes) for rung in rungs]
        for rung, changed, predicted in zip(rungs, configs, predict(configs), strict=True):
            device, host = predicted.device_bytes, predicted.host_bytes
            excess = _excess_bytes(config, {"device_memory": device, "host_memory": host})
            limits = {f"--{name}={getattr(config, name)}": size for name, size in excess.items()}
            why = ", ".join(f"{gigabytes(size)} more than {limit}" for limit, size in limits.items())
            log(f"  {rung.name}: device {gigabytes(device)}, host {gigabytes(host)}; {why or 'fits'}")
            yield _Tried(rung, changed, predicted, excess, why)

    all_rungs = list(ladder(config, cluster, fixed))
    refused = [rung for rung in all_rungs if rung.refused]
    for rung in refused:
        log(f"  {rung.name}: not tried, {rung.refused}")
    rungs = [rung for rung in all_rungs if not rung.refused]
    failed: list[_Tried] = []
    width = max(1, min(4, len(os.sched_getaffinity(0))) // 2)  # rungs predicted at a time; each uses two processes
    for start in range(0, len(rungs), width):
        for best in tried(rungs[start : start + width]):
            if not best.excess:
                return _undo_unneeded(best, rungs[: len(failed) + 1], tried)
            failed.append(best)
    nearest = min(failed, key=lambda each: sum(each.excess.values()))
    advice = "more processes or fewer tokens (--max_seq_len)"
    if config.memory != "lean" and config.optimizer in TIERED_OPTIMIZERS:
        advice += ", or --mixed_precision=bf16 --memory=lean (the loss differs, within the spread of seeds)"
    if refused:
        names = ", ".join(rung.name for rung in refused)
        advice += f"; to try {names}, remove their flags"
    if adapters := _fitting_adapters(config, nearest.rung, tried):
        advice += f"; or train adapters alone, which fit: {adapters}"
    raise UsageError(f"nothing fits: the closest setting, {nearest.rung.name}, needs {nearest.why}. Use {advice}")


def _fitting_adapters(config: TrainConfig, least: Rung, tried: Callable[[Sequence[Rung]], Iterator[_Tried]]) -> str:
    """Return the flags of LoRA or QLoRA with which the rung `least` fits; empty if neither does, or can be set."""
    if config.trains_adapters:
        return ""
    whole = {"sharding_strategy": "NO_SHARD", "cpu_offload": False, "offload_weights": None}  # for quantized weights
    for more in ({}, {"quantization": "nf4"} | whole):
        changes = least.changes | {"lora_rank": 16} | more
        changed = dataclasses.replace(config, **changes)
        if conflicts(changed, ()):
            continue
        flags = " ".join(f"--{name}={changes[name]}" for name in ("lora_rank", "quantization") if name in changes)
        with suppress(UsageError):  # such as for a model without linear layers, or without peft
            if not next(tried([Rung(flags, changes)])).excess:
                return flags
    return ""


def _check_programs(config: TrainConfig, cluster: Cluster) -> None:
    """Raise UsageError if Python, CUDA and their libraries alone exceed a limit, because then no rung can help."""
    what = {"host_memory": f"Python and its libraries ({cluster.local_world_size} processes)"}
    what["device_memory"] = "CUDA and its libraries"
    needed = {"host_memory": programs_bytes(cluster), "device_memory": context_bytes(cluster)}
    for name, over in _excess_bytes(config, needed).items():
        limit = f"--{name}={getattr(config, name)} ({parse_bytes(getattr(config, name)):,} bytes)"
        alone = f"{what[name]} alone need {gigabytes(needed[name])} of {name.replace('_', ' ')}"
        raise UsageError(f"nothing fits: {alone}, {gigabytes(over)} more than {limit}: raise the limit")


def _undo_unneeded(
    best: _Tried, rungs: Sequence[Rung], tried: Callable[[Sequence[Rung]], Iterator[_Tried]]
) -> tuple[TrainConfig, Prediction]:
    """Undo each change of an earlier rung, costliest first, if `best` (the rung that fits) still fits without it.

    Keeps what later rungs need, such as recompute=full with `layered`.
    """
    needed = set(best.rung.own)
    for before, rung in reversed(list(pairwise(rungs[:-1]))):
        if needed & rung.own:
            continue  # nothing to undo: a later, needed rung sets the same field, to a value that takes less memory
        kept = {name: value for name, value in best.rung.changes.items() if name not in rung.own}
        kept |= {name: value for name, value in before.changes.items() if name in rung.own}
        before_all = {name: FIELDS[name].default for name in rung.own - kept.keys()}
        is_possible = not conflicts(dataclasses.replace(best.config, **before_all, **kept), ())
        less = next(tried([Rung(f"without {rung.name}", kept)])) if is_possible else None
        if less is None or less.excess:
            needed |= rung.own
        else:
            best = less
    return best.config, best.predicted


def _excess_bytes(config: TrainConfig, needed: Mapping[str, int]) -> dict[str, int]:
    """Return {limit: bytes by which `needed` exceeds it} for each limit that is exceeded."""
    limits = {name: getattr(config, name) for name in needed}
    over = {name: needed[name] - parse_bytes(limit) for name, limit in limits.items() if limit is not None}
    return {name: size for name, size in over.items() if size > 0}


def variants(config: TrainConfig, cluster: Cluster) -> Sequence[tuple[str, str, TrainConfig]]:
    """Return (name, cost, config) for each variant of `config` with another tier, saver or sharding strategy."""
    bf16, in_fp32 = {"mixed_precision": "bf16"}, config.mixed_precision != "bf16"
    prefix, forward = ("mixed_precision=bf16, ", "a forward in bf16; ") if in_fp32 else ("", "")
    exact = f"{forward}loss curve of fp32 weights"
    found = []
    if config.optimizer in TIERED_OPTIMIZERS:
        found += [
            ("memory=off", "nothing", {"memory": "off", "optimizer": config.optimizer.removesuffix("_bf16")}),
            (f"{prefix}memory=exact", exact if in_fp32 else f"nothing: {exact}", bf16 | {"memory": "exact"}),
            (f"{prefix}memory=lean", f"{forward}rounding, at most the spread of seeds", bf16 | {"memory": "lean"}),
        ]
    found += [
        ("recompute=off", "nothing", {"recompute": "off"}),
        ("recompute=cheap", "norms, activations and dropout twice", {"recompute": "cheap"}),
        ("recompute=full", "each layer's forward twice", {"recompute": "full"}),
        ("offload_activations", "traffic to the host", {"offload_activations": True}),
    ]
    if cluster.world_size > 1 and _may_shard(config):
        costs = {"SHARD_GRAD_OP": "weights and gradients over the wire, each micro-batch"}
        costs["FULL_SHARD"] = "the same, and weights twice"
        found += [(f"sharding_strategy={name}", cost, {"sharding_strategy": name}) for name, cost in costs.items()]

    def with_tier(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, memory=config.memory or "off")

    made = [(name, cost, dataclasses.replace(config, **changes)) for name, cost, changes in found]
    return [each for each in made if with_tier(each[2]) != with_tier(config) and not conflicts(each[2], ())]
