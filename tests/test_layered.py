"""Layered gradient accumulation gives the losses and gradients of micro-batch order, on any number of processes."""

from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from shutil import rmtree
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig, masking_utils

from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss
from lowmem.memory.layered import layered
from lowmem.memory.savers import (
    entered,
    layered_offloaded,
    offload_activations,
    recompute,
    recompute_cheap,
    release,
)
from lowmem.model.build import freeze, model_from
from lowmem.model.replaced import replaced
from lowmem.optim.make import make_optimizer
from lowmem.plan.meter import MemoryMeter
from lowmem.step import TrainState, train_step
from tests import runs
from tests.architectures import tiny_fields
from tests.forked import fork_ranks, train_ranks
from tests.models import LLAMA, build
from tests.processes import train
from tests.runs import assert_same_run, write_files

DROPOUT = {"t5": {"dropout_rate": 0.1}, "llama": {"attention_dropout": 0.1}, "qwen2": {"attention_dropout": 0.1}}
TIED = {"t5": "shared.weight", "qwen2": "model.embed_tokens.weight"}
ACCUMULATED = 4
STRATEGIES = ["NO_SHARD", "FULL_SHARD", "SHARD_GRAD_OP"]


def batches_of(is_encoder_decoder, count=ACCUMULATED, first=0):
    """Make micro-batches of unequal shapes, with padding."""
    batches = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(index)
        rows, length = 2 + index % 2, 16 + 8 * (index % 3)
        ids = torch.randint(3, 384, (rows, length), generator=generator)
        labels = torch.randint(3, 384, (rows, 12 if is_encoder_decoder else length), generator=generator)
        if not is_encoder_decoder:
            labels[:, :4] = -100
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batches.append(Batch(inputs, int((labels != -100).sum()), [], needs_its_masks=True))
    return batches


def packed_batches(is_encoder_decoder):
    """Make micro-batches of rows of two or three documents."""
    batches = batches_of(is_encoder_decoder)
    for batch in batches:
        del batch.inputs["attention_mask"]
        for name, side in (("position_ids", "input_ids"), ("decoder_position_ids", "labels"))[: 1 + is_encoder_decoder]:
            length = batch.inputs[side].shape[1]
            period = -(-length // 2) if is_encoder_decoder else 9
            batch.inputs[name] = (torch.arange(length) % period).expand_as(batch.inputs[side]).contiguous()
    return batches


def trained(model, savers, batches, *, memory="off", steps=1, accelerator=None, loss_fn=chunked_loss, **options):
    """Train, and return losses, gradient norms and weights. SGD at rate 1 subtracts the gradient."""
    optimizer = make_optimizer(model, name="sgd" if memory == "off" else "adamw", memory=memory)
    state, accelerator = TrainState(model, optimizer, seed=3), accelerator or Accelerator(cpu=True)
    options = {"learning_rate": 1.0 if memory == "off" else 1e-2} | options
    with entered(savers, model, optimizer):
        results = [train_step(state, batches, loss_fn, accelerator, **options) for _ in range(steps)]
    return [x.loss for x in results], [x.grad_norm for x in results], dict(model.named_parameters())


def assert_same(results, others, tied=None):
    """Assert equal bits, except of tied embeddings, whose gradients are summed in another order."""
    (losses, norms, weights), (other_losses, other_norms, other_weights) = results, others
    assert losses == other_losses
    torch.testing.assert_close(norms, other_norms, rtol=0 if tied is None else 1e-2, atol=0)
    for name, weight in weights.items():
        if name != tied:
            assert torch.equal(weight, other_weights[name]), name
        else:
            torch.testing.assert_close(weight, other_weights[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", ["off", "exact", "lean"])
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
def test_layered_gives_the_bits_of_micro_batch_order(family, memory):
    # Offloaded gradients wait for their norm on the host. Of tied embeddings, the norm is another in the last bit.
    options = {"memory": memory, "max_grad_norm": None if family in TIED else 0.1}
    expected, *others = (
        trained(build(family, **DROPOUT[family]), savers, batches_of(family == "t5"), **options)
        for savers in ([], [layered], [layered_offloaded])
    )
    for found in others:
        if memory != "off" and family in TIED:  # AdamW divides gradients by their size, so their last bits count
            found[2][TIED[family]] = expected[2][TIED[family]]
        assert_same(expected, found, tied=TIED.get(family))


# their layers get different arguments, share tensors, or compute with more than the tensors that they get
@pytest.mark.parametrize(
    ("name", "tied"),
    {
        "bart": "model.shared.weight",
        "bloom": "transformer.word_embeddings.weight",
        "doge": None,
        "gemma2": "model.embed_tokens.weight",
        "gemma3_text": "model.embed_tokens.weight",
        "inkling2_text": "model.embed_tokens.weight",
        "mixtral": None,
    }.items(),
)
def test_other_architectures_have_the_bits_of_micro_batch_order(name, tied):
    def built():
        torch.manual_seed(0)
        fields = tiny_fields(name)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return model_from(config, torch.float32, on_meta=False).train()

    batches = batches_of(built().config.is_encoder_decoder)
    assert_same(trained(built(), [], batches), trained(built(), [layered], batches), tied=tied)


def train_packed():
    accelerator, in_backward = init_distributed(mixed_precision="bf16"), []
    results = []
    for savers in ([], [layered], [layered_offloaded]):
        model = build("llama", **DROPOUT["llama"])
        for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight, model.model.embed_tokens.weight):
            weight.register_hook(lambda _: in_backward.append(torch.is_autocast_enabled("cpu")))
        results.append(trained(model, savers, packed_batches(False), accelerator=accelerator))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert in_backward == [False] * 3 * 3 * ACCUMULATED and not torch.is_autocast_enabled("cpu")


def test_packed_rows_and_autocast_keep_their_bits():
    assert fork_ranks(1, train_packed) == [0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_pairs_keep_their_bits(attention):
    results = []
    for savers in ([], [layered], [layered_offloaded]):
        model = build("t5", **DROPOUT["t5"])
        model.set_attn_implementation(attention)
        results.append(trained(model, savers, packed_batches(True)))
    assert_same(results[0], results[1], tied=TIED["t5"])
    assert_same(results[0], results[2], tied=TIED["t5"])


def test_a_frozen_encoder_is_not_run_again():
    calls = []
    results = []
    for savers in ([], [layered]):
        model = build("t5", **DROPOUT["t5"])
        freeze(model, parts=["embeddings", "encoder"])
        model.encoder.block[0].register_forward_hook(lambda *_: calls.append(1))
        model.encoder.block[0].layer[0].register_forward_hook(lambda *_: calls.append(2))
        results.append(trained(model, savers, batches_of(True)))
    assert_same(*results)
    assert sorted(calls) == [1] * 2 * ACCUMULATED + [2] * 2 * ACCUMULATED


@pytest.mark.parametrize("savers", [[layered], [layered, release]])
def test_a_weight_of_a_layer_that_is_also_the_head_is_right(savers):
    def shared():
        model = build("llama", vocab_size=64)
        model.lm_head.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    batches = batches_of(False)
    for batch in batches:
        for name in ("input_ids", "labels"):
            batch.inputs[name].clamp_(max=63)
    _, _, weights = trained(shared(), [], batches)
    _, _, same_weights = trained(shared(), savers, batches)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, same_weights[name], rtol=1e-6, atol=1e-6)


def test_released_adafactor_has_the_bits_of_micro_batch_order():
    results = []
    for savers in ([], [layered, release]):
        model = build("llama", **DROPOUT["llama"])
        optimizer = make_optimizer(model, name="adafactor", memory="lean")
        state = TrainState(model, optimizer, seed=3)
        with entered(savers, model, optimizer):
            result = train_step(state, batches_of(False), chunked_loss, Accelerator(cpu=True), learning_rate=1e-2)
        results.append(([result.loss], [result.grad_norm], dict(model.named_parameters())))
    assert_same(*results)


def test_one_micro_batch_has_the_bits_of_micro_batch_order():
    for memory in ("off", "exact"):
        results = [
            trained(build("llama", **DROPOUT["llama"]), savers, batches_of(False, 1), memory=memory)
            for savers in ([], [layered], [layered, release])
        ]
        assert_same(results[0], results[1])
        assert_same(results[0], results[2])


def test_layers_that_are_one_module_are_right():
    def shared():
        model = build("llama", num_hidden_layers=3)
        model.model.layers[2] = model.model.layers[0]
        return model

    _, _, weights = trained(shared(), [], batches_of(False))
    _, _, same_weights = trained(shared(), [layered], batches_of(False))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, same_weights[name], rtol=1e-6, atol=1e-6)


def test_a_loss_may_run_the_model_again_without_gradients():
    """Such as for a reference. This forward pauses no micro-batch."""

    def loss_fn(model, batch):
        with torch.no_grad():
            reference = model(batch.inputs["input_ids"], use_cache=False).logits
        return chunked_loss(model, batch) * reference.square().mean()

    results = [trained(build("llama"), savers, batches_of(False), loss_fn=loss_fn) for savers in ([], [layered])]
    assert_same(*results)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_loss_may_call_the_model_with_a_cache(family):
    """As models do by default: each layer would add its keys and values again when it runs again in backward."""

    def loss_fn(model, batch, use_cache):
        logits = model(**batch.inputs, use_cache=use_cache).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.inputs["labels"].flatten(), reduction="sum")

    batches = batches_of(family == "t5")
    plain = trained(build(family), [], batches, loss_fn=partial(loss_fn, use_cache=False))
    mine = trained(build(family), [layered], batches, loss_fn=partial(loss_fn, use_cache=True))
    assert_same(plain, mine, TIED.get(family))


def test_released_and_offloaded_layers_need_less_memory():
    """Of 8 layers, one gradient is held at a time and, if inputs are offloaded, those of one layer."""
    peaks, batches = [], batches_of(False)
    for savers in ([recompute], [layered, release], [layered_offloaded, release]):
        model = build("llama", num_hidden_layers=8, hidden_size=64, vocab_size=384)
        with MemoryMeter() as meter:
            trained(model, savers, batches)
        peaks.append(meter.peak_bytes)
    weights = 4 * sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert peaks[0] - peaks[1] > 0.2 * weights, (peaks, weights)  # despite the inputs of all layers and micro-batches
    assert peaks[0] - peaks[2] > 0.8 * weights, (peaks, weights)


# --- processes


class Run(NamedTuple):
    """A run of two steps on several ranks."""

    strategy: str = "NO_SHARD"
    memory: str = "off"
    savers: tuple = ()
    max_grad_norm: float | None = 1.0
    family: str = "llama"

    def __str__(self):
        return "-".join([self.family, self.strategy, self.memory, *(saver.__name__ for saver in self.savers)])


# for each number of ranks, runs in micro-batch order, and runs that must end like them
SAME = {
    2: {
        Run(memory=memory): [Run(strategy, memory, (layered,)) for strategy in STRATEGIES] for memory in ("off", "lean")
    },
    3: {
        Run(): [Run("NO_SHARD", savers=(layered,)), Run("FULL_SHARD", savers=(layered,))],
        Run(memory="lean"): [Run("FULL_SHARD", "lean", (layered,))],
    },
    4: {Run(memory="exact", max_grad_norm=None): [Run("HYBRID_SHARD", "exact", (layered, release), None)]},
}
SAME[2][Run(max_grad_norm=None, family="t5")] = [Run("FULL_SHARD", "off", (layered, release), None, "t5")]
SAME[2][Run(memory="exact", max_grad_norm=None)] = [
    Run(strategy, "exact", (layered, release), None) for strategy in ("NO_SHARD", "FULL_SHARD")
]


def train_on_a_rank(folder, ranks):
    """Do all runs of `SAME`, each rank on its own micro-batches, and save the whole weights."""
    accelerator = init_distributed()
    for run in [run for expected, others in SAME[ranks].items() for run in (expected, *others)]:
        sharding = {"sharding_strategy": run.strategy} | ({"shard_size": 2} if run.strategy == "HYBRID_SHARD" else {})
        batches = batches_of(run.family == "t5", 2, first=2 * accelerator.process_index)
        model = parallelize(build(run.family, **DROPOUT[run.family]), accelerator, **sharding)
        options = {"memory": run.memory, "max_grad_norm": run.max_grad_norm, "accelerator": accelerator}
        losses, norms, weights = trained(model, run.savers, batches, steps=2, **options)
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}
        whole |= {"loss": torch.stack(losses), "norm": torch.stack(norms)}
        if accelerator.is_main_process:
            save_file({name: x.detach().contiguous() for name, x in whole.items()}, folder / str(run))
    accelerator.end_training()


@pytest.mark.parametrize("ranks", SAME)
def test_every_strategy_trains_as_in_micro_batch_order(ranks, tmp_path):
    """Without shards, or with two ranks, to the same bits; more ranks may sum shards in another order."""
    assert fork_ranks(ranks, train_on_a_rank, tmp_path, ranks) == [0] * ranks
    for expected, others in SAME[ranks].items():
        weights = load_file(tmp_path / str(expected))
        for run in others:
            found = load_file(tmp_path / str(run))
            for name, weight in weights.items():
                if (run.strategy == "NO_SHARD" or ranks <= 2) and name != "norm" and run.family not in TIED:
                    assert torch.equal(found[name], weight), (run, name)
                else:
                    torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


class Traffic(TorchDispatchMode):
    """Counts the collectives of a group, and the bytes that they give or take, whichever are more."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count += 1
            self.bytes += max(_num_bytes(arg) for arg in args)
        return func(*args, **(kwargs or {}))


def _num_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def count_traffic(folder):
    accelerator, lines = init_distributed(), []
    for savers in ([recompute], [layered]):
        for count in (1, 4):
            model = parallelize(build("llama", seed=1), accelerator, sharding_strategy="FULL_SHARD")
            optimizer = make_optimizer(model, memory="exact")
            state, batches = TrainState(model, optimizer), batches_of(False, count)
            with entered(savers, model, optimizer):
                train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-3)
                with Traffic() as traffic:
                    train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-3)
            lines.append(f"{traffic.count} {traffic.bytes}")
    if accelerator.is_main_process:
        (folder / "traffic").write_text("\n".join(lines))
    accelerator.end_training()


def test_the_traffic_of_sharded_layers_does_not_depend_on_accumulation(tmp_path):
    assert fork_ranks(2, count_traffic, tmp_path) == [0, 0]
    found = [tuple(map(int, line.split())) for line in (tmp_path / "traffic").read_text().splitlines()]
    (one, four), in_layers = found[:2], found[2:]
    assert in_layers[0] == in_layers[1]
    assert four[0] > 3 * one[0] and four[1] > 3 * one[1]
    assert in_layers[0][1] < one[1]


# --- runs


def test_a_run_may_switch_layered_on_and_off_when_it_resumes(tmp_path):
    work = write_files(tmp_path, num_rows=90)
    (work / "t5.json").write_text(AutoConfig.for_model(**LLAMA | DROPOUT["llama"]).to_json_string())
    options = {"batch_size": 2, "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "memory": "lean"}
    options |= {"max_steps": 6, "save_steps": 3, "save_total_limit": 0, "resume": "auto"}
    assert train("train", *runs.flags(work, "plain", **options)).returncode == 0
    for savers in ({"layered": True, "offload_activations": True}, {"recompute": "full"}):
        switched = options | savers
        result = train("train", *runs.flags(work, "switched", **switched))
        assert result.returncode == 0, result.stderr
        assert_same_run(work, "switched", "plain")
        rmtree(work / "switched" / "checkpoints" / "step-00000006")  # as if it had been killed just before the end


def test_two_sharded_processes_train_released_layers(tmp_path):
    work = write_files(tmp_path, num_rows=90)
    options = {"batch_size": 2, "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "max_grad_norm": 0}
    options |= {"layered": True, "release": True, "sharding_strategy": "FULL_SHARD", "max_steps": 3}
    results = train_ranks(2, "train", *runs.flags(work, "sharded", **options))
    assert [result.returncode for result in results] == [0, 0], results
    one = options | {"sharding_strategy": "NO_SHARD", "gradient_accumulation_steps": 6}
    assert train("train", *runs.flags(work, "one", **one)).returncode == 0
    assert runs.losses(work, "sharded") == pytest.approx(runs.losses(work, "one"), rel=1e-3)


# --- what is refused, and what is left behind


class GPT(torch.nn.Linear):
    """A model without layers of transformers."""

    config = PretrainedConfig()

    def __init__(self):
        super().__init__(2, 2)


@contextmanager
def entered_layered(model, *savers):
    with entered([*savers, layered], model, make_optimizer(model, memory="off")):
        yield


@pytest.mark.parametrize(
    ("make", "savers", "message"),
    [
        (lambda: build("t5", layerdrop=0.1), [], "layerdrop=0.1: set it to 0.0"),
        (lambda: GPT(), [], "GPT has no layers of that kind"),
        (lambda: build("llama"), [recompute], "remove recompute"),
        (lambda: build("llama"), [recompute_cheap], "remove recompute"),
        (lambda: build("llama"), [release], "enter layered before release"),
        (lambda: build("llama"), [layered], "entered twice"),
        (lambda: build("llama", output_attentions=True, attn_implementation="eager"), [], "output_attentions"),
    ],
)
def test_what_layered_does_not_support_is_refused_in_one_line(make, savers, message):
    with pytest.raises(UsageError, match=message) as error, entered_layered(make(), *savers):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("saver", "message"), [(offload_activations, "layered_offloaded"), (recompute, "remove rec")])
def test_savers_that_layered_contains_are_refused_within_it(saver, message):
    model = build("llama")
    optimizer = make_optimizer(model, memory="off")
    with pytest.raises(UsageError, match=message), entered([layered, saver], model, optimizer):
        pass
    assert not hasattr(optimizer, "layered")


@pytest.mark.parametrize("block", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: sdpa_kernel(SDPBackend.MATH)])
def test_blocks_of_a_loss_that_would_reach_other_micro_batches_are_refused(block):
    def loss_fn(model, batch):
        with block():
            return chunked_loss(model, batch)

    with pytest.raises(UsageError, match="would reach the other micro-batches"):
        trained(build("llama"), [layered], batches_of(False), loss_fn=loss_fn)
    assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()


def test_layers_in_another_order_and_changed_inputs_are_refused():
    def shuffled(model, batch):
        layers = model.model.layers
        if len(batch.inputs["input_ids"]) == 3:
            model.model.layers = torch.nn.ModuleList([layers[1], layers[0]])
        try:
            return chunked_loss(model, batch)
        finally:
            model.model.layers = layers

    with pytest.raises(UsageError, match="other layers for one micro-batch"):
        trained(build("llama"), [layered], batches_of(False), loss_fn=shuffled)

    model = build("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) + hidden.detach().zero_()
    with pytest.raises(UsageError, match="changes its inputs in place"):
        trained(model, [layered], batches_of(False))


@pytest.mark.parametrize("strategy", ["NO_SHARD", "FULL_SHARD"])
def test_a_failed_step_leaves_nothing_behind_and_the_next_one_is_right(strategy):
    assert fork_ranks(1, fail_and_train, strategy) == [0]


def fail_and_train(strategy):
    accelerator, batches = init_distributed(), batches_of(False)
    model = parallelize(build("llama", **DROPOUT["llama"]), accelerator, sharding_strategy=strategy)
    optimizer = make_optimizer(model, name="sgd", memory="off")
    state, original = TrainState(model, optimizer, seed=3), masking_utils.find_packed_sequence_indices

    def failing(model, batch):
        loss = chunked_loss(model, batch)
        if len(batch.inputs["input_ids"]) == 3:  # the second micro-batch, when the first has ended
            raise ZeroDivisionError
        return loss

    with entered([layered], model, optimizer):
        with pytest.raises(ZeroDivisionError):
            train_step(state, batches, failing, accelerator, learning_rate=1.0)
        assert not any("forward" in vars(module) for module in model.modules())
        assert masking_utils.find_packed_sequence_indices is original
        result = train_step(state, batches, chunked_loss, accelerator, learning_rate=1.0)
    assert not hasattr(optimizer, "layered")
    weights = {name: local_of(weight.detach()) for name, weight in model.named_parameters()}
    expected = trained(build("llama", **DROPOUT["llama"]), [], batches)
    assert_same(([result.loss], [result.grad_norm], weights), expected)


def test_overlapping_contexts_have_their_own_replacements():
    class Owner:
        def name(self):
            return "original"

    owner, other = Owner(), copy_context()
    mine = replaced(owner, "name", lambda original: f"mine, not {original()}")
    theirs = replaced(owner, "name", lambda original: "theirs")
    mine.__enter__()
    other.run(theirs.__enter__)
    assert owner.name() == "mine, not original" and other.run(owner.name) == "theirs"
    mine.__exit__(None, None, None)
    assert owner.name() == "original" and other.run(owner.name) == "theirs"
    other.run(theirs.__exit__, None, None, None)
    assert "name" not in vars(owner)
