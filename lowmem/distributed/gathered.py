"""Where the weights of layers are for schedules that run one layer at a time: on the device, or all-gathered there."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from torch import nn
from torch.distributed.fsdp import UnshardHandle

from lowmem.distributed.fully_sharded import reshards_after_forward, sharded_modules, without_hooks
from lowmem.distributed.offloaded import Offloaded


class Store(Protocol):
    """Where the weights of layers are."""

    gathered: dict[nn.Parameter, nn.Parameter]
    """For each sharded parameter, the all-gathered one, which forward and backward use."""

    def step(self) -> AbstractContextManager[None]:
        """Within this block, all weights outside layers are on the device."""

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        """Bring the weights of `layer` to the device, and begin to bring those of `following`."""

    def finish(self, layer: nn.Module) -> None:
        """Note that this step needs the weights of `layer` no more."""


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


class Gathered:
    """The store of a sharded model for layered gradient accumulation and a pipeline.

    Uses the groups and all-gathers of `fully_shard`, but not its hooks, which expect one micro-batch at a time. Weights
    outside layers, such as embeddings and head, stay all-gathered for the whole step. With SHARD_GRAD_OP, layers stay
    all-gathered until their last backward. With `offloaded`, this rank's parts of layers come from there.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], offloaded: Offloaded | None):
        self._model, self._reshards, self._offloaded = model, reshards_after_forward(model), offloaded
        self._groups = {layer: sharded_modules(layer) for layer in layers}
        within = {group for groups in self._groups.values() for group in groups}
        self._outside = [group for group in sharded_modules(model) if group not in within]
        self._unsharded: dict[nn.Module, list[UnshardHandle]] = {}
        self.gathered: dict[nn.Parameter, nn.Parameter] = {}
        with without_hooks(model):
            for groups in [*([group] for group in self._outside), *self._groups.values()]:
                for group in groups:
                    group.reshard()  # an evaluation may have all-gathered it
                    parts = dict(group.named_parameters())
                    group.unshard()
                    whole = dict(group.named_parameters())
                    self.gathered |= {part: whole[name] for name, part in parts.items() if part is not whole[name]}
                for group in groups:
                    group.reshard()

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._offloaded.step() if self._offloaded else nullcontext(), without_hooks(self._model):
            for group in self._outside:
                group.unshard()
            try:
                yield
            finally:
                for layer in list(self._unsharded):
                    self.finish(layer)

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        for other in [other for other in self._unsharded if self._reshards and other not in (layer, following)]:
            self._reshard(other)
        if self._offloaded:
            self._offloaded.fetch(layer, following)
        self._begin(layer)
        for handle in self._unsharded[layer]:
            handle.wait()
        if following is not None and not self._offloaded:
            self._begin(following)

    def finish(self, layer: nn.Module) -> None:
        self._reshard(layer)
        if self._offloaded:
            self._offloaded.finish(layer)

    def _reshard(self, layer: nn.Module) -> None:
        for handle in self._unsharded.pop(layer, ()):
            handle.wait()  # else the next step would take what was gathered for this one
        for group in self._groups[layer]:
            group.reshard()

    def _begin(self, layer: nn.Module) -> None:
        if layer not in self._unsharded:
            self._unsharded[layer] = [group.unshard(async_op=True) for group in self._groups[layer]]
