"""What a loss function returns: the summed loss and, if it likes, metrics as sums and counts."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from lowmem.data.batch import Batch
from lowmem.distributed.collectives import gather_json
from lowmem.distributed.pipeline import stages_of
from lowmem.errors import UsageError

Metrics = Mapping[str, tuple[Tensor | float, Tensor | float]]
"""A sum and a count by name, such as {"accuracy": (right answers, answers)}: numbers, or tensors of one element."""

LossFunction = Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Metrics]]
"""`(model, batch) -> sum of the token losses`, an fp32 scalar, or with metrics: the only interface to the task."""


def loss_and_metrics(loss_fn: LossFunction, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    """Call `loss_fn`; return the summed loss, and its metrics ({} if there are none). Raises UsageError for others.

    Those of a blank batch are 0: a loss of rows rather than of labels would count the row that replaces missing ones.
    Without gradients, a model in stages runs on all of them, and every rank gets the values of the last stage.
    """
    stages = stages_of(model)
    if stages is None or torch.is_grad_enabled():
        return _returned(loss_fn, model, batch)
    return stages.on_all(lambda: _returned(loss_fn, model, batch))


def _returned(loss_fn: LossFunction, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
    returned = loss_fn(model, batch)
    loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
        advice = "return the summed loss, or (summed loss, {name: (sum, count)})"
        raise UsageError(f"the loss function returned {_described(returned)}: {advice}")
    return (loss * 0.0, dict.fromkeys(metrics, (0, 0))) if batch.is_blank else (loss, metrics)


def summed_loss(loss_fn: LossFunction, model: nn.Module, batch: Batch) -> Tensor:
    """Call `loss_fn` for its loss only."""
    return loss_and_metrics(loss_fn, model, batch)[0]


class MetricSums:
    """The sums and counts of metrics, added over micro-batches on this rank and then over ranks, in fp64.

    Adding needs no sync of the device. `names` are those that any rank has (None: not agreed on yet).
    """

    def __init__(self, device: torch.device, names: Sequence[str] | None = None):
        self._device, self.names = device, names
        self._totals: dict[str, Tensor] = {}  # (sum, count)

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a micro-batch. Raises UsageError for a name that is not in `names`, and for no pairs."""
        for name, pair in metrics.items():
            if self.names is not None and name not in self.names:
                found = f"the loss function returned the metric {name}, but not in the first step"
                raise UsageError(f"{found}: return (0, 0) where there is nothing to count")
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_is_scalar, pair)):
                found = f"the loss function returned the metric {name} as {_described(pair)}"
                raise UsageError(f"{found}: return (sum, count), two numbers or tensors of one element")
            total = torch.stack(list(map(self._scalar, pair)))
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def totals(self) -> list[Tensor]:
        """Return (sum, count) of each name in `names`, to be summed over ranks in place.

        If `names` is None, runs a collective, after which it has the names of all ranks.
        """
        if self.names is None:
            self.names = sorted(set().union(*gather_json([*self._totals])))
        for name in self.names:
            self._totals.setdefault(name, torch.zeros(2, dtype=torch.float64, device=self._device))
        return [self._totals[name] for name in self.names]

    def means(self) -> dict[str, Tensor]:
        """Return sum / count of each metric, fp32 scalars on the device; NaN where nothing was counted."""
        zeros = torch.zeros(2, dtype=torch.float64, device=self._device)
        totals = {name: self._totals.get(name, zeros) for name in self.names or ()}
        return {name: (total[0] / total[1]).float() for name, total in totals.items()}

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64).reshape(())
        return torch.full((), value, dtype=torch.float64, device=self._device)  # unlike torch.tensor, does not sync


def _is_scalar(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {[*value.shape]}"
    return f"({', '.join(map(_described, value))})" if isinstance(value, tuple) else type(value).__name__
