"""A micro-batch whose layers others run: a coroutine that pauses at each layer, its calls of layers, their backward."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import NamedTuple
from weakref import ref

import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import Cache

from lowmem.distributed.graph import Graph
from lowmem.distributed.trace import hidden_of
from lowmem.errors import UsageError
from lowmem.memory.offload import Offload, OffloadedCopy

Autocast = Callable[[], AbstractContextManager[None]]

_PLAIN = (Tensor, bool, int, float, str, type(None))


class _Value:
    """A tensor that goes into layers or comes from one, and its gradient: the sum over the calls that took it."""

    def __init__(self, tensor: Tensor | None):
        self.tensor = tensor
        """The tensor, if the micro-batch's own graph computes it; None for a layer's output."""
        self.gradient: Tensor | None = None
        self.calls_left = 0
        """Calls that took it and have not run backward."""

    def add(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def call_done(self) -> None:
        """Note that a call that took it has run backward. After the last, go on in the micro-batch's own graph."""
        self.calls_left -= 1
        if not self.calls_left and self.tensor is not None:
            tensor, gradient, self.tensor, self.gradient = self.tensor, self.gradient, None, None
            if gradient is not None:
                # other values may need the same part of the graph, which is freed with the last of them
                torch.autograd.backward([tensor], [gradient], retain_graph=True)


class MicroBatch(greenlet):
    """The coroutine of a micro-batch, which runs in a copy of its creator's context.

    `switch(*outputs)` passes it the outputs of the layer at which it pauses, and runs it until the next layer. It then
    returns that layer's `Call` or, when backward has reached the outputs of the last layer, the loss. Calls run their
    layers again in backward, from inputs that `offload` may keep, or keep their graphs with `keeps_graph`.
    """

    def __init__(
        self,
        forward: Callable[[], Tensor],
        device: torch.device,
        *,
        offload: Offload | None = None,
        keeps_graph: bool = False,
    ):
        super().__init__(self._forward_and_backward)
        self._forward = forward
        self.gr_context = copy_context()
        self.device, self.offload, self.keeps_graph = device, offload, keeps_graph
        self._values: dict[int, tuple[ref[Tensor], _Value]] = {}  # by the tensor's id

    def pause(self, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, object]) -> object:
        """Call this in the coroutine, instead of the layer's `forward`. Returns the outputs."""
        if _thread_state(self.device) != self._thread_state:
            raise UsageError(
                "the loss enters autocast or chooses attention kernels, which would reach the other micro-batches: set "
                "mixed_precision in the Accelerator, or enter the block around train_step"
            )
        return self.parent.switch(Call(self, layer, forward, args, kwargs))

    def _forward_and_backward(self) -> Tensor:
        self._thread_state = _thread_state(self.device)
        loss = self._forward()
        with torch.autocast(self.device.type, enabled=False):
            # keep the graph if a later backward, of a layer's input, uses a part of it too
            loss.backward(retain_graph=not Graph.of([loss]).nodes.isdisjoint(self.graph_left().nodes))
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

    def graph_left(self) -> Graph:
        """Return the part of this micro-batch's own graph through which backward will go on."""
        return Graph.of(value.tensor for _, value in self._values.values() if value.tensor is not None)

    def _note(self, tensor: Tensor, value: _Value) -> _Value:
        self._values[id(tensor)] = ref(tensor), value
        return value


def _thread_state(device: torch.device) -> tuple[object, ...]:
    """What coroutines of a thread share, and a loss may set: autocast, and the allowed kernels of attention."""
    kernels = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.math_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
    )


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


class Call:
    """A micro-batch's call of a layer: its inputs, and what backward needs to run the layer again."""

    def __init__(
        self, micro_batch: MicroBatch, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, object]
    ):
        self.layer = layer
        self._forward, self._micro_batch = forward, micro_batch
        inputs, self._spec = tree_flatten((args, kwargs))
        # without a cache of keys and values, to which backward would add the same again
        self._inputs = [None if isinstance(x, Cache) else x for x in inputs]
        self._random_state = _RandomState.now(self._micro_batch.device)
        self._taken: dict[_Value, list[int]] = {}  # and its indices in the inputs
        self._made: dict[int, _Value] = {}  # by their index in the outputs
        self._graph: _LayerGraph | None = None

    @property
    def hidden(self) -> Tensor:
        """The hidden states among the inputs of a call that has not run."""
        return hidden_of(*tree_unflatten(self._inputs, self._spec))

    def forward(self) -> object:
        """Run the layer. Returns its outputs, as leaves if they will get gradients."""
        inputs, micro_batch = self._inputs, self._micro_batch
        versions = [x._version for x in inputs if isinstance(x, Tensor)]
        self._random_state.restore(micro_batch.device)
        for index, x in enumerate(inputs):
            if isinstance(x, Tensor) and x.requires_grad:
                self._taken.setdefault(micro_batch.value_of(x), []).append(index)
        if micro_batch.keeps_graph:
            self._graph = self._run(inputs)
            inputs, outputs, spec = self._graph.inputs, [*self._graph.outputs], self._graph.spec
        else:
            # not in no_grad, in which attention may run another kernel than in backward
            with saved_tensors_hooks(_dropped, _dropped):
                outputs, spec = tree_flatten(self._call(inputs))
        if [x._version for x in inputs if isinstance(x, Tensor)] != versions:
            raise self._unsupported("changes its inputs in place")
        if found := next((x for x in outputs if not isinstance(x, _PLAIN)), None):
            raise self._unsupported(f"returns a {type(found).__name__}")
        passed_on = {id(x): index for index, x in enumerate(inputs)}
        for index, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                if id(output) in passed_on:
                    outputs[index] = self._inputs[passed_on[id(output)]]
                else:
                    outputs[index], self._made[index] = micro_batch.new_leaf(output)
        if not self._made:  # such as those of frozen layers
            self._inputs, self._taken, self._graph = [], {}, None
        for value in self._taken:
            value.calls_left += 1
        if self._graph is not None:
            self._inputs = []  # the graph keeps what it needs
        elif micro_batch.offload:
            self._offload_inputs(micro_batch.offload)
        return tree_unflatten(outputs, spec)

    def backward(self, autocast: Autocast) -> None:
        """Run the layer's backward, after running the layer again if its graph was not kept."""
        gradients = {index: value.gradient for index, value in self._made.items() if value.gradient is not None}
        if gradients:
            graph = self._graph
            if graph is None:
                self._random_state.restore(self._micro_batch.device)
                with autocast():
                    graph = self._run(list(map(_unpacked, self._inputs)))
            # as roots, the gradients of inputs up to now are added where autograd would add them
            roots = [(graph.inputs[indices[0]], value.gradient) for value, indices in self._taken.items()]
            roots += [(graph.outputs[index], gradient) for index, gradient in gradients.items()]
            roots = [(root, gradient) for root, gradient in roots if root.requires_grad and gradient is not None]
            torch.autograd.backward(*map(list, zip(*roots, strict=True)))
            for value, leaf in graph.leaves.items():
                value.gradient = leaf.grad
        for value in self._taken:
            value.call_done()
        for value in self._made.values():
            value.gradient = None
        self._inputs, self._taken, self._made, self._graph = [], {}, {}, None

    def fetch_inputs(self) -> None:
        """Begin to copy offloaded inputs to the device. At most one call's are ahead, so no window limits them."""
        for kept in self._inputs:
            if isinstance(kept, OffloadedCopy) and not kept.is_on_device():
                kept.fetch()

    def _run(self, inputs: Sequence[object]) -> "_LayerGraph":
        """Run the layer with leaves as the inputs that get gradients."""
        inputs, leaves = list(inputs), {}
        for value, indices in self._taken.items():
            leaves[value] = leaf = inputs[indices[0]].detach().requires_grad_()
            for index in indices:
                inputs[index] = leaf.view_as(leaf)
        return _LayerGraph(inputs, leaves, *tree_flatten(self._call(inputs)))

    def _call(self, inputs: Sequence[object]) -> object:
        args, kwargs = tree_unflatten(inputs, self._spec)
        return self._forward(*args, **kwargs)

    def _offload_inputs(self, offload: Offload) -> None:
        """Offload the inputs that the layer before has returned."""
        for value, indices in self._taken.items():
            if value.tensor is None:
                packed = offload.pack(self._inputs[indices[0]].detach())
                for index in indices:
                    self._inputs[index] = packed

    def _unsupported(self, what: str) -> UsageError:
        found = f"{type(self.layer).__name__} {what}"
        return UsageError(f"{found}, which layered and pp_size do not support: remove layered, or set pp_size=1")


class _LayerGraph(NamedTuple):
    """A call's part of the graph: `inputs` with `leaves` in their places, and flattened `outputs`."""

    inputs: list[object]
    leaves: dict[_Value, Tensor]
    outputs: list[object]
    spec: TreeSpec


def _dropped(saved: object) -> None:
    return None


def _unpacked(kept: object) -> object:
    return kept.take() if isinstance(kept, OffloadedCopy) else kept
