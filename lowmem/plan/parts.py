"""The parts of a memory prediction: bytes by purpose. Imports no torch."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NamedTuple

from lowmem.config.train_config import TrainConfig


class Kind(StrEnum):
    """What bytes are used for. `plan` prints the kinds in this order, the longest-lived first."""

    WEIGHTS = "weights"
    LOW_HALVES = "low halves"
    MOMENTS = "moments"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    COMMUNICATION = "communication"
    """Buffers of collectives, and the all-gathered weights of a layer."""
    OFFLOADED = "offloaded"
    """Activations moved off the device."""


Bytes = dict[str, int]


class Cluster(NamedTuple):
    """The processes of the planned run."""

    world_size: int
    local_world_size: int
    """Processes on each machine."""
    on_gpu: bool
    """Whether each process has a GPU. If not, every process computes on a CPU like this machine's."""


def micro_batches_of(config: TrainConfig, cluster: Cluster) -> int:
    """Return how many micro-batches a step has on each data-parallel rank."""
    return -(-_rows_of(config, cluster) // (config.batch_size * data_ranks_of(config, cluster)))


def rows_of_micro_batch(config: TrainConfig, cluster: Cluster) -> int:
    """Return the rows of a step's largest micro-batch."""
    return -(-_rows_of(config, cluster) // (micro_batches_of(config, cluster) * data_ranks_of(config, cluster)))


def data_ranks_of(config: TrainConfig, cluster: Cluster) -> int:
    """Return the number of data-parallel ranks."""
    return max(1, cluster.world_size // (config.pp_size * config.tp_size))


def _rows_of(config: TrainConfig, cluster: Cluster) -> int:
    whole = config.global_batch_size
    return whole or config.batch_size * config.gradient_accumulation_steps * data_ranks_of(config, cluster)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step reads from the store of offloaded weights and writes to it, by phase of the step."""

    forward: int
    backward: int
    update: int
    """Of gradients and updates, while no layer computes."""
    written: int
    """Bytes that are written, of those of all phases."""

    @property
    def read(self) -> int:
        return self.forward + self.backward + self.update - self.written

    def step_seconds(self, *, bandwidth: float, computing: float) -> float:
        """Return how long a step takes at `bandwidth` (bytes per second), if computing alone takes `computing` seconds.

        A layer's weights and inputs are on their way while another layer computes: for a quarter of the time in
        forward, and for the rest in backward, which runs forward again. Gradients and updates go between layers.
        """
        forward, backward = (
            max(share * computing, num_bytes / bandwidth)
            for share, num_bytes in ((0.25, self.forward), (0.75, self.backward))
        )
        return forward + backward + self.update / bandwidth


@dataclass
class Counted:
    """The bytes of rank 0, or of the first rank of a stage, in one step."""

    peaks: dict[str, Bytes] = field(default_factory=dict)
    """{phase of the step: {kind: bytes at the phase's peak}}."""
    model_bytes: int = 0
    """Size of the model's files. `checkpoint_bytes` also includes the optimizer state."""
    checkpoint_bytes: int = 0
    num_parameters: int = 0
    sent_bytes: int = 0
    """Bytes that the rank sends to others in a step of all micro-batches; see `sent_bytes` in `lowmem.plan.meter`."""
    largest_parameter: int = 0
    """Elements of the largest parameter."""
    offloaded_bytes: int = 0
    """Bytes of weights and optimizer state that `offload_weights` moves."""
    forward_traffic: int = 0
    """Bytes that a step reads and writes in each phase with `offload_weights`; see `Traffic`."""
    backward_traffic: int = 0
    update_traffic: int = 0
    written_traffic: int = 0

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.forward_traffic, self.backward_traffic, self.update_traffic, self.written_traffic)


def extrapolate(shallow: Counted, deeper: Iterable[tuple[int, Counted]]) -> Counted:
    """Return `shallow` plus the sum of n x (deep - shallow) over `deeper`, because peaks are linear in stack depth."""
    total = copy.deepcopy(shallow)
    for times, deep in deeper:
        for name in (x.name for x in fields(Counted) if x.type is int):
            setattr(total, name, getattr(total, name) + times * (getattr(deep, name) - getattr(shallow, name)))
        for phase, parts in total.peaks.items():
            first, second = shallow.peaks[phase], deep.peaks[phase]
            for kind in {*first, *second}:
                parts[kind] = parts.get(kind, 0) + times * (second.get(kind, 0) - first.get(kind, 0))
    return total
