"""fp16: the loss is scaled, an update whose gradient overflows is skipped on all ranks, and the scale is resumed."""

import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowmem import init_distributed, load_checkpoint, parallelize, save_checkpoint
from lowmem.adapters.lora import add_lora
from lowmem.errors import UsageError
from lowmem.evaluation import evaluate
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.layered import layered
from lowmem.memory.precision import LossScale
from lowmem.memory.savers import entered, recompute, release
from lowmem.optim.make import make_optimizer
from lowmem.plan.meter import MemoryMeter
from lowmem.step import TrainState, train_step
from tests import runs
from tests.forked import fork_ranks
from tests.models import T5, build
from tests.processes import train
from tests.runs import assert_same_run, records, write_files
from tests.test_layered import assert_same, batches_of, trained


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="fp16")
    AcceleratorState._reset_state(reset_partial_state=True)


def state_of(model, **options):
    return TrainState(model, make_optimizer(model, memory="off", **options))


def step(state, accelerator, batches=None, **options):
    batches = batches or batches_of(state.model.config.is_encoder_decoder)
    return train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, **options)


def overflowing(model):
    """Make the gradient of the last hidden states infinite, until the hook is removed."""
    hook = partial(Tensor.register_hook, hook=lambda gradient: gradient * float("inf"))
    return model.model.norm.register_forward_hook(lambda module, inputs, output: hook(output) and None)


@pytest.mark.parametrize("loss_fn", [chunked_loss, plain_loss])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_fp16_has_the_gradient_of_fp32_up_to_rounding(family, loss_fn, accelerator):
    batches = batches_of(family == "t5")
    losses, norms, weights = trained(build(family), [], batches, accelerator=accelerator, loss_fn=loss_fn)
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = trained(build(family), [], batches, accelerator=Accelerator(cpu=True), loss_fn=loss_fn)
    torch.testing.assert_close(losses, expected[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(norms, expected[1], rtol=1e-2, atol=0)
    assert losses != expected[0]  # the forward was in fp16
    start = dict(build(family).named_parameters())
    for name, weight in weights.items():  # the gradient is the difference
        wanted = expected[2][name] - start[name]
        assert (weight - start[name] - wanted).norm() <= 5e-2 * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_loss_norm_and_update_do_not_depend_on_the_scale(max_grad_norm, accelerator):
    found = []
    for value in (2.0**16, 2.0**12):
        state = state_of(build("llama"), name="sgd")
        state.loss_scale = LossScale(value)
        result = step(state, accelerator, max_grad_norm=max_grad_norm)
        assert result.updated and result.loss_scale == value
        found.append([result.loss, result.grad_norm, *state.model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_layered_and_recompute_have_the_bits_of_micro_batch_order(accelerator):
    dropout, options = {"attention_dropout": 0.1}, {"accelerator": accelerator, "max_grad_norm": 0.1}
    expected = trained(build("llama", **dropout), [], batches_of(False), **options)
    for savers in ([layered], [recompute]):
        assert_same(expected, trained(build("llama", **dropout), savers, batches_of(False), **options))


def test_the_scale_doubles_after_2000_updates_and_halves_after_an_overflow(accelerator):
    state = state_of(build("llama"))
    state.loss_scale = LossScale(8.0, finite_steps=1999)
    assert step(state, accelerator).loss_scale == 8.0 and state.loss_scale == LossScale(16.0)
    hook = overflowing(state.model)
    result = step(state, accelerator)  # `nonfinite` is "stop", but a smaller scale may help
    assert not result.updated and "overflowed with a loss scale of 16" in result.reason
    assert state.loss_scale == LossScale(8.0) and (state.step, state.updates) == (2, 1)
    state.loss_scale = LossScale(1.0)
    with pytest.raises(FloatingPointError, match="step 3: loss .*the loss of every micro-batch was finite"):
        step(state, accelerator)
    assert not step(state, accelerator, nonfinite="skip").updated
    hook.remove()
    assert step(state, accelerator).updated and state.loss_scale == LossScale(1.0, finite_steps=1)


def test_a_loss_that_is_not_finite_keeps_the_scale(accelerator):
    state = state_of(build("llama"))
    with torch.no_grad():
        state.model.lm_head.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss was not finite on"):
        step(state, accelerator)
    assert state.loss_scale == LossScale()


def test_a_checkpoint_holds_the_scale(accelerator, tmp_path):
    state = state_of(build("llama"))
    step(state, accelerator)
    state.loss_scale = LossScale(2.0**10, finite_steps=7)
    path = save_checkpoint(state, tmp_path, accelerator)
    resumed = state_of(build("llama", seed=1))
    load_checkpoint(resumed, path, accelerator)
    assert resumed.loss_scale == state.loss_scale
    assert step(resumed, accelerator).loss.item() == step(state, accelerator).loss.item()
    assert resumed.loss_scale == LossScale(2.0**10, finite_steps=8)


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ({"value": 1, "finite_steps": 0, "of_a_later_version": 5}, LossScale(1.0)),
        ({"value": True, "finite_steps": 0}, "loss_scale.value is True, not a power of two from 1 to"),
        ({"value": 3.0, "finite_steps": 0}, "loss_scale.value is 3.0, not a power of two from 1 to"),
        ({"value": math.nan, "finite_steps": 0}, "loss_scale.value is nan"),
        ({"value": 2.0**25, "finite_steps": 0}, "loss_scale.value is 33554432.0"),
        ({"value": 1.0, "finite_steps": -1}, "loss_scale.finite_steps is -1"),
        ({"value": 1.0}, "loss_scale.finite_steps is missing"),
        ([1.0, 0], "loss_scale is .*, not null or an object"),
    ],
)
def test_a_scale_from_a_damaged_checkpoint_is_refused(saved, found, accelerator, tmp_path):
    state = state_of(build("llama"))
    path = save_checkpoint(state, tmp_path, accelerator)
    training = json.loads((path / "state.json").read_text()) | {"loss_scale": saved}
    (path / "state.json").write_text(json.dumps(training))
    with pytest.raises(UsageError, match=found) if isinstance(found, str) else nullcontext():
        load_checkpoint(state, path, accelerator, verify=False)
        assert state.loss_scale == found


def test_an_evaluation_computes_in_fp16(accelerator):
    model, batches = build("llama"), batches_of(False)
    loss = evaluate(model, batches, chunked_loss, accelerator)["eval_loss"]
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = evaluate(model, batches, chunked_loss, Accelerator(cpu=True))["eval_loss"]
    assert loss != expected and loss == pytest.approx(expected, rel=1e-3)


def test_a_loss_function_may_return_fp16(accelerator):
    """Most scales, such as the first, are infinite in fp16."""
    results = []
    for dtype in (torch.float32, torch.float16):
        state, batches = state_of(build("llama")), batches_of(False)
        loss_fn = lambda model, batch: plain_loss(model, batch).to(dtype)  # noqa: B023, E731
        results.append(train_step(state, batches, loss_fn, accelerator, learning_rate=1e-2).loss)
    torch.testing.assert_close(*results, rtol=1e-3, atol=0)


def test_adapters_train_over_a_base_in_fp16(accelerator):
    model = build("llama").to(torch.float16)
    add_lora(model, rank=4)
    state = state_of(model)
    losses = [step(state, accelerator).loss.item() for _ in range(5)]
    assert losses[-1] < losses[0] and state.updates == 5
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_gradient_release_is_refused(accelerator):
    model = build("llama")
    optimizer = make_optimizer(model, memory="off")
    with entered([release], model, optimizer), pytest.raises(UsageError, match="fp16 may skip an update"):
        step(TrainState(model, optimizer), accelerator, batches_of(False, 1))


def overflow_on_one_rank():
    accelerator, losses = init_distributed(mixed_precision="fp16"), []
    for strategy, savers in (("NO_SHARD", []), ("FULL_SHARD", []), ("FULL_SHARD", [layered])):
        model = parallelize(build("llama"), accelerator, sharding_strategy=strategy)
        state = state_of(model)
        batches = batches_of(False, 2, first=2 * accelerator.process_index)
        with entered(savers, model, state.optimizer):
            first = step(state, accelerator, batches)
            before = [local(parameter).clone() for parameter in model.parameters()]
            if accelerator.process_index == 1:
                hook = overflowing(model)
            second = step(state, accelerator, batches)
            if accelerator.process_index == 1:
                hook.remove()
            assert first.updated and not second.updated and state.loss_scale == LossScale(2.0**15), strategy
            assert "overflowed" in second.reason
            assert all(map(torch.equal, map(local, model.parameters()), before)), strategy
            third = step(state, accelerator, batches)
            assert third.updated and third.loss_scale == 2.0**15
        losses.append(torch.stack([first.loss, third.loss]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=0)
    accelerator.end_training()


def local(parameter):
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def evaluate_sharded():
    accelerator = init_distributed(mixed_precision="fp16")
    model = parallelize(
        build("llama", num_hidden_layers=8, hidden_size=128), accelerator, sharding_strategy="FULL_SHARD"
    )
    with MemoryMeter() as meter:
        evaluate(model, batches_of(False, 1), chunked_loss, accelerator)
    layers = [parameter for name, parameter in model.named_parameters() if "layers" in name]
    assert meter.peak_bytes < 2 * sum(parameter.numel() for parameter in layers)
    accelerator.end_training()


def test_an_evaluation_of_a_sharded_model_has_no_copy_of_all_weights():
    assert fork_ranks(2, evaluate_sharded) == [0, 0]


def test_an_overflow_on_one_rank_skips_the_update_on_all():
    assert fork_ranks(2, overflow_on_one_rank) == [0, 0]


def test_a_run_resumes_to_the_same_bits_under_either_flag(tmp_path):
    """The first gradients of this T5 overflow, so that the resumed run must take another scale from the checkpoint."""
    work = write_files(tmp_path, num_rows=24, dropout_rate=0.1)
    (work / "t5.json").write_text(json.dumps(T5 | {"initializer_factor": 1.3}))
    options = {"max_steps": 6, "save_steps": 3, "save_total_limit": 0, "lr_scheduler_type": "constant"}
    whole = train("train", *runs.flags(work, "whole", **options, mixed_precision="fp16"))
    assert whole.returncode == 0, whole.stderr
    assert "step 1: no update, the gradient overflowed with a loss scale of 65536, which is now halved" in whole.stdout
    half = runs.flags(work, "half", **options | {"max_steps": 3, "max_predict_samples": 0})
    assert train("train", *half, ACCELERATE_MIXED_PRECISION="fp16").returncode == 0
    rest = train("train", *runs.flags(work, "half", **options, resume="auto"), ACCELERATE_MIXED_PRECISION="fp16")
    assert rest.returncode == 0, rest.stderr
    assert_same_run(work, "half", "whole")
    scales, resumed = ([x["loss_scale"] for x in records(work, name) if "loss" in x] for name in ("whole", "half"))
    assert resumed == scales and scales[3] < scales[0] == 65536
