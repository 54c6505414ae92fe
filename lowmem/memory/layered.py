"""Layered gradient accumulation: all micro-batches of a step run through one layer before any runs through the next.

A layer's gradient is then complete while the layer is still there: it can be applied and freed at once, and a sharded
layer is all-gathered twice a step. (Lamy-Poirier 2021, arXiv 2106.02679.) The price: the inputs of all layers and
micro-batches are kept, and each layer runs again in backward, as with `recompute`.

Each micro-batch is a coroutine, which runs the model as it is. Only the forwards of layers are replaced: they pause the
coroutine until the others have reached the same layer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from itertools import zip_longest
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.distributed.collectives import gather_json
from lowmem.distributed.gathered import Gathered
from lowmem.distributed.placement import device_of, is_sharded, layer_drop, tensor_mesh, unwrapped
from lowmem.errors import UsageError
from lowmem.memory.offload import Offload, OffloadedCopy

Autocast = Callable[[], AbstractContextManager[None]]
Complete = Callable[[Sequence[nn.Parameter]], None]
"""Called with parameters whose gradients are complete on this rank."""
_PLAIN = (Tensor, bool, int, float, str, type(None))


class Store(Protocol):
    """Where the weights of layers are."""

    gathered: dict[nn.Parameter, nn.Parameter]
    """For parameters of which this rank holds a part: the whole one, which forward and backward use."""

    def step(self) -> AbstractContextManager[None]:
        """Within this block, all weights outside layers are on the device."""

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        """Bring the weights of `layer` to the device, and begin to bring those of `following`."""

    def finish(self, layer: nn.Module) -> None:
        """Let go of the weights of `layer`: no call of it in this step is left."""


class Resident:
    """A store whose weights are always on the device."""

    def __init__(self):
        self.gathered: dict[nn.Parameter, nn.Parameter] = {}

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        pass

    def finish(self, layer: nn.Module) -> None:
        pass


@contextmanager
def layered(model: nn.Module, optimizer: Optimizer, *, offload: Offload | None = None) -> Iterator[None]:
    """Run all micro-batches of a step through one layer before the next. Implies `recompute`.

    With `offload`, the layers' inputs are kept where it says. Enter `release` inside this block, not around it. Raises
    UsageError for a model without layers, with random layer drop, or with tensor parallelism.
    """
    layers = training_layers(model, "layered")
    base = unwrapped(model)
    if dropped := layer_drop(base):
        raise UsageError(f"layered needs all micro-batches to run the same layers, but found {dropped}: set it to 0.0")
    if tensor_mesh(model) is not None:
        raise UsageError("layered does not support tensor parallelism: set tp_size=1, or remove layered")
    if hasattr(optimizer, "released"):
        raise UsageError("release cannot sum over micro-batches by itself: enter layered before release")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UsageError("layered computes each layer again in backward by itself: remove recompute")
    store = Gathered(model, layers) if is_sharded(model) else Resident()
    optimizer.layered = Layered(base, layers, store, offload)
    try:
        yield
    finally:
        del optimizer.layered


def training_layers(model: nn.Module, saver: str) -> list[nn.Module]:
    """Return the layers that transformers marks for checkpointing, outermost ones only, in the order of the model.

    Raises UsageError, which names `saver`, if there are none.
    """
    layers, inner = [], set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            layers.append(module)
            inner.update(module.modules())
    if not layers:
        name = type(unwrapped(model)).__name__
        raise UsageError(f"{saver} needs transformers' layers, {name} has no layers of that kind: remove {saver}")
    return layers


class Layered:
    """Runs the micro-batches of a step in lockstep."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], store: Store, offload: Offload | None):
        self.store, self.offload = store, offload
        self._model, self._layers = model, layers
        self._device = device_of(model)
        self._order = list(layers)  # in which the last step called the layers
        within = {module for layer in layers for module in layer.modules()}
        outside = [x for module in model.modules() if module not in within for x in module.parameters(recurse=False)]
        self._outside = list(dict.fromkeys(outside))  # a set would have another order on each rank
        self._complete_early: list[int] | None = None  # of _outside, on all ranks
        self._parameters = {layer: [x for x in layer.parameters() if x not in set(outside)] for layer in layers}

    def run(
        self,
        forwards: Sequence[Callable[[], Tensor]],
        autocast: Autocast,
        complete: Complete,
        complete_early: Complete,
    ) -> list[Tensor]:
        """Run the micro-batches' forwards in `autocast`, and their backwards; return the losses, detached.

        A forward seeds its random numbers. Calls `complete_early` once, with the parameters that the layers' backward
        will not reach, such as an untied head, and `complete` with the parameters of each layer.
        """
        with self.store.step(), self._pausing():
            micro_batches = [_MicroBatch(forward, self._device, self.offload) for forward in forwards]
            try:
                steps: list[list[_Call]] = []
                with autocast():
                    reached = [micro_batch.resume() for micro_batch in micro_batches]
                    while calls := self._same_layer(reached):
                        self._fetch(calls[0].layer, len(steps))
                        steps.append(calls)
                        reached = [x.resume(call.forward()) for x, call in zip(micro_batches, calls, strict=True)]
                self._order = [calls[0].layer for calls in steps]
                left = set().union(*(micro_batch.graph_left().leaves for micro_batch in micro_batches))
                complete_early([x for x in self._outside if self.store.gathered.get(x, x) not in left])
                self._backward(steps, autocast, complete)
            finally:
                for micro_batch in micro_batches:
                    if not micro_batch.dead:
                        micro_batch.throw(GreenletExit)  # leaves its blocks, and frees what its frames hold
        return reached

    def same_on_all_ranks(self, early: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of the parameters that are complete early on all ranks. The first call runs a collective."""
        mine = [index for index, parameter in enumerate(self._outside) if parameter in set(early)]
        if self._complete_early is None:
            self._complete_early = sorted(set.intersection(*map(set, gather_json(mine))))
        if not set(self._complete_early) <= set(mine):
            name = type(self._model).__name__
            raise UsageError(f"{name} uses a weight in other places than in the first step: remove layered")
        return [self._outside[index] for index in self._complete_early]

    def _backward(self, steps: list[list["_Call"]], autocast: Autocast, complete: Complete) -> None:
        uses = Counter(parameter for calls in steps for parameter in self._parameters[calls[0].layer])
        calls_left = Counter(self._order)
        while steps:
            layer = steps[-1][0].layer
            self._fetch(layer, 2 * len(self._order) - len(steps))
            calls = steps.pop()
            for call, following in zip_longest(calls, [*calls[1:], *(steps[-1][:1] if steps else [])]):
                if following:
                    following.fetch_inputs()
                call.backward(autocast)
            calls_left[layer] -= 1
            if not calls_left[layer]:
                self.store.finish(layer)
            uses.subtract(self._parameters[layer])
            complete([parameter for parameter in self._parameters[layer] if not uses[parameter]])

    def _fetch(self, layer: nn.Module, index: int) -> None:
        """Fetch the layer whose call is the `index`th of the step, and begin to fetch the one that will be next."""
        later = [*self._order, *reversed(self._order)][index + 1 :]
        self.store.fetch(layer, next((each for each in later if each is not layer), None))

    def _same_layer(self, reached: Sequence["_Call | Tensor"]) -> list["_Call"]:
        """Return the calls at which all micro-batches pause; empty if all have ended. Raises UsageError otherwise."""
        layers = {result.layer if isinstance(result, _Call) else None for result in reached}
        if len(layers) > 1:
            found = f"{type(self._model).__name__} calls other layers for one micro-batch than for another"
            raise UsageError(f"layered runs all micro-batches through the same layers, but {found}: remove layered")
        return [result for result in reached if isinstance(result, _Call)]

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        """Within this block, a layer's forward with gradients pauses its micro-batch."""
        before = [vars(layer).get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = self._pausing_forward(layer, layer.forward)
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _pausing_forward(self, layer: nn.Module, forward: Callable) -> Callable:
        def pausing_forward(*args, **kwargs):
            if torch.is_grad_enabled():
                return getcurrent().parent.switch(_Call(layer, forward, args, kwargs))
            self.store.fetch(layer, None)  # such as a reference for the loss, which needs no backward
            return forward(*args, **kwargs)

        return pausing_forward


class _Value:
    """A tensor that goes into layers or comes from one, and its gradient: the sum over the calls that took it."""

    def __init__(self, tensor: Tensor | None):
        self.tensor = tensor
        """Whose backward is in the micro-batch's own graph; None if it is a layer's output."""
        self.gradient: Tensor | None = None
        self.takers = 0
        """Calls that took it and have not run backward."""

    def add(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def taken(self) -> None:
        """A call that took it has run backward. After the last, go on in the micro-batch's own graph."""
        self.takers -= 1
        if not self.takers and self.tensor is not None:
            tensor, gradient, self.tensor, self.gradient = self.tensor, self.gradient, None, None
            if gradient is not None:
                # other values may need the same part of the graph, which is freed with the last of them
                torch.autograd.backward([tensor], [gradient], retain_graph=True)


class _MicroBatch(greenlet):
    """The coroutine of a micro-batch. It has its own random state, and a copy of the context of its creator."""

    def __init__(self, forward: Callable[[], Tensor], device: torch.device, offload: Offload | None):
        super().__init__(self._forward_and_backward)
        self._forward = forward
        self.gr_context = copy_context()
        self.device, self.offload = device, offload
        self._values: dict[int, tuple[ref[Tensor], _Value]] = {}  # by the tensor's id

    def resume(self, *outputs: object) -> "_Call | Tensor":
        """Run until the next layer, and return its call; or until backward has reached the last layer's outputs."""
        return self.switch(*outputs)

    def _forward_and_backward(self) -> Tensor:
        loss = self._forward()
        with torch.autocast(self.device.type, enabled=False):
            # keep the graph if a later backward, of a layer's input, uses a part of it too
            loss.backward(retain_graph=not _Graph.of([loss]).nodes.isdisjoint(self.graph_left().nodes))
        return loss.detach()

    def value_of(self, tensor: Tensor) -> _Value:
        found = self._values.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return self._note(tensor, _Value(tensor))
        return found[1]

    def new_leaf(self, output: Tensor) -> tuple[Tensor, _Value]:
        """Return a layer's output as a leaf of the micro-batch's graph."""
        leaf = output.detach().requires_grad_()
        value = self._note(leaf, _Value(None))
        leaf.register_post_accumulate_grad_hook(value.add)
        return leaf, value

    def graph_left(self) -> "_Graph":
        """Return the part of this micro-batch's own graph through which backward will go on."""
        return _Graph.of(value.tensor for _, value in self._values.values() if value.tensor is not None)

    def _note(self, tensor: Tensor, value: _Value) -> _Value:
        self._values[id(tensor)] = ref(tensor), value
        return value


class _Graph(NamedTuple):
    """The graph by which tensors were computed."""

    nodes: set[Node]
    leaves: set[Tensor]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "_Graph":
        tensors = list(tensors)
        graph, left = cls(set(), {x for x in tensors if x.is_leaf}), [x.grad_fn for x in tensors]
        while left:
            node = left.pop()
            if hasattr(node, "variable"):  # the node that sums a leaf's gradient
                graph.leaves.add(node.variable)
            elif node is not None and node not in graph.nodes:
                graph.nodes.add(node)
                left += [before for before, _ in node.next_functions]
        return graph


class _RandomState(NamedTuple):
    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "_RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


class _Call:
    """A micro-batch's call of a layer: its inputs, and what backward needs to run the layer again."""

    def __init__(self, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, object]):
        self.layer = layer
        self._forward, self._micro_batch = forward, getcurrent()
        self._inputs, self._spec = tree_flatten((args, kwargs))
        self._random_state = _RandomState.now(self._micro_batch.device)
        self._taken: dict[_Value, list[int]] = {}  # and where they are in the inputs
        self._made: dict[int, _Value] = {}  # by their index in the outputs

    def forward(self) -> object:
        """Run the layer, but keep nothing for backward. Returns its outputs, as leaves if gradients will come back."""
        inputs, micro_batch = self._inputs, self._micro_batch
        versions = [x._version for x in inputs if isinstance(x, Tensor)]
        self._random_state.restore(micro_batch.device)
        # not in no_grad, in which attention may run another kernel than in backward
        with saved_tensors_hooks(_dropped, _dropped):
            outputs, spec = tree_flatten(self._call(inputs))
        if [x._version for x in inputs if isinstance(x, Tensor)] != versions:
            raise self._unsupported("changes its inputs in place")
        if found := next((x for x in outputs if not isinstance(x, _PLAIN)), None):
            raise self._unsupported(f"returns a {type(found).__name__}")
        passed_on = {id(x) for x in inputs}
        for index, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.requires_grad and id(output) not in passed_on:
                outputs[index], self._made[index] = micro_batch.new_leaf(output)
        if self._made:
            self._keep_inputs()
        else:
            self._inputs = []  # such as those of frozen layers
        return tree_unflatten(outputs, spec)

    def backward(self, autocast: Autocast) -> None:
        """Run the layer again, with gradients, and its backward."""
        gradients = {index: value.gradient for index, value in self._made.items() if value.gradient is not None}
        if gradients:
            inputs, leaves = list(map(_unpacked, self._inputs)), {}
            for value, places in self._taken.items():
                leaves[value] = leaf = inputs[places[0]].detach().requires_grad_()
                for place in places:
                    inputs[place] = leaf.view_as(leaf)
            self._random_state.restore(self._micro_batch.device)
            with autocast():
                outputs, _ = tree_flatten(self._call(inputs))
            # as roots, the gradients of inputs up to now are added where autograd would add them
            roots = [(inputs[places[0]], value.gradient) for value, places in self._taken.items()]
            roots += [(outputs[index], gradient) for index, gradient in gradients.items()]
            roots = [(root, gradient) for root, gradient in roots if root.requires_grad and gradient is not None]
            torch.autograd.backward(*map(list, zip(*roots, strict=True)))
            for value, leaf in leaves.items():
                value.gradient = leaf.grad
        for value in self._taken:
            value.taken()
        for value in self._made.values():
            value.gradient = None
        self._inputs, self._taken, self._made = [], {}, {}

    def fetch_inputs(self) -> None:
        """Begin to copy offloaded inputs to the device."""
        for kept in self._inputs:
            if isinstance(kept, OffloadedCopy) and not kept.is_on_device():
                kept.fetch()

    def _call(self, inputs: Sequence[object]) -> object:
        args, kwargs = tree_unflatten(inputs, self._spec)
        return self._forward(*args, **kwargs)

    def _keep_inputs(self) -> None:
        """Note the inputs that get gradients, and offload those that the layer before has returned."""
        for index, x in enumerate(self._inputs):
            if isinstance(x, Tensor) and x.requires_grad:
                self._taken.setdefault(self._micro_batch.value_of(x), []).append(index)
        offload = self._micro_batch.offload
        for value, places in self._taken.items():
            value.takers += 1
            if offload and value.tensor is None:
                packed = offload.pack(self._inputs[places[0]].detach())
                for place in places:
                    self._inputs[place] = packed

    def _unsupported(self, what: str) -> UsageError:
        return UsageError(f"{type(self.layer).__name__} {what}, which layered does not support: remove layered")


def _dropped(saved: object) -> None:
    return None


def _unpacked(kept: object) -> object:
    return kept.take() if isinstance(kept, OffloadedCopy) else kept
