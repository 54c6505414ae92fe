"""Optimizers for the memory tiers: AdamW with bf16 weights, and a base class shared with Adafactor. See `formats.py`.

exact   weights split into bf16 and an int16 low half, which together hold all bits of fp32; fp32 moments
lean    weights in bf16 only, rounded stochastically; 8-bit moments. Small parameters are stored as in exact.

An update converts one slice of rows at a time to fp32 and back, so temporaries have the size of a slice.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lowmem.distributed.dtensor import local_of, local_part, set_local_, sharded_like
from lowmem.distributed.seeds import seed_of
from lowmem.optim.formats import by_rows, keep, random_halves, read, rows_and_columns, shuffled, write, zeros

_SMALL = 4096  # vectors, and parameters of at most this many elements, take few bytes: lean stores them as exact does
_CACHED_ELEMENTS = 2**19  # elements per slice on CPU, so that the slice's temporaries fit into the cache
_VECTOR = 16  # fp32 values in a CPU's widest vector register
_LAUNCHED_ELEMENTS = (2**22, 2**24)  # elements per slice on a GPU: minimum (few launches), maximum (small temporaries)

Tensors = dict[str, Tensor]
Group = dict[str, object]
Random = Callable[[Tensor], Tensor]


class TieredOptimizer(Optimizer):
    """Base class for the optimizers of the memory tiers. It handles formats, slices, random bits and gradient sums.

    Converts the trainable weights to the tier's format in place, and allocates all state: "step" (on the host) and the
    tensors of each format. Groups hold (name, parameter) pairs. Random bits depend only on (seed, update, name, shard).
    A subclass allocates moments in `_new_moments`, and updates weight and state slice by slice in `_update`.
    """

    def __init__(self, groups: list[Group], defaults: Group, *, memory: str, slice_elements: int | None = None):
        names = {parameter: name for group in groups for name, parameter in group["params"]}
        groups = [group | {"params": [parameter for _, parameter in group["params"]]} for group in groups]
        super().__init__(groups, {"lr": 0.0} | defaults)
        self.memory, self._names = memory, names
        self.seed = 0
        """Seed of stochastic rounding; `train_step` sets it."""
        self._slice_elements = slice_elements or slice_elements_for(list(names), next(iter(names)).device.type)
        for group in self.param_groups:
            for parameter in group["params"]:
                form = "bf16" if self._is_rounded(parameter) else "split"
                local = local_of(parameter.detach())
                kept = keep("weight", local.float().contiguous(), form) | self._new_moments(parameter, local)
                set_local_(parameter, kept.pop("weight"))
                sharded = {name: sharded_like(parameter, tensor) for name, tensor in kept.items()}
                self.state[parameter] = {"step": torch.zeros(()), **sharded}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient (bf16 or fp32)."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                tensors = _local_tensors(parameter, state)
                gradient = by_rows(local_of(parameter.grad).contiguous())
                self._update(group, parameter, gradient, tensors, self._random(parameter, int(state["step"])))

    @contextmanager
    def summing(self, micro_batches: int, *key: int) -> Iterator[None]:
        """Sum gradients over micro-batches in fp32. In lean, sum large ones in bf16 with rounding seeded by `key`."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        sums: dict[nn.Parameter, Tensors] = {}
        count = dict.fromkeys(parameters, 0)

        @torch.no_grad()
        def add(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = local_of(parameter.grad).contiguous(), None
            is_rounded = self._is_rounded(parameter)
            if parameter not in sums:
                sums[parameter] = {"sum": gradient if is_rounded else gradient.float()}
                return
            count[parameter] += 1
            draw = self._random(parameter, count[parameter], *key)
            for rows in self.slices(parameter):
                values = read(sums[parameter], "sum", rows).add_(by_rows(gradient)[rows])
                write(sums[parameter], "sum", rows, values, draw(values) if is_rounded else None)

        for parameter in parameters:
            parameter.grad_dtype = parameter.dtype
        hooks = [x.register_post_accumulate_grad_hook(add) for x in parameters] if micro_batches > 1 else []
        try:
            yield
            for parameter in parameters if hooks else ():
                # set the dtype even without a sum: this rank then all-reduces zeros, which need the other ranks' dtype
                parameter.grad_dtype = torch.bfloat16 if self._is_rounded(parameter) else torch.float32
            for parameter, total in sums.items():
                parameter.grad = sharded_like(parameter, total["sum"])
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def round_from(self, parameter: nn.Parameter, names: Iterable[str], values: Callable[[str, slice], Tensor]) -> None:
        """For each name, store `values(name, rows)` (fp32) in its format. `rows` are rows of the full parameter."""
        tensors, (_, first, _) = _local_tensors(parameter, self.state[parameter]), local_part(parameter.data)
        draw = self._random(parameter, "round_from")
        for rows in self.slices(parameter):
            for name in sorted(names):
                new = values(name, slice(first + rows.start, first + rows.stop)).to(parameter.device)
                if tensors[name].dtype == torch.float32:
                    by_rows(tensors[name])[rows] = new
                else:
                    write(tensors, name, rows, new, None if f"{name}_low" in tensors else draw(new))

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Copy a saved state into this optimizer. (torch's method would convert moments to the weight's dtype.)"""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, tensors in state_dict["state"].items():
            for key, tensor in tensors.items():
                self.state[parameters[index]][key].copy_(tensor)

    def _is_rounded(self, parameter: nn.Parameter) -> bool:
        return self.memory == "lean" and is_large(parameter)

    def slices(self, parameter: nn.Parameter) -> Iterator[slice]:
        """Split the rows of this rank's shard of a parameter into the slices to update one at a time."""
        rows, columns = rows_and_columns(local_of(parameter))
        height = max(1, self._slice_elements // max(1, columns))
        # Slices are multiples of the vector width if possible: the fused kernel may round a remainder differently.
        whole = _VECTOR // math.gcd(_VECTOR, columns)
        height = height // whole * whole or height
        return (slice(first, min(first + height, rows)) for first in range(0, rows, height))

    def _random(self, parameter: nn.Parameter, *key: int | str) -> Random:
        """Return a function that draws 16 random bits per element, the same on every rank that has this shard."""
        generator = None  # created on first use, because not every update draws
        _, *corner = local_part(parameter.data)

        def draw(values: Tensor) -> Tensor:
            nonlocal generator
            if generator is None:
                seed = seed_of(self.seed, *key, self._names[parameter], *(corner if any(corner) else []))
                generator = torch.Generator(parameter.device).manual_seed(seed)
            return random_halves(values.shape, generator)

        return draw


class TieredAdamW(TieredOptimizer):
    """AdamW (Loshchilov and Hutter, 2019) with torch's fused kernel.

    The exact tier with fp32 moments gives the same weights as AdamW in fp32, bit for bit.

    With moments="tier", large moments are fp32 in exact and 8-bit in lean. With "bf16", they are bf16 in both.
    """

    def __init__(self, groups, *, betas: tuple[float, float], eps: float, moments: str, **options):
        self._moments = moments
        super().__init__(groups, {"weight_decay": 0.0, "betas": betas, "eps": eps}, **options)

    def _new_moments(self, parameter: nn.Parameter, local: Tensor) -> Tensors:
        forms = ("fp32", "fp32")
        if is_large(parameter):
            tier_forms = ("int8", "uint8") if self.memory == "lean" else forms
            forms = tier_forms if self._moments == "tier" else ("bf16", "bf16")
        return zeros("exp_avg", local, forms[0]) | zeros("exp_avg_sq", local, forms[1])

    def _update(self, group: Group, parameter: nn.Parameter, gradient: Tensor, tensors: Tensors, draw: Random) -> None:
        names = ("weight", "exp_avg", "exp_avg_sq")
        is_rounded = any(tensors[name].dtype != torch.float32 and f"{name}_low" not in tensors for name in names)
        beta1, beta2 = group["betas"]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options |= {"fused": True, "amsgrad": False, "maximize": False, "beta1": beta1, "beta2": beta2}
        for rows in self.slices(parameter):
            weight, exp_avg, exp_avg_sq = (read(tensors, name, rows) for name in names)
            step = torch.full((), int(tensors["step"]) - 1, dtype=torch.float32, device=weight.device)
            adamw([weight], [gradient[rows].float()], [exp_avg], [exp_avg_sq], [], [step], **options)
            random = draw(weight) if is_rounded else None
            write(tensors, "weight", rows, weight, random)
            write(tensors, "exp_avg_sq", rows, exp_avg_sq, random)
            # use other bits: the update divides the first moment by the second, so their errors must not correlate
            write(tensors, "exp_avg", rows, exp_avg, shuffled(random) if is_rounded else None)


def _local_tensors(parameter: nn.Parameter, state: Tensors) -> Tensors:
    return {name: local_of(tensor) for name, tensor in {"weight": parameter.data, **state}.items()}


def slice_elements_for(parameters: list[nn.Parameter], device_type: str) -> int:
    """Return how many elements a tier should update at a time on a device of this type."""
    if device_type == "cpu":
        return _CACHED_ELEMENTS
    least, most = _LAUNCHED_ELEMENTS
    return min(most, max(least, max(parameter.numel() for parameter in parameters) // 32))


def is_large(parameter: Tensor) -> bool:
    """Return whether lean rounds the parameter: it is not a vector and has more than `_SMALL` elements."""
    return parameter.dim() > 1 and parameter.numel() > _SMALL
