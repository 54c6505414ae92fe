"""The gradients of one optimizer step: summed over micro-batches, reduced over ranks, clipped, applied.

Before the update, `.grad` holds gradients in fp32 or (memory tiers) bf16, whole or sharded (fully_shard). With gradient
release, they are already applied and freed. `train_step` handles all these cases in the same way.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from operator import attrgetter
from types import MappingProxyType

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import is_first_copy, is_shared, local_of, sharded_like
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import data_place, has_collectives, is_engine, is_sharded, unwrapped
from lowmem.distributed.reduce import BucketedSum, LayerSum, all_reduce_sum
from lowmem.distributed.seeds import seed_of
from lowmem.errors import UsageError
from lowmem.memory.layered import Layered
from lowmem.memory.micro_batch import Autocast
from lowmem.memory.pipeline import Pipeline, pipeline_of
from lowmem.memory.precision import autocast
from lowmem.memory.release import KeptOnHost, Released, TakenGradients
from lowmem.model.metrics import LossFunction, MetricSums, loss_and_metrics
from lowmem.optim.norms import gradient_norms
from lowmem.optim.tiers import TieredOptimizer

BeforeUpdate = Callable[[Mapping[str, Tensor]], object]
"""Called with the gradients of a step by parameter name, which it may read and change in place."""


class Gradients:
    """The gradients of one step, whose losses are divided by `denominator` (0: no target counts).

    Losses are multiplied by `loss_scale`, a power of two, before backward. The losses and the norm that methods return,
    and the gradients in the update, are divided by it. The constructor clears gradients left by a failed step.

    Raises ValueError for DeepSpeed, fp8, mixed precision with a memory tier or an optimizer wrapped by accelerate, and
    UsageError for offloaded weights without `layered`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        *,
        denominator: float,
        seed: int,
        step: int,
        loss_scale: float = 1.0,
        metric_names: Sequence[str] | None = None,
    ):
        _check(type(optimizer), accelerator.mixed_precision, is_engine(model))
        self._model, self._optimizer, self._accelerator = model, optimizer, accelerator
        self._denominator, self._seed, self._step = denominator, seed, step
        self._loss_scale = loss_scale
        self.metrics = MetricSums(accelerator.device, metric_names)
        """The metrics that the loss function returns with its loss."""
        self._rank, self._is_sharded = data_place(model), is_sharded(model)
        self.released: Released | None = getattr(optimizer, "released", None)
        self._stages = stages_of(model)
        self._schedule: Layered | Pipeline | None = getattr(optimizer, "layered", None) or pipeline_of(model)
        self._offloaded = offloaded_of(model)
        if self._schedule is None and self._offloaded is not None:
            raise UsageError("weights of offload_weights are gone before backward needs them: enter layered")
        self.can_be_dropped = self.released is None and not has_collectives(model)
        """Whether all ranks can drop the step after an error in `accumulate`, in a block of `completed`."""
        self._all: dict[nn.Parameter, Tensor] = {}
        """The gradients that are in `.grad`."""
        self.clear()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        is_summed = self.can_be_dropped and accelerator.num_processes > 1
        # the order in which backward usually computes gradients
        self._sum = BucketedSum(self._trained[::-1], self._rank.group) if is_summed else None
        offload = self._schedule.gradients if self._schedule and not self._sum else None
        self._kept = KeptOnHost(optimizer, offload) if offload and not self.released else None
        self._taken: TakenGradients | None = self.released or self._kept

    def check(
        self,
        micro_batches: int,
        max_grad_norm: float | None,
        nonfinite: str,
        before_update: BeforeUpdate | None = None,
    ) -> None:
        """Raise UsageError for options that gradient release or gradients kept on the host do not support."""
        if before_update and self._taken is not None:
            saver = "release" if self.released else "layered with gradients on the host"
            found = f"before_update needs all gradients at the same time, but {saver} takes each when it is complete"
            raise UsageError(f"{found}: remove one of the two")
        if self.released:
            if self._accelerator.mixed_precision == "fp16":
                found = "release applies gradients before all are known to be finite, but fp16 may skip an update"
                raise UsageError(f"{found}: remove release, or use bf16")
            self.released.begin(micro_batches, max_grad_norm, nonfinite)

    def completed(self) -> AbstractContextManager[None]:
        """If a block with `accumulate` fails, complete the collectives that other ranks have begun."""
        return self._sum.completed() if self._sum else nullcontext()

    def accumulate(self, batches: Sequence[Batch], loss_fn: LossFunction) -> list[Tensor]:
        """Run forward and backward on each micro-batch; return each one's share of the mean loss, an fp32 scalar.

        When a gradient is complete on this rank (in the last backward or, with `layered`, after each layer's), its sum
        over ranks begins, and `release` applies it. (fully_shard itself sums gradients in each backward.) With
        `layered_offloaded`, gradients wait for their norm on the host, but not if they are summed in `BucketedSum`.
        """
        counted = enumerate(batches if self._denominator else ())
        forwards = [partial(self._forward, index, batch, loss_fn) for index, batch in counted]
        in_precision = partial(autocast, self._accelerator)
        with ExitStack() as stack:
            if isinstance(self._model, DistributedDataParallel):
                # DDP must not all-reduce in backward, because `all_reduce` does that once for all micro-batches
                stack.enter_context(self._model.no_sync())
            sums = stack.enter_context(self._summing(len(batches)))
            if self._schedule:
                losses = self._run_schedule(forwards, in_precision, sums) if forwards else []
            else:
                losses = []
                for forward in forwards:
                    if forward is forwards[-1]:
                        stack.enter_context(self._completing(sums))
                    with in_precision():
                        loss = forward()
                    loss.backward()
                    losses.append(loss.detach())
        taken = self._taken.norms if self._taken else ()  # all other parameters without gradients get zeros
        for parameter in self._trained:
            is_elsewhere = self._offloaded is not None and self._offloaded.record_of(parameter) is not None
            if parameter not in taken and not is_elsewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
                self._all[parameter] = parameter.grad
        if self._sum:
            self._sum.finish([*self._all.values()][::-1])
        return losses if self._loss_scale == 1 else [loss / self._loss_scale for loss in losses]

    def _forward(self, index: int, batch: Batch, loss_fn: LossFunction) -> Tensor:
        # seeds all devices, so that dropout masks are a function of (seed, step, rank, micro-batch)
        torch.manual_seed(seed_of(self._seed, self._step, self._rank.rank, index))
        loss, metrics = loss_and_metrics(loss_fn, self._model, batch.to(self._accelerator.device))
        self.metrics.add(metrics)
        loss = loss / self._denominator
        return loss if self._loss_scale == 1 else loss.float() * self._loss_scale  # in fp16, most scales are infinite

    def _run_schedule(
        self, forwards: Sequence[Callable[[], Tensor]], autocast: Autocast, sums: "_Sums"
    ) -> Sequence[Tensor]:
        """Run micro-batches on the schedule; complete a layer's gradients while those of the next are computed."""
        index_of = {parameter: index for index, parameter in enumerate(reversed(self._trained))}
        done: set[nn.Parameter] = set()
        rows_of = self._offloaded.rows if self._offloaded else {}
        in_flight: deque[tuple[Sequence[nn.Parameter], LayerSum]] = deque()

        def complete(parameters: Sequence[nn.Parameter], *, waits: bool = False) -> None:
            parameters = [parameter for parameter in parameters if parameter in index_of and parameter not in done]
            done.update(parameters)
            for parameter in [parameter for parameter in parameters if parameter in rows_of]:
                self._taken.take_rows(parameter, rows_of[parameter])
            parameters = [parameter for parameter in parameters if parameter not in rows_of]
            for parameter in parameters if self._sum else ():
                if (gradient := sums.get(parameter)) is not None and not is_shared(gradient):
                    self._sum.add(index_of[parameter], gradient)
            if parameters and (self._is_sharded or self._taken):
                gradients = [sums.pop(parameter) for parameter in parameters]
                in_flight.append((parameters, LayerSum(parameters, gradients, self._rank.group)))
                del gradients
                finish(most=0 if waits or self._accelerator.num_processes == 1 else 1)

        def finish(most: int) -> None:
            while len(in_flight) > most:
                parameters, total = in_flight.popleft()
                for parameter, gradient in zip(parameters, total.finish(), strict=True):
                    parameter.grad_dtype = gradient.dtype
                    parameter.grad = sharded_like(parameter, gradient.to(parameter.device))
                    if self._taken:
                        self._taken.take(parameter)

        def complete_early(parameters: Sequence[nn.Parameter]) -> None:
            if self._is_sharded or self._taken:  # ranks must sum the same parameters together
                parameters = self._schedule.same_on_all_ranks(parameters)
            complete(parameters, waits=True)  # a head may be the largest weight: do not keep its gradient longer

        losses = self._schedule.run(forwards, autocast, complete, complete_early)
        complete(self._trained, waits=True)  # all others
        finish(most=0)
        return losses

    def all_reduce(self, losses: Sequence[Tensor]) -> Tensor:
        """Sum `losses` over ranks; return the loss. Also sums metrics, and gradients that are not summed yet."""
        loss = sum(losses, torch.zeros((), device=self._accelerator.device))
        totals = self.metrics.totals() if self._denominator else []
        if self._rank.size > 1:
            is_summed = self._sum or self._is_sharded
            gradients = [] if is_summed else map(local_of, self._all.values())
            all_reduce_sum([loss, *gradients, *totals], self._rank.group)
        if self._stages:
            self._stages.sum([loss, *totals], self._all)
        return loss

    def change(self, function: BeforeUpdate) -> None:
        """Call `function` with the complete gradients, as they are without a loss scale, by parameter name."""
        if self._loss_scale != 1:  # fp32 gradients, whose bits a power of two does not change
            torch._foreach_div_([*map(local_of, self._all.values())], self._loss_scale)
            self._loss_scale = 1.0
        named = {name: x for name, x in unwrapped(self._model).named_parameters() if x in self._all}
        with torch.no_grad():
            function(MappingProxyType({name: self._all[parameter] for name, parameter in named.items()}))

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole gradient, fp32, equal on every rank.

        Runs a small collective if weights are sharded or in stages.
        """
        norms = dict(zip(self._all, gradient_norms([*map(local_of, self._all.values())]), strict=True))
        norms |= self._taken.norms if self._taken else {}
        # in the same order whether gradients were taken or not, so that the sums have the same bits
        trained = [parameter for parameter in self._trained if parameter in norms]
        whole = [norms[x] for x in trained if not (self._stages or isinstance(x, DTensor))]
        if len(whole) < len(trained):
            counts = self._stages.counts if self._stages else is_first_copy
            squares = torch.zeros((), device=self._accelerator.device)
            if mine := [norms[x] for x in trained if (self._stages or isinstance(x, DTensor)) and counts(x)]:
                squares += torch.stack(mine).square().sum().to(squares.device)  # they are on the host with cpu_offload
            all_reduce_sum([squares])
            whole.append(squares.sqrt())
        return torch.linalg.vector_norm(torch.stack(whole)) / self._loss_scale

    def update(self, max_grad_norm: float | None, grad_norm: Tensor, *, if_finite: Tensor) -> bool:
        """Clip and update if the scalar `if_finite` is finite; return whether it is. The step's only device sync.

        Clips like torch.nn.utils.clip_grads_with_norm_, which cannot mix plain and sharded gradients. Kernels begin
        before the sync, so that a GPU need not wait for the host: a clip factor of NaN tells them to change nothing.
        """
        is_finite, is_tiered = torch.isfinite(if_finite), isinstance(self._optimizer, TieredOptimizer)
        begins_early = is_tiered and self._optimizer.can_undo and self._taken is None
        if not begins_early and not is_finite.item():
            return False
        factor = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0) if max_grad_norm else None
        if self._loss_scale != 1:
            factor = (torch.ones_like(grad_norm) if factor is None else factor) / self._loss_scale
        if begins_early:
            factor = torch.where(is_finite, 1.0 if factor is None else factor, math.nan)
        for parameter in self._kept.fetched() if self._kept else ():
            self._clip([parameter if parameter.grad is None else parameter.grad], factor)
            self._kept.step(parameter)
        if self._all:
            self._clip([*self._all.values()], factor)
            self._optimizer.step()
        if begins_early and not is_finite.item():
            self._optimizer.undo()
            return False
        return True

    def _clip(self, gradients: Sequence[Tensor], factor: Tensor | None) -> None:
        """Multiply the gradients that are next updated by `factor`, an fp32 scalar."""
        if factor is None:
            return
        local = [local_of(gradient) for gradient in gradients]
        if isinstance(self._optimizer, TieredOptimizer):
            self._optimizer.clip_factor = factor.to(local[0].device)  # saves a pass over all gradients
        else:
            torch._foreach_mul_(local, factor.to(local[0].device))

    def clear(self) -> None:
        self._all.clear()
        self._optimizer.zero_grad()
        for whole in self._schedule.store.gathered.values() if self._schedule else ():
            whole.grad = None  # if a step has failed
        if isinstance(self._optimizer, TieredOptimizer):
            self._optimizer.clip_factor = None

    @contextmanager
    def _completing(self, sums: "_Sums") -> Iterator[None]:
        """Within this block, backward releases each gradient, or adds it to the sum over ranks, when it is complete."""
        hooks = []
        for index, parameter in enumerate(reversed(self._trained) if self._sum or self.released else ()):

            def complete(parameter: nn.Parameter, index: int = index) -> None:
                if self.released:
                    self.released.take(parameter)
                elif not is_shared(gradient := sums.get(parameter)):  # else `accumulate` adds it after backward
                    self._sum.add(index, gradient)

            hooks.append(parameter.register_post_accumulate_grad_hook(complete))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _summing(self, micro_batches: int) -> Iterator["_Sums"]:
        """Sum gradients over micro-batches."""
        whole = self._schedule.store.gathered if self._schedule else {}
        if not isinstance(self._optimizer, TieredOptimizer):
            yield _Sums({}, whole, attrgetter("dtype"))
            return
        self._optimizer.seed = self._seed
        # HYBRID_SHARD replicas hold equal sums of parts, so they must round with the same random bits
        key = (self._step,) if self._is_sharded and not self._schedule else (self._step, self._rank.rank)
        with self._optimizer.summing(micro_batches, *key, whole=whole) as totals:
            yield _Sums(totals, whole, self._optimizer.sum_dtype if micro_batches > 1 else attrgetter("dtype"))


class _Sums:
    """The gradients that are summed over micro-batches on this rank: in `totals`, or by autograd in `.grad`."""

    def __init__(
        self,
        totals: dict[nn.Parameter, Tensor],
        whole: Mapping[nn.Parameter, nn.Parameter],
        dtype_of: Callable[[nn.Parameter], torch.dtype],
    ):
        self._totals, self._whole, self._dtype_of = totals, whole, dtype_of

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum up to now. Whole, if `layered` gathers the parameter."""
        used = self._whole.get(parameter, parameter)
        return self._totals.get(used) if used.grad is None else local_of(used.grad)

    def pop(self, parameter: nn.Parameter) -> Tensor:
        """Remove the sum and return it, in memory of its own; zeros if there is none."""
        used, gradient = self._whole.get(parameter, parameter), self.get(parameter)
        self._totals.pop(used, None)
        used.grad = None
        if gradient is None:
            return torch.zeros_like(used, dtype=self._dtype_of(used))
        return gradient.clone() if is_shared(gradient) else gradient


@cache  # check each combination of values once, not at every step
def _check(optimizer: type, mixed_precision: str, is_engine: bool) -> None:
    if is_engine:
        raise ValueError("the model is in DeepSpeed's engine, which reduces and applies gradients: use deepspeed_step")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision={mixed_precision} is not supported: use no, bf16 or fp16")
    if issubclass(optimizer, AcceleratedOptimizer):
        raise ValueError("the optimizer is wrapped by accelerator.prepare: pass the unwrapped one from make_optimizer")
    if issubclass(optimizer, TieredOptimizer) and mixed_precision != "no":
        raise ValueError(f"memory tiers need the Accelerator's mixed_precision=no, got {mixed_precision}: set it to no")
