"""Without dropout, a step's result depends on neither micro-batches nor ranks. Also tested: steps that fail."""

import json
import re
import sys
from contextlib import contextmanager, nullcontext
from time import monotonic

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import ByT5Tokenizer

from lowmem import init_distributed, parallelize
from lowmem.data.batch import UnreadableStep, collate
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.stream import open_stream
from lowmem.distributed.collectives import sum_over_ranks
from lowmem.errors import RankError, RowError, UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks, started_ranks
from tests.models import build, qa_rows

ROWS = qa_rows(24)


def stream_of(family, **options):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)
    return open_stream(ROWS, encode, seed=2, **options)


def state_of(model, stream=None, **options):
    return TrainState(model, make_optimizer(model, **{"memory": "off"} | options), stream)


def gradient_of_step(model, batches, accelerator, loss_fn=chunked_loss):
    """Take a step of SGD at learning rate 1; return the gradient that SGD subtracts, and the step result."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = state_of(model, name="sgd")
    result = train_step(state, batches, loss_fn, accelerator, learning_rate=1.0)
    after = model.named_parameters()
    return {name.removeprefix("module."): before[name] - parameter.detach() for name, parameter in after}, result


def assert_same_gradient(mine, expected):
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        # a gradient is the difference of weights of size ~1, and their rounding errors need an absolute tolerance
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (2, 4), (1, 8)])
def test_unequal_micro_batches_have_the_gradient_of_one_batch(family, batch_size, steps):
    accelerator = Accelerator(cpu=True)
    whole = next(stream_of(family, batch_size=8))
    parts = next(stream_of(family, batch_size=batch_size, gradient_accumulation_steps=steps))
    assert len({batch.num_targets for batch in parts}) > 1  # with equal numbers, wrong averaging would pass
    expected, one = gradient_of_step(build(family), whole, accelerator)
    mine, many = gradient_of_step(build(family), parts, accelerator)
    assert_same_gradient(mine, expected)
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(many.grad_norm, one.grad_norm, rtol=1e-5, atol=0)
    assert many.num_tokens == one.num_tokens == sum(batch.num_targets for batch in whole)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_step_has_the_gradient_of_the_mean_token_loss(family):
    """Compare with the gradient of transformers' own loss on one batch of all rows."""
    (whole,) = next(stream_of(family, batch_size=8))
    model = build(family)
    model(**whole.inputs, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    mine, _ = gradient_of_step(build(family), [whole], Accelerator(cpu=True))
    assert_same_gradient(mine, expected)


@pytest.mark.parametrize("wrapping", ["parallelize", "ddp"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_two_processes_with_unequal_target_counts_have_the_gradient_of_one(family, wrapping, tmp_path):
    whole = next(stream_of(family, batch_size=8))
    expected, one = gradient_of_step(build(family), whole, Accelerator(cpu=True))
    assert fork_ranks(2, step_on_a_rank, family, wrapping, tmp_path) == [0, 0]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["my_targets"] != results[1]["my_targets"]
    for rank in range(2):
        assert_same_gradient(load_file(tmp_path / f"{rank}.safetensors"), expected)
        assert results[rank]["loss"] == pytest.approx(one.loss.item(), rel=1e-6)
        assert results[rank]["num_tokens"] == one.num_tokens


def step_on_a_rank(family, wrapping, folder):
    accelerator = init_distributed()
    # ranks start with different weights, to check that wrapping replaces them with rank 0's
    model = build(family, seed=0 if accelerator.is_main_process else 1)
    model = parallelize(model, accelerator) if wrapping == "parallelize" else accelerator.prepare(model)
    rank = accelerator.process_index
    batches = next(stream_of(family, batch_size=2, gradient_accumulation_steps=2, rank=rank, world_size=2))
    gradient, result = gradient_of_step(model, batches, accelerator)
    save_file({name: value.contiguous() for name, value in gradient.items()}, f"{folder}/{rank}.safetensors")
    summary = {
        "loss": result.loss.item(),
        "num_tokens": int(result.num_tokens),
        "my_targets": sum(batch.num_targets for batch in batches),
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(summary, file)
    # A DDP reducer that outlives its gloo group can wait forever in the group's destructor (torch 2.13): free it here.
    (model,) = accelerator.free_memory(model)
    accelerator.end_training()


def test_clipping_bounds_the_applied_gradient_and_reports_the_unclipped_norm():
    batches = next(stream_of("t5", batch_size=4))
    accelerator = Accelerator(cpu=True)
    expected, _ = gradient_of_step(build("t5"), batches, accelerator)
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    model = build("t5")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = train_step(
        state_of(model, name="sgd"), batches, chunked_loss, accelerator, learning_rate=1.0, max_grad_norm=0.1
    )
    applied = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert norm > 0.1
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(applied.norm(), torch.tensor(0.1), rtol=1e-3, atol=0)


def test_dropout_differs_between_micro_batches_and_between_ranks(tmp_path):
    """Compute the loss of the same rows four times. Losses are equal only if their dropout masks are equal."""
    assert fork_ranks(2, losses_of_the_same_rows, tmp_path) == [0, 0]
    losses = [loss for rank in range(2) for loss in json.loads((tmp_path / f"{rank}.json").read_text())]
    assert len(set(losses)) == len(losses) == 4


def losses_of_the_same_rows(folder):
    accelerator = init_distributed()
    losses = []

    def recording(model, batch):
        loss = plain_loss(model, batch)
        losses.append(loss.item())
        return loss

    model = parallelize(build("t5", dropout_rate=0.3), accelerator)
    (batch,) = next(stream_of("t5", batch_size=4, rank=0, world_size=1))
    train_step(state_of(model, name="sgd"), [batch, batch], recording, accelerator, learning_rate=0.0)
    with open(f"{folder}/{accelerator.process_index}.json", "w") as file:
        json.dump(losses, file)
    accelerator.end_training()


def test_dropout_is_a_function_of_seed_and_step():
    def loss(seed, step, disturb):
        torch.manual_seed(disturb)
        state = state_of(build("t5", dropout_rate=0.3), name="sgd")
        torch.rand(disturb)  # change the global generator's state, as other code may do
        state.seed, state.step = seed, step
        batches = next(stream_of("t5", batch_size=2, gradient_accumulation_steps=2))
        return train_step(state, batches, plain_loss, Accelerator(cpu=True), learning_rate=0.0).loss.item()

    assert loss(0, 5, disturb=1) == loss(0, 5, disturb=99)
    assert len({loss(0, 5, 1), loss(0, 6, 1), loss(1, 5, 1)}) == 3


def poisoned(model, batch):
    return plain_loss(model, batch) * (float("nan") if 3 in batch.row_ids else 1.0)


@pytest.mark.parametrize("memory", ["off", "exact"])  # with kernels, the update of a tier begins before the check
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_loss_that_is_not_finite_changes_no_weight(nonfinite, memory):
    model = build("t5")
    stream = stream_of("t5", batch_size=12, shuffle=False)
    state = state_of(model, stream, memory=memory)
    kept = [tensor for tensors in state.optimizer.state.values() for tensor in tensors.values()]
    states = [tensor.clone() for tensor in kept]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = Accelerator(cpu=True)
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*on rank 0 with rows \[0, 1, 2, 3"):
            train_step(state, next(stream), poisoned, accelerator, learning_rate=0.1)
        assert state.step == stream.position == 0
    else:
        result = train_step(state, next(stream), poisoned, accelerator, learning_rate=0.1, nonfinite="skip")
        assert result.loss.isnan() and (state.step, stream.position) == (1, 12)
        assert "not finite on rank 0 with rows [0, 1, 2, 3" in result.reason and not result.updated
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(map(torch.equal, kept, states))
    assert all(parameter.grad is None for parameter in model.parameters())
    if nonfinite == "skip":  # the next step has no poisoned row, so it updates the weights
        train_step(state, next(stream), poisoned, accelerator, learning_rate=0.1, nonfinite="skip")
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_nan_on_one_rank_raises_an_error_on_both_before_the_update():
    assert fork_ranks(2, step_with_nan_on_one_rank) == [0, 0]


def step_with_nan_on_one_rank():
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = parallelize(build("t5"), accelerator)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    # rank 0 has rows 0 to 3 in two micro-batches, and row 3 is poisoned
    options = {"rank": rank, "world_size": 2, "gradient_accumulation_steps": 2, "shuffle": False}
    batches = next(stream_of("t5", batch_size=2, **options))
    message = r"loss nan, gradient norm nan; the loss was not finite on rank 0 with rows \[2, 3\]"
    with pytest.raises(FloatingPointError, match=message):
        train_step(state_of(model), batches, poisoned, accelerator, learning_rate=0.1)
    skipped = train_step(state_of(model), batches, poisoned, accelerator, learning_rate=0.1, nonfinite="skip")
    assert re.match(message, skipped.reason) and "rank 1" not in skipped.reason

    def infinite_gradient(model, batch):
        loss = plain_loss(model, batch)
        loss.register_hook(lambda gradient: gradient / (rank == 0))
        return loss

    message = (
        r"gradient norm (inf|nan); the loss of every micro-batch was finite: rank 0 with rows .*, rank 1 with rows \[4"
    )
    with pytest.raises(FloatingPointError, match=message):
        train_step(state_of(model), batches, infinite_gradient, accelerator, learning_rate=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    accelerator.end_training()


def test_an_error_on_one_rank_is_raised_by_both_and_the_next_step_sums_gradients_within_backward():
    assert fork_ranks(2, fail_on_one_rank) == [0, 0]


def fail_on_one_rank():
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = build("t5")
    # `wide` fills a bucket. Its gradient comes first in backward, equals that of `other`, and shares memory with it.
    wide, other = (nn.Parameter(torch.ones(9_000_000)) for _ in range(2))
    model.last = nn.ParameterList([other, wide])
    model = parallelize(model, accelerator)
    state = state_of(model, name="sgd")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batches = next(stream_of("t5", batch_size=2, gradient_accumulation_steps=2, rank=rank, world_size=2))

    def loss_of(model, batch):
        return plain_loss(model, batch) + ((1 * other)[None] + wide[None]).square().sum() * (rank + 1)

    def failing(kind):
        def loss_fn(model, batch):
            if rank == 1 and batch is not batches[0]:
                raise kind("what was wrong")
            return loss_of(model, batch)

        return loss_fn

    def failing_in_backward(model, batch):
        if rank == 1 and batch is not batches[0]:
            model.shared.weight.register_hook(fail)
        return loss_of(model, batch)

    def fail(gradient):
        assert wide.grad is not None
        model.shared.weight._backward_hooks.clear()
        raise KeyError("what was wrong")

    @contextmanager
    def full_disk():
        def pack(tensor):
            if rank == 1:
                raise OSError(28, "what was wrong")
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    unreadable = UnreadableStep(RowError("what was wrong"))
    for loss_fn, given, saver, kind, elsewhere in [
        (failing(KeyError), batches, nullcontext, KeyError, RankError),
        (failing(UsageError), batches, nullcontext, UsageError, UsageError),
        (failing_in_backward, batches, nullcontext, KeyError, RankError),
        (loss_of, batches, full_disk, OSError, RankError),
        (loss_of, unreadable if rank == 1 else batches, nullcontext, RowError, RankError),
    ]:
        message = "what was wrong" if rank == 1 else f"rank 1 failed with {kind.__name__}: .*what was wrong"
        with pytest.raises(kind if rank == 1 else elsewhere, match=message), saver():
            train_step(state, given, loss_fn, accelerator, learning_rate=0.1)
    assert state.step == 0 and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    num_calls = num_tokens = 0

    def wait_for_the_sum(gradient):  # of `shared`, which comes last
        nonlocal num_calls
        num_calls += 1
        limit = monotonic() + 30
        while num_calls == 2 and wide.grad[0] * num_tokens < 23.9:  # 2 * 4 * (1 + 2)
            assert monotonic() < limit, "the sum over ranks did not begin within backward"

    (num_tokens,) = sum_over_ranks(sum(batch.num_targets for batch in batches))
    handle = model.shared.weight.register_hook(wait_for_the_sum)
    result = train_step(state, batches, loss_of, accelerator, learning_rate=0.1, preempted=rank == 1)
    handle.remove()
    assert num_calls == 2
    assert result.updated and result.preempted and result.reason == ""
    assert not train_step(state, batches[:1], loss_of, accelerator, learning_rate=0.1).preempted
    assert torch.equal(wide, other)
    accelerator.end_training()


def test_an_error_on_one_rank_of_a_sharded_model_ends_both_ranks_with_that_error():
    with started_ranks(2, fail_in_a_sharded_forward) as ranks:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert "KeyError: 'what was wrong'" in outputs[1]
    assert "rank 1 failed with KeyError: 'what was wrong'" in outputs[0], outputs[0]


def fail_in_a_sharded_forward():
    accelerator = init_distributed(heartbeat_timeout=3)
    model = parallelize(build("t5"), accelerator, sharding_strategy="FULL_SHARD")

    def failing(model, batch):
        if accelerator.process_index == 1:
            raise KeyError("what was wrong")
        return plain_loss(model, batch)

    batches = next(stream_of("t5", batch_size=2, rank=accelerator.process_index, world_size=2))
    train_step(state_of(model), batches, failing, accelerator, learning_rate=0.1)


def test_a_step_without_any_target_is_counted_but_changes_no_weight():
    empty = collate([{"input_ids": [5], "labels": [-100]}])
    assert empty.num_targets == 0
    model, accelerator = build("t5"), Accelerator(cpu=True)
    state = state_of(model)
    train_step(state, next(stream_of("t5", batch_size=4)), chunked_loss, accelerator, learning_rate=0.1)
    # AdamW has momentum from this first step, so an update with a gradient of zero would change the weights
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = train_step(state, [empty], chunked_loss, accelerator, learning_rate=0.1)
    assert result.loss == 0 and result.grad_norm == 0 and state.step == 2 and not result.updated
    assert result.reason == "no rank has a target token"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_autocast_keeps_no_copies_of_the_weights(tmp_path):
    assert fork_ranks(1, step_in_bf16, tmp_path) == [0]
    assert json.loads((tmp_path / "seen.json").read_text()) == {"autocast": True, "cache": False}


def step_in_bf16(folder):
    accelerator = init_distributed(mixed_precision="bf16")

    def looking(model, batch):
        with open(f"{folder}/seen.json", "w") as file:
            seen = {"autocast": torch.is_autocast_enabled("cpu"), "cache": torch.is_autocast_cache_enabled()}
            json.dump(seen, file)
        return chunked_loss(model, batch)

    batches = next(stream_of("t5", batch_size=4))
    train_step(state_of(build("t5")), batches, looking, accelerator, learning_rate=0.1)
    accelerator.end_training()


def test_a_step_does_not_change_the_environment():
    # the prefetch thread's tokenizer reads the environment, and reading it while it changes crashes the process
    assert fork_ranks(1, step_with_an_unchanged_environment) == [0]


def step_with_an_unchanged_environment():
    accelerator = init_distributed(mixed_precision="bf16")
    batches, state = next(stream_of("t5", batch_size=4)), state_of(build("t5"))
    changes = []
    sys.addaudithook(lambda event, _: changes.append(event) if event in ("os.putenv", "os.unsetenv") else None)
    train_step(state, batches, chunked_loss, accelerator, learning_rate=0.1)
    assert not changes
    accelerator.end_training()


def test_a_dict_instead_of_a_batch_is_an_error_that_names_the_remedy():
    model = build("t5")
    state = TrainState(model, make_optimizer(model, name="adamw", memory="off"))
    (batch,) = next(stream_of("t5", batch_size=4))
    with pytest.raises(TypeError, match="must be a lowmem.Batch, found dict: make it with lowmem.collate"):
        train_step(state, [batch.inputs], plain_loss, Accelerator(cpu=True), learning_rate=0.1)


def open_a_stream_without_coordinates(folder):
    accelerator = init_distributed()
    with pytest.raises(UsageError, match=r"2 processes need rank and world_size.*: pass \*\*data_place"):
        stream_of("t5", batch_size=4)
    accelerator.end_training()


def test_a_stream_on_several_processes_needs_rank_and_world_size(tmp_path):
    assert fork_ranks(2, open_a_stream_without_coordinates, tmp_path) == [0, 0]
