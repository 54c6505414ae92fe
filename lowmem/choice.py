"""The fastest settings that fit, a ladder down from what was asked; and what other settings would take and cost."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lowmem.config import TrainConfig, UsageError, parse_bytes
from lowmem.plan import Place, Predict, Prediction, gigabytes, programs_bytes


class Rung(NamedTuple):
    """A step of the ladder: what it is called, what it changes (all before it included), why it is not taken."""

    name: str
    changes: dict[str, object]
    refused: str = ""


def ladder(config: TrainConfig, place: Place, fixed: Iterable[str]) -> Iterator[Rung]:
    """From what was asked to what takes least, cheapest first: each rung keeps the changes of those before it.

    Fields in `fixed` stay. So do the rows of an optimizer step, the tier and the optimizer: the loss curve is the same.
    """
    fixed, changes = set(fixed), {}
    yield Rung("as asked", {})

    def rung(name: str, **more: object) -> Rung:
        kept = sorted(fixed & more.keys())
        if kept:
            return Rung(name, {}, f"{', '.join('--' + field for field in kept)} is set")
        changes.update(more)
        return Rung(name, dict(changes))

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


def choose(
    config: TrainConfig, place: Place, fixed: Iterable[str], predict: Predict, tell: Callable[[str], None]
) -> tuple[TrainConfig, Prediction]:
    """The first rung that fits `device_memory` and `host_memory`; each one is told. Raises UsageError if none does."""
    programs = programs_bytes(place)
    if config.host_memory is not None and (over := programs - parse_bytes(config.host_memory)) > 0:
        raise UsageError(
            f"nothing fits: the programs of {place.local_world_size} processes alone take {gigabytes(programs)} of the "
            f"host, {gigabytes(over)} more than --host_memory={config.host_memory}"
        )
    rungs = list(ladder(config, place, fixed))
    for rung in (rung for rung in rungs if rung.refused):
        tell(f"  {rung.name}: not tried, {rung.refused}")
    tried = [rung for rung in rungs if not rung.refused]
    nearest: tuple[int, Rung, str] | None = None
    width = min(4, len(os.sched_getaffinity(0)))
    for start in range(0, len(tried), width):
        some = tried[start : start + width]
        configs = [dataclasses.replace(config, **rung.changes) for rung in some]
        for rung, changed, predicted in zip(some, configs, predict(configs), strict=True):
            missing, told = _missing(config, predicted)
            tell(f"  {rung.name}: {_told(predicted)}{'; fits' if not missing else f'; {told}'}")
            if not missing:
                return changed, predicted
            if nearest is None or missing < nearest[0]:
                nearest = missing, rung, told
    _, rung, told = nearest
    advice = "more processes, fewer tokens (--max_seq_len)"
    if config.memory != "lean" and config.optimizer != "sgd":
        advice += ", or the tier --mixed_precision=bf16 --memory=lean (another curve, inside the spread of seeds)"
    if refused := [rung.name for rung in rungs if rung.refused]:
        advice += f"; {', '.join(refused)} may not be tried, as their flags are set"
    raise UsageError(f"nothing fits: with {rung.name}, which comes nearest, {told}. Take {advice}")


def _missing(config: TrainConfig, predicted: Prediction) -> tuple[int, str]:
    """By how many bytes it does not fit, and a line that tells where."""
    limits = {"device_memory": predicted.device_bytes, "host_memory": predicted.host_bytes}
    over = {
        name: taken - parse_bytes(getattr(config, name))
        for name, taken in limits.items()
        if getattr(config, name) is not None and taken > parse_bytes(getattr(config, name))
    }
    told = [f"{gigabytes(size)} more than --{name}={getattr(config, name)}" for name, size in over.items()]
    return sum(over.values()), ", ".join(told)


def _told(predicted: Prediction) -> str:
    return f"device {gigabytes(predicted.device_bytes)}, host {gigabytes(predicted.host_bytes)}"


def variants(config: TrainConfig, place: Place) -> Sequence[tuple[str, str, TrainConfig]]:
    """Each tier, saver and strategy in place of what was asked, what it costs, and the config; what goes with it."""
    bf16 = {"mixed_precision": "bf16"}
    tiers = [
        ("memory=off", "nothing", {"memory": "off", "optimizer": config.optimizer.removesuffix("_bf16")}),
        ("memory=exact", "nothing: AdamW's curve over fp32 weights", bf16 | {"memory": "exact"}),
        ("memory=lean", "rounding: inside the spread of seeds", bf16 | {"memory": "lean"}),
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
    return [each for each in made if each[2] != config]


_STRATEGIES = [
    ("SHARD_GRAD_OP", "weights and gradients over the wire, each micro-batch"),
    ("FULL_SHARD", "the same, and weights twice"),
]
