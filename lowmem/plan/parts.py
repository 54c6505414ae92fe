"""What a prediction of memory is about: the settings that it depends on, and bytes by what they are. No torch."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

WEIGHTS, LOW_HALVES, MOMENTS, GRADIENTS = "weights", "low halves", "moments", "gradients"
ACTIVATIONS, LOSS, BACKWARD, UPDATE, OFFLOADED = "activations", "loss", "backward", "update", "offloaded"

COMMUNICATION = "communication"
"""What collectives make, and weights gathered for a layer."""

ON_DEVICE = (WEIGHTS, LOW_HALVES, MOMENTS, GRADIENTS, ACTIVATIONS, LOSS, BACKWARD, UPDATE, COMMUNICATION)
KINDS = (*ON_DEVICE, OFFLOADED)
"""In the order in which they are told: what stays first."""

Bytes = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the bytes of a run depend on, under the names of the command line."""

    model: str
    """A folder, the path of a config.json, or a name of MODEL_SHAPES."""
    memory: str = "off"
    autocast: str = "no"
    optimizer: str = "adamw"
    freeze: str = ""
    loss: str = "chunked"
    recompute: str = "off"
    offload_activations: bool = False
    release: bool = False
    batch_size: int = 1
    """Rows of `seq_len` tokens in a micro-batch."""
    seq_len: int = 512
    is_padded: bool = True
    """Whether a mask hides padding, where the model needs one."""
    micro_batches: int = 1
    max_grad_norm: float = 1.0
    world_size: int = 1
    local_world_size: int = 1
    sharding_strategy: str = "NO_SHARD"
    shard_size: int | None = None
    cpu_offload: bool = False
    tp_size: int = 1
    on_gpu: bool = True
    """False: what a CPU computes with, as this machine would."""


@dataclass
class Counted:
    """Bytes on the first of alike ranks."""

    moments: dict[str, Bytes] = field(default_factory=dict)
    """The peak of each stretch of the step, by what it consists of."""
    model_bytes: int = 0
    """Of the model's files, and (`checkpoint_bytes`) of a checkpoint, whose tensors are whole."""
    checkpoint_bytes: int = 0
    num_parameters: int = 0


def followed(base: Counted, deeper: Iterable[tuple[int, Counted]]) -> Counted:
    """`base`, and what each of `deeper` takes beyond it, so many times: each moment is linear in a stack's depth."""
    total = copy.deepcopy(base)
    for times, deep in deeper:
        for name in ("model_bytes", "checkpoint_bytes", "num_parameters"):
            each = getattr(deep, name) - getattr(base, name)
            setattr(total, name, getattr(total, name) + times * each)
        for moment, parts in total.moments.items():
            first, second = base.moments[moment], deep.moments[moment]
            for kind in {*first, *second}:
                parts[kind] = parts.get(kind, 0) + times * (second.get(kind, 0) - first.get(kind, 0))
    return total
