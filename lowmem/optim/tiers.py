"""Optimizers for the memory tiers: AdamW with bf16 weights, and a base class shared with Adafactor. See `formats.py`.

exact   weights split into bf16 and an int16 low half, which together hold all bits of fp32; fp32 moments
lean    weights in bf16 only, rounded stochastically; 8-bit moments. Only large matrices: others are as in exact.

A kernel updates each parameter in one pass over memory. Without one, tensor operations convert one slice of rows at a
time to fp32 and back, so temporaries have the size of a slice.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim import Optimizer

from lowmem.distributed.collectives import report_failure
from lowmem.distributed.dtensor import local_of, local_part, set_local_, sharded_like
from lowmem.distributed.offloaded import Offloaded
from lowmem.distributed.placement import is_large
from lowmem.distributed.seeds import seed_of
from lowmem.kernels.compilers import has_triton
from lowmem.kernels.products_cpu import speed_up_bf16
from lowmem.optim import kernels_cpu
from lowmem.optim.adamw import Numbers, Update, adamw
from lowmem.optim.formats import by_rows, keep, round_stochastically, rows_and_columns, write, zeros
from lowmem.optim.philox import BLOCK, Origin, random_halves
from lowmem.storage.records import Record

_OFFLOADED_ELEMENTS = 2**22  # elements of a slice whose weight and state are read and written
_CACHED_ELEMENTS = 2**19  # elements per slice on CPU, so that the slice's temporaries fit into the cache
_LAUNCHED_ELEMENTS = (2**22, 2**24)  # elements per slice on a GPU: minimum (few launches), maximum (small temporaries)

Tensors = dict[str, Tensor]
Group = dict[str, object]
Random = Callable[[slice], Tensor]
"""Return 16 random bits for each element of some rows, as int32; the same bits for the same rows."""


class WithGradient(NamedTuple):
    """A parameter to update, or some of its rows."""

    group: Group
    parameter: nn.Parameter
    gradient: Tensor
    """This rank's part, bf16 or fp32, as a matrix (rows, columns)."""
    tensors: Tensors
    """This rank's part of the weight and state."""
    origin: Origin


class TieredOptimizer(Optimizer):
    """Base class for the optimizers of the memory tiers. It handles formats, slices, random bits and gradient sums.

    Converts the trainable weights to the tier's format in place, and allocates all state: "step" (on the host) and the
    tensors of each format. Groups hold (name, parameter) pairs. The random bits of an element depend only on (seed,
    update, name) and its position in the full parameter. A subclass allocates moments in `_new_moments`, and updates
    weights and state in `_update`. `fused=False` uses tensor operations even if there are kernels. `fill` is called
    with each parameter just before it is converted (see `filler_of`). `offloaded` takes weights and state of large
    matrices; updates read and write them some rows at a time.
    """

    row_wise = True
    """Whether rows are updated independently. If not, matrices are updated whole, and moments are not offloaded."""

    def __init__(
        self,
        groups: list[Group],
        defaults: Group,
        *,
        memory: str,
        slice_elements: int | None = None,
        fused: bool = True,
        fill: Callable[[nn.Parameter], None] = lambda parameter: None,
        offloaded: Offloaded | None = None,
    ):
        names = {parameter: name for group in groups for name, parameter in group["params"]}
        groups = [group | {"params": [parameter for _, parameter in group["params"]]} for group in groups]
        super().__init__(groups, {"lr": 0.0} | defaults)
        self.memory, self._names, self._offloaded = memory, names, offloaded
        for parameter in names:
            fill(parameter)
            self._convert(parameter)
        first, devices = local_of(next(iter(names))), {parameter.device for parameter in names}
        speed_up_bf16(first.device)
        self.kernels = kernels_for(first) if fused and len(devices) == 1 else None
        """The kernels that this optimizer uses, or None for tensor operations."""
        self.seed = 0
        """Seed of stochastic rounding; `train_step` sets it."""
        self.clip_factor: Tensor | None = None
        """An fp32 scalar that multiplies each gradient in the next `step`, which then sets it to None.

        If `can_undo`, NaN makes that `step` change nothing but the counts of updates; `undo` resets these.
        """
        self.gradient_rows: dict[nn.Parameter, Callable[[slice], Tensor]] = {}
        """Instead of `.grad`, for parameters whose gradient is never whole: a function that returns some rows of it."""
        self._slice_elements = slice_elements or slice_elements_for(list(names), first.device.type)

    def _convert(self, parameter: nn.Parameter) -> None:
        """Convert a weight to the tier's format, in place, and allocate its state."""
        form = "bf16" if self._is_rounded(parameter) else "split"
        kept = keep("weight", local_of(parameter.detach()).float().contiguous(), form)
        set_local_(parameter, kept.pop("weight"))  # frees the fp32 weight before the moments are allocated
        local = local_of(parameter.detach())
        if self._offloaded and is_large(parameter):
            kept |= self._new_moments(parameter, local.to("meta" if self.row_wise else local.device))
            with report_failure():
                self._offloaded.take_weight(parameter, row_wise=self.row_wise, sum_dtype=self.sum_dtype(parameter))
                self.state[parameter] = {
                    name: sharded_like(parameter, self._offloaded.new_record(x))
                    if self.row_wise or name == "weight_low"
                    else x
                    for name, x in kept.items()
                }
        else:
            kept |= self._new_moments(parameter, local)
            self.state[parameter] = {name: sharded_like(parameter, tensor) for name, tensor in kept.items()}
        self.state[parameter]["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient (bf16 or fp32)."""
        clip_factor, self.clip_factor = self.clip_factor, None
        self._update(self._with_gradients(is_offloaded=False), clip_factor)
        for found in self._with_gradients(is_offloaded=True):  # one at a time, because they share memory
            self._update([found], clip_factor)

    @property
    def can_undo(self) -> bool:
        """Whether `step` can begin before the host knows that gradients are finite; see `clip_factor`."""
        return False

    def undo(self) -> None:
        """After a `step` with a `clip_factor` of NaN, restore each parameter's count of updates."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] -= 1

    def _with_gradients(self, *, is_offloaded: bool) -> Iterator[WithGradient]:
        """Yield each parameter that has a gradient, after counting its update; if offloaded, some rows at a time."""
        for group in self.param_groups:
            for parameter in group["params"]:
                rows_of = self.gradient_rows.get(parameter)
                if (parameter.grad is None and rows_of is None) or self._is_offloaded(parameter) != is_offloaded:
                    continue
                self.state[parameter]["step"] += 1
                if rows_of is None:
                    gradient = by_rows(local_of(parameter.grad).contiguous())
                    if gradient.dtype not in (torch.bfloat16, torch.float32):
                        gradient = gradient.float()
                    rows_of = gradient.__getitem__
                origin = origin_of(parameter)
                for rows, tensors in self._opened(parameter):
                    of_rows = origin._replace(row=origin.row + rows.start)
                    yield WithGradient(group, parameter, rows_of(rows), tensors, of_rows)

    def _is_offloaded(self, parameter: nn.Parameter) -> bool:
        return self._offloaded is not None and is_large(parameter)

    def _opened(self, parameter: nn.Parameter) -> Iterator[tuple[slice, Tensors]]:
        """Yield slices of this rank's rows, with weight and state to change in place; all rows if not offloaded."""
        local = local_of(parameter.data)
        state = {name: local_of(tensor) for name, tensor in self.state[parameter].items()}
        every = [slice(0, rows_and_columns(local)[0])]
        if self._is_offloaded(parameter):
            slices = _slices(local, _OFFLOADED_ELEMENTS) if self.row_wise else every
            yield from self._offloaded.opened(parameter, state, slices)
        else:
            yield every[0], {"weight": local, **state}

    @contextmanager
    def summing(
        self, micro_batches: int, *key: int, whole: Mapping[nn.Parameter, nn.Parameter]
    ) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Sum gradients over micro-batches in fp32. In lean, sum large ones in bf16 with rounding seeded by `key`.

        For a sharded parameter in `whole`, backward uses the whole one, and its sums are whole. Yields a dict of the
        sums so far, by the parameters that backward uses. It stays empty for one micro-batch: `.grad` is the sum. At
        the end, each sum that is still in the dict becomes the `.grad` of the optimizer's parameter.
        """
        parameter_of = {whole.get(x, x): x for group in self.param_groups for x in group["params"]}
        sums: dict[nn.Parameter, Tensor] = {}
        count = dict.fromkeys(parameter_of, 0)

        @torch.no_grad()
        def add(used: nn.Parameter) -> None:
            gradient, used.grad = local_of(used.grad).contiguous(), None
            if used not in sums:
                sums[used] = gradient.to(self.sum_dtype(used))
                return
            count[used] += 1
            random = self.key_of(parameter_of[used], count[used], *key) if self._is_rounded(used) else 0
            self.add(used, sums[used], gradient, random)

        @torch.no_grad()
        def add_rows(parameter: nn.Parameter, number: int, first: int, total: Tensor, gradient: Tensor) -> None:
            random = self.key_of(parameter, number, *key) if self._is_rounded(parameter) else 0
            self.add(parameter, total, gradient, random, first_row=first)

        in_rows = self._offloaded.rows if self._offloaded else {}
        for parameter, rows in in_rows.items():
            rows.clear()
            rows.add = partial(add_rows, parameter)
        for parameter in parameter_of.values():
            parameter.grad_dtype = parameter.dtype
        summed = [x for x in parameter_of if x not in in_rows] if micro_batches > 1 else []
        hooks = [x.register_post_accumulate_grad_hook(add) for x in summed]
        try:
            yield sums
            for parameter in parameter_of.values() if hooks else ():
                # set the dtype even without a sum: this rank then all-reduces zeros, which need the other ranks' dtype
                parameter.grad_dtype = self.sum_dtype(parameter)
            for used, total in sums.items():
                parameter_of[used].grad = sharded_like(parameter_of[used], total)
        finally:
            for hook in hooks:
                hook.remove()

    def sum_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Return the dtype in which `summing` sums a parameter's gradients over several micro-batches."""
        return torch.bfloat16 if self._is_rounded(parameter) else torch.float32

    def add(self, parameter: nn.Parameter, total: Tensor, gradient: Tensor, key: int, *, first_row: int = 0) -> None:
        assert gradient.dtype == torch.bfloat16, gradient.dtype
        total, gradient, origin = by_rows(total), by_rows(gradient), origin_of(parameter)
        origin = origin._replace(row=origin.row + first_row)
        # with cpu_offload, updates run on the host, but all-gathered gradients are on the GPU
        if self.kernels and (kernels := kernels_for(total)):
            kernels.add(total, gradient, key, origin)
            return
        for rows in self.slices(total):
            values = total[rows].float().add_(gradient[rows])
            if self._is_rounded(parameter):
                random = random_halves(key, origin, rows, values.shape[1], values.device)
                values = round_stochastically(values, random)
            total[rows] = values

    @torch.no_grad()
    def round_from(self, parameter: nn.Parameter, names: Iterable[str], values: Callable[[str, slice], Tensor]) -> None:
        """For each name, store `values(name, rows)` (fp32) in its format. `rows` are rows of the full parameter."""
        first = origin_of(parameter).row
        for opened, tensors in self._opened(parameter):
            for name in sorted(names):
                draw = self._random(parameter, "round_from", name)
                for rows in self.slices(by_rows(tensors["weight"])):
                    local = slice(opened.start + rows.start, opened.start + rows.stop)
                    new = values(name, slice(first + local.start, first + local.stop)).to(parameter.device)
                    if tensors[name].dtype == torch.float32:
                        by_rows(tensors[name])[rows] = new
                    else:
                        write(tensors, name, rows, new, None if f"{name}_low" in tensors else draw(local))

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Copy a saved state into this optimizer. (torch's method would convert moments to the weight's dtype.)"""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, tensors in state_dict["state"].items():
            for key, tensor in tensors.items():
                target, value = local_of(self.state[parameters[index]][key]), local_of(tensor)
                if isinstance(target, Record):
                    target.space.write(target, value.to_host() if isinstance(value, Record) else value)
                else:
                    target.copy_(value)

    def _is_rounded(self, parameter: nn.Parameter) -> bool:
        return self.memory == "lean" and is_large(parameter)

    def slices(self, matrix: Tensor) -> list[slice]:
        """Split the rows of a matrix, this rank's part of a parameter, into the slices to update one at a time."""
        return _slices(matrix, self._slice_elements)

    def key_of(self, parameter: nn.Parameter, *key: int | str) -> int:
        """Return the key of the random bits of one rounding of a parameter, the same on every rank."""
        return seed_of(self.seed, *key, self._names[parameter])

    def _random(self, parameter: nn.Parameter, *key: int | str) -> Random:
        columns, origin = rows_and_columns(local_of(parameter))[1], origin_of(parameter)
        return lambda rows: random_halves(self.key_of(parameter, *key), origin, rows, columns, parameter.device)


class TieredAdamW(TieredOptimizer):
    """AdamW as `adamw.py` defines it. The exact tier with fp32 moments has the bits of that AdamW over fp32 weights.

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

    @property
    def can_undo(self) -> bool:
        return self.kernels is not None

    def _update(self, with_gradients: Iterable[WithGradient], clip_factor: Tensor | None) -> None:
        if self.kernels:
            self.kernels.adamw(map(self._update_of, with_gradients), clip_factor)
            return
        for found in with_gradients:
            adamw(self._update_of(found), self.slices(found.gradient), clip_factor)

    def _update_of(self, found: WithGradient) -> Update:
        step = int(found.tensors["step"])
        matrices = {name: by_rows(tensor) for name, tensor in found.tensors.items() if name != "step"}
        numbers, key = Numbers.of(step, **found.group), self.key_of(found.parameter, step)
        return Update(matrices, found.gradient, numbers, key, found.origin)


class FakeKernels:
    """Kernels for fake tensors, which have no data. Like real kernels, they take no memory."""

    @staticmethod
    def adamw(updates: Iterable[Update], clip_factor: Tensor | None) -> None:
        for _ in updates:  # iterating counts them
            pass

    @staticmethod
    def add(total: Tensor, gradient: Tensor, key: int, origin: Origin) -> None:
        pass


def kernels_for(tensor: Tensor) -> ModuleType | type[FakeKernels] | None:
    """Return the kernels for tensors like this one, or None if its device has none or they are not compiled."""
    if isinstance(tensor, FakeTensor):
        return FakeKernels
    if tensor.device.type == "cpu":
        return kernels_cpu if kernels_cpu.library() else None
    return import_module("lowmem.optim.kernels_cuda") if tensor.device.type == "cuda" and has_triton() else None


def origin_of(parameter: nn.Parameter) -> Origin:
    """Return where this rank's part begins in the full parameter as a matrix."""
    _, row, column = local_part(parameter.data)
    return Origin(row, column * math.prod(parameter.shape[2:]), rows_and_columns(parameter)[1])


def _slices(matrix: Tensor, elements: int) -> list[slice]:
    rows, columns = rows_and_columns(matrix)
    height = max(1, elements // max(BLOCK, columns))  # random bits take whole blocks
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]


def slice_elements_for(parameters: list[nn.Parameter], device_type: str) -> int:
    """Return how many elements a tier should update at a time on a device of this type."""
    if device_type == "cpu":
        return _CACHED_ELEMENTS
    least, most = _LAUNCHED_ELEMENTS
    return min(most, max(least, max(parameter.numel() for parameter in parameters) // 32))
