"""Adafactor for the memory tiers. Weights are bf16, and a matrix's second moment is factored into rows and columns."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowmem.optim.formats import by_rows, read, write, zeros
from lowmem.optim.tiers import Group, Tensors, TieredOptimizer, WithGradient


class TieredAdafactor(TieredOptimizer):
    """Adafactor (Shazeer and Stern, 2018) like `torch.optim.Adafactor`, but without two host syncs per parameter.

    Factors the second moment of matrices, but not of vectors. Rows are the first dimension; columns are all others.
    """

    row_wise = False

    _LEAST_VARIANCE = torch.finfo(torch.float32).eps
    _LEAST_RMS = 1e-3

    def __init__(self, groups, **options):
        super().__init__(groups, {"weight_decay": 0.0}, **options)

    def _new_moments(self, parameter: nn.Parameter, local: Tensor) -> Tensors:
        matrix = by_rows(local)
        if parameter.dim() < 2:
            return zeros("variance", matrix, "fp32")
        return zeros("row_var", matrix[:, :1], "fp32") | zeros("col_var", matrix[:1], "fp32")

    def _update(self, with_gradients: Iterable[WithGradient], clip_factor: Tensor | None) -> None:
        for group, parameter, gradient, tensors, _ in with_gradients:
            if clip_factor is not None:
                gradient.mul_(clip_factor)
            self._update_one(group, parameter, gradient, tensors)

    def _update_one(self, group: Group, parameter: nn.Parameter, gradient: Tensor, tensors: Tensors) -> None:
        step, lr = int(tensors["step"]), group["lr"]
        count = parameter.numel()
        self._add_to_variance(parameter, gradient, tensors, step**-0.8)
        direction = self._direction(gradient, tensors)
        weight_squares, update_squares = (torch.zeros((), device=parameter.device) for _ in range(2))
        for rows in self.slices(gradient):
            weight_squares += read(tensors, "weight", rows).square().sum()
            update_squares += direction(rows).square_().sum()
        rms = (weight_squares / count).sqrt()
        size = rms.clamp(min=self._LEAST_RMS) * min(lr, step**-0.5) / (update_squares / count).sqrt().clamp(min=1.0)
        draw = self._random(parameter, step)
        for rows in self.slices(gradient):
            weight = read(tensors, "weight", rows).mul_(1 - lr * group["weight_decay"])
            weight -= size * direction(rows)
            write(tensors, "weight", rows, weight, draw(rows) if "weight_low" not in tensors else None)

    def _add_to_variance(self, parameter: nn.Parameter, gradient: Tensor, tensors: Tensors, part: float) -> None:
        if "variance" in tensors:
            tensors["variance"].lerp_(gradient.float().square(), part)
            return
        rows_mean, columns_sum = torch.empty_like(tensors["row_var"]), torch.zeros_like(tensors["col_var"])
        for rows in self.slices(gradient):
            squares = gradient[rows].float().square()
            rows_mean[rows] = squares.mean(1, keepdim=True)
            columns_sum += squares.sum(0, keepdim=True)
        tensors["row_var"].lerp_(rows_mean, part)
        tensors["col_var"].lerp_(columns_sum / len(gradient), part)

    def _direction(self, gradient: Tensor, tensors: Tensors) -> Callable[[slice], Tensor]:
        mean = tensors["row_var"].mean().clamp(min=self._LEAST_VARIANCE) if "row_var" in tensors else None

        def direction(rows: slice) -> Tensor:
            if mean is None:
                variance = tensors["variance"][rows].clone()
            else:
                variance = (tensors["row_var"][rows] / mean) @ tensors["col_var"]
            return variance.clamp_(min=self._LEAST_VARIANCE**2).rsqrt_().mul_(gradient[rows])

        return direction
