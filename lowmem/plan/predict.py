"""What a run will take, before it runs. Counting is done in processes of its own."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.parts import (
    GRADIENTS,
    KINDS,
    LOW_HALVES,
    MOMENTS,
    OFFLOADED,
    ON_DEVICE,
    UPDATE,
    WEIGHTS,
    Bytes,
    Counted,
    Settings,
    followed,
)

CONTEXT = "context, fragments"
DEVICE_PARTS = (*ON_DEVICE, CONTEXT)

_ON_HOST = (WEIGHTS, LOW_HALVES, MOMENTS, GRADIENTS, UPDATE)  # with cpu_offload
# interpreter, torch, transformers and rows read ahead, in each process; CUDA's as much more. All three are estimates.
_PROGRAM_BYTES = 600 * 2**20
_CONTEXT_BYTES = 600 * 2**20  # of CUDA and its libraries, on the device
_FRAGMENTS = 0.05  # of what tensors take
_PLANNER_BYTES = 500 * 2**20  # of a process that counts
_WAITING_BYTES = 250 * 2**20  # of a rank meanwhile


Result = TypeVar("Result")


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


Predict = Callable[[Iterable[TrainConfig]], Iterator[Prediction]]


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
def planners(host_memory: str | None = None) -> Iterator[Executor]:
    """Processes that count, so that this one needs no torch: one a core, up to four, as far as `host_memory` holds."""
    most = min(4, len(os.sched_getaffinity(0)))
    if host_memory is not None:  # on which a launcher's ranks wait meanwhile
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * _WAITING_BYTES
        most = max(1, min(most, (parse_bytes(host_memory) - beside) // _PLANNER_BYTES))
    pool = ProcessPoolExecutor(most, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def visible_gpus(pool: Executor) -> int:
    """GPUs that processes of this machine see."""
    return _result(pool.submit(_num_gpus))


def predicting(pool: Executor, place: Place) -> Predict:
    """The function that predicts configs at `place`; what it has counted once it does not count again."""
    counted: dict[Settings, tuple[Future[Counted], Future[list[tuple[int, Counted]]]]] = {}

    def predict(configs: Iterable[TrainConfig]) -> Iterator[Prediction]:
        configs = list(configs)
        wanted = [settings_of(config, place) for config in configs]
        for settings in wanted:
            if settings not in counted:
                counted[settings] = pool.submit(_count_shallow, settings), pool.submit(_count_deeper, settings)
        return (
            prediction(config, place, followed(*map(_result, counted[settings])))
            for config, settings in zip(configs, wanted, strict=True)
        )

    return predict


def _result(found: Future[Result]) -> Result:
    try:
        return found.result()
    except BrokenProcessPool as error:
        raise UsageError(
            f"a process that was to predict has ended: each takes {gigabytes(_PLANNER_BYTES)} of host memory, look "
            "whether that is there (with --host_memory no more of them run than it holds)"
        ) from error


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _count_shallow(settings: Settings) -> Counted:
    from lowmem.plan.rehearsal import count_shallow

    return count_shallow(settings)


def _count_deeper(settings: Settings) -> list[tuple[int, Counted]]:
    from lowmem.plan.rehearsal import count_deeper

    return count_deeper(settings)


def prediction(config: TrainConfig, place: Place, counted: Counted) -> Prediction:
    """The whole of it: what was counted, and what stands beside it."""
    away = {OFFLOADED, *(_ON_HOST if config.cpu_offload else ())} if place.on_gpu else {OFFLOADED}
    moments = [dict(sorted(parts.items(), key=lambda part: KINDS.index(part[0]))) for parts in counted.moments.values()]
    on_device = [{kind: size for kind, size in parts.items() if kind not in away} for parts in moments]
    on_host = [{kind: size for kind, size in parts.items() if kind in away} for parts in moments]
    device, host = (max(each, key=lambda parts: sum(parts.values())) for each in (on_device, on_host))
    host = {f"{kind}, of all processes": size * place.local_world_size for kind, size in host.items()}
    loaded = 4 * counted.num_parameters
    copies = 1 if config.is_divided else place.local_world_size
    loading = 0 if config.is_divided and config.model_name_or_path else loaded * copies
    if place.on_gpu:
        device[CONTEXT] = _CONTEXT_BYTES + int(_FRAGMENTS * sum(device.values()))
        training = sum(host.values())
    else:  # the device is the host
        host = {"tensors, of all processes": sum(device.values()) * place.local_world_size}
        training = sum(host.values())
    host["loading, beyond training"] = max(0, loading - training)
    host["programs"] = programs_bytes(place)
    keeps = config.save_total_limit + 1 if config.save_total_limit else 1  # before one goes its successor stands
    name = f"{keeps} checkpoints" if config.save_total_limit else "each checkpoint"
    return Prediction(device, host, {name: keeps * counted.checkpoint_bytes, "model": counted.model_bytes})


def programs_bytes(place: Place) -> int:
    """Of the host, whatever is trained."""
    return _PROGRAM_BYTES * (1 + place.on_gpu) * place.local_world_size


def context_bytes(place: Place) -> int:
    """What a device has given away before there is a tensor."""
    return _CONTEXT_BYTES if place.on_gpu else 0


def gigabytes(num_bytes: int) -> str:
    """As --device_memory takes it."""
    return f"{num_bytes / 10**9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 10**6:.2f} MB"
