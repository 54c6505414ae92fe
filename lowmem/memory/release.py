"""Gradient release: update each weight inside backward, and free its gradient immediately."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.dtensor import local_of, sharded_like
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.vocabulary import OffloadedRows
from lowmem.errors import UsageError
from lowmem.memory.offload import Offload
from lowmem.optim.norms import gradient_norms, squared_norm


@contextmanager
def release(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Update each parameter inside backward and free its gradient (Lv et al., 2023).

    Supports one process and one micro-batch a step, or any number of both within `layered`.
    """
    if stages_of(model) is not None:
        found = "a pipeline sums the gradients of all its layers until the last micro-batch"
        raise UsageError(f"release would save nothing, because {found}: set pp_size=1, or remove release")
    is_layered = hasattr(optimizer, "layered")
    if not is_layered and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found = f"release frees gradients before they can be summed over {dist.get_world_size()} processes"
        raise UsageError(f"{found}: start one process, enter layered first, or remove release")
    optimizer.released = Released(optimizer, is_layered=is_layered)
    try:
        yield
    finally:
        del optimizer.released


class TakenGradients:
    """Gradients of a step that were taken from `.grad` when they were complete, and their norms."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        groups = enumerate(optimizer.param_groups)
        self._group_of = {parameter: index for index, group in groups for parameter in group["params"]}
        self.norms: dict[nn.Parameter, Tensor] = {}
        """L2 norm of each gradient, fp32; of a sharded gradient, the norm of this rank's part."""

    def _note(self, parameter: nn.Parameter) -> None:
        """Note a gradient's norm."""
        (self.norms[parameter],) = gradient_norms([local_of(parameter.grad)])

    def step(self, parameter: nn.Parameter) -> None:
        """Apply and free the gradient of one parameter."""
        groups = self._optimizer.param_groups
        # with all groups, each of P steps would look at all P parameters
        self._optimizer.param_groups = [groups[self._group_of[parameter]] | {"params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def _norm_of_rows(self, parameter: nn.Parameter, squares: Sequence[Tensor]) -> None:
        self.norms[parameter] = torch.stack(squares).sum().sqrt().float()


class Released(TakenGradients):
    """Gradients that are applied and freed as soon as they are complete."""

    def __init__(self, optimizer: Optimizer, *, is_layered: bool):
        super().__init__(optimizer)
        self._is_layered = is_layered

    def begin(self, micro_batches: int, max_grad_norm: float | None, nonfinite: str) -> None:
        """Start a step. Raises UsageError for options that need all gradients at the same time."""
        problems = {
            f"{micro_batches} micro-batches per step (set gradient_accumulation_steps to 1, or enter layered first)": (
                micro_batches > 1 and not self._is_layered
            ),
            f"clipping at {max_grad_norm} (set max_grad_norm to 0)": bool(max_grad_norm),
            "skipping updates that are not finite (set nonfinite to stop)": nonfinite != "stop",
        }
        if found := [problem for problem, is_found in problems.items() if is_found]:
            raise UsageError(f"release updates each weight inside backward, so it does not support {', '.join(found)}")
        self.norms.clear()

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Apply and free the parameter's gradient, which must be complete."""
        self._note(parameter)
        self.step(parameter)

    @torch.no_grad()
    def take_rows(self, parameter: nn.Parameter, rows: OffloadedRows) -> None:
        """Apply a complete gradient that is never whole."""
        squares = []

        def gradient(part: slice) -> Tensor:
            of_part = rows.gradient(part)
            squares.append(squared_norm(of_part))
            return of_part

        self._optimizer.gradient_rows = {parameter: gradient}
        self.step(parameter)
        self._optimizer.gradient_rows = {}
        self._norm_of_rows(parameter, squares)


class KeptOnHost(TakenGradients):
    """Complete gradients that `layered_offloaded` keeps on the host until their norm is known."""

    def __init__(self, optimizer: Optimizer, offload: Offload):
        super().__init__(optimizer)
        self._offload = offload
        self._kept: dict[nn.Parameter, object] = {}

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Move the parameter's gradient, which must be complete, to the host."""
        self._note(parameter)
        self._kept[parameter] = self._offload.pack(local_of(parameter.grad))
        parameter.grad = None

    @torch.no_grad()
    def take_rows(self, parameter: nn.Parameter, rows: OffloadedRows) -> None:
        """Keep a complete gradient that is never whole."""
        squares = []
        for part in rows.parts():
            gradient = rows.gradient(part)
            squares.append(squared_norm(gradient))
            rows.keep(part, gradient)
        self._norm_of_rows(parameter, squares)
        self._kept[parameter] = rows

    def fetched(self) -> Iterator[nn.Parameter]:
        """Yield each parameter with its gradient on the device; the caller must apply and free it with `step`."""
        while self._kept:
            parameter, kept = self._kept.popitem()
            if isinstance(kept, OffloadedRows):
                self._optimizer.gradient_rows = {parameter: kept.kept}
                yield parameter
                self._optimizer.gradient_rows = {}
                continue
            gradient = self._offload.unpack(kept)
            parameter.grad_dtype = gradient.dtype
            parameter.grad = sharded_like(parameter, gradient)
            yield parameter
