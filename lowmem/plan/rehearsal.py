"""Count the bytes of one optimizer step on fake tensors: the peak of each phase of the step, by kind.

Builds the run with the functions that `train.py` uses, in the same order. Counts a deep stack of equal layers at two
small depths (see `extrapolate`). Call this module in a new process: it changes the environment and accelerate's state.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.adapters.lora import inject, lora_config, read_config
from lowmem.checkpoint.tensors import model_tensors, named_parameters, num_bytes
from lowmem.config.train_config import TrainConfig
from lowmem.cross_entropy import SLICE_ELEMENTS
from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.offloaded import offload_weights, offloaded_of
from lowmem.distributed.pipeline import (
    depths_of_stages,
    make_pipeline_mesh,
    mesh_within_stage,
    split_into_stages,
    stages_of,
)
from lowmem.distributed.placement import training_layers
from lowmem.distributed.sharding import make_mesh, shard
from lowmem.loss import make_loss
from lowmem.memory.layered import Store
from lowmem.memory.offload import Offload
from lowmem.memory.pipeline import pipeline_of
from lowmem.memory.savers import entered
from lowmem.model.build import attention_options, build_model, freeze
from lowmem.model.load import config_of
from lowmem.model.metrics import LossFunction
from lowmem.model.quantized import quantized_outline, replace_linear, scales_of
from lowmem.optim import kernels_cpu
from lowmem.optim.make import make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.optim.tiers import slice_elements_for
from lowmem.plan.fakes import (
    CountedSpace,
    HostCopies,
    fake_ranks,
    fake_tensors,
    few_slices,
    gpu_kernels,
    messages_that_arrive,
)
from lowmem.plan.meter import CUDA_BLOCK_BYTES, MemoryMeter
from lowmem.plan.parts import Bytes, Cluster, Counted, Kind, micro_batches_of, rows_of_micro_batch
from lowmem.step import TrainState, train_step

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_FEW = 2  # the number of layers that `count_shallow` counts in a deep stack


class _Shape(NamedTuple):
    """A model of another depth."""

    config: PretrainedConfig
    starts: list[int] | None = None
    """Where each stage of a pipeline begins. None: where the stages are balanced."""


def count_shallow(config: TrainConfig, cluster: Cluster, stage: int = 0) -> Counted:
    """Count the bytes of a step with _FEW layers in each deep stack of equal layers and all layers of other stacks.

    Of a pipeline, count a rank of `stage`, with _FEW of its layers.
    """
    shallow, _ = _depths(config, stage)
    return count(config, cluster, shallow.config, stage, shallow.starts)


def count_deeper(config: TrainConfig, cluster: Cluster, stage: int = 0) -> list[tuple[int, Counted]]:
    """For each depth of deep stacks, return how many layers `count_shallow` omits, and the bytes with one of them."""
    _, deeper = _depths(config, stage)
    return [(times, count(config, cluster, shape.config, stage, shape.starts)) for times, shape in deeper]


def _depths(config: TrainConfig, stage: int) -> tuple[_Shape, list[tuple[int, _Shape]]]:
    """Return the shallow and deeper shapes. Fields of equal depth change together: they may describe one stack."""
    shape = config_of(config.model_name_or_path or config.model_config)
    if config.pp_size > 1:
        return _depths_of_stage(config, shape, stage)
    deep: dict[int, list[str]] = {}
    for name in _DEPTHS:
        if (depth := getattr(shape, name, None) or 0) > _FEW + 2:
            deep.setdefault(depth, []).append(name)
    if not deep or len(set(getattr(shape, "layer_types", None) or ())) > 1:
        return _Shape(shape), []  # count all layers: those of different types need different bytes

    def with_depth(names: list[str], depth: int) -> _Shape:
        return _Shape(_changed(shape, dict.fromkeys(chain(*deep.values()), _FEW) | dict.fromkeys(names, depth)))

    one_more = [(depth - _FEW, with_depth(names, _FEW + 1)) for depth, names in deep.items()]
    return with_depth([], _FEW), one_more


def _depths_of_stage(
    config: TrainConfig, shape: PretrainedConfig, stage: int
) -> tuple[_Shape, list[tuple[int, _Shape]]]:
    """Return the shallow and deeper shapes for a stage, in which each stack of another stage has one layer at most."""
    stacks = [("num_layers", "encoder_layers", "num_hidden_layers"), ("num_decoder_layers", "decoder_layers")]
    if not shape.is_encoder_decoder:
        stacks = [(), _DEPTHS]
    model, _ = _on_meta(config, copy.deepcopy(shape))  # because building a model writes into its config
    depths = depths_of_stages(model, config.pp_size)
    deep = [number for number in (0, 1) if depths[stage][number] > _FEW + 2]
    if not deep or len(set(getattr(shape, "layer_types", None) or ())) > 1:
        return _Shape(shape), []

    def with_one_more(number: int | None) -> _Shape:
        few = [[min(depth, 1) for depth in of_stage] for of_stage in depths]
        few[stage] = [_FEW + (x == number) if x in deep else depth for x, depth in enumerate(depths[stage])]
        fields = {name: sum(x) for names, x in zip(stacks, zip(*few, strict=True), strict=True) for name in names}
        starts = [0, *accumulate(map(sum, few))][:-1]
        return _Shape(_changed(shape, {name: x for name, x in fields.items() if hasattr(shape, name)}), starts)

    return with_one_more(None), [(depths[stage][number] - _FEW, with_one_more(number)) for number in deep]


def _changed(shape: PretrainedConfig, depths: Mapping[str, int]) -> PretrainedConfig:
    fields = shape.to_dict() | depths
    fields.pop("layer_types", None)
    return type(shape).from_dict(fields)


def count(
    config: TrainConfig,
    cluster: Cluster,
    shape: PretrainedConfig,
    stage: int = 0,
    starts: Sequence[int] | None = None,
) -> Counted:
    """Count the bytes of one step of a model with this `shape`, without extrapolation.

    Of a pipeline, count a rank of `stage`, if stages begin at the layers `starts` (None: where they are balanced).
    """
    with ExitStack() as stack:
        rank, shards = stage * config.tp_size, config.is_sharded or config.pp_size > 1
        ranks = fake_ranks(cluster, rank=rank, mixed_precision=config.autocast, shards=shards)
        accelerator = stack.enter_context(ranks)
        stages = None
        if config.pp_size > 1:  # before `fake_tensors`, because a mesh needs real tensors
            stages = make_pipeline_mesh("cpu", cluster.world_size, config.pp_size, config.tp_size)
            mesh = mesh_within_stage(stages)
        elif config.is_sharded:
            mesh = make_mesh(accelerator, config.sharding_strategy, config.shard_size, config.tp_size)
        stack.enter_context(messages_that_arrive())
        # each slice of logits may read rows of an offloaded head, which are counted
        stack.enter_context(few_slices(of_logits=not config.offload_weights))
        stack.enter_context(fake_tensors())
        if cluster.on_gpu:
            stack.enter_context(gpu_kernels())
        if config.attn_implementation:  # flash-attn's kernels do not run on fake tensors; SDPA's need the same bytes
            is_flash = config.attn_implementation.startswith("flash")
            shape._attn_implementation = "sdpa" if is_flash else config.attn_implementation
        options = attention_options(shape, on_gpu=cluster.on_gpu)
        if config.trains_adapters or stages:
            model, quantized = _on_meta(config, shape, **options)
            if stages:
                with unset_fake_temporarily():  # in which groups of processes have no ranks
                    split_into_stages(model, stages, starts)
            _replace_by_fakes(config, model, quantized)
        else:
            model = build_model(shape, **options)
            freeze(model, parts=config.frozen_parts)
        if config.is_sharded:
            shard(model, mesh, sharding_strategy=config.sharding_strategy, cpu_offload=False)  # fakes are on the CPU
        if config.offload_weights:
            records = CountedSpace()
            offload_weights(model, records, accelerator.device)
        device, trained = "cuda" if cluster.on_gpu else "cpu", [x for x in model.parameters() if x.requires_grad]
        slice_elements = slice_elements_for(trained, device)
        fused = cluster.on_gpu or kernels_cpu.library() is not None  # a GPU has Triton
        options = config.optimizer_options | {"slice_elements": slice_elements, "fused": fused}
        optimizer = make_optimizer(model, **options)
        _make_state(optimizer)
        chunked = {"slice_elements": SLICE_ELEMENTS[device], "fused": cluster.on_gpu}
        loss_fn = make_loss(**config.training_loss, **(chunked if config.loss == "chunked" else {}))
        timeline = _Timeline(MemoryMeter(block_bytes=CUDA_BLOCK_BYTES if cluster.on_gpu else 1))
        timeline.watch(model, optimizer)
        # start the meter before the savers, because one of them all-gathers the weights
        stack.enter_context(timeline.meter)
        savers = [timeline.host.savers[name] for name in config.savers if name != "compiled"]  # fakes run no kernels
        stack.enter_context(entered(savers, model, optimizer))
        if schedule := optimizer.layered if config.layered else pipeline_of(model):
            schedule.store = _WatchedStore(schedule.store, timeline)
        if config.offload_weights:
            optimizer.layered.gradients = Offload((), timeline.host)
            # count as in later steps, each of which finds the first layer where the one before has left it
            offloaded_of(model).fetch(training_layers(model, "offload_weights")[0], None)
            records.moved = timeline.host.moved
        batches = _batches(config, cluster, stage, is_causal=not shape.is_encoder_decoder)
        timeline.meter.reset_peak()
        timeline.meter.sent_bytes = 0  # making a store of sharded weights has sent some, once
        train_step(
            TrainState(model, optimizer),
            batches,
            timeline.watched(loss_fn),
            accelerator,
            learning_rate=1e-4,
            max_grad_norm=config.max_grad_norm,
        )
        timeline.end("after", then=Kind.ACTIVATIONS)
        counted = _counted(model, optimizer)
        counted.peaks, counted.sent_bytes = timeline.peaks, timeline.meter.sent_bytes
        if left := micro_batches_of(config, cluster) - len(batches):
            before_last, last = timeline.sent_before[-2:]
            counted.sent_bytes += left * (last - before_last)
        if config.offload_weights:
            counted.offloaded_bytes = records.num_bytes
            counted.forward_traffic, counted.backward_traffic, counted.update_traffic = (
                records.moved.by_phase[phase] for phase in ("forward", "backward", "update")
            )
            counted.written_traffic = records.moved.written
        return counted


def _on_meta(
    config: TrainConfig, shape: PretrainedConfig, **options: object
) -> tuple[PreTrainedModel, Iterable[nn.Module]]:
    """Build a model with the adapters of a run on meta, because peft moves modules, which fake tensors do not allow.

    Returns the quantized modules too.
    """
    quantized = {}
    with unset_fake_temporarily(), torch.device("meta"):
        if config.trains_adapters:
            options["dtype"] = getattr(torch, config.loaded_dtype)
        model = build_model(shape, **options)
        if config.quantization:
            quantized = replace_linear(model, config.quantization)
        if config.trains_adapters:
            folder, is_new = config.model_name_or_path, config.lora_rank is not None
            inject(model, lora_config(model, **config.lora) if is_new else read_config(Path(folder)))
        freeze(model, parts=config.frozen_parts)
    return model, quantized


def _replace_by_fakes(config: TrainConfig, model: PreTrainedModel, quantized: Iterable[nn.Module]) -> None:
    """Replace the tensors of a model on meta by fake ones."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fakes:
                    fakes[tensor] = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fakes[tensor] = nn.Parameter(fakes[tensor], tensor.requires_grad)
                tensors[name] = fakes.get(tensor)
    for module in quantized:
        module.weight = quantized_outline(module.weight, config.quantization)
        for number, scales in enumerate(scales_of(module.weight)):
            module.register_buffer(f"scales_{number}", scales)  # to be counted


def _counted(model: PreTrainedModel, optimizer: Optimizer) -> Counted:
    """Count what a checkpoint has. Of weights that several stages share, the first stage counts them."""
    tensors, parameters = model_tensors(model), named_parameters(model, optimizer)
    elements = {name: x.numel() for name, x in model.named_parameters()}
    if (stages := stages_of(model)) is not None:
        tensors, parameters, elements = (
            {name: x for name, x in named.items() if name not in stages.counted_before}
            for named in (tensors, parameters, elements)
        )
    weights, state = num_bytes(tensors), num_bytes(optimizer_tensors(parameters, optimizer))
    sizes = elements.values()
    return Counted({}, weights, weights + state, sum(sizes), largest_parameter=max(sizes, default=0))


def _make_state(optimizer: Optimizer) -> None:
    """Unless the state exists, run one step: torch's optimizers create their state in their first step."""
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _batches(config: TrainConfig, cluster: Cluster, stage: int, *, is_causal: bool) -> list[Batch]:
    """Make full micro-batches: 1 or 2, because more do not raise the peak, or all if `layered` keeps inputs of all.

    For a stage, make one more than are alive there at a time: the first then leaves gradients before the last begins.

    All tokens but a causal row's first are targets. Encoders get a mask if there are several rows, which then differ in
    length. Packed rows have two documents each.
    """
    length, micro_batches = config.max_seq_len, micro_batches_of(config, cluster)
    tokens = torch.ones((rows_of_micro_batch(config, cluster), length), dtype=torch.int64)
    inputs = {"input_ids": tokens, "labels": F.pad(tokens[:, 1:], (1, 0), value=-100) if is_causal else tokens}
    if config.packing:
        positions = (torch.arange(length) % -(-length // 2)).expand_as(tokens).contiguous()
        inputs |= {name: positions for name in ("position_ids", "decoder_position_ids")[: 1 if is_causal else 2]}
    elif not is_causal and len(tokens) > 1:
        inputs["attention_mask"] = torch.ones_like(tokens)
    num_targets = len(tokens) * (length - is_causal)
    weighted = {}
    if config.weight_column:  # give the sum, because fake tensors have none
        weighted = {"weights": torch.ones_like(tokens, dtype=torch.float32), "weight_sum": float(num_targets)}
    batch = Batch(inputs, num_targets, row_ids=[], needs_its_masks=True, **weighted)
    return [batch] * (micro_batches if config.layered else min(config.pp_size - stage + 1, micro_batches))


class _Timeline:
    """With hooks, split a step into phases, and record the memory peak of each phase."""

    def __init__(self, meter: MemoryMeter):
        self.meter, self.host = meter, HostCopies()
        self.meter.kind = Kind.ACTIVATIONS
        self.peaks: dict[str, Bytes] = {}
        self.sent_before: list[int] = []
        """The bytes that were sent before each call of the loss."""
        self.where_of: dict[nn.Module, str] = {}
        """Where a layer is in its stack: "0 last" in the first stack."""
        self._layer, self._computing = "", "forward"

    def end(self, phase: str, *, then: Kind) -> None:
        """End `phase`. Record its peak if no earlier one of that name is higher. Label later storages as `then`."""
        peak = {kind: size for kind, size in self.meter.peak_by_kind.items() if size}
        known = self.peaks.get(phase, {})
        on_host = max(known.get(Kind.OFFLOADED, 0), self.host.peak_bytes)
        if sum(peak.values()) > sum(size for kind, size in known.items() if kind != Kind.OFFLOADED):
            self.peaks[phase] = known = peak
        if on_host:
            known[Kind.OFFLOADED] = on_host
        self.meter.kind = then
        self.meter.reset_peak()
        self.host.reset_peak()

    def watched(self, loss_fn: LossFunction) -> LossFunction:
        """Wrap `loss_fn` so that the phase "before" ends at the start of each call and the phase "loss" at its end."""

        def watched_loss(model: nn.Module, batch: Batch) -> Tensor:
            self.end("before", then=Kind.ACTIVATIONS)
            self.sent_before.append(self.meter.sent_bytes)
            self.host.moved.phase = self._computing = "forward"
            self.meter.rename(Kind.BACKWARD, Kind.GRADIENTS)  # an earlier backward has left only gradients
            try:
                return loss_fn(model, batch)
            finally:  # a stage before the last leaves the forward after its last layer
                self.end("loss", then=Kind.BACKWARD)
                self.host.moved.phase = self._computing = "backward"

        return watched_loss

    def watch(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Count weights and state. Add hooks that end the phases encoder, forward, backward, reduction and update."""
        if (offloaded := offloaded_of(model)) is not None:
            offloaded.make_buffers()
            self.meter.count(offloaded.buffers, Kind.WEIGHTS)
        self.meter.count(map(local_of, (*model.parameters(), *model.buffers())), Kind.WEIGHTS)
        for tensors in optimizer.state.values():
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    self.meter.count([local_of(tensor)], Kind.LOW_HALVES if name == "weight_low" else Kind.MOMENTS)
        model.get_output_embeddings().register_forward_pre_hook(
            lambda *_: self.end("forward", then=Kind.LOSS if self.meter.kind == Kind.ACTIVATIONS else self.meter.kind)
        )
        if model.config.is_encoder_decoder:
            model.get_decoder().register_forward_pre_hook(lambda *_: self.end("encoder", then=Kind.ACTIVATIONS))
        last_of: dict[nn.Parameter, str] = {}  # hooks of parameters that are gathered for `layered` do not run
        stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x)]
        stacks = [x for x in stacks if all(isinstance(layer, GradientCheckpointingLayer) for layer in x)]
        for number, stack in enumerate(stacks):
            for index, layer in enumerate(stack):
                matrices = [x for x in layer.parameters() if x.requires_grad and x.dim() > 1]
                where = {len(stack) - 1: "last", 0: "first"}.get(index, "middle")
                self.where_of[layer] = f"{number} {where}"
                last_of |= {parameter: f"backward {self.where_of[layer]}" for parameter in matrices[:1]}

        def has_gradient(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:  # that of offloaded embeddings is never whole
                self.meter.count([local_of(parameter.grad)], Kind.GRADIENTS)
            if parameter in last_of:
                self.end(last_of[parameter], then=Kind.BACKWARD)

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(has_gradient)

        def before_update(*_) -> None:
            if self.meter.kind != Kind.UPDATE:
                self.end(f"reduction {self._layer}".strip(), then=Kind.UPDATE)
                self.meter.rename(Kind.BACKWARD, Kind.GRADIENTS)
            self.host.moved.phase = "update"

        optimizer.register_step_pre_hook(before_update)
        optimizer.register_step_post_hook(lambda *_: self.end("update", then=Kind.BACKWARD))

    def fetching(self) -> None:
        """Go on with forward or backward: a layer will compute."""
        self.host.moved.phase = self._computing

    def finished(self, layer: nn.Module) -> None:
        """End the backward of a layer, through which `layered` has run all micro-batches."""
        self.host.moved.phase = "update"
        self._layer = f"after {self.where_of.get(layer, 'a layer')}"
        self.end(f"backward {self.where_of.get(layer, 'of a layer')}", then=Kind.BACKWARD)
        self.meter.rename(Kind.BACKWARD, Kind.GRADIENTS)


class _WatchedStore:
    """A store of `layered` that reports each finished layer to the timeline."""

    def __init__(self, store: Store, timeline: _Timeline):
        self._store, self._timeline = store, timeline
        self.gathered, self.step = store.gathered, store.step

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        self._timeline.fetching()
        self._store.fetch(layer, following)

    def finish(self, layer: nn.Module) -> None:
        self._timeline.finished(layer)
        self._store.finish(layer)
