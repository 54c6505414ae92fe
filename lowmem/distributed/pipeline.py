"""Pipeline parallelism: each process of a line holds a stage, which is a contiguous part of a model's layers.

Every stage runs the model's own forward on the same rows, up to its last layer. It has no weights of other stages:
placeholders take their places, which are zeros without memory. Their layers do nothing, except that the output of the
layer before a stage is a message from the stage before. The output of an encoder's last layer is sent to all stages
with layers of the decoder. A weight that several stages use, such as tied embeddings, is on each of them, and its
gradients are summed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from lowmem.distributed.links import Links, StageFailed, lines_of
from lowmem.distributed.partition import messages_to, share_position_bias, starts_of_stages, users_of_weights
from lowmem.distributed.placement import (
    PIPELINE_MESH,
    STAGES,
    TENSOR_PARALLEL_MESH,
    is_sharded,
    original_class,
    unwrapped,
)
from lowmem.distributed.reduce import all_reduce_sum
from lowmem.distributed.trace import Trace, hidden_of, placeholder, replaced_forwards, trace
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
    starts = starts_of_stages(model, traced, mesh.size(1)) if starts is None else list(starts)
    # an attribute, because a table would keep the model for ever
    setattr(model, STAGES, Stages(model, mesh, traced, starts))


def depths_of_stages(model: PreTrainedModel, num_stages: int) -> list[tuple[int, int]]:
    """Return how many layers of an encoder, and how many others, each stage of `model` would get.

    Raises UsageError as `split_into_stages` does.
    """
    traced = trace(model)
    starts = starts_of_stages(model, traced, num_stages)
    ends = [*starts[1:], len(traced.layers)]
    before = [min(index, traced.num_encoder_layers) for index in starts]
    after = [min(index, traced.num_encoder_layers) for index in ends]
    return [(b - a, end - start - (b - a)) for start, end, a, b in zip(starts, ends, before, after, strict=True)]


def stages_of(model: nn.Module) -> "Stages | None":
    """Return the stages into which `model` is split, if it is."""
    return getattr(unwrapped(model), STAGES, None)


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
        self._model = model
        self.mesh = mesh
        """Of shape (data ranks, stages, tensor-parallel ranks)."""
        users = users_of_weights(model, traced, starts)
        self.links = Links(mesh)
        self.received = messages_to(starts, traced.num_encoder_layers, self.index)
        """The layers whose outputs come from the stage before."""
        self.sent = messages_to(starts, traced.num_encoder_layers, self.index + 1) if not self.is_last else frozenset()
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
        share_position_bias(self.layers, traced.num_encoder_layers, self.own)
        self._drop_weights({parameter for parameter, stages in users.items() if self.index in stages})
        self.schedule: object | None = None
        """The pipeline (memory/pipeline.py) that runs these stages, after its first step."""

    @property
    def own_layers(self) -> list[nn.Module]:
        """This stage's layers, in order."""
        return [self.layers[index] for index in self.own]

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this is the first process of its stage."""
        return self.mesh.get_local_rank(0) == self.mesh.get_local_rank(2) == 0

    @property
    def _has_collectives(self) -> bool:
        """Whether the forward of a stage has collectives."""
        return is_sharded(self._model) or self.mesh.size(2) > 1

    @property
    def is_last(self) -> bool:
        return self.index == self.number - 1

    @cached_property
    def store(self) -> Store:
        """Where this stage's weights are. Made after all weights have their dtypes."""
        return Gathered(self._model, self.own_layers, None) if is_sharded(self._model) else Resident()

    @cached_property
    def _name_of(self) -> dict[nn.Parameter, str]:  # made after all weights are sharded
        return {parameter: name for name, parameter in self._model.named_parameters()}

    def convert_placeholders(self, dtype: torch.dtype) -> None:
        """Give the placeholders the dtype of the weights, so that hidden states have the dtype of messages."""
        for module, name in self._placeholders:
            setattr(module, name, placeholder(getattr(module, name), self.links.device, dtype))

    def shaped(self, index: int, output: Tensor) -> object:
        """Return `output` as the layer of this index returns it."""
        number = self._num_outputs[index]
        return output if number is None else (output, *[None] * (number - 1))

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
        all_reduce_sum(totals, self.mesh.get_group(1))
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
        except StageFailed as caught:
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
        scalar = torch.tensor(value, device=self.mesh.device_type)
        return scalar, {name: tuple(pair) for name, pair in pairs.items()}

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Within this block, without gradients, the model returns the last stage's logits on every stage."""
        head, group = self._model.get_output_embeddings(), self.mesh.get_group(1)

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
                        except StageFailed:
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


def _groups(mesh: DeviceMesh, shared: dict[str, tuple[int, ...]]) -> list[tuple[list[str], dist.ProcessGroup]]:
    """Return the names of the weights that this process shares with the same other stages, and their group."""
    groups = []
    for stages in sorted(set(shared.values())):
        for line in lines_of(mesh):
            ranks = [line[index] for index in stages]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                groups.append(([name for name, those in shared.items() if those == stages], group))
    return groups
