"""Layered gradient accumulation: all micro-batches of a step run through one layer before any runs through the next.

A layer's gradient is then complete while the layer is still there: it can be applied and freed at once, and a sharded
layer is all-gathered twice a step. (Lamy-Poirier 2021, arXiv 2106.02679.) The price: the inputs of all layers and
micro-batches are kept, and each layer runs again in backward, as with `recompute`.

Each micro-batch is a coroutine, which runs the model as it is. Only the forwards of layers are replaced: they pause the
coroutine until the others have reached the same layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
from greenlet import GreenletExit, getcurrent
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.collectives import gather_json
from lowmem.distributed.gathered import Gathered, Resident, Store
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import device_of, is_sharded, layer_drop, tensor_mesh, training_layers, unwrapped
from lowmem.distributed.trace import replaced_forwards
from lowmem.errors import UsageError
from lowmem.memory.micro_batch import Autocast, Call, MicroBatch
from lowmem.memory.offload import Offload, host_of

Complete = Callable[[Sequence[nn.Parameter]], None]
"""Called with parameters whose gradients are complete on this rank."""


@contextmanager
def layered(model: nn.Module, optimizer: Optimizer, *, offload: Offload | None = None) -> Iterator[None]:
    """Run all micro-batches of a step through one layer before the next. Implies `recompute`.

    With `offload`, the layers' inputs are kept where it says. Enter `release` inside this block, not around it. If
    `offload_weights` has given the model a store, the layers' weights come from there. Raises UsageError for a model
    without layers, with random layer drop, or with tensor parallelism.
    """
    layers = training_layers(model, "layered")
    base = unwrapped(model)
    if dropped := layer_drop(base):
        raise UsageError(f"layered needs all micro-batches to run the same layers, but found {dropped}: set it to 0.0")
    if stages_of(base) is not None:
        raise UsageError(
            "layered runs all micro-batches before the next stage could begin: set pp_size=1, or remove it"
        )
    if tensor_mesh(model) is not None:
        raise UsageError("layered does not support tensor parallelism: set tp_size=1, or remove layered")
    for name in ("output_router_logits", "output_attentions"):
        if getattr(base.config.get_text_config(), name, False):
            found = f"layered computes what {name} returns without gradients"
            raise UsageError(f"{found}: set it to false in the model's config")
    if hasattr(optimizer, "layered"):
        raise UsageError("layered is entered twice: enter it once")
    if hasattr(optimizer, "released"):
        raise UsageError("release cannot sum over micro-batches by itself: enter layered before release")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UsageError("layered computes each layer again in backward by itself: remove recompute")
    offloaded = offloaded_of(model)
    store = Gathered(model, layers, offloaded) if is_sharded(model) else offloaded or Resident()
    optimizer.layered = Layered(base, layers, store, offload, offload or (offloaded and Offload((), host_of(model))))
    try:
        yield
    finally:
        del optimizer.layered


class Layered:
    """Runs the micro-batches of a step in lockstep."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        store: Store,
        inputs: Offload | None,
        gradients: Offload | None,
    ):
        self.store = store
        self.gradients = gradients
        """Where complete gradients wait for their norm; None: on the device."""
        self._inputs = inputs
        self._model, self._layers = model, layers
        self._device = device_of(model)
        self._order = list(layers)  # in which the last step called the layers
        within = {module for layer in layers for module in layer.modules()}
        outside = dict.fromkeys(
            x for module in model.modules() if module not in within for x in module.parameters(recurse=False)
        )
        self._parameters = {layer: [x for x in layer.parameters() if x not in outside] for layer in layers}
        in_layers = {x for layer in layers for x in layer.parameters()}
        self._only_outside = [x for x in outside if x not in in_layers]  # in the same order on all ranks
        self._complete_early: list[int] | None = None  # of _only_outside, on all ranks

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
        with self.store.step(), replaced_forwards(self._layers, self._pausing):
            micro_batches = [MicroBatch(forward, self._device, offload=self._inputs) for forward in forwards]
            try:
                steps: list[list[Call]] = []
                with autocast():
                    reached = [micro_batch.switch() for micro_batch in micro_batches]
                    while calls := self._same_layer(reached):
                        following = self._following(len(steps))
                        steps.append(calls)
                        reached = []
                        for micro_batch, call in zip(micro_batches, calls, strict=True):
                            self.store.fetch(call.layer, following)  # the one before may have run other layers
                            reached.append(micro_batch.switch(call.forward()))
                self._order = [calls[0].layer for calls in steps]
                left = set().union(*(micro_batch.graph_left().leaves for micro_batch in micro_batches))
                complete_early([x for x in self._only_outside if self.store.gathered.get(x, x) not in left])
                self._backward(steps, autocast, complete)
            finally:
                for micro_batch in micro_batches:
                    if not micro_batch.dead:
                        micro_batch.throw(GreenletExit)  # leaves its blocks, and frees what its frames hold
        return reached

    def same_on_all_ranks(self, early: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of the parameters that are complete early on all ranks. The first call runs a collective."""
        found = set(early)
        mine = {index for index, parameter in enumerate(self._only_outside) if parameter in found}
        if self._complete_early is None:
            self._complete_early = sorted(set.intersection(*map(set, gather_json(sorted(mine)))))
        if not mine.issuperset(self._complete_early):
            name = type(self._model).__name__
            raise UsageError(f"{name} uses a weight in other places than in the first step: remove layered")
        return [self._only_outside[index] for index in self._complete_early]

    def _backward(self, steps: list[list["Call"]], autocast: Autocast, complete: Complete) -> None:
        uses = Counter(parameter for calls in steps for parameter in self._parameters[calls[0].layer])
        calls_left = Counter(self._order)
        while steps:
            layer = steps[-1][0].layer
            self.store.fetch(layer, self._following(2 * len(self._order) - len(steps)))
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

    def _following(self, index: int) -> nn.Module | None:
        """Return the layer that a step will need after the one of its `index`th call, if calls keep their order."""
        layer, *later = [*self._order, *reversed(self._order)][index:] or [None]
        return next((each for each in later if each is not layer), None)

    def _same_layer(self, reached: Sequence["Call | Tensor"]) -> list["Call"]:
        """Return the calls at which all micro-batches pause; empty if all have ended. Raises UsageError otherwise."""
        layers = {result.layer if isinstance(result, Call) else None for result in reached}
        if len(layers) > 1:
            found = f"{type(self._model).__name__} calls other layers for one micro-batch than for another"
            raise UsageError(f"layered runs all micro-batches through the same layers, but {found}: remove layered")
        return [result for result in reached if isinstance(result, Call)]

    def _pausing(self, layer: nn.Module) -> Callable:
        """Return a forward for `layer` that, with gradients, pauses its micro-batch."""
        forward = layer.forward

        def pausing_forward(*args, **kwargs):
            if torch.is_grad_enabled():
                return getcurrent().pause(layer, forward, args, kwargs)
            self.store.fetch(layer, None)  # such as a reference for the loss, which needs no backward
            return forward(*args, **kwargs)

        return pausing_forward
