"""The fastest settings that fit, a ladder down from what was asked; and what other settings would take and cost."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.predict import Place, Predict, Prediction, context_bytes, gigabytes, programs_bytes


class Rung(NamedTuple):
    """A step of the ladder: what it is called, what it changes (all before it included), and which fields itself."""

    name: str
    changes: dict[str, object]
    own: Set[str] = frozenset()
    refused: str = ""
    """Why it is not taken."""


def ladder(config: TrainConfig, place: Place, fixed: Iterable[str]) -> Iterator[Rung]:
    """From what was asked to what takes least, cheapest first: each rung keeps the changes of those before it.

    Fields in `fixed` stay. So do the rows of an optimizer step, the tier and the optimizer: the loss curve is the same.
    """
    fixed, changes = set(fixed), {}
    yield Rung("as asked", {})

    def rung(name: str, **more: object) -> Rung:
        kept = sorted(fixed & more.keys())
        if kept:
            return Rung(name, {}, refused=f"{', '.join('--' + field for field in kept)} is set")
        changes.update(more)
        return Rung(name, dict(changes), more.keys())

    if config.recompute == "off":
        yield rung("recompute=cheap", recompute="cheap")
    if config.recompute != "full":
        yield rung("recompute=full", recompute="full")
    rows, micro_batches = config.batch_size, config.gradient_accumulation_steps
    while rows > 1 and not config.release:
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
            break  # smaller ones would be refused alike
    if not config.offload_activations:
        yield rung("offload_activations", offload_activations=True)
    may_divide = config.optimizer != "adafactor" and config.tp_size == 1 and not config.release
    if may_divide and place.world_size > 1 and config.sharding_strategy == "NO_SHARD":
        yield rung("sharding_strategy=SHARD_GRAD_OP", sharding_strategy="SHARD_GRAD_OP")
    if may_divide and place.world_size > 1 and config.sharding_strategy in ("NO_SHARD", "SHARD_GRAD_OP"):
        yield rung("sharding_strategy=FULL_SHARD", sharding_strategy="FULL_SHARD")
    if may_divide and place.on_gpu and not config.cpu_offload:
        strategy = "FULL_SHARD" if config.sharding_strategy == "NO_SHARD" else config.sharding_strategy
        yield rung("cpu_offload", sharding_strategy=strategy, cpu_offload=True)


class _Tried(NamedTuple):
    rung: Rung
    config: TrainConfig
    predicted: Prediction
    missing_bytes: int
    missing: str


def choose(
    config: TrainConfig, place: Place, fixed: Iterable[str], predict: Predict, tell: Callable[[str], None]
) -> tuple[TrainConfig, Prediction]:
    """The first rung that fits `device_memory` and `host_memory`, without those before it that it can do without.

    What is tried is told. Raises UsageError if no rung fits.
    """
    _check_programs(config, place)

    def tried(rungs: Sequence[Rung]) -> Iterator[_Tried]:
        configs = [dataclasses.replace(config, **rung.changes) for rung in rungs]
        for rung, changed, predicted in zip(rungs, configs, predict(configs), strict=True):
            each = _Tried(rung, changed, predicted, *_missing(config, predicted))
            tell(f"  {rung.name}: {_told(predicted)}; {each.missing or 'fits'}")
            yield each

    rungs = list(ladder(config, place, fixed))
    refused = [rung for rung in rungs if rung.refused]
    for rung in refused:
        tell(f"  {rung.name}: not tried, {rung.refused}")
    rungs = [rung for rung in rungs if not rung.refused]
    failed: list[_Tried] = []
    width = max(1, min(4, len(os.sched_getaffinity(0))) // 2)  # each is counted in two processes
    for start in range(0, len(rungs), width):
        for best in tried(rungs[start : start + width]):
            if not best.missing_bytes:
                return _without_needless(best, rungs[: len(failed) + 1], tried)
            failed.append(best)
    nearest = min(failed, key=lambda each: each.missing_bytes)
    advice = "more processes, fewer tokens (--max_seq_len)"
    if config.memory != "lean" and config.optimizer != "sgd":
        advice += ", or the tier --mixed_precision=bf16 --memory=lean (another curve, inside the spread of seeds)"
    if refused:
        names = ", ".join(rung.name for rung in refused)
        advice += f"; {names} may not be tried, as their flags are set"
    raise UsageError(f"nothing fits: with {nearest.rung.name}, which comes nearest, {nearest.missing}. Take {advice}")


def _check_programs(config: TrainConfig, place: Place) -> None:
    """Refuse limits that no setting meets, before anything is counted."""
    programs = f"the programs of {place.local_world_size} processes"
    what = {"host_memory": programs, "device_memory": "CUDA and its libraries"}
    taken = {"host_memory": programs_bytes(place), "device_memory": context_bytes(place)}
    for name, over in _beyond_limits(config, taken).items():
        limit = getattr(config, name)
        raise UsageError(
            f"nothing fits: {what[name]} alone take {gigabytes(taken[name])} of the {name.partition('_')[0]}, "
            f"{gigabytes(over)} more than --{name}={limit} ({parse_bytes(limit):,} bytes)"
        )


def _without_needless(
    best: _Tried, rungs: Sequence[Rung], tried: Callable[[Sequence[Rung]], Iterator[_Tried]]
) -> tuple[TrainConfig, Prediction]:
    """`best`, of the last of `rungs`, with each change before that taken back that it fits without, costliest first."""
    needed = set(best.rung.own)
    for before, rung in reversed(list(pairwise(rungs[:-1]))):
        if needed & rung.own:
            continue  # a later change of the same field is needed, and an earlier one takes more
        kept = {name: value for name, value in best.rung.changes.items() if name not in rung.own}
        kept |= {name: value for name, value in before.changes.items() if name in rung.own}
        (less,) = tried([Rung(f"without {rung.name}", kept)])
        if less.missing_bytes:
            needed |= rung.own
        else:
            best = less
    return best.config, best.predicted


def _missing(config: TrainConfig, predicted: Prediction) -> tuple[int, str]:
    """By how many bytes it does not fit, and a line that tells where."""
    taken = {"device_memory": predicted.device_bytes, "host_memory": predicted.host_bytes}
    over = _beyond_limits(config, taken)
    told = [f"{gigabytes(size)} more than --{name}={getattr(config, name)}" for name, size in over.items()]
    return sum(over.values()), ", ".join(told)


def _beyond_limits(config: TrainConfig, taken: Mapping[str, int]) -> dict[str, int]:
    """By the limit's name the bytes that are more than it."""
    limits = {name: getattr(config, name) for name in taken}
    over = {name: taken[name] - parse_bytes(limit) for name, limit in limits.items() if limit is not None}
    return {name: size for name, size in over.items() if size > 0}


def _told(predicted: Prediction) -> str:
    return f"device {gigabytes(predicted.device_bytes)}, host {gigabytes(predicted.host_bytes)}"


def variants(config: TrainConfig, place: Place) -> Sequence[tuple[str, str, TrainConfig]]:
    """Each tier, saver and strategy in place of what was asked, what it costs, and the config; what goes with it."""
    bf16, in_fp32 = {"mixed_precision": "bf16"}, config.mixed_precision != "bf16"
    prefix, forward = ("mixed_precision=bf16, ", "a forward in bf16; ") if in_fp32 else ("", "")
    exact = f"{forward}AdamW's curve over fp32 weights"
    tiers = [
        ("memory=off", "nothing", {"memory": "off", "optimizer": config.optimizer.removesuffix("_bf16")}),
        (f"{prefix}memory=exact", exact if in_fp32 else f"nothing: {exact}", bf16 | {"memory": "exact"}),
        (f"{prefix}memory=lean", f"{forward}rounding: inside the spread of seeds", bf16 | {"memory": "lean"}),
    ]
    if config.optimizer not in ("adamw", "adamw_bf16", "adafactor"):
        tiers = []
    savers = [
        ("recompute=off", "nothing", {"recompute": "off"}),
        ("recompute=cheap", "norms, activations and dropout once more", {"recompute": "cheap"}),
        ("recompute=full", "each layer's forward once more", {"recompute": "full"}),
        ("offload_activations", "traffic to the host", {"offload_activations": True}),
    ]
    strategies = []
    if place.world_size > 1 and config.tp_size == 1 and config.optimizer != "adafactor" and not config.release:
        strategies = [(f"sharding_strategy={name}", costs, {"sharding_strategy": name}) for name, costs in _STRATEGIES]
    made = [(name, costs, dataclasses.replace(config, **more)) for name, costs, more in tiers + savers + strategies]
    asked = dataclasses.replace(config, memory=config.memory or "off")
    return [each for each in made if dataclasses.replace(each[2], memory=each[2].memory or "off") != asked]


_STRATEGIES = [
    ("SHARD_GRAD_OP", "weights and gradients over the wire, each micro-batch"),
    ("FULL_SHARD", "the same, and weights twice"),
]
