"""What else fits, beyond what `choose` may change, and what it costs. Also variants to compare a config with."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lowmem.config.rules import conflicts
from lowmem.config.train_config import FIELDS, TIERED_OPTIMIZERS, TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.choose import Choice, Rung, exceeds, in_stages, ladder, may_shard, over_bytes, search
from lowmem.plan.parts import Cluster
from lowmem.plan.predict import Predict, Prediction, cluster_of, idle_share

NOTHING_MEANS = '"nothing": no time and no exactness, only the bytes of this row'

_MOST_PROCESSES = 256
_FEWEST_TOKENS, _ROUND_TOKENS = 128, 64
_EXACT, _LEAN = ({"mixed_precision": "bf16", "memory": memory} for memory in ("exact", "lean"))
_RELEASED = {"release": True, "max_grad_norm": 0.0, "nonfinite": "stop"}
_WHOLE = {"sharding_strategy": "NO_SHARD", "shard_size": None, "cpu_offload": False, "offload_weights": None}
_RECOMPUTED = {"cheap": "norms, activations and dropout twice", "full": "each layer's forward twice"}
# Each row: a field, the value that it changes to (None: any), and what that costs.
_PRICES: list[tuple[str, object, str]] = [
    ("num_processes", None, "{value} processes, each with its own device"),
    ("lora_rank", None, "adapters alone are trained"),
    ("quantization", "nf4", "the frozen model is rounded to 4 bits"),
    ("mixed_precision", "bf16", "forward and backward in bf16"),
    ("memory", "lean", "rounding, at most the spread of seeds"),
    ("optimizer", "adafactor", "another optimizer, whose learning rate must be tuned"),
    ("max_grad_norm", 0, "no clipping"),
    ("max_seq_len", None, "rows are cut after {value} tokens"),
    ("batch_size", None, "smaller micro-batches"),
    ("offload_activations", True, "traffic to the host"),
    ("sharding_strategy", "SHARD_GRAD_OP", "weights and gradients over the wire, each {unit}"),
    ("sharding_strategy", "FULL_SHARD", "weights twice and gradients over the wire, each {unit}"),
    (
        "pp_size",
        None,
        "hidden states and their gradients over the wire, each micro-batch; {idle:.0%} idle",
    ),
    ("cpu_offload", True, "weights and gradients over PCIe, each {unit}; the CPU updates"),
    ("offload_weights", "host", "layers and their state stream from host memory"),
    ("offload_weights", None, "layers and their state stream from a file, which wears an SSD"),
]


def price(before: TrainConfig, after: TrainConfig, cluster: Cluster, step_seconds: float | None = None) -> str:
    """Return what `after` costs, compared with `before`, in time, exactness and devices; "nothing" if only memory."""
    found: dict[str, str] = {}
    idle = idle_share(after, cluster_of(after, cluster))
    for name, value, text in _PRICES:
        if getattr(after, name) not in (getattr(before, name), None) and value in (None, getattr(after, name)):
            unit = "step" if after.layered else "micro-batch"
            found.setdefault(name, text.format(value=getattr(after, name), unit=unit, idle=idle))
    if cluster_of(after, cluster).world_size == 1:
        found.pop("sharding_strategy", None)
    recompute = ["full" if config.layered else config.recompute for config in (before, after)]
    if recompute[0] != recompute[1] != "off":
        found["recompute"] = _RECOMPUTED[recompute[1]]
    if "offload_weights" in found and step_seconds is not None:
        found["offload_weights"] += f", {step_seconds:.1f} s a step"
    return "; ".join(found.values()) or "nothing"


class Alternative(NamedTuple):
    """Settings that fit."""

    config: TrainConfig
    predicted: Prediction


def alternatives(
    config: TrainConfig, cluster: Cluster, fixed: Iterable[str], choice: Choice, predict: Predict
) -> Iterator[Alternative]:
    """Yield settings that fit the limits of `config`, but that `choose`, which found `choice`, did not choose.

    First those that keep weights on the device. Each takes a few predictions.
    """
    finder = _Finder(config, cluster, set(fixed), predict, {choice.config})
    any_rung = _any if choice.missing else _stays
    has_tiers = config.optimizer in TIERED_OPTIMIZERS
    tier = _EXACT if has_tiers and config.memory not in ("exact", "lean") else {}
    layered = {"layered": True, "recompute": "full" if config.recompute == "cheap" else config.recompute}
    lean = []
    yield from finder.first({}, may=any_rung, fixed=())
    if has_tiers:
        yield from finder.first(tier)
        yield from (lean := list(finder.first(_LEAN)))
        adafactor = _LEAN | _RELEASED | _WHOLE | {"optimizer": "adafactor", "tp_size": 1}
        adafactor |= {name: FIELDS[name].default for name in ("adam_beta1", "adam_beta2", "adam_epsilon")}
        yield from finder.first(*[adafactor] * (cluster.world_size == 1), adafactor | layered)
    yield from finder.first(tier | layered, tier | layered | _RELEASED)
    if stages := in_stages(config, cluster):
        yield from finder.first(tier | stages)
    yield from finder.on_more_processes(tier)
    if has_tiers and not lean:
        yield from finder.on_more_processes(_LEAN)
    yield from finder.with_fewer_tokens(any_rung)
    if config.model_name_or_path and not config.trains_adapters:
        adapters = {"lora_rank": 16, "mixed_precision": "bf16"} | tier
        yield from finder.first(adapters, adapters | _WHOLE | {"quantization": "nf4"})
    for is_host in (True, False):
        yield from finder.first(tier, may=partial(_stays_or_streams, is_host=is_host))
    if has_tiers and not lean:
        yield from finder.first(_LEAN, may=_any)


def _any(rung: Rung) -> bool:
    return True


def _stays(rung: Rung) -> bool:
    """Whether weights and optimizer state stay on the device."""
    return not {"cpu_offload", "offload_weights"} & rung.own


def _offloads_nothing(rung: Rung) -> bool:
    return _stays(rung) and "offload_activations" not in rung.own


def _stays_or_streams(rung: Rung, *, is_host: bool) -> bool:
    return _stays(rung) or ("offload_weights" in rung.own and (rung.changes["offload_weights"] == "host") == is_host)


@dataclass
class _Finder:
    """Finds settings that fit, each once."""

    config: TrainConfig
    cluster: Cluster
    fixed: Set[str]
    predict: Predict
    known: set[TrainConfig]

    def first(
        self, *options: Mapping[str, object], may: Callable[[Rung], bool] = _stays, fixed: Set[str] | None = None
    ) -> Iterator[Alternative]:
        """Yield the first of `options`, each a set of changes, that fits with the rungs that `may` accepts, if new.

        Rungs change no field of `fixed` (None: those that flags set).
        """
        for changes in options:
            with suppress(UsageError):  # such as adapters for a model without linear layers, or without peft
                config, rungs = self._rungs(changes, may, self.fixed if fixed is None else fixed)
                choice = search(config, rungs, self.predict, lambda line: None)
                if choice.missing:
                    continue
                if choice.config not in self.known:
                    self.known.add(choice.config)
                    yield Alternative(choice.config, choice.predicted)
                return

    def on_more_processes(self, changes: Mapping[str, object]) -> Iterator[Alternative]:
        """Yield FULL_SHARD on about the fewest processes on which it fits. Its bytes grow with 1 / processes."""
        fewest, strategy = self.cluster.world_size + 1, self.config.sharding_strategy
        is_free = may_shard(self.config) and self.config.pp_size == 1 and strategy != "HYBRID_SHARD"
        if self.config.device_memory is None or not is_free:
            return

        def sharded(share: float) -> dict[str, object]:
            return {**changes, "sharding_strategy": "FULL_SHARD", "num_processes": round(1 / share)}

        def rounded(share: float, failed: float) -> float:
            processes = max(fewest, math.ceil(1 / share), round(1 / failed) + 1)
            return 1 / processes if processes <= _MOST_PROCESSES else 0.0

        # host memory grows with the number of processes, and more so if they offload
        may = _stays if self.config.host_memory is None else _offloads_nothing

        def over(share: float) -> int:
            return self._over_at_last_rung(sharded(share), may)["device_memory"]

        if share := _largest_that_fits(over, (0.5 / self.cluster.world_size, 0.25 / self.cluster.world_size), rounded):
            yield from self.first(sharded(share))

    def with_fewer_tokens(self, may: Callable[[Rung], bool]) -> Iterator[Alternative]:
        """Yield about the longest rows that fit, if shorter rows help."""
        length, floor = self.config.max_seq_len, next(self.predict([self.config])).device_floor
        if length < 2 * _FEWEST_TOKENS or (may == _stays and exceeds(self.config, device_memory=floor)):
            return

        def rounded(tokens: float, failed: float) -> float:
            most = int(min(tokens, failed - 1)) // _ROUND_TOKENS * _ROUND_TOKENS
            return most if most >= _FEWEST_TOKENS else 0

        def shorter(tokens: float) -> dict[str, object]:
            return {"max_seq_len": int(tokens)}

        def over(tokens: float) -> int:
            return max(self._over_at_last_rung(shorter(tokens), may).values())

        if tokens := _largest_that_fits(over, (length, length // 2), rounded):
            yield from self.first(shorter(tokens), may=may)

    def _over_at_last_rung(self, changes: Mapping[str, object], may: Callable[[Rung], bool]) -> dict[str, int]:
        """Return {limit: bytes by which the last rung exceeds it}; negative if it fits."""
        config, rungs = self._rungs(changes, may, self.fixed)
        last = [rung for rung in rungs if not rung.is_aside][-1]
        (predicted,) = self.predict([dataclasses.replace(config, **last.changes)])
        return over_bytes(config, predicted)

    def _rungs(
        self, changes: Mapping[str, object], may: Callable[[Rung], bool], fixed: Set[str]
    ) -> tuple[TrainConfig, Sequence[Rung]]:
        """Return the changed config and the rungs that may be tried. Raises UsageError if the changes conflict."""
        config = dataclasses.replace(self.config, **changes)
        if problems := conflicts(config, ()):
            raise UsageError("; ".join(problems))
        rungs = ladder(config, cluster_of(config, self.cluster), fixed)
        return config, [rung for rung in rungs if not rung.refused and may(rung)]


def _largest_that_fits(
    over: Callable[[float], int], start: tuple[float, float], rounded: Callable[[float, float], float]
) -> float:
    """Return about the largest x with over(x) <= 0; 0 if a few secant steps from the two x in `start` find none.

    `rounded(x, failed)` rounds x down, below `failed`, the smallest that does not fit; to 0 if that is too little.
    """
    points = [(x, over(x)) for x in start]
    for _ in range(4):
        (x1, first), (x2, second) = points
        slope = (first - second) / (x1 - x2) if x1 != x2 else 0
        failed = min((x for x, num_bytes in points if num_bytes > 0), default=math.inf)
        if slope <= 0 or (x := x1 - first / slope) <= 0 or not (x := rounded(x, failed)):
            return 0
        if (num_bytes := over(x)) <= 0:
            return x
        points = [points[1], (x, num_bytes)]
    return 0


def variants(config: TrainConfig, cluster: Cluster) -> Sequence[tuple[str, str, TrainConfig]]:
    """Return (name, cost, config) for each variant of `config` with another tier, saver or sharding strategy."""
    found: list[tuple[str, dict[str, object]]] = []
    if config.optimizer in TIERED_OPTIMIZERS:
        prefix = "" if config.mixed_precision == "bf16" else "mixed_precision=bf16, "
        found += [
            ("memory=off", {"memory": "off", "optimizer": config.optimizer.removesuffix("_bf16")}),
            (f"{prefix}memory=exact", _EXACT),
            (f"{prefix}memory=lean", _LEAN),
        ]
    if not config.layered:  # which implies recompute=full
        found += [(f"recompute={name}", {"recompute": name}) for name in ("off", "cheap", "full")]
    found.append(("offload_activations", {"offload_activations": True}))
    if cluster.world_size > 1 and may_shard(config):
        found += [(f"sharding_strategy={x}", {"sharding_strategy": x}) for x in ("SHARD_GRAD_OP", "FULL_SHARD")]

    if stages := in_stages(config, cluster):
        found.append((f"pp_size={stages['pp_size']}", stages))

    def with_tier(config: TrainConfig) -> TrainConfig:
        return dataclasses.replace(config, memory=config.memory or "off")

    made = [(name, dataclasses.replace(config, **changes)) for name, changes in found]
    made = [each for each in made if with_tier(each[1]) != with_tier(config) and not conflicts(each[1], ())]
    return [(name, price(config, changed, cluster), changed) for name, changed in made]
