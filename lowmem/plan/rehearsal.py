"""An optimizer step on tensors without data: what it would hold at most, by what that is and when.

Model, optimizer, savers and step are the ones that train; a process group of torch's kind "fake" stands for the other
ranks. A stack of alike layers is counted at two depths, and the rest of it follows (`memory.parts.followed`).

All of it changes the environment of its process and the Accelerator's state: call it in a process of its own. It raises
UsageError for what the model or the number of processes does not allow.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.checkpoint.tensors import model_tensors, named_parameters, num_bytes
from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.sharding import make_mesh, shard
from lowmem.distributed.tensor_parallel import divide_layers, make_tensor_mesh
from lowmem.loss import LOSSES
from lowmem.memory import savers
from lowmem.model import build_model, config_of, freeze
from lowmem.optim.make import make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.plan.meter import CUDA_BLOCK_BYTES, MemoryMeter, fake_tensors
from lowmem.plan.parts import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    LOSS,
    LOW_HALVES,
    MOMENTS,
    OFFLOADED,
    UPDATE,
    WEIGHTS,
    Bytes,
    Counted,
    Settings,
)
from lowmem.plan.stand_ins import HostCopies, attention_for, stand_ins
from lowmem.step import TrainState, train_step

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_FEW = 2  # layers that a deeper stack is counted at, and one more


def count_shallow(settings: Settings) -> Counted:
    """Count a step with few layers in each deep stack of alike ones, and all of the others."""
    shallow, _ = _few_layers(settings.model)
    return count(shallow, settings)


def count_deeper(settings: Settings) -> list[tuple[int, Counted]]:
    """The same with one layer more in those of a depth, for each depth; and how many more there really are."""
    shallow, deep = _few_layers(settings.model)
    one_more = [(depth - _FEW, _at_depth(shallow, dict.fromkeys(names, _FEW + 1))) for depth, names in deep.items()]
    return [(times, count(config, settings)) for times, config in one_more]


def _few_layers(model: str) -> tuple[PretrainedConfig, dict[int, list[str]]]:
    """The config with few layers, and which fields told of more: by depth, as stacks of one may be alike."""
    config = config_of(model)
    groups: dict[int, list[str]] = {}
    for name in _DEPTHS:
        if (depth := getattr(config, name, None)) is not None:
            groups.setdefault(depth, []).append(name)
    deep = {depth: names for depth, names in groups.items() if depth > _FEW + 2}
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        deep = {}  # layers that differ do not follow from one another
    few = {name: _FEW for names in deep.values() for name in names}
    return (_at_depth(config, few) if few else config), deep


def _at_depth(config: PretrainedConfig, depths: dict[str, int]) -> PretrainedConfig:
    fields = config.to_dict() | depths
    fields.pop("layer_types", None)
    return type(config).from_dict(fields)


def count(config: PretrainedConfig, settings: Settings) -> Counted:
    """Count a step of the whole model."""
    with ExitStack() as stack:
        accelerator, mesh = stack.enter_context(_first_rank(settings))
        host = stack.enter_context(stand_ins(on_gpu=settings.on_gpu))
        stack.enter_context(fake_tensors())
        model = build_model(config, attention_for(config, on_gpu=settings.on_gpu, is_padded=settings.is_padded))
        freeze(model, parts=[part for part in settings.freeze.split(",") if part])
        if settings.tp_size > 1:
            divide_layers(model, mesh)
        elif settings.sharding_strategy != "NO_SHARD":
            reshards = settings.sharding_strategy != "SHARD_GRAD_OP"
            shard(model, mesh, reshard_after_forward=reshards, cpu_offload=False)  # all is on one device here
        optimizer = make_optimizer(model, name=settings.optimizer, memory=settings.memory)
        _make_state(optimizer)
        wanted = {
            savers.recompute: settings.recompute == "full",
            savers.recompute_cheap: settings.recompute == "cheap",
            savers.offload_activations: settings.offload_activations,
            savers.release: settings.release,
        }
        meter = MemoryMeter(block_bytes=CUDA_BLOCK_BYTES if settings.on_gpu else 1)
        timeline = _Timeline(meter, host)
        timeline.watch(model, optimizer)
        # beneath the meter, which then sees weights that a saver gathers to know them
        stack.enter_context(meter)
        stack.enter_context(savers.entered([saver for saver, on in wanted.items() if on], model, optimizer))
        _step(model, optimizer, accelerator, settings, timeline)
        weights = num_bytes(model_tensors(model))
        state = num_bytes(optimizer_tensors(named_parameters(model, optimizer), optimizer))
        return Counted(timeline.peaks, weights, weights + state, model.num_parameters())


def _step(
    model: PreTrainedModel, optimizer: Optimizer, accelerator: Accelerator, settings: Settings, timeline: "_Timeline"
) -> None:
    meter, is_causal = timeline.meter, not model.config.is_encoder_decoder
    loss_fn = LOSSES[settings.loss]

    def watched_loss(model: nn.Module, batch: Batch) -> Tensor:
        timeline.ends("before", then=ACTIVATIONS)
        meter.rename(BACKWARD, GRADIENTS)  # what an earlier backward has left
        loss = loss_fn(model, batch)
        timeline.ends("loss", then=BACKWARD)
        return loss

    meter.count(map(local_of, (*model.parameters(), *model.buffers())), WEIGHTS)
    for tensors in optimizer.state.values():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                meter.count([local_of(tensor)], LOW_HALVES if name == "weight_low" else MOMENTS)
    meter.kind = ACTIVATIONS
    shape = (settings.batch_size, settings.seq_len)
    tokens = torch.ones(shape, dtype=torch.int64)
    inputs = {"input_ids": tokens, "labels": F.pad(tokens[:, 1:], (1, 0), value=-100) if is_causal else tokens}
    if settings.is_padded and not is_causal:
        inputs["attention_mask"] = torch.ones_like(tokens)
    batch = Batch(inputs, num_targets=shape[0] * (shape[1] - is_causal), row_ids=[])
    meter.reset_peak()
    train_step(
        TrainState(model, optimizer),
        [batch] * min(2, settings.micro_batches),  # more take no more than two
        watched_loss,
        accelerator,
        learning_rate=1e-4,
        max_grad_norm=settings.max_grad_norm or None,
    )
    timeline.ends("after", then="")


class _Timeline:
    """Cuts a step where hooks say so, and keeps the peak of each part of it."""

    def __init__(self, meter: MemoryMeter, host: HostCopies):
        self.meter, self._host = meter, host
        self.peaks: dict[str, Bytes] = {}

    def ends(self, moment: str, *, then: str) -> None:
        """The moment is over; what is made after it is for `then`."""
        peak = {kind: size for kind, size in self.meter.peak_by_kind.items() if size}
        known = self.peaks.get(moment, {})
        on_host = max(known.get(OFFLOADED, 0), self._host.peak_bytes)
        if sum(peak.values()) > sum(size for kind, size in known.items() if kind != OFFLOADED):
            self.peaks[moment] = known = peak
        if on_host:
            known[OFFLOADED] = on_host
        self.meter.kind = then
        self.meter.reset_peak()
        self._host.reset_peak()

    def watch(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Cut it into forward (of encoder and decoder), loss, backward of the stacks' first and last layers, update."""
        model.get_output_embeddings().register_forward_pre_hook(
            lambda *_: self.ends("forward", then=LOSS if self.meter.kind == ACTIVATIONS else self.meter.kind)
        )
        if model.config.is_encoder_decoder:
            model.get_decoder().register_forward_pre_hook(lambda *_: self.ends("encoder", then=ACTIVATIONS))
        last_of: dict[nn.Parameter, str] = {}
        stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x)]
        stacks = [x for x in stacks if all(isinstance(layer, GradientCheckpointingLayer) for layer in x)]
        for number, stack in enumerate(stacks):
            for place, layer in enumerate(stack):
                matrices = [x for x in layer.parameters() if x.requires_grad and x.dim() > 1]
                where = {len(stack) - 1: "last", 0: "first"}.get(place, "middle")
                last_of |= {parameter: f"backward {number} {where}" for parameter in matrices[:1]}

        def has_gradient(parameter: nn.Parameter) -> None:
            self.meter.count([local_of(parameter.grad)], GRADIENTS)
            if parameter in last_of:
                self.ends(last_of[parameter], then=BACKWARD)

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(has_gradient)

        def before_update(*_) -> None:
            if self.meter.kind != UPDATE:
                self.ends("reduction", then=UPDATE)
                self.meter.rename(BACKWARD, GRADIENTS)

        optimizer.register_step_pre_hook(before_update)
        optimizer.register_step_post_hook(lambda *_: self.ends("update", then=BACKWARD))


def _make_state(optimizer: Optimizer) -> None:
    """torch's optimizers make theirs in their first step."""
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _first_rank(settings: Settings) -> Iterator[tuple[Accelerator, object]]:
    """An Accelerator on the CPU that takes itself for the first of so many, and the mesh that divides a model."""
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": settings.world_size}
    places |= {"LOCAL_WORLD_SIZE": settings.local_world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in places]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or accelerate warns
    if settings.world_size > 1:
        os.environ.update({name: str(value) for name, value in places.items()})
    is_divided = settings.sharding_strategy != "NO_SHARD" or settings.tp_size > 1
    if settings.world_size > 1 or is_divided:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=settings.world_size)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        PartialState(cpu=True).device = torch.device(
            "cpu"
        )  # it says cpu:0, which tensors without data take for another
        accelerator = Accelerator(cpu=True, mixed_precision=settings.autocast)
        mesh = None
        if settings.tp_size > 1:
            mesh = make_tensor_mesh("cpu", settings.world_size, settings.tp_size)
        elif is_divided:
            mesh = make_mesh(accelerator, settings.sharding_strategy, settings.shard_size)
        yield accelerator, mesh
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()
