"""Gradient release: update each weight inside backward, and free its gradient immediately."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowmem.distributed.dtensor import local_of
from lowmem.errors import UsageError
from lowmem.optim.norms import gradient_norms


@contextmanager
def release(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Update each parameter inside backward and free its gradient (Lv et al., 2023). Supports one process only."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found = f"release frees gradients before they can be summed over {dist.get_world_size()} processes"
        raise UsageError(f"{found}: start one process, or remove release")
    released = Released(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooks = [parameter.register_post_accumulate_grad_hook(released.update) for parameter in parameters]
    optimizer.released = released
    try:
        yield
    finally:
        del optimizer.released
        for hook in hooks:
            hook.remove()


class Released:
    """The parameters whose gradients are already applied and freed in this step, and the norms of these gradients."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        groups = enumerate(optimizer.param_groups)
        self._group_of = {parameter: index for index, group in groups for parameter in group["params"]}
        self.parameters: set[nn.Parameter] = set()
        self.norms: list[Tensor] = []
        """L2 norm of each gradient, fp32."""

    def begin(self, micro_batches: int, max_grad_norm: float | None, nonfinite: str) -> None:
        """Start a step. Raises UsageError for options that need all gradients at the same time."""
        problems = {
            f"{micro_batches} micro-batches per step (set gradient_accumulation_steps to 1)": micro_batches > 1,
            f"clipping at {max_grad_norm} (set max_grad_norm to 0)": bool(max_grad_norm),
            "skipping updates that are not finite (set nonfinite to stop)": nonfinite != "stop",
        }
        if found := [problem for problem, is_found in problems.items() if is_found]:
            raise UsageError(f"release updates each weight inside backward, so it does not support {', '.join(found)}")
        self.parameters.clear()
        self.norms.clear()

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        self.norms += gradient_norms([local_of(parameter.grad)])
        self.parameters.add(parameter)
        groups = self._optimizer.param_groups
        # with all groups, each of P steps would look at all P parameters
        self._optimizer.param_groups = [groups[self._group_of[parameter]] | {"params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None
