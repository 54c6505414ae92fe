"""Partition a model's layers into stages, and find which stages hold which weight and get which messages."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import nn
from transformers import PreTrainedModel

from lowmem.distributed.trace import Trace, is_of_t5
from lowmem.errors import UsageError


def starts_of_stages(model: PreTrainedModel, traced: Trace, num_stages: int) -> list[int]:
    """Return the index of each stage's first layer.

    A layer's part of all weights is its part of the time, because each weight multiplies each token once. Embeddings
    before the layers are looked up, which takes memory but no time, while a head takes both. Raises UsageError if there
    are fewer layers than stages.
    """
    if len(traced.layers) < num_stages:
        found = f"{type(model).__name__} has {len(traced.layers)} layers"
        raise UsageError(f"pp_size={num_stages} needs a layer for each stage, but {found}: lower pp_size")
    numel = [sum(x.numel() for x in layer.parameters()) for layer in traced.layers]
    ends = {0: 0, len(traced.layers): 0}
    for parameter, gaps in traced.uses.items():
        for gap in gaps & ends.keys():
            ends[gap] += parameter.numel()
    embeddings, head = ends[0], ends[len(traced.layers)]
    time, held = sum(numel) + head, sum(numel) + embeddings + head
    return balanced(
        [size / time + size / held for size in numel], embeddings / held, head / time + head / held, num_stages
    )


def users_of_weights(model: nn.Module, traced: Trace, starts: list[int]) -> dict[nn.Parameter, tuple[int, ...]]:
    """Return which stages hold each parameter of `model`."""
    num_layers, num_encoder_layers = len(traced.layers), traced.num_encoder_layers
    stage_of = [sum(start <= index for start in starts) - 1 for index in range(num_layers)]
    users: dict[nn.Parameter, set[int]] = {parameter: set() for parameter in model.parameters()}
    for index, layer in enumerate(traced.layers):
        for parameter in layer.parameters():
            users[parameter].add(stage_of[index])
    for parameter, gaps in traced.uses.items():
        users[parameter].update(stage_of[min(gap, num_layers - 1)] for gap in gaps)
    for indices, path, names in _position_biases(traced.layers, num_encoder_layers):
        first = traced.layers[indices[0]].get_submodule(path)
        for name in names:
            users[getattr(first, name).weight].update(stage_of[index] for index in indices)
    return {parameter: tuple(sorted(stages or {0})) for parameter, stages in users.items()}


def messages_to(starts: list[int], num_encoder_layers: int, stage: int) -> frozenset[int]:
    """Return the layers whose outputs stage `stage` - 1 sends to `stage`."""
    if stage == 0:
        return frozenset()
    has_decoder = 0 < num_encoder_layers <= starts[stage]
    return frozenset({starts[stage] - 1, *([num_encoder_layers - 1] if has_decoder else [])})


def balanced(costs: Sequence[float], first: float, last: float, num_stages: int) -> list[int]:
    """Return where each stage begins, so that the most expensive one costs least. Each has one layer or more.

    `costs` are those of the layers; the first and the last stage cost `first` and `last` more.
    """
    sums = [0.0, *accumulate(costs)]
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by where the next stage begins
    for stage in range(num_stages):
        extra = first * (stage == 0) + last * (stage == num_stages - 1)
        reached: dict[int, tuple[float, list[int]]] = {}
        for start, (worst, starts) in best.items():
            for end in range(start + 1, len(costs) - (num_stages - 1 - stage) + 1):
                found = max(worst, sums[end] - sums[start] + extra), [*starts, start]
                reached[end] = min(reached.get(end, found), found)
        best = reached
    return best[len(costs)][1]


def _position_biases(layers: list[nn.Module], num_encoder_layers: int) -> Iterator[tuple[range, str, list[str]]]:
    """Yield which attention of T5 computes the position bias of all layers of a stack.

    Each is the indices of these layers, the attention's path in the first of them, and the names of its embeddings.
    """
    for indices in (range(num_encoder_layers), range(num_encoder_layers, len(layers))):
        for path, attention in layers[indices[0]].named_modules() if indices else ():
            if _computes_bias(attention) and not _computes_bias(layers[indices[-1]].get_submodule(path)):
                names = [name for name, _ in attention.named_children() if name.endswith("relative_attention_bias")]
                yield indices, path, names


def _computes_bias(attention: nn.Module) -> bool:
    return is_of_t5(attention) and attention.has_relative_attention_bias


def share_position_bias(layers: list[nn.Module], num_encoder_layers: int, own: range) -> None:
    """Let the first own layer of each stack of T5 compute the position bias, with the weights of the stack's first."""
    for indices, path, names in _position_biases(layers, num_encoder_layers):
        mine = [index for index in indices if index in own]
        if mine and mine[0] != indices[0]:
            first, other = (layers[index].get_submodule(path) for index in (indices[0], mine[0]))
            other.has_relative_attention_bias = True
            # not as submodules, because weights keep their one name
            vars(other).update((name, getattr(first, name)) for name in names)
