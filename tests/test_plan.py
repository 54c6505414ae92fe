"""`plan` predicts the bytes of real training steps, and chooses a configuration that fits in memory."""

import dataclasses
import json
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import ByT5Tokenizer

from lowmem import add_lora, cross_entropy, load_model
from lowmem.config.parse import named_fields, resolve
from lowmem.config.rules import conflicts
from lowmem.config.train_config import TrainConfig
from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.offloaded import offload_weights, offloaded_of
from lowmem.distributed.placement import is_quantized
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss
from lowmem.memory import offload, savers
from lowmem.model.build import build_model, freeze
from lowmem.model.load import config_of
from lowmem.model.quantized import scales_of
from lowmem.optim.make import make_optimizer
from lowmem.plan import predict
from lowmem.plan.alternatives import _largest_that_fits, alternatives, price, variants
from lowmem.plan.choose import choose, ladder, over_bytes
from lowmem.plan.command import flags_between
from lowmem.plan.meter import MemoryMeter
from lowmem.plan.parts import Cluster, Counted, Traffic, extrapolate
from lowmem.plan.predict import CONTEXT, Prediction, cluster_of, prediction
from lowmem.plan.rehearsal import count, count_deeper, count_shallow
from lowmem.step import TrainState, train_step
from lowmem.storage import records
from lowmem.storage.records import ScratchFile, Space
from tests.forked import fork_ranks
from tests.models import FAMILIES, build
from tests.processes import run, train

CPU = Cluster(world_size=1, local_world_size=1, on_gpu=False)
GPU = Cluster(world_size=1, local_world_size=1, on_gpu=True)
GPUS = Cluster(world_size=2, local_world_size=2, on_gpu=True)
WIDE = {  # matrices of more than 4,096 elements, which are offloaded
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 192},
    "llama": {"hidden_size": 128, "intermediate_size": 192},
}
TIERS = {"fp32": {}, "exact": {"mixed_precision": "bf16"}, "lean": {"mixed_precision": "bf16", "memory": "lean"}}


def write_model(folder, family, **changes):
    (folder / f"{family}.json").write_text(json.dumps(FAMILIES[family] | changes))
    return folder / f"{family}.json"


def config_for(folder, family, tier="exact", **flags):
    sizes = {"max_seq_len": 32, "batch_size": 4, "gradient_accumulation_steps": 2}
    return resolve({"model_config": write_model(folder, family), **sizes, **TIERS[tier], **flags})


def peak_of_two_steps(config, accelerator):
    """Run two optimizer steps with the training code; return this rank's peak tensor bytes in the second step."""
    if config.lora_rank:
        options = {"quantization": config.quantization, "dtype": torch.bfloat16}
        model = add_lora(load_model(config.model_name_or_path, **options)[0], **config.lora)
    else:
        model = build_model(config_of(config.model_config), "eager" if "t5" in config.model_config else "sdpa")
    names = ("sharding_strategy", "shard_size", "cpu_offload", "tp_size", "pp_size")
    model = parallelize(model, accelerator, **{name: getattr(config, name) for name in names})
    optimizer = make_optimizer(model, memory=config.memory or "off")
    tokens = torch.randint(3, 300, (config.batch_size, config.max_seq_len))
    is_causal = not model.config.is_encoder_decoder
    inputs = {"input_ids": tokens, "labels": F.pad(tokens[:, 1:], (1, 0), value=-100) if is_causal else tokens}
    if config.packing:
        positions = (torch.arange(config.max_seq_len) % 20).expand_as(tokens).contiguous()
        inputs |= {name: positions for name in ("position_ids", "decoder_position_ids")[: 1 if is_causal else 2]}
    elif not is_causal:
        inputs["attention_mask"] = torch.ones_like(tokens).index_fill(1, torch.tensor([31]), 0)
    num_targets = tokens.numel() - len(tokens) * is_causal
    batch = Batch(inputs, num_targets, row_ids=[], needs_its_masks=True)
    batches = [batch] * config.gradient_accumulation_steps
    active = [savers.SAVERS[name] for name in config.savers]
    with MemoryMeter() as meter, savers.entered(active, model, optimizer):
        kept = [tensor for tensors in optimizer.state.values() for tensor in tensors.values()]
        scales = [x for p in model.parameters() if is_quantized(p) for x in scales_of(p)]
        meter.count(map(local_of, [*model.parameters(), *scales, *kept, *inputs.values()]))
        state = TrainState(model, optimizer)
        for _ in range(2):
            meter.reset_peak()
            clipping = {"max_grad_norm": config.max_grad_norm or None}
            train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-4, **clipping)
    return meter.peak_bytes


@pytest.fixture
def restored_environment(monkeypatch):
    """Restore the launcher's environment variables, which `count` sets because it usually runs in its own process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def rehearse(config, cluster=CPU, stage=0):
    return extrapolate(count_shallow(config, cluster, stage), count_deeper(config, cluster, stage))


def predicted_bytes(config, cluster=CPU):
    return prediction(config, cluster, rehearse(config, cluster)).device_bytes


RELEASE = {"release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
SAVERS = ({}, {"recompute": "full"}, {"recompute": "cheap"}, RELEASE, RELEASE | {"recompute": "full"})


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_prediction_is_within_a_tenth_of_the_measured_peak(family, tmp_path, restored_environment):
    for tier in TIERS:
        for options in SAVERS:
            assert_within_a_tenth(config_for(tmp_path, family, tier, **options))


LAYERED = {"layered": True, "gradient_accumulation_steps": 3}
IN_LAYERS = LAYERED | {"release": True, "max_grad_norm": 0.0}
PACKED = {"packing": True, "max_seq_len": 128}
PACKED_TEXT = PACKED | {"recompute": "cheap", "text_column": "text"}


@pytest.mark.parametrize(
    ("tier", "options"),
    [("fp32", SAVERS[0]), ("exact", PACKED_TEXT), ("lean", SAVERS[4]), ("exact", LAYERED), ("lean", IN_LAYERS)],
)
def test_a_llama_prediction_in_each_tier_is_within_a_tenth_of_the_peak(tier, options, tmp_path, restored_environment):
    assert_within_a_tenth(config_for(tmp_path, "llama", tier, **options))


def test_a_prediction_for_packed_pairs_is_within_a_tenth_of_the_peak(tmp_path, restored_environment):
    assert_within_a_tenth(config_for(tmp_path, "t5", "exact", **PACKED))


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_prediction_for_adapters_is_within_a_tenth_of_the_peak(quantization, tmp_path, restored_environment):
    build("llama", **WIDE["llama"]).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    options = {"max_seq_len": 32, "batch_size": 4, "gradient_accumulation_steps": 2, "recompute": "full"}
    options |= {"model_name_or_path": str(tmp_path), "lora_rank": 4, "quantization": quantization}
    assert_within_a_tenth(resolve(options | TIERS["exact"]))


def assert_within_a_tenth(config):
    real = peak_of_two_steps(config, Accelerator(cpu=True))
    assert abs(predicted_bytes(config) / real - 1) < 0.1, (config.memory, config.recompute, config.release, real)


# --- offloaded weights


class CountingFile(ScratchFile):
    """A file that counts the bytes that it and others in its folder read and write."""

    def __init__(self, folder, moved):
        super().__init__(folder, pin_memory=False)
        self._moved = moved

    def in_same_folder(self):
        return CountingFile(self._folder, self._moved)

    def read(self, address, target):
        self._moved["read"] += target.nbytes
        super().read(address, target)

    def write(self, address, source):
        self._moved["written"] += source.nbytes
        super().write(address, source)


def moved_in_a_step(config, folder):
    """Return the bytes that the second step reads and writes."""
    moved, device = Counter(), torch.device("cpu")
    model = build_model(config_of(config.model_config))
    freeze(model, parts=config.frozen_parts)
    offload_weights(model, Space(CountingFile(folder, moved), device), device)
    optimizer = make_optimizer(model, **config.optimizer_options)
    batches, state, accelerator = [], TrainState(model, optimizer), Accelerator(cpu=True)
    for _ in range(config.gradient_accumulation_steps):
        tokens = torch.randint(3, 384, (config.batch_size, config.max_seq_len))
        labels = tokens if model.config.is_encoder_decoder else tokens.index_fill(1, torch.tensor([0]), -100)
        batches.append(Batch({"input_ids": tokens, "labels": labels}, int((labels > 0).sum()), row_ids=[]))
    options = {"learning_rate": 1e-4, "max_grad_norm": config.max_grad_norm or None}
    with savers.entered([savers.SAVERS[name] for name in config.savers], model, optimizer):
        for _ in range(2):
            offloaded_of(model).space.drain()
            moved.clear()
            train_step(state, batches, chunked_loss, accelerator, **options)
        offloaded_of(model).space.drain()
    return moved


@pytest.mark.parametrize(
    ("family", "tier", "shape", "flags"),
    [
        ("llama", "lean", {"num_hidden_layers": 5}, IN_LAYERS | {"offload_activations": True}),
        ("llama", "exact", {"num_hidden_layers": 5, "vocab_size": 1500}, {"gradient_accumulation_steps": 3}),
        ("t5", "exact", {"num_layers": 5}, {"gradient_accumulation_steps": 1, "freeze": "embeddings,encoder"}),
    ],
)
def test_plan_counts_the_bytes_that_a_step_with_offloaded_weights_reads_and_writes(
    family, tier, shape, flags, tmp_path, restored_environment, monkeypatch
):
    monkeypatch.setitem(records._IN_FLIGHT_BYTES, "cpu", 2**14)  # what is in flight need not be read
    monkeypatch.setattr(cross_entropy, "_WEIGHT_ELEMENTS", 2**15)  # several slices of an offloaded head
    config = config_for(tmp_path, family, tier, offload_weights=tmp_path / "store", **flags)
    write_model(tmp_path, family, **WIDE[family] | shape)
    predicted = rehearse(config).traffic
    moved = moved_in_a_step(config, tmp_path / "store")
    assert (predicted.read, predicted.written) == pytest.approx((moved["read"], moved["written"]), rel=0.01)


def test_a_step_streams_weights_while_it_computes_and_updates_afterwards():
    traffic = Traffic(forward=200, backward=200, update=500, written=300)
    assert traffic.read == 600
    # computing takes 1 s in forward and 3 s in backward
    seconds = {bandwidth: traffic.step_seconds(bandwidth=bandwidth, computing=4.0) for bandwidth in (10, 100, 1000)}
    assert seconds == {10: 20 + 20 + 50, 100: 2 + 3 + 5, 1000: 1 + 3 + 0.5}


STRATEGIES = [{"sharding_strategy": name} for name in ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")] + [{"tp_size": 2}]


def write_peaks(folder, configs):
    accelerator = init_distributed()
    peaks = [peak_of_two_steps(config, accelerator) for config in configs]
    (folder / f"peaks-{accelerator.process_index}").write_text(json.dumps(peaks))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # lowmem.distributed.fully_sharded explains the warning
def test_a_prediction_on_two_processes_is_within_a_tenth_of_the_peak(tmp_path, restored_environment):
    configs = [
        config_for(tmp_path, "llama", tier, recompute="full", **options)
        for options in STRATEGIES
        for tier in ("exact", "lean")
        if (tier, "tp_size" in options) != ("lean", True)  # lean's blocks do not fit in the shards of tp_size=2
    ]
    configs.append(dataclasses.replace(configs[2], offload_activations=True))
    configs += [config_for(tmp_path, "llama", tier, **IN_LAYERS, **STRATEGIES[2]) for tier in ("exact", "lean")]
    configs.append(dataclasses.replace(configs[4], cpu_offload=True))
    assert fork_ranks(2, write_peaks, tmp_path, configs) == [0, 0]
    peaks = json.loads((tmp_path / "peaks-0").read_text())
    for config, real in zip(configs, peaks, strict=True):
        found = predicted_bytes(config, Cluster(2, 2, on_gpu=False))
        assert abs(found / real - 1) < 0.1, (config.sharding_strategy, config.tp_size, config.memory, found, real)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_prediction_with_two_replicas_of_two_shards_is_within_a_tenth_of_the_peak(tmp_path, restored_environment):
    sharding = {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}
    configs = [config_for(tmp_path, family, recompute="full", **sharding) for family in ("t5", "llama")]
    assert fork_ranks(4, write_peaks, tmp_path, configs) == [0] * 4
    peaks = json.loads((tmp_path / "peaks-0").read_text())
    for config, real in zip(configs, peaks, strict=True):
        assert abs(predicted_bytes(config, Cluster(4, 4, on_gpu=False)) / real - 1) < 0.1, (config.model_config, real)


# --- stages

STAGES = {"pp_size": 2, "gradient_accumulation_steps": 4}


def test_a_prediction_for_each_stage_is_within_a_twentieth_of_the_peak(tmp_path, restored_environment):
    configs = [config_for(tmp_path, "llama", "exact", **STAGES), config_for(tmp_path, "t5", "lean", **STAGES)]
    assert fork_ranks(2, write_peaks, tmp_path, configs) == [0, 0]
    peaks = [json.loads((tmp_path / f"peaks-{rank}").read_text()) for rank in (0, 1)]
    for config, *real in zip(configs, *peaks, strict=True):
        stages = [rehearse(config, GPUS._replace(on_gpu=False), stage) for stage in (0, 1)]
        predicted = prediction(config, GPUS._replace(on_gpu=False), *stages)
        assert predicted.stages == pytest.approx(real, rel=0.05) and predicted.device_bytes == max(predicted.stages)
        whole = sum(x.numel() for x in build_model(config_of(config.model_config)).parameters())
        assert sum(stage.num_parameters for stage in stages) == whole  # those of both stages count once
        messages, shared = 1, 0
        if "t5" in config.model_config:
            # the encoder's output too; embeddings, the decoder's position bias, and the encoder's last norm
            messages, shared = 2, 384 * 32 + 32 * 4 + 32
        messages *= 4 * 4 * 32 * 32  # micro-batches, rows, tokens, width
        scalars = 2  # the loss, and the sum of squares of the norm
        assert [stage.sent_bytes for stage in stages] == [2 * messages + 4 * (shared + scalars)] * 2


def test_memory_of_a_deep_stage_is_extrapolated_from_shallow_ones(tmp_path, restored_environment):
    config = config_for(tmp_path, "llama", max_seq_len=16, batch_size=1, **STAGES)
    path = write_model(tmp_path, "llama", num_hidden_layers=10)
    whole, found = count(config, GPUS, config_of(str(path)), stage=0), rehearse(config, GPUS, stage=0)
    largest = [max(sum(parts.values()) for parts in counted.peaks.values()) for counted in (found, whole)]
    assert largest[0] == pytest.approx(largest[1], rel=0.01)
    assert dataclasses.replace(found, peaks=whole.peaks) == whole  # the bytes of checkpoints and messages


def test_the_host_memory_of_a_machine_is_that_of_its_stages(tmp_path):
    config = config_for(tmp_path, "llama", pp_size=2, save_steps=1, save_total_limit=0)
    first, second = (
        Counted({"update": {"weights": size, "offloaded": host}}, size, 3 * size, size // 2, sent_bytes=size)
        for size, host in ((400, 2**27), (600, 2**30))
    )
    one, two = (prediction(config, Cluster(4, n, on_gpu=True), first, second) for n in (4, 1))
    assert one.host["offloaded, of all processes"] == 2 * (2**27 + 2**30)
    assert two.host["offloaded, of all processes"] == 2**30  # of the machine with the second stage
    assert one.device["weights"] == one.sent_bytes == 600
    assert (one.disk["each checkpoint"], one.disk["model"]) == (3000, 1000)
    assert "(50% of computing: (stages - 1) / micro-batches = 1 / 2)" in one.pipeline


def test_stages_are_chosen_where_they_suffice_and_the_model_has_as_many_layers(tmp_path):
    config, lines = config_for(tmp_path, "llama", device_memory="5GB", recompute="cheap"), []
    cluster = Cluster(3, 3, on_gpu=True)

    def predict(most, configs):
        def predicted(config):
            if config.pp_size > most:
                raise UsageError(f"pp_size={config.pp_size} needs a layer for each stage")
            state = {"NO_SHARD": 12, "SHARD_GRAD_OP": 8, "FULL_SHARD": 6}[config.sharding_strategy] / config.pp_size
            return Prediction({"all": int((0 if config.cpu_offload else state) * 10**9)}, {"all": 5}, {})

        return map(predicted, configs)

    chosen = choose(config, cluster, (), partial(predict, 3), lines.append).config
    assert (chosen.pp_size, chosen.sharding_strategy, chosen.recompute) == (3, "NO_SHARD", "full")
    rows = [x.batch_size * x.gradient_accumulation_steps * 3 // x.pp_size for x in (config, chosen)]
    assert rows[0] == rows[1] and not conflicts(chosen, ())
    costs = price(config, chosen, cluster)
    share = 2 / chosen.gradient_accumulation_steps
    assert f"hidden states and their gradients over the wire, each micro-batch; {share:.0%} idle" in costs
    lines.clear()
    chosen = choose(config, cluster, (), partial(predict, 2), lines.append).config
    assert chosen.cpu_offload and chosen.pp_size == 1
    assert "  pp_size=3: not tried, pp_size=3 needs a layer for each stage" in lines
    # with stages, a sharding strategy divides only what several data-parallel ranks hold
    staged = dataclasses.replace(config, pp_size=3)
    assert names(ladder(staged, cluster, ()))[-2:] == ["offload_activations", "cpu_offload"]
    assert "sharding_strategy=FULL_SHARD" in names(ladder(staged, Cluster(6, 6, on_gpu=True), ()))


DEEP = {
    "t5": [{"num_layers": 6, "dropout_rate": 0.1}, {"num_layers": 5, "num_decoder_layers": 7}],
    "llama": [{"num_hidden_layers": 6}],
}


@pytest.mark.parametrize(("family", "options"), [*((family, {}) for family in DEEP), ("llama", IN_LAYERS)])
def test_memory_of_deep_models_is_extrapolated_from_shallow_ones(family, options, tmp_path, restored_environment):
    for depth in DEEP[family]:
        gpu, config = Cluster(1, 1, on_gpu=True), config_for(tmp_path, family, max_seq_len=64, batch_size=2, **options)
        path = write_model(tmp_path, family, **depth)
        whole, found = count(config, gpu, config_of(str(path))), rehearse(config, gpu)
        assert found.num_parameters == whole.num_parameters
        assert (found.model_bytes, found.checkpoint_bytes) == (whole.model_bytes, whole.checkpoint_bytes)
        peaks = [max(sum(parts.values()) for parts in counted.peaks.values()) for counted in (found, whole)]
        assert abs(peaks[0] / peaks[1] - 1) < 0.02, depth


def test_predicted_weights_moments_and_gradients_have_the_bytes_of_the_tier(tmp_path, restored_environment):
    counted = rehearse(config_for(tmp_path, "llama"))
    parts = counted.peaks["update"]
    weights = counted.num_parameters
    assert (parts["weights"], parts["low halves"]) == (pytest.approx(2 * weights, rel=0.01), 2 * weights)
    assert parts["moments"] == pytest.approx(8 * weights, rel=0.01)
    assert parts["gradients"] == pytest.approx(4 * weights, rel=0.01)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_all_gather_buffers_count_as_communication_from_the_first_forward(tmp_path, restored_environment):
    sharding = {"sharding_strategy": "SHARD_GRAD_OP", "gradient_accumulation_steps": 1}
    counted = rehearse(config_for(tmp_path, "llama", **sharding), Cluster(2, 2, on_gpu=False))
    assert counted.peaks["loss"]["communication"] == 2 * counted.num_parameters


def names(rungs):
    return [rung.name for rung in rungs if not rung.refused]


def test_the_ladder_keeps_the_tier_the_rows_per_step_and_what_flags_set(tmp_path):
    config = config_for(tmp_path, "llama")
    rungs = list(ladder(config, GPUS, fixed=()))
    assert names(rungs) == [
        "no change",
        "recompute=cheap",
        "recompute=full",
        "batch_size=2 x accumulation 4",
        "batch_size=1 x accumulation 8",
        "offload_activations",
        "sharding_strategy=SHARD_GRAD_OP",
        "sharding_strategy=FULL_SHARD",
        "pp_size=2",
        "cpu_offload",
        "offload_weights=host",
        "offload_weights=out/offloaded",
    ]
    for rung in rungs:
        changed = dataclasses.replace(config, **rung.changes)
        rows = [x.batch_size * x.gradient_accumulation_steps // x.pp_size for x in (config, changed)]
        assert rows[0] == rows[1]  # on as many data-parallel ranks
        assert (changed.memory, changed.optimizer) == (config.memory, config.optimizer)
    fixed = named_fields({"batch_size": 4, "recompute": "off", "use_large_config": True}, TrainConfig)
    assert fixed == {"batch_size", "recompute"}
    refused = {rung.name: rung.refused for rung in ladder(config, GPUS, fixed) if rung.refused}
    assert refused["recompute=full"] == "--recompute is set"
    assert refused["batch_size=2 x accumulation 4"] == "--batch_size is set"
    whole = dataclasses.replace(config, gradient_accumulation_steps=None, global_batch_size=16)
    changes = [rung.changes for rung in ladder(whole, GPUS, fixed=())]
    assert all("gradient_accumulation_steps" not in each and "global_batch_size" not in each for each in changes)
    unclipped = names(ladder(dataclasses.replace(config, max_grad_norm=0.0), GPUS, ()))
    assert unclipped[2:5] == ["recompute=full", "layered, release", "batch_size=2 x accumulation 4"]
    assert unclipped[-3] == "cpu_offload"
    in_fp16 = dataclasses.replace(config, max_grad_norm=0.0, mixed_precision="fp16", memory=None)
    assert "layered, release" not in names(ladder(in_fp16, GPUS, ()))  # release and fp16 exclude each other
    released = config_for(tmp_path, "llama", release=True, gradient_accumulation_steps=1, max_grad_norm=0)
    assert names(ladder(released, GPUS, ())) == [
        "no change",
        "recompute=cheap",
        "recompute=full",
        "offload_activations",
        "offload_weights=host",
        "offload_weights=out/offloaded",
    ]


def predictions(sizes):
    """Return a fake `predict` for `choose`: `sizes[recompute, batch_size]` are the device bytes that it predicts."""

    def predict(configs):
        return (Prediction({"all": sizes[config.recompute, config.batch_size]}, {"all": 5}, {}) for config in configs)

    return predict


def test_the_first_rung_that_fits_is_chosen_and_every_tried_rung_is_reported(tmp_path):
    config = config_for(tmp_path, "llama", device_memory="3GB")
    sizes = {("off", 4): 9 * 10**9, ("cheap", 4): 4 * 10**9, ("full", 4): 3 * 10**9, ("full", 2): 2 * 10**9}
    sizes |= {("full", 1): 1 * 10**9, ("off", 2): 8 * 10**9, ("off", 1): 7 * 10**9}
    lines = []
    _, chosen, predicted, missing = choose(config, CPU, (), predictions(sizes), lines.append)
    assert (chosen.recompute, chosen.batch_size, predicted.device_bytes, missing) == ("full", 4, 3 * 10**9, "")
    assert lines[0] == "  no change: device 9.00 GB, host 0.00 MB; 6.00 GB more than --device_memory=3GB"
    assert lines[-1].endswith("recompute=full: device 3.00 GB, host 0.00 MB; fits")
    tight = dataclasses.replace(config, device_memory="500MB")
    closest = choose(tight, CPU, (), predictions(sizes), lines.append)
    assert closest.rung == "batch_size=1 x accumulation 8"
    assert closest.missing == "0.50 GB more than --device_memory=500MB"


def test_rungs_that_save_nothing_are_not_reported_and_those_of_activations_cannot_lower_the_rest(tmp_path):
    config = config_for(tmp_path, "llama", device_memory="3GB")

    def predict(configs):
        for config in configs:
            state = 1 if config.cpu_offload else 2 if config.sharding_strategy != "NO_SHARD" else 4
            size = state + (config.recompute == "off") + 3 * (state < 4 and not config.offload_activations)
            yield Prediction({"all": size * 10**9}, {"all": 5}, {}, device_floor=state * 10**9)

    lines = []
    chosen = choose(config, GPUS, (), predict, lines.append).config
    assert (chosen.sharding_strategy, chosen.cpu_offload) == ("SHARD_GRAD_OP", False)
    (skipped,) = (line for line in lines if "not tried" in line)  # how many rungs are tried at a time varies
    assert "batch_size=1 x accumulation 8, offload_activations: not tried, 4.00 GB are needed without" in skipped

    def same(configs):
        return (Prediction({"all": 9 * 10**9}, {"all": 5}, {}) for _ in configs)

    lines.clear()
    assert choose(config, CPU, (), same, lines.append).rung == "no change"
    assert [line.strip().partition(":")[0] for line in lines] == ["no change"]


# --- what else fits


def predict_in_process(cluster):
    counted = {}

    def predicted(config):
        ranks = cluster_of(config, cluster)
        if config not in counted:
            counted[config] = [rehearse(config, ranks, stage) for stage in range(config.pp_size)]
        return prediction(config, ranks, *counted[config])

    return partial(map, predicted)


WIDER = {"vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}


@pytest.fixture
def fine_tuning(tmp_path, restored_environment):
    """Flags to fine-tune a model of which only the config.json exists, and a function that predicts for one GPU."""
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"] | WIDER))
    flags = {"model_name_or_path": str(tmp_path), "text_column": "text", "max_seq_len": 128, "batch_size": 1}
    flags["recompute"] = "full"  # fewer rungs to predict
    return flags | TIERS["exact"], predict_in_process(GPU)


def found_for(config, choice, predict, cluster=GPU):
    """Check and return what `alternatives` finds: {the changed flags: price}."""
    found = {}
    for each in alternatives(config, cluster, {"batch_size"}, choice, predict):
        assert all(over <= 0 for over in over_bytes(each.config, each.predicted).values())
        assert not conflicts(each.config, ()) and each.config != choice.config
        changes = " ".join(flags_between(config, each.config))
        found[changes] = price(config, each.config, cluster, each.predicted.step_seconds)
    assert found
    return found


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_what_fits_next_to_an_offload_is_found_with_its_price(fine_tuning):
    flags, predict = fine_tuning
    config = resolve(flags)
    exact, lean = predict([dataclasses.replace(config, memory=x) for x in ("exact", "lean")])
    limit = (9 * exact.device_floor + lean.device_bytes) // 10
    assert lean.device_bytes < limit < exact.device_floor
    config = dataclasses.replace(config, device_memory=str(limit))
    choice = choose(config, GPU, {"batch_size"}, predict, lambda line: None)
    assert choice.config.cpu_offload and not choice.missing and choice.config.memory == "exact"
    found = found_for(config, choice, predict)
    first, costs = next(iter(found.items()))
    assert first.startswith("--memory=lean") and "offload" not in first
    assert costs.startswith("rounding, at most the spread of seeds")
    for flag, costs in (
        ("--optimizer=adafactor", "another optimizer"),
        ("--layered=True", "no clipping"),
        ("--sharding_strategy=FULL_SHARD", "processes, each with its own device"),
        ("--lora_rank=16", "adapters alone are trained"),
        ("--offload_weights=host", "stream from host memory, "),
        ("--offload_weights=out/offloaded", "stream from a file, which wears an SSD, "),
    ):
        assert any(flag in changes and costs in found[changes] for changes in found), (flag, found)
    assert not any("--max_seq_len" in changes for changes in found)  # which would not help
    (processes,) = {int(x.partition("num_processes=")[2].split()[0]) for x in found if "num_processes" in x}
    fewer = {"num_processes": processes - 1, "sharding_strategy": "FULL_SHARD"}
    (less,) = predict([dataclasses.replace(config, **fewer)])
    assert processes == 2 or less.device_bytes > limit


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fewer_tokens_are_found_where_activations_do_not_fit(fine_tuning):
    flags, predict = fine_tuning
    config = resolve(flags | {"max_seq_len": 4096, "offload_activations": True, "optimizer": "sgd"})
    sizes = [next(predict([dataclasses.replace(config, max_seq_len=x)])).device_bytes for x in (4096, 1024)]
    config = dataclasses.replace(config, device_memory=str(sum(sizes) // 2))
    choice = choose(config, GPU, {"batch_size"}, predict, lambda line: None)
    assert choice.missing or choice.config.cpu_offload
    found = (each.config for each in alternatives(config, GPU, {"batch_size"}, choice, predict))
    shorter = next(each for each in found if each.max_seq_len < 4096)  # the others are not predicted
    assert 1024 <= shorter.max_seq_len < 4096
    assert f"rows are cut after {shorter.max_seq_len} tokens" in price(config, shorter, GPU)


def test_the_largest_number_that_fits_is_found_although_bytes_are_not_linear():
    def rounded(x, failed):
        return int(min(x, failed - 1))

    calls = []

    def over(x):
        calls.append(x)
        return max(5 * x, 12 * x - 1500) - 1000  # the limit, 1000, is reached at 200

    assert _largest_that_fits(over, (800, 400), rounded) == 200 and len(calls) <= 6
    assert _largest_that_fits(lambda x: 10, (800, 400), rounded) == 0  # smaller numbers need as much
    assert _largest_that_fits(lambda x: x + 5, (800, 400), rounded) == 0


def test_the_price_of_what_takes_neither_time_nor_exactness_is_nothing(tmp_path):
    config = config_for(tmp_path, "llama")
    costs = {name: cost for name, cost, _ in variants(dataclasses.replace(config, recompute="full"), GPUS)}
    assert costs["memory=off"] == costs["recompute=off"] == "nothing"
    assert costs["memory=lean"] == "rounding, at most the spread of seeds"
    assert costs["sharding_strategy=FULL_SHARD"] == "weights twice and gradients over the wire, each micro-batch"
    assert not any(
        name.startswith("recompute") for name, *_ in variants(config_for(tmp_path, "llama", layered=True), CPU)
    )
    offloaded = dataclasses.replace(config, layered=True, offload_weights="host", sharding_strategy="FULL_SHARD")
    costs = price(config, offloaded, GPU, 2.34)  # nothing goes over a wire in one process
    assert costs == "layers and their state stream from host memory, 2.3 s a step; each layer's forward twice"
    assert (
        price(dataclasses.replace(config, recompute="full"), dataclasses.replace(config, layered=True), GPU)
        == "nothing"
    )


def test_the_numbers_of_processes_of_other_machines(tmp_path):
    config = config_for(tmp_path, "llama")
    machines = Cluster(world_size=4, local_world_size=2, on_gpu=True)
    assert cluster_of(config, machines) == machines
    assert cluster_of(dataclasses.replace(config, num_processes=8), machines) == Cluster(8, 2, True)
    assert cluster_of(dataclasses.replace(config, num_processes=8), GPUS) == Cluster(8, 8, True)


def predict_two_parts(configs):
    """Predict the sum of activations and state, a multiple of 0.5 GB."""
    for config in configs:
        activations = {"off": 4, "cheap": 2, "full": 1}[config.recompute] * config.batch_size
        activations *= 0.5 if config.offload_activations else 1
        state = {"NO_SHARD": 12, "SHARD_GRAD_OP": 6, "FULL_SHARD": 3}[config.sharding_strategy]
        state *= 0 if config.cpu_offload else 1
        yield Prediction({"all": int((activations + state) * 10**9)}, {"all": 5}, {})


def test_rungs_that_a_later_rung_makes_unnecessary_are_undone_costliest_first(tmp_path):
    config, lines = config_for(tmp_path, "llama", device_memory="10GB"), []
    _, chosen, predicted, _ = choose(config, GPUS, (), predict_two_parts, lines.append)
    assert [line.partition(":")[0].strip() for line in lines[6:]] == [
        "sharding_strategy=SHARD_GRAD_OP",  # needs 6.5 GB
        "without offload_activations",  # 7 GB
        "without batch_size=1 x accumulation 8",  # 8 GB
        "without batch_size=2 x accumulation 4",  # 10 GB
        "without recompute=full",  # 14 GB is too much, so recompute=full stays
    ]
    assert chosen == dataclasses.replace(config, recompute="full", sharding_strategy="SHARD_GRAD_OP")
    assert predicted.device_bytes == 10 * 10**9 and lines[-2].endswith("device 10.00 GB, host 0.00 MB; fits")
    assert lines[-1].endswith("4.00 GB more than --device_memory=10GB")


@pytest.mark.parametrize(
    ("limit", "fixed", "flags", "chosen"),
    [
        ("30GB", (), {}, {}),
        ("20GB", (), {}, {"recompute": "cheap"}),
        ("11GB", (), {"batch_size": 1}, {"sharding_strategy": "SHARD_GRAD_OP"}),
        ("9GB", {"recompute"}, {"batch_size": 1, "recompute": "cheap"}, {"sharding_strategy": "SHARD_GRAD_OP"}),
        (
            "2GB",
            (),
            {},
            # the earlier rung sharding_strategy=FULL_SHARD is not undone, because cpu_offload needs it
            {"recompute": "full", "batch_size": 2, "gradient_accumulation_steps": 4}
            | {"sharding_strategy": "FULL_SHARD", "cpu_offload": True},
        ),
    ],
)
def test_the_choice_contains_no_unnecessary_change(limit, fixed, flags, chosen, tmp_path):
    config = config_for(tmp_path, "llama", device_memory=limit, **flags)
    found = choose(config, GPUS, fixed, predict_two_parts, lambda line: None)
    assert found.config == dataclasses.replace(config, **chosen)


def test_host_memory_is_a_limit_too(tmp_path):
    config = config_for(tmp_path, "llama", host_memory="2.6GB")

    def predict(configs):
        return (Prediction({"all": 1}, {"all": 3 * 10**9}, {}) for _ in configs)

    closest = choose(config, GPUS, (), predict, lambda line: None)
    assert (closest.rung, closest.missing) == ("no change", "0.40 GB more than --host_memory=2.6GB")
    small = dataclasses.replace(config, host_memory="2GB")
    with pytest.raises(UsageError, match=r"libraries \(2 processes\) alone need 2.52 GB of host memory, 0.52 GB more"):
        choose(small, GPUS, (), predict, lambda line: None)


def test_device_memory_below_the_cuda_context_is_refused_before_counting(tmp_path):
    config = config_for(tmp_path, "llama", device_memory=20)
    with pytest.raises(UsageError, match=r"CUDA and its libraries alone need .* of device memory, .*=20 \(20 bytes\)"):
        choose(config, GPUS, (), None, None)


def test_host_memory_counts_all_processes_and_what_cpu_offload_moves(tmp_path):
    moments = {"update": {"offloaded": 3, "moments": 40, "activations": 7, "weights": 10}}
    counted = Counted(moments, model_bytes=20, checkpoint_bytes=100, num_parameters=0)
    config = config_for(tmp_path, "llama", sharding_strategy="FULL_SHARD", cpu_offload=True, save_total_limit=2)
    predicted = prediction(config, GPUS, counted)
    # of 3 offloaded bytes, up to 3 are in flight; pinned memory comes in slabs
    assert sum(size for kind, size in predicted.device.items() if kind != CONTEXT) == 7 + 3
    of_processes = sum(size for kind, size in predicted.host.items() if kind.endswith("processes"))
    assert of_processes == 2 * (10 + 40 + offload.SLAB_BYTES)
    assert (predict.IN_FLIGHT_BYTES, predict.SLAB_BYTES) == (offload.IN_FLIGHT_BYTES, offload.SLAB_BYTES)
    assert predicted.disk == {"3 checkpoints": 300, "model": 20}
    kept = prediction(dataclasses.replace(config, cpu_offload=False), GPUS, counted)
    assert list(kept.device) == ["weights", "moments", "activations", CONTEXT]  # persistent parts are first


def test_wrong_sizes_are_reported_before_torch_is_loaded():
    code = (
        "import sys, lowmem.cli as cli\n"
        "assert cli.main(arguments=['plan', '--device_memory=much', '--batch_size=0']) == 2\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert "--device_memory: size 'much' is not valid" in result.stderr and "--batch_size=0" in result.stderr


def test_plan_prints_its_result_and_writes_no_file_except_a_chart(tmp_path):
    model = write_model(tmp_path, "llama")
    flags = [f"--model_config={model}", "--text_column=text", "--max_seq_len=64", "--mixed_precision=bf16"]
    result = train("plan", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in ("device, peak per process", "low halves", "3 checkpoints", "memory=lean", "recompute=full"):
        assert expected in result.stdout
    drawn = ["out", "out/plan.png"] if "out/plan.png: chart" in result.stdout else []
    assert drawn or "matplotlib is not installed" in result.stdout
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["llama.json", *drawn]

    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"] | WIDER))  # fine-tuning, without the weights
    flags = [f"--model_name_or_path={tmp_path}", *flags[1:], "--recompute=full", "--offload_activations=False"]
    flags += ["--cpu_offload=False", "--sharding_strategy=NO_SHARD", "--layered=False"]  # then nothing fits
    flags += ["--num_processes=1", "--device_memory=1.2GB"]
    result = train("plan", *flags, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    breakdown, _, answers = result.stdout.partition("what would fit, if you add these flags to yours:")
    for expected in ("device, peak per process: ", "  moments  ", "host, this machine: ", "disk: "):
        assert expected in breakdown
    assert "  --memory=lean\n" in answers and "; costs: rounding" in answers
    assert "nothing fits: the closest setting, no change, needs" in result.stderr
    assert "add the flags of one line above, such as --" in result.stderr


def test_train_chooses_settings_that_fit_and_writes_them_to_config_json(tmp_path):
    (tmp_path / "rows.txt").write_text("".join(f"line {i} of a text\n" for i in range(60)))
    flags = [
        f"--model_config={write_model(tmp_path, 'llama')}",
        f"--train_file={tmp_path}/rows.txt",
        "--text_column=text",
    ]
    flags += ["--max_steps=1", "--max_seq_len=256", "--batch_size=16", f"--output_dir={tmp_path}/out"]
    refused = train("train", *flags, "--device_memory=630MB")
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert "error: nothing fits: the closest setting, " in refused.stderr
    assert "more than --device_memory=630MB" in refused.stderr
    assert "what would fit, if you add these flags to yours:" in refused.stdout
    result = train("train", *flags, "--device_memory=648MB")
    assert result.returncode == 0, result.stderr
    assert "no change: device" in result.stdout and "; fits" in result.stdout, result.stdout
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["recompute"] != "off" and f"chosen: --recompute={kept['recompute']}" in result.stdout
    assert kept["batch_size"] == 16
