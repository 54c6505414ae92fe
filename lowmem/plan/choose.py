"""Choose the fastest settings that fit the memory limits."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import dropwhile, pairwise
from typing import NamedTuple

from lowmem.config.rules import conflicts
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import FIELDS, TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.parts import Cluster, data_ranks_of
from lowmem.plan.predict import (
    Predict,
    Prediction,
    cluster_of,
    context_bytes,
    gigabytes,
    predicted_or_refused,
    programs_bytes,
)

# Fields that do not lower the bytes of weights, gradients and optimizer state.
_OF_ACTIVATIONS = {"recompute", "batch_size", "gradient_accumulation_steps", "offload_activations"}


class Rung(NamedTuple):
    """One step of the ladder: a set of changes to the config that `choose` may try."""

    name: str
    changes: dict[str, object]
    """The changes of this rung and of all earlier rungs that are not aside."""
    own: Set[str] = frozenset()
    """The fields that this rung itself changes."""
    is_aside: bool = False
    """Whether later rungs do not keep the changes."""
    refused: str = ""
    """Why this rung is not tried; empty if it is tried."""


def ladder(config: TrainConfig, cluster: Cluster, fixed: Iterable[str]) -> Iterator[Rung]:
    """Yield rungs from `config` down to the least memory, cheapest change first. Each keeps all earlier changes.

    (Of stages, later rungs keep nothing.) No rung changes a field in `fixed`. No rung changes the loss: rows per step,
    tier and optimizer remain the same.
    """
    fixed, changes = set(fixed), {}
    yield Rung("no change", {})

    def rung(name: str, is_aside: bool = False, **more: object) -> Rung:
        if kept := sorted(name for name in fixed & more.keys() if more[name] != getattr(config, name)):
            return Rung(name, {}, refused=f"{', '.join('--' + field for field in kept)} is set")
        if is_aside:
            return Rung(name, changes | more, more.keys(), is_aside)
        changes.update(more)
        return Rung(name, dict(changes), more.keys())

    has_stages = config.pp_size > 1
    if config.recompute == "off" and not (config.layered or has_stages):
        yield rung("recompute=cheap", recompute="cheap")
    if config.recompute != "full" and not config.layered:
        yield rung("recompute=full", recompute="full")
    may_release = config.max_grad_norm == 0 and config.nonfinite == "stop" and config.tp_size == config.pp_size == 1
    if may_release and config.mixed_precision != "fp16" and not (config.release or config.layered):
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
    may_offload = _may_offload(config, cluster)
    may_divide = may_shard(config) and data_ranks_of(config, cluster) > 1
    if may_divide and strategy == "NO_SHARD":
        yield rung("sharding_strategy=SHARD_GRAD_OP", sharding_strategy="SHARD_GRAD_OP")
    if may_divide and strategy in ("NO_SHARD", "SHARD_GRAD_OP"):
        yield rung("sharding_strategy=FULL_SHARD", sharding_strategy="FULL_SHARD")
    own = {"layered": config.layered, "release": config.release}  # without those of earlier rungs
    if stages := in_stages(dataclasses.replace(config, **changes | own), cluster):
        if config.recompute == "cheap":
            stages["recompute"] = "full"  # as an own change, which is not undone
        yield rung(f"pp_size={stages['pp_size']}", is_aside=True, **stages)
    if may_shard(config) and cluster.on_gpu and not config.cpu_offload:
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
    is_free = config.tp_size == config.pp_size == 1 and config.quantization is None and not config.compile
    return has_parts and is_free and config.memory in ("exact", "lean")


def may_shard(config: TrainConfig) -> bool:
    """Whether `config` allows another sharding strategy."""
    is_free = config.tp_size == 1 and config.offload_weights is None and config.quantization is None
    return is_free and config.optimizer != "adafactor" and (config.layered or not config.release)


def in_stages(config: TrainConfig, cluster: Cluster) -> dict[str, object]:
    """Return the changes that split the model into one stage per process; empty if other settings rule stages out.

    A step keeps its rows. (Whether the model can be split is known only when it is predicted.)
    """
    processes = cluster_of(config, cluster).world_size
    is_free = config.tp_size == config.pp_size == 1 and config.quantization is None and config.deepspeed is None
    is_free = is_free and not (config.layered or config.release or config.cpu_offload or config.offload_weights)
    if processes == 1 or not is_free:
        return {}
    changes = {"pp_size": processes, "sharding_strategy": "NO_SHARD", "layered": False, "release": False}
    if config.recompute == "cheap":
        changes["recompute"] = "full"
    if config.global_batch_size is None:
        changes["gradient_accumulation_steps"] = config.gradient_accumulation_steps * processes
    return {"shard_size": None, **changes} if config.shard_size else changes


class Choice(NamedTuple):
    """What `choose` or `search` found."""

    rung: str
    config: TrainConfig
    predicted: Prediction
    missing: str = ""
    """By how much the prediction exceeds the limits. Then nothing fits, and this is the closest setting."""


class _Tried(NamedTuple):
    rung: Rung
    config: TrainConfig
    predicted: Prediction
    excess: Mapping[str, int]
    """For each exceeded limit, the bytes by which the prediction exceeds it."""

    @property
    def missing(self) -> str:
        """`excess` as text; empty if the prediction fits."""
        limits = {f"--{name}={getattr(self.config, name)}": size for name, size in self.excess.items()}
        return ", ".join(f"{gigabytes(size)} more than {limit}" for limit, size in limits.items())

    @property
    def line(self) -> str:
        device, host = gigabytes(self.predicted.device_bytes), gigabytes(self.predicted.host_bytes)
        return f"  {self.rung.name}: device {device}, host {host}; {self.missing or 'fits'}"


def choose(
    config: TrainConfig, cluster: Cluster, fixed: Iterable[str], predict: Predict, log: Callable[[str], None]
) -> Choice:
    """Return the fastest settings of the ladder that fit the memory limits of `config`, or the closest ones.

    Logs the rungs that it tries and that save memory. Raises UsageError if the programs alone exceed a limit.
    """
    _check_programs(config, cluster)
    rungs = list(ladder(config, cluster, fixed))
    for rung in rungs:
        if rung.refused:
            log(f"  {rung.name}: not tried, {rung.refused}")
    return search(config, [rung for rung in rungs if not rung.refused], predict, log)


def search(config: TrainConfig, rungs: Sequence[Rung], predict: Predict, log: Callable[[str], None]) -> Choice:
    """Find the first rung whose prediction fits the limits of `config`, and undo its unneeded changes.

    Does not try rungs that change activations alone after a rung that exceeds the limit without its activations.
    Returns the closest rung if none fits. Logs what it tries, but not what saves no memory.
    """

    def tried(rungs: Sequence[Rung]) -> Iterator[_Tried]:
        configs = [dataclasses.replace(config, **rung.changes) for rung in rungs]
        found = predicted_or_refused(config, configs, predict)
        for rung, (changed, predicted) in zip(rungs, found, strict=True):
            if isinstance(predicted, UsageError):
                log(f"  {rung.name}: not tried, {predicted}")
                continue
            excess = {name: over for name, over in over_bytes(config, predicted).items() if over > 0}
            yield _Tried(rung, changed, predicted, excess)

    failed: list[_Tried] = []
    width = max(1, min(4, len(os.sched_getaffinity(0))) // 2)  # rungs predicted at a time; each uses two processes
    remaining = list(rungs)
    while remaining:
        for each in tried(remaining[:width]):
            if not each.excess:
                log(each.line)
                before = [rung for rung in rungs[: rungs.index(each.rung)] if not rung.is_aside]
                best = _undo_unneeded(each, [*before, each.rung], tried, log)
                return Choice(best.rung.name, best.config, best.predicted)
            if not failed or _saves(each.predicted, failed[-1].predicted):
                log(each.line)
            failed.append(each)
        remaining = remaining[width:]
        floor = failed[-1].predicted.device_floor
        if exceeds(config, device_memory=floor):
            useful = list(dropwhile(lambda rung: rung.own <= _OF_ACTIVATIONS, remaining))
            if skipped := remaining[: len(remaining) - len(useful)]:
                names = ", ".join(rung.name for rung in skipped)
                log(f"  {names}: not tried, {gigabytes(floor)} are needed without activations")
            remaining = useful
    nearest = min(failed, key=lambda each: sum(each.excess.values()))
    return Choice(nearest.rung.name, nearest.config, nearest.predicted, nearest.missing)


def _saves(after: Prediction, before: Prediction) -> bool:
    """Whether `after` needs less of a resource than `before`, by so much that it is printed."""
    pairs = [(x.device_bytes, x.host_bytes) for x in (after, before)]
    return any(less < more and gigabytes(less) != gigabytes(more) for less, more in zip(*pairs, strict=True))


def _check_programs(config: TrainConfig, cluster: Cluster) -> None:
    """Raise UsageError if Python, CUDA and their libraries alone exceed a limit, because then no rung can help."""
    what = {"host_memory": f"Python and its libraries ({cluster.local_world_size} processes)"}
    what["device_memory"] = "CUDA and its libraries"
    needed = {"host_memory": programs_bytes(cluster), "device_memory": context_bytes(cluster)}
    for name, over in _over(config, **needed).items():
        if over <= 0:
            continue
        limit = f"--{name}={getattr(config, name)} ({parse_bytes(getattr(config, name)):,} bytes)"
        alone = f"{what[name]} alone need {gigabytes(needed[name])} of {name.replace('_', ' ')}"
        raise UsageError(f"nothing fits: {alone}, {gigabytes(over)} more than {limit}: raise the limit")


def _undo_unneeded(
    best: _Tried,
    rungs: Sequence[Rung],
    tried: Callable[[Sequence[Rung]], Iterator[_Tried]],
    log: Callable[[str], None],
) -> _Tried:
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
        if less is not None:
            log(less.line)
        if less is None or less.excess:
            needed |= rung.own
        else:
            best = less
    return best


def over_bytes(config: TrainConfig, predicted: Prediction) -> dict[str, int]:
    """Return {limit: bytes by which `predicted` exceeds it} for each limit of `config`; negative if it fits."""
    return _over(config, device_memory=predicted.device_bytes, host_memory=predicted.host_bytes)


def exceeds(config: TrainConfig, **needed: int) -> bool:
    """Whether `needed`, bytes by the name of a limit, exceed a limit of `config`."""
    return any(over > 0 for over in _over(config, **needed).values())


def _over(config: TrainConfig, **needed: int) -> dict[str, int]:
    limits = {name: getattr(config, name) for name in needed}
    return {name: needed[name] - parse_bytes(limit) for name, limit in limits.items() if limit is not None}
