"""What a prediction of memory is made of: bytes by what they are for. No torch."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What bytes are for, in the order in which `plan` prints them: what stays longest comes first."""

    WEIGHTS = "weights"
    LOW_HALVES = "low halves"
    MOMENTS = "moments"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    COMMUNICATION = "communication"
    """What collectives allocate, and the all-gathered weights of a layer."""
    OFFLOADED = "offloaded"
    """Activations that are not on the device."""


Bytes = dict[str, int]


class Cluster(NamedTuple):
    """The processes that a run is planned for."""

    world_size: int
    local_world_size: int
    """Processes on each machine."""
    on_gpu: bool
    """Each process has a GPU. False: they compute on CPUs like this machine's."""


@dataclass
class Counted:
    """Bytes on rank 0."""

    moments: dict[str, Bytes] = field(default_factory=dict)
    """The peak of each phase of the step, by kind."""
    model_bytes: int = 0
    """Size of the model's files. A checkpoint, which also holds the whole optimizer state, has `checkpoint_bytes`."""
    checkpoint_bytes: int = 0
    num_parameters: int = 0


def extrapolate(shallow: Counted, deeper: Iterable[tuple[int, Counted]]) -> Counted:
    """Add to `shallow` what each of `deeper` takes beyond it, so many times: peaks are linear in a stack's depth."""
    total = copy.deepcopy(shallow)
    for times, deep in deeper:
        for name in ("model_bytes", "checkpoint_bytes", "num_parameters"):
            setattr(total, name, getattr(total, name) + times * (getattr(deep, name) - getattr(shallow, name)))
        for moment, parts in total.moments.items():
            first, second = shallow.moments[moment], deep.moments[moment]
            for kind in {*first, *second}:
                parts[kind] = parts.get(kind, 0) + times * (second.get(kind, 0) - first.get(kind, 0))
    return total
