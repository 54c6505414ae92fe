"""Predict the memory of a run before it starts. Separate processes count the bytes of one training step."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import TrainConfig
from lowmem.errors import UsageError
from lowmem.plan.parts import (
    Bytes,
    Cluster,
    Counted,
    Kind,
    Traffic,
    extrapolate,
    micro_batches_of,
    rows_of_micro_batch,
)

CONTEXT = "context, fragments"

_WITH_CPU_OFFLOAD = {Kind.WEIGHTS, Kind.LOW_HALVES, Kind.MOMENTS, Kind.GRADIENTS, Kind.UPDATE}
# Estimates. _PROGRAM_BYTES is a process's host memory for libraries and prefetched rows; with a GPU it is doubled.
_PROGRAM_BYTES = 600 * 2**20
_CONTEXT_BYTES = 600 * 2**20  # device memory per process: CUDA and its libraries
_FRAGMENTS = 0.05  # fragmentation, as a fraction of the bytes of tensors
IN_FLIGHT_BYTES, SLAB_BYTES = 2**26, 2**27  # of memory/offload.py, which imports torch; also of storage/records.py
STORE_SLAB_BYTES = 2**30  # of storage/records.py
_STORED = "offloaded weights and state"
_DRAWING_BYTES, _DRAWN_COPIES = 2**28, 3  # of model/spilled.py: kept in memory; of the parameter that is drawn
_HOST_BANDWIDTH, _FILE_BANDWIDTH = 25e9, 3e9  # bytes per second: PCIe 4.0 x16, and an NVMe SSD
_GPU_SPEED, _CPU_SPEED = 100e12, 0.1e12  # FLOP per second
_SSD_LIFE = 600e12  # bytes that can be written to a consumer SSD of 1 TB
_PLANNER_BYTES = 750 * 2**20  # host memory of a process that counts the bytes of a step, with torch's CUDA build
_WAITING_BYTES = 550 * 2**20  # host memory of a rank that waits for the planners

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prediction:
    """Peak bytes by purpose."""

    device: Bytes
    """Bytes of one process on its device. Of a pipeline, on a device of the stage that needs most."""
    host: Bytes
    """Bytes in the host memory of a machine, of all its processes."""
    disk: Bytes
    traffic: Traffic | None = None
    """With `offload_weights`: what a step reads and writes."""
    streaming: str = ""
    """With `offload_weights`: how long reading and writing take, and how long computing takes."""
    step_seconds: float | None = None
    """With `offload_weights`: how long a step takes."""
    device_floor: int = 0
    """The part of `device_bytes` that smaller activations do not lower: context, weights, optimizer state, gradients
    that are kept until the update."""
    sent_bytes: int = 0
    """What a process sends to others in a step; of a pipeline, a process of the stage that sends most."""
    stages: tuple[int, ...] = ()
    """The device bytes of each stage of a pipeline."""
    pipeline: str = ""
    """What limits a pipeline: messages, and waiting for other stages."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


Predict = Callable[[Iterable[TrainConfig]], Iterator[Prediction]]


@contextmanager
def planners(host_memory: str | None = None) -> Iterator[Executor]:
    """Yield a pool of counting processes: at most 4, one per core, within `host_memory`. Only they import torch."""
    most = min(4, len(os.sched_getaffinity(0)))
    if host_memory is not None:  # the ranks that wait for this pool also use host memory
        waiting = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * _WAITING_BYTES
        most = max(1, min(most, (parse_bytes(host_memory) - waiting) // _PLANNER_BYTES))
    pool = ProcessPoolExecutor(most, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def visible_gpus(pool: Executor) -> int:
    """Return how many GPUs torch sees. A process of `pool` counts them, so that this one need not import torch."""
    return _result(pool.submit(_num_gpus))


def predicting(pool: Executor, cluster: Cluster) -> Predict:
    """Return a function that predicts configs' peaks on `cluster`. The function caches the bytes of each step.

    A config with another number of processes is predicted for that number.
    """
    counted: dict[tuple[TrainConfig, Cluster], list[tuple[Future[Counted], Future[list[tuple[int, Counted]]]]]] = {}

    def key_of(config: TrainConfig) -> tuple[TrainConfig, Cluster]:
        """Return the same key for configs whose steps have the same bytes, in whichever memory these are."""
        where = {"cpu_offload": False, "offload_weights": config.offload_weights and "host"}
        limits = dict.fromkeys(("num_processes", "device_memory", "host_memory"))
        return replace(config, **where, **limits), cluster_of(config, cluster)

    def predict(configs: Iterable[TrainConfig]) -> Iterator[Prediction]:
        configs = list(configs)
        for config in configs:
            if (key := key_of(config)) not in counted:
                tasks = (_count_shallow, _count_deeper)
                counted[key] = [tuple(pool.submit(task, *key, x) for task in tasks) for x in range(config.pp_size)]

        def found(config: TrainConfig) -> Prediction:
            key = key_of(config)
            return prediction(config, key[1], *(extrapolate(*map(_result, pair)) for pair in counted[key]))

        return map(found, configs)  # not a generator, which ends with the first error

    return predict


def cluster_of(config: TrainConfig, cluster: Cluster) -> Cluster:
    """Return `cluster` with `config.num_processes` processes: on one machine, unless `cluster` has several."""
    processes = config.num_processes or cluster.world_size
    has_one_machine = cluster.local_world_size == cluster.world_size
    local = processes if has_one_machine else min(processes, cluster.local_world_size)
    return cluster._replace(world_size=processes, local_world_size=local)


def predicted_or_refused(
    before: TrainConfig, configs: Sequence[TrainConfig], predict: Predict
) -> Iterator[tuple[TrainConfig, Prediction | UsageError]]:
    """Yield each config with its prediction, or with why its model cannot be split into stages that `before` lacks."""
    predictions = predict(configs)
    for config in configs:
        try:
            yield config, next(predictions)
        except UsageError as error:
            if config.pp_size in (1, before.pp_size):
                raise
            yield config, error


def _result(found: Future[Result]) -> Result:
    try:
        return found.result()
    except BrokenProcessPool as error:
        found = f"a prediction process ended early; each needs {gigabytes(_PLANNER_BYTES)} of host memory"
        raise UsageError(f"{found}: free some, or set --host_memory so that fewer processes run") from error


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _count_shallow(config: TrainConfig, cluster: Cluster, stage: int) -> Counted:
    from lowmem.plan.rehearsal import count_shallow

    return count_shallow(config, cluster, stage)


def _count_deeper(config: TrainConfig, cluster: Cluster, stage: int) -> list[tuple[int, Counted]]:
    from lowmem.plan.rehearsal import count_deeper

    return count_deeper(config, cluster, stage)


def prediction(config: TrainConfig, cluster: Cluster, *counted: Counted) -> Prediction:
    """Add the bytes outside a step (programs, loading, checkpoints) to the bytes of a step, `counted` for each stage.

    Without a pipeline, a model has one stage.
    """
    ranks = [_of_rank(config, cluster, each) for each in counted]
    largest = max(ranks, key=lambda rank: _total(rank.device))
    machines = [
        Counter(rank // config.tp_size % len(counted) for rank in range(first, first + cluster.local_world_size))
        for first in range(0, cluster.world_size, cluster.local_world_size)
    ]  # how many ranks of each stage a machine has
    hosts = [_summed((ranks[stage].host, number) for stage, number in machine.items()) for machine in machines]
    host = {f"{kind}, of all processes": size for kind, size in max(hosts, key=_total).items()}
    disk = dict(largest.disk)
    # each rank reads its part of saved weights; only rank 0 initializes new ones
    loading = 0 if config.model_name_or_path else 4 * sum(each.num_parameters for each in counted)
    if loading and config.scratch_folder:
        disk["random weights, beyond training"] = max(0, loading - sum(disk.values()))
        loading = _DRAWING_BYTES + _DRAWN_COPIES * 4 * max(each.largest_parameter for each in counted)
    host["loading, beyond training"] = max(0, loading - _total(host))
    host["programs"] = programs_bytes(cluster)
    keeps = config.save_total_limit + 1 if config.save_total_limit else 1  # the oldest is removed only after a save
    if config.save_steps:
        name = f"{keeps} checkpoints" if config.save_total_limit else "each checkpoint"
        disk[name] = keeps * sum(each.checkpoint_bytes for each in counted)
    if config.save_model:
        disk["model"] = sum(each.model_bytes for each in counted)
    found = Prediction(
        largest.device,
        host,
        disk,
        device_floor=max(rank.floor for rank in ranks),
        sent_bytes=max(each.sent_bytes for each in counted),
    )
    if len(counted) > 1:
        stages = tuple(_total(rank.device) for rank in ranks)
        found = replace(found, stages=stages, pipeline=_waiting(config, cluster, counted))
    if not counted[0].offloaded_bytes:
        return found
    line, seconds = _streaming(config, cluster, *counted)
    return replace(found, traffic=counted[0].traffic, streaming=line, step_seconds=seconds)


class _Rank(NamedTuple):
    """The bytes of a process."""

    device: Bytes
    host: Bytes
    disk: Bytes
    """Bytes of all processes of a machine."""
    floor: int


def _of_rank(config: TrainConfig, cluster: Cluster, counted: Counted) -> _Rank:
    on_host = {Kind.OFFLOADED} | (_WITH_CPU_OFFLOAD if config.cpu_offload and cluster.on_gpu else set())
    kept = {Kind.WEIGHTS, Kind.LOW_HALVES, Kind.MOMENTS} | (set() if config.release else {Kind.GRADIENTS})
    peaks = [{kind: parts[kind] for kind in Kind if kind in parts} for parts in counted.peaks.values()]
    floor = max(sum(parts.get(kind, 0) for kind in kept - on_host) for parts in peaks)
    device, host = (
        max(({kind: parts[kind] for kind in parts if (kind in on_host) == is_host} for parts in peaks), key=_total)
        for is_host in (False, True)
    )
    processes = cluster.local_world_size
    stored, disk = counted.offloaded_bytes, {}
    if stored:
        in_flight = IN_FLIGHT_BYTES * (2 if Kind.OFFLOADED in host else 1)  # of state, and of activations
        device[Kind.UPDATE] = device.get(Kind.UPDATE, 0) + min(in_flight, stored)
        if config.offload_weights == "host":
            host[_STORED] = -(-stored // STORE_SLAB_BYTES) * STORE_SLAB_BYTES if cluster.on_gpu else stored
        else:
            disk[_STORED] = stored * processes
            if Kind.OFFLOADED in host:
                disk["offloaded activations, gradients"] = host.pop(Kind.OFFLOADED) * processes
    if cluster.on_gpu:
        if offloaded := host.get(Kind.OFFLOADED):
            device[Kind.ACTIVATIONS] = device.get(Kind.ACTIVATIONS, 0) + min(IN_FLIGHT_BYTES, offloaded)
            host[Kind.OFFLOADED] = -(-offloaded // SLAB_BYTES) * SLAB_BYTES
        device[CONTEXT] = _context_bytes_of(_total(device))
    else:  # the CPU is the device; offload_activations then writes files, which take no memory
        in_memory = host.get(_STORED, 0) + (host.get(Kind.OFFLOADED, 0) if config.offload_weights == "host" else 0)
        host = {"tensors": _total(device) + in_memory}
    floor += _context_bytes_of(floor) if cluster.on_gpu else 0
    return _Rank(device, host, disk, floor)


def idle_share(config: TrainConfig, cluster: Cluster) -> float:
    """Return how long each stage of a pipeline waits for others, as a part of the time in which it computes."""
    return (config.pp_size - 1) / micro_batches_of(config, cluster)


def _waiting(config: TrainConfig, cluster: Cluster, counted: Sequence[Counted]) -> str:
    """Describe what a pipeline sends, and estimate the seconds of sending, of computing and of waiting."""
    micro_batches, idle = micro_batches_of(config, cluster), idle_share(config, cluster)
    sent, speed = max(each.sent_bytes for each in counted), _GPU_SPEED if cluster.on_gpu else _CPU_SPEED
    tokens = micro_batches * rows_of_micro_batch(config, cluster) * config.max_seq_len
    operations = (8 if config.recompute == "full" else 6) * sum(each.num_parameters for each in counted) * tokens
    computing = operations / (len(counted) * config.tp_size * speed)
    return (
        f"in each step, a process of the pipeline sends up to {gigabytes(sent)}: {sent / _HOST_BANDWIDTH:.1f} s at "
        f"{_HOST_BANDWIDTH / 1e9:g} GB/s (PCIe 4.0 x16); if stages take equally long, computing takes "
        f"{computing:.1f} s at {speed / 1e12:g} TFLOP/s, and waiting for other stages {computing * idle:.1f} s "
        f"({idle:.0%} of computing: (stages - 1) / micro-batches = {config.pp_size - 1} / {micro_batches})"
    )


def _streaming(config: TrainConfig, cluster: Cluster, counted: Counted) -> tuple[str, float]:
    """Describe what a step reads and writes, and estimate the seconds of streaming, of computing and of the step."""
    processes = cluster.local_world_size
    traffic = counted.traffic
    is_file = config.offload_weights != "host"
    bandwidth, what = (_FILE_BANDWIDTH, "an NVMe SSD") if is_file else (_HOST_BANDWIDTH, "PCIe 4.0 x16")
    speed = _GPU_SPEED if cluster.on_gpu else _CPU_SPEED
    rows = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps
    computing = 8 * counted.num_parameters * rows * config.max_seq_len / speed
    streaming, waiting = (num / bandwidth for num in (traffic.read + traffic.written, traffic.update))
    seconds = traffic.step_seconds(bandwidth=bandwidth, computing=computing)
    line = (
        f"each step {'of each process ' * (processes > 1)}reads {gigabytes(traffic.read)} and writes "
        f"{gigabytes(traffic.written)} of weights, state and inputs: {streaming:.1f} s at {bandwidth / 1e9:g} GB/s "
        f"({what}), {waiting:.1f} s of it while the device waits for updates; computing takes {computing:.1f} s at "
        f"{speed / 1e12:g} TFLOP/s; together {seconds:.1f} s"
    )
    if not is_file:
        return line, seconds
    written = 1000 * traffic.written * processes
    wear = f"1,000 steps write {written / 1e12:.1f} TB, {written / _SSD_LIFE:.0%} of a 1 TB SSD's rated endurance"
    return f"{line}; {wear}", seconds


def _context_bytes_of(tensor_bytes: int) -> int:
    return _CONTEXT_BYTES + int(_FRAGMENTS * tensor_bytes)


def _summed(parts: Iterable[tuple[Bytes, int]]) -> Bytes:
    """Return the sum of (bytes by purpose, how often they are needed)."""
    total = Counter()
    for sizes, times in parts:
        total.update({kind: size * times for kind, size in sizes.items()})
    return dict(total)


def _total(parts: Bytes) -> int:
    return sum(parts.values())


def programs_bytes(cluster: Cluster) -> int:
    """Return the host memory that the processes of a machine take without a model."""
    return _PROGRAM_BYTES * (1 + cluster.on_gpu) * cluster.local_world_size


def context_bytes(cluster: Cluster) -> int:
    """Return the device memory that CUDA takes before any tensor is created."""
    return _CONTEXT_BYTES if cluster.on_gpu else 0


def gigabytes(num_bytes: int) -> str:
    """Format bytes in the form that --device_memory accepts."""
    return f"{num_bytes / 10**9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 10**6:.2f} MB"
