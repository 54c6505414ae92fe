"""What a run will take, before it runs; and the fastest settings that fit. Counting is done in processes of its own."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

from lowmem.config import TrainConfig, UsageError, parse_bytes
from lowmem.memory.parts import GRADIENTS, LOW_HALVES, MOMENTS, OFFLOADED, UPDATE, WEIGHTS, Bytes, Counted, Settings

_ON_HOST = (WEIGHTS, LOW_HALVES, MOMENTS, GRADIENTS, UPDATE)  # with cpu_offload
# interpreter, torch, transformers and rows read ahead, in each process; CUDA's as much more. All three are estimates.
_PROGRAM_BYTES = 600 * 2**20
_CONTEXT_BYTES = 600 * 2**20  # of CUDA and its libraries, on the device
_FRAGMENTS = 0.05  # of what tensors take


class Place(NamedTuple):
    """Where a run is planned for."""

    world_size: int
    local_world_size: int
    on_gpu: bool


@dataclass(frozen=True)
class Prediction:
    """Bytes by what they are: of a process on its device, of a machine's processes on its host, of the run on disk."""

    device: Bytes
    host: Bytes
    disk: Bytes

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


class Rung(NamedTuple):
    """A step of the ladder: what it is called, what it changes (all before it included), why it is not taken."""

    name: str
    changes: dict[str, object]
    refused: str = ""


Predict = Callable[[Iterable[TrainConfig]], list[Prediction]]


def settings_of(config: TrainConfig, place: Place) -> Settings:
    """What is counted for a run: micro-batches full of rows of `max_seq_len` tokens, all of them targets."""
    given = vars(config)
    same = {field.name: given[field.name] for field in dataclasses.fields(Settings) if field.name in given}
    data_ranks = place.world_size // config.tp_size
    micro_batches, rows = config.gradient_accumulation_steps, config.batch_size
    if config.global_batch_size is not None:
        micro_batches = -(-config.global_batch_size // (config.batch_size * data_ranks))
        rows = min(rows, -(-config.global_batch_size // (micro_batches * data_ranks)))
    return Settings(
        **same | {"memory": config.memory or "off", "batch_size": rows},
        model=config.model_name_or_path or config.model_config,
        autocast=config.autocast,
        seq_len=config.max_seq_len,
        micro_batches=micro_batches,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
        on_gpu=place.on_gpu,
    )


@contextmanager
def predicting(place: Place, processes: int | None = None) -> Iterator[Predict]:
    """Within it the function that predicts configs, as many at a time as there are cores."""
    processes = processes or min(4, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def predict(configs: Iterable[TrainConfig]) -> list[Prediction]:
            configs = list(configs)
            counted = pool.map(_count, [settings_of(config, place) for config in configs])
            return [prediction(config, place, each) for config, each in zip(configs, counted, strict=True)]

        yield predict


def _count(settings: Settings) -> Counted:
    from lowmem.rehearsal import rehearse  # torch is in this process alone

    return rehearse(settings)


def prediction(config: TrainConfig, place: Place, counted: Counted) -> Prediction:
    """The whole of it: what was counted, and what stands beside it."""
    away = {OFFLOADED, *(_ON_HOST if config.cpu_offload else ())} if place.on_gpu else {OFFLOADED}
    moments = [
        tuple({kind: size for kind, size in parts.items() if (kind in away) == on_host} for on_host in (False, True))
        for parts in counted.moments.values()
    ]
    device = dict(max((on_device for on_device, _ in moments), key=lambda parts: sum(parts.values())))
    host = max((on_host for _, on_host in moments), key=lambda parts: sum(parts.values()))
    host = {f"{kind}, of all processes": size * place.local_world_size for kind, size in host.items()}
    loaded = 4 * counted.num_parameters
    copies = 1 if config.is_divided else place.local_world_size
    loading = 0 if config.is_divided and config.model_name_or_path else loaded * copies
    if place.on_gpu:
        device["context, fragments"] = _CONTEXT_BYTES + int(_FRAGMENTS * sum(device.values()))
        training = sum(host.values())
    else:  # the device is the host
        host = {"tensors, of all processes": sum(device.values()) * place.local_world_size}
        training = sum(host.values())
    host["loading, beyond training"] = max(0, loading - training)
    host["programs"] = _PROGRAM_BYTES * (1 + place.on_gpu) * place.local_world_size
    keeps = config.save_total_limit + 1 if config.save_total_limit else 1  # before one goes its successor stands
    name = f"{keeps} checkpoints" if config.save_total_limit else "each checkpoint"
    return Prediction(device, host, {name: keeps * counted.checkpoint_bytes, "model": counted.model_bytes})


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


def gigabytes(num_bytes: int) -> str:
    """As --device_memory takes it."""
    return f"{num_bytes / 10**9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 10**6:.2f} MB"


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
        ("recompute=cheap", "a tenth of the time", {"recompute": "cheap"}),
        ("recompute=full", "a fifth to a third of the time", {"recompute": "full"}),
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
