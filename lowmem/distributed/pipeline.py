"""Pipeline parallelism: each process of a line holds a stage, which is a contiguous part of a model's layers.

Every stage runs the model's own forward on the same rows, up to its last layer. It has no weights of other stages:
placeholders take their places, which are zeros without memory. Their layers do nothing, except that the output of the
layer before a stage is a message from the stage before. The output of an encoder's last layer is sent to all stages
with layers of the decoder. A weight that several stages use, such as tied embeddings, is on each of them, and its
gradients are summed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lowmem.distributed.collectives import collective, gather_json, raise_error_of_any_rank, sum_over_ranks
from lowmem.distributed.dtensor import is_first_copy, local_of
from lowmem.distributed.gathered import Gathered, Resident, Store
from lowmem.distributed.placement import (
    PIPELINE_MESH,
    TENSOR_PARALLEL_MESH,
    is_sharded,
    original_class,
    place_on_mesh,
    unwrapped,
)
from lowmem.distributed.reduce import all_reduce_sum
from lowmem.distributed.stages import (
    Trace,
    balanced,
    hidden_of,
    is_of_t5,
    placeholder,
    replaced_forwards,
    shaped,
    trace,
)
from lowmem.errors import RankError, UsageError


def make_pipeline_mesh(kind: str, world_size: int, pp_size: int, tp_size: int) -> DeviceMesh:
    """Make a mesh of shape (data ranks, `pp_size`, `tp_size`)."""
    if world_size % (pp_size * tp_size):
        found = f"pp_size={pp_size} x tp_size={tp_size} was set, which does not divide {world_size} processes"
        raise UsageError(f"{found}: start a multiple of {pp_size * tp_size} processes")
    shape = (world_size // (pp_size * tp_size), pp_size, tp_size)
    return init_device_mesh(kind, shape, mesh_dim_names=PIPELINE_MESH)


def mesh_within_stage(mesh: DeviceMesh) -> DeviceMesh:
    """Return the part of a mesh of `make_pipeline_mesh` over which a stage is sharded."""
    return mesh[TENSOR_PARALLEL_MESH if mesh.size(2) > 1 else "data"]


def split_into_stages(model: PreTrainedModel, mesh: DeviceMesh, starts: Sequence[int] | None = None) -> None:
    """Leave in `model` only the weights of this process's stage. The model may be on meta.

    `starts` are the indices of the stages' first layers (None: those that balance the stages). Raises UsageError for a
    model that a pipeline does not support, or that has fewer layers than stages.
    """
    traced = trace(model)
    starts = _starts(model, traced, mesh.size(1)) if starts is None else list(starts)
    place_on_mesh(model, mesh)
    # an attribute, because a table would keep the model for ever
    setattr(model, _STAGES, Stages(model, mesh, traced, starts))


def depths_of_stages(model: PreTrainedModel, num_stages: int) -> list[tuple[int, int]]:
    """Return how many layers of an encoder, and how many others, each stage of `model` would get.

    Raises UsageError as `split_into_stages` does.
    """
    traced = trace(model)
    starts = _starts(model, traced, num_stages)
    ends = [*starts[1:], len(traced.layers)]
    before = [min(index, traced.num_encoder_layers) for index in starts]
    after = [min(index, traced.num_encoder_layers) for index in ends]
    return [(b - a, end - start - (b - a)) for start, end, a, b in zip(starts, ends, before, after, strict=True)]


_STAGES = "_lowmem_stages"


def stages_of(model: nn.Module) -> "Stages | None":
    """Return the stages into which `model` is split, if it is."""
    return getattr(unwrapped(model), _STAGES, None)


def sum_over_stages(model: nn.Module, number: int) -> int:
    """Return the sum of `number` over the stages of `model`; without stages, `number`."""
    stages = stages_of(model)
    return number if stages is None else sum_over_ranks(number if stages.is_first_of_stage else 0)[0]


def logits_on_all_stages(model: nn.Module) -> AbstractContextManager[None]:
    """Within this block, without gradients, a model in stages returns the last stage's logits on each of them."""
    stages = stages_of(model)
    return nullcontext() if stages is None else stages.generating()


class Stages:
    """A model that is split into stages, as one process sees it."""

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, traced: Trace, starts: list[int]):
        self.index, self.number = mesh.get_local_rank(1), mesh.size(1)
        self.layers, self._num_outputs = traced.layers, traced.num_outputs
        self.model_class = original_class(model).__name__
        self.names = frozenset(model.state_dict())
        """Of the whole model."""
        self.own = range(starts[self.index], [*starts, len(self.layers)][self.index + 1])
        """The indices of this stage's layers."""
        self._model, self._mesh = model, mesh
        users = _users(model, traced, starts)
        self.links = Links(mesh)
        self.received = _messages(starts, traced.num_encoder_layers, self.index)
        """The layers whose outputs come from the stage before."""
        self.sent = _messages(starts, traced.num_encoder_layers, self.index + 1) if not self.is_last else frozenset()
        """The layers whose outputs go to the next stage."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        shared = {names[parameter]: stages for parameter, stages in users.items() if len(stages) > 1}
        trained = {stage for parameter, stages in users.items() if parameter.requires_grad for stage in stages}
        if trained and (frozen := set(range(self.number)) - trained):
            found = f"all weights of stage {min(frozen)} are frozen"
            raise UsageError(f"pp_size={self.number} needs weights to train on each stage, but {found}: lower pp_size")
        self._shared = _groups(mesh, shared)
        self.counted_before = {name for name, stages in shared.items() if self.index > stages[0]}
        """The names of shared weights that an earlier stage has too."""
        self._placeholders: list[tuple[nn.Module, str]] = []
        _share_position_bias(self.layers, traced.num_encoder_layers, self.own)
        self._drop_weights({parameter for parameter, stages in users.items() if self.index in stages})
        self.needs_gradients = any(stage < self.index for stage in trained)
        """Whether the stages before this one need the gradients of their outputs."""
        self.returns_gradients = not self.is_last and any(stage <= self.index for stage in trained)
        """Whether the next stage returns the gradients of its inputs."""
        self.schedule: object | None = None
        """The pipeline (memory/pipeline.py) that runs these stages, after its first step."""

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this is the first process of its stage."""
        return self._mesh.get_local_rank(0) == self._mesh.get_local_rank(2) == 0

    @property
    def _has_collectives(self) -> bool:
        """Whether the forward of a stage has collectives."""
        return is_sharded(self._model) or self._mesh.size(2) > 1

    @property
    def is_last(self) -> bool:
        return self.index == self.number - 1

    @cached_property
    def store(self) -> Store:
        """Where this stage's weights are. Made after all weights have their dtypes."""
        layers = [self.layers[index] for index in self.own]
        return Gathered(self._model, layers, None) if is_sharded(self._model) else Resident()

    @cached_property
    def _name_of(self) -> dict[nn.Parameter, str]:  # made after all weights are sharded
        return {parameter: name for name, parameter in self._model.named_parameters()}

    def convert_placeholders(self, dtype: torch.dtype) -> None:
        """Give the placeholders the dtype of the weights, so that hidden states have the dtype of messages."""
        for module, name in self._placeholders:
            setattr(module, name, placeholder(getattr(module, name), self.links.device, dtype))

    def shaped(self, index: int, output: Tensor) -> object:
        """Return `output` as the layer of this index returns it."""
        return shaped(output, self._num_outputs[index])

    def output_of(self, index: int, outputs: object, hidden: Tensor) -> Tensor:
        """Return the output of the layer of this index, which returns `outputs` for `hidden`.

        Raises UsageError if it is not like `hidden`, perhaps under autocast, because the next stage expects that.
        """
        output = outputs if self._num_outputs[index] is None else outputs[0]
        if (output.shape, output.dtype) != (hidden.shape, hidden.dtype):
            what = f"takes {hidden.dtype} {[*hidden.shape]} and returns {output.dtype} {[*output.shape]}"
            found = f"{type(self.layers[index]).__name__} {what}"
            raise UsageError(f"pp_size sends hidden states of one shape and dtype, but {found}: set pp_size=1")
        return output

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether sums over all ranks count this rank's part of a parameter."""
        is_first = is_first_copy(parameter) if isinstance(parameter, DTensor) else self.is_first_of_stage
        return is_first and self._name_of[parameter] not in self.counted_before

    def sum(self, totals: Sequence[Tensor], gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Sum `totals` over stages, and the gradients of shared weights over the stages that hold them, in place."""
        all_reduce_sum(totals, self._mesh.get_group(1))
        by_name = {self._name_of[parameter]: gradient for parameter, gradient in gradients.items()}
        for names, group in self._shared:
            all_reduce_sum([local_of(by_name[name]) for name in names if name in by_name], group)

    @torch.no_grad()
    def on_all(self, function: Callable[[], tuple[Tensor, dict]]) -> tuple[Tensor, dict]:
        """Call a function that runs the model once, without gradients, on every stage.

        Returns on every stage what it returns on the last one: a scalar, and pairs of scalars by name. If it fails on
        any rank, every rank raises an error; if weights are sharded, only that rank and the stages after it. Runs a
        small collective of all ranks.
        """
        error, result = None, None
        try:
            with self._running(stops=True):
                value, pairs = function()
            result = [value.item(), {name: [float(x) for x in pair] for name, pair in pairs.items()}]
        except _StageEnd:
            pass
        except _StageFailed as caught:
            if self._has_collectives:
                raise RankError(f"stage {self.index - 1} has failed in a forward") from caught
        except Exception as caught:
            if self._has_collectives or isinstance(caught, RankError):
                raise  # other ranks wait within their forward, not for the collective below
            error = caught
        of_ranks = gather_json([result, error is not None])
        if any(failed for _, failed in of_ranks):
            raise_error_of_any_rank(error)
        value, pairs = of_ranks[self.links.ranks[-1]][0]
        scalar = torch.tensor(value, device=self._mesh.device_type)
        return scalar, {name: tuple(pair) for name, pair in pairs.items()}

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Within this block, without gradients, the model returns the last stage's logits on every stage."""
        head, group = self._model.get_output_embeddings(), self._mesh.get_group(1)

        def shared(head: nn.Module) -> Callable:
            forward = head.forward

            def of_last_stage(hidden: Tensor) -> Tensor:
                shape = (*hidden.shape[:-1], head.weight.shape[0])
                logits = forward(hidden).float() if self.is_last else torch.empty(shape, device=hidden.device)
                with collective("broadcasting logits"):
                    dist.broadcast(logits, self.links.ranks[-1], group=group)
                return logits

            return of_last_stage

        with self._running(stops=False), replaced_forwards([head], shared):
            yield

    @contextmanager
    def _running(self, *, stops: bool) -> Iterator[None]:
        """Within this block, the forward runs without gradients. With `stops`, only up to this stage's last layer."""
        index_of = {layer: index for index, layer in enumerate(self.layers)}
        left, awaited = sorted(self.sent), set(self.received)

        def replacement(layer: nn.Module) -> Callable:
            forward, index = layer.forward, index_of[layer]

            def run(*args, **kwargs):
                hidden = hidden_of(args, kwargs)
                if index in self.own:
                    self.store.fetch(layer, None)
                    outputs = forward(*args, **kwargs)
                    hidden = self.output_of(index, outputs, hidden)
                else:
                    if index in self.received:
                        if stops and index not in awaited:  # the stages before have ended
                            found = f"the loss runs {type(self._model).__name__} again"
                            raise UsageError(f"a loss runs a model in stages once, but {found}: set pp_size=1")
                        awaited.discard(index)
                        try:
                            hidden = self.links.receive_or_fail(hidden.shape, hidden.dtype)
                        except _StageFailed:
                            awaited.clear()  # it sends no more
                            raise
                    outputs = self.shaped(index, hidden)
                if index in self.sent:
                    self.links.send_or_fail(hidden)
                    if stops:
                        left.remove(index)
                if stops and not self.is_last and index == self.own[-1]:
                    raise _StageEnd
                return outputs

            return run

        with ExitStack() as stack:
            stack.enter_context(self.store.step())
            stack.enter_context(replaced_forwards(self.layers, replacement))
            try:
                yield
            except Exception as error:
                if stops and not isinstance(error, RankError):
                    if left:
                        self.links.send_or_fail(None)
                    self.links.drop(len(awaited))  # else the next forward would take them
                    self.links.wait()
                raise
            self.links.wait()

    def _drop_weights(self, kept: set[nn.Parameter]) -> None:
        for module in self._model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter not in kept:
                    del module._parameters[name]
                    setattr(module, name, placeholder(parameter, self.links.device))
                    self._placeholders.append((module, name))


class _StageEnd(BaseException):
    """Ends a forward after the last layer of a stage. Not an Exception, so that no loss function catches it."""


class _StageFailed(Exception):
    """A stage before this one has failed."""


class Links:
    """The connections of a stage with its neighbours, one for forward and one for backward."""

    def __init__(self, mesh: DeviceMesh):
        rank = dist.get_rank()
        self.device = torch.device(mesh.device_type)
        self._forward = mesh.get_group(1)
        self.sent_bytes = 0
        """Bytes of all messages that this process has sent."""
        for line in _lines(mesh):  # all processes make all groups, in one order
            # a group of its own, because NCCL runs what is sent and received in a group in one order
            group = dist.new_group(line)
            if rank in line:
                self.ranks, self._backward = line, group
        self._index = self.ranks.index(rank)
        self._in_flight: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Begin to send `tensor` to the next stage. It must not change before `wait`."""
        self._send(tensor, 1, self._forward)

    def receive(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive a tensor from the stage before."""
        return self._receive(shape, dtype, -1, self._forward)

    def send_back(self, gradient: Tensor) -> None:
        """Begin to send a gradient to the stage before."""
        self._send(gradient, -1, self._backward)

    def receive_back(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive a gradient from the next stage."""
        return self._receive(shape, dtype, 1, self._backward)

    def send_or_fail(self, tensor: Tensor | None) -> None:
        """Send `tensor` to the next stage or, if it is None, that this stage has failed."""
        num_bytes = -1 if tensor is None else tensor.nbytes
        self.send(torch.tensor([num_bytes], dtype=torch.int64, device=self.device))
        if tensor is not None:
            self.send(tensor.detach().contiguous().view(-1).view(torch.uint8))

    def receive_or_fail(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive what the stage before passes to `send_or_fail`. Raises _StageFailed if it has failed."""
        return self._received_bytes().view(dtype).view(shape)

    def drop(self, count: int) -> None:
        """Receive what the stage before passes to `count` calls of `send_or_fail`, or until it fails, for no use."""
        with suppress(_StageFailed):
            for _ in range(count):
                self._received_bytes()

    def _received_bytes(self) -> Tensor:
        num_bytes = int(self.receive(torch.Size([1]), torch.int64).item())
        if num_bytes < 0:
            raise _StageFailed
        return self.receive(torch.Size([num_bytes]), torch.uint8)

    def wait(self) -> None:
        """Wait until all that was sent has been received. (On a GPU, its stream waits, not the host.)"""
        while self._in_flight:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self._in_flight.popleft()
        with collective("sending to a neighbouring stage"):
            work.wait()

    def _send(self, tensor: Tensor, offset: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.detach().contiguous()
        # Gloo completes a message only in `wait`. At most one micro-batch for each stage is on its way, with at most
        # two messages in each direction, so an older message has been received.
        while len(self._in_flight) >= 4 * len(self.ranks) or (self._in_flight and self._in_flight[0][0].is_completed()):
            self._wait_for_oldest()
        with collective(f"sending to stage {self._index + offset}"):
            work = dist.isend(tensor, self.ranks[self._index + offset], group=group)
        self._in_flight.append((work, tensor))
        self.sent_bytes += tensor.nbytes

    def _receive(self, shape: torch.Size, dtype: torch.dtype, offset: int, group: dist.ProcessGroup) -> Tensor:
        received = torch.empty(shape, dtype=dtype, device=self.device)
        with collective(f"waiting for stage {self._index + offset}"):
            dist.recv(received, self.ranks[self._index + offset], group=group)
        return received


def _groups(mesh: DeviceMesh, shared: dict[str, tuple[int, ...]]) -> list[tuple[list[str], dist.ProcessGroup]]:
    """Return the names of the weights that this process shares with the same other stages, and their group."""
    groups = []
    for stages in sorted(set(shared.values())):
        for line in _lines(mesh):
            ranks = [line[index] for index in stages]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                groups.append(([name for name, those in shared.items() if those == stages], group))
    return groups


def _lines(mesh: DeviceMesh) -> list[list[int]]:
    """Return the ranks of each line of stages."""
    return mesh.mesh.movedim(1, -1).reshape(-1, mesh.size(1)).tolist()


def _starts(model: PreTrainedModel, traced: Trace, num_stages: int) -> list[int]:
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


def _users(model: nn.Module, traced: Trace, starts: list[int]) -> dict[nn.Parameter, tuple[int, ...]]:
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


def _messages(starts: list[int], num_encoder_layers: int, stage: int) -> frozenset[int]:
    """Return the layers whose outputs stage `stage` - 1 sends to `stage`."""
    if stage == 0:
        return frozenset()
    has_decoder = 0 < num_encoder_layers <= starts[stage]
    return frozenset({starts[stage] - 1, *([num_encoder_layers - 1] if has_decoder else [])})


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


def _share_position_bias(layers: list[nn.Module], num_encoder_layers: int, own: range) -> None:
    """Let the first own layer of each stack of T5 compute the position bias, with the weights of the stack's first."""
    for indices, path, names in _position_biases(layers, num_encoder_layers):
        mine = [index for index in indices if index in own]
        if mine and mine[0] != indices[0]:
            first, other = (layers[index].get_submodule(path) for index in (indices[0], mine[0]))
            other.has_relative_attention_bias = True
            # not as submodules, because weights keep their one name
            vars(other).update((name, getattr(first, name)) for name in names)
