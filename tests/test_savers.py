"""Savers (except `compiled`) change no loss or gradient, need fewer bytes, rename no parameter and leave no hook."""

import os
import shutil
import signal
import sys
import tempfile
from itertools import combinations

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSeq2SeqLM, ByT5Tokenizer, PretrainedConfig, PreTrainedModel

from lowmem.data.batch import collate
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss
from lowmem.memory.offload import mapped_file
from lowmem.memory.savers import compiled, entered, offload_activations, recompute, recompute_cheap, release
from lowmem.model.checks import check_backward
from lowmem.optim.make import make_optimizer
from lowmem.plan.meter import MemoryMeter
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.processes import started_function

DROPOUT = {"t5": {"dropout_rate": 0.1}, "llama": {"attention_dropout": 0.1}}
DEEP = {"t5": {"num_layers": 6}, "llama": {"num_hidden_layers": 6}}

# For each saver, the largest allowed ratio of a step's peak bytes with the saver to those without it. The models have 6
# layers (T5: 6 + 6), and weights are not counted. The first three savers run on 8 rows, where the peak is 20 to 26
# times the weights' bytes, mostly activations. `release` runs on one short row, where gradients dominate the peak.
ALONE = {recompute: 0.25, recompute_cheap: 0.60, offload_activations: 0.15, release: 0.80}
PAIRS = [pair for pair in combinations(ALONE, 2) if pair != (recompute, recompute_cheap)]  # these exclude each other
SAVERS = [*((saver,) for saver in ALONE), *PAIRS]


def names_of(savers):
    return " and ".join(saver.__name__ for saver in savers)


def batch_of(family, rows=8):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)
    return collate([encode(row) for row in qa_rows(rows)])


def step_of(family, savers, rows=8, **changes):
    """Run an SGD step with dropout; return loss, gradient norm, new weights, and peak bytes without the weights."""
    model, batch = build(family, **DROPOUT[family], **changes), batch_of(family, rows)
    optimizer = make_optimizer(model, name="sgd", memory="off")
    state = TrainState(model, optimizer, seed=3)
    with entered(savers, model, optimizer), MemoryMeter() as meter:
        result = train_step(state, [batch], chunked_loss, Accelerator(cpu=True), learning_rate=1.0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return result.loss, result.grad_norm, weights, meter.peak_bytes


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("savers", SAVERS, ids=names_of)
def test_savers_and_their_pairs_keep_the_bits_of_loss_and_weights_with_dropout(savers, family):
    loss, norm, weights, _ = step_of(family, [])
    same_loss, same_norm, same_weights, _ = step_of(family, savers)
    assert torch.equal(loss, same_loss) and torch.equal(norm, same_norm)
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name]), name  # SGD at rate 1 subtracts the gradient


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_savers_and_pairs_of_savers_need_fewer_bytes(family):
    for rows, savers in (8, [recompute, recompute_cheap, offload_activations]), (1, [release]):
        plain = step_of(family, [], rows, **DEEP[family])[-1]
        alone = {saver: step_of(family, [saver], rows, **DEEP[family])[-1] for saver in ALONE}
        for saver in savers:
            assert alone[saver] <= ALONE[saver] * plain, (saver.__name__, alone[saver] / plain)
        for pair in PAIRS:
            together = step_of(family, pair, rows, **DEEP[family])[-1]
            # A recompute saver with offloading may need more bytes than offloading alone, because together they offload
            # only the layers' inputs. What a layer recomputes is not offloaded: its backward follows immediately.
            better = [saver for saver in pair if saver is not offload_activations or release in pair]
            assert together <= min(alone[saver] for saver in better), names_of(pair)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("savers", SAVERS, ids=names_of)
def test_savers_rename_no_parameter_and_leave_no_hook(savers, family):
    model, batch = build(family), batch_of(family)
    optimizer = make_optimizer(model, name="sgd", memory="off")
    state = TrainState(model, optimizer)

    def bytes_of_a_step():
        with MemoryMeter() as meter:
            train_step(state, [batch], chunked_loss, Accelerator(cpu=True), learning_rate=0.0)
        return meter.peak_bytes

    # take a step before counting hooks, because transformers adds hooks in a model's first forward
    before = bytes_of_a_step()
    keys, hooks, names = list(model.state_dict()), count_hooks(model), vars(optimizer).keys() | set()
    with entered(savers, model, optimizer):
        assert list(model.state_dict()) == keys
        assert bytes_of_a_step() <= before
    assert count_hooks(model) == hooks and vars(optimizer).keys() == names
    assert not any("forward" in vars(module) for module in model.modules())
    assert bytes_of_a_step() == before


def count_hooks(model):
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return modules + sum(len(x._post_accumulate_grad_hooks or ()) for x in model.parameters())


@pytest.mark.parametrize("saver", [recompute, recompute_cheap])
def test_recompute_refuses_a_model_that_does_not_support_it(saver):
    class Plain(PreTrainedModel):
        config_class = PretrainedConfig
        supports_gradient_checkpointing = False

    with pytest.raises(UsageError, match="Plain does not support"), saver(Plain(PretrainedConfig())):
        pass


def test_recompute_does_not_differentiate_frozen_embeddings():
    model, batch = build("t5"), batch_of("t5")
    model.shared.requires_grad_(False)
    model.encoder.requires_grad_(False)
    with recompute(model):
        hidden = model.encoder(input_ids=batch.inputs["input_ids"]).last_hidden_state
    assert not hidden.requires_grad


def test_offloaded_activations_are_kept_when_their_memory_is_reused():
    """If a new tensor reuses a freed tensor's memory, backward must get the copy of the new tensor, not of the old."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(6)]

    def loss():
        hidden = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
        for weight in weights:
            hidden = (hidden @ weight).tanh() * hidden.T.contiguous().T
        return hidden.square().sum()

    expected = torch.autograd.grad(loss(), weights)
    model = torch.nn.ParameterList(weights)
    for _ in range(3):
        with offload_activations(model):
            gradients = torch.autograd.grad(loss(), weights)
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))


def offload_until_killed(folder):
    """Offload an activation to a file in `folder`, and kill this process as soon as the file has its size."""

    def kill(frame, event, function):
        if event == "c_return" and function is os.posix_fallocate:
            os.kill(os.getpid(), signal.SIGKILL)

    tempfile.tempdir = str(folder)
    sys.setprofile(kill)
    mapped_file(torch.ones(1024))


def test_a_killed_process_leaves_no_file_of_an_activation(tmp_path):
    with started_function(offload_until_killed, tmp_path) as process:
        assert process.wait(timeout=300) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "memory"), [("adamw", "exact"), ("adamw", "lean"), ("adafactor", "lean"), ("adam", "off")]
)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_release_trains_to_the_same_bits_in_every_tier(family, name, memory):
    results = []
    for savers in ([], [release]):
        model, batch = build(family, **DROPOUT[family]), batch_of(family)
        optimizer = make_optimizer(model, name=name, memory=memory)
        state = TrainState(model, optimizer)
        with entered(savers, model, optimizer):
            for _ in range(4):
                train_step(state, [batch], chunked_loss, Accelerator(cpu=True), learning_rate=1e-2)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_release_holds_one_gradient_at_a_time():
    model, batch = build("llama", **DEEP["llama"]), batch_of("llama")
    optimizer, held = make_optimizer(model), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(x.grad is not None for x in model.parameters()))
        )
    with release(model, optimizer):
        train_step(TrainState(model, optimizer), [batch], chunked_loss, Accelerator(cpu=True), learning_rate=1e-2)
    assert set(held) == {1} and len(held) == len(list(model.parameters()))


def test_before_computing_anything_release_refuses_options_that_need_all_gradients_together():
    model, batch = build("t5"), batch_of("t5")
    optimizer = make_optimizer(model)
    state, accelerator = TrainState(model, optimizer), Accelerator(cpu=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with release(model, optimizer):
        for batches, options, message in [
            ([batch] * 2, {}, "2 micro-batches per step .set gradient_accumulation_steps to 1"),
            ([batch], {"max_grad_norm": 1.0}, "clipping at 1.0 .set max_grad_norm to 0"),
            ([batch], {"nonfinite": "skip"}, "set nonfinite to stop"),
        ]:
            with pytest.raises(UsageError, match=message):
                train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, **options)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert state.step == 0


def test_release_refuses_several_processes(tmp_path):
    assert fork_ranks(2, release_on_a_rank, tmp_path) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refused-0", "refused-1"]


def release_on_a_rank(folder):
    from lowmem import init_distributed

    accelerator = init_distributed()
    model = build("t5")
    with pytest.raises(UsageError, match="2 processes: start one"), release(model, make_optimizer(model)):
        pass
    open(f"{folder}/refused-{accelerator.process_index}", "w").close()
    accelerator.end_training()


def test_release_says_that_weights_have_changed_if_the_loss_is_not_finite():
    model, batch = build("t5"), batch_of("t5")
    optimizer = make_optimizer(model)
    state = TrainState(model, optimizer)

    def poisoned(model, batch):
        return chunked_loss(model, batch) * float("nan")

    with (
        release(model, optimizer),
        pytest.raises(FloatingPointError, match="have updated the weights already.*last ch"),
    ):
        train_step(state, [batch], poisoned, Accelerator(cpu=True), learning_rate=1e-2)
    assert state.step == 0


def test_release_also_updates_parameters_that_the_loss_does_not_use():
    """Such parameters get a gradient of zero, but weight decay still changes them, and their moments decay."""
    results = []
    for savers in ([], [release]):
        model, batch = build("t5"), batch_of("t5")
        model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, 2000)))
        optimizer = make_optimizer(model, weight_decay=0.5)
        with entered(savers, model, optimizer):
            train_step(TrainState(model, optimizer), [batch], chunked_loss, Accelerator(cpu=True), learning_rate=0.1)
        results.append(model.idle.detach())
    assert torch.equal(*results) and results[0].float().mean() < 0.96


# ignore this warning, because torch's own compiler causes it (torch 2.13)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_compiled_recomputed_layers_have_the_losses_of_plain_ones(family):
    """Also check that torch keeps using compiled layers when batches differ in length and padding."""
    losses = []
    for savers in ([], [recompute, compiled]):
        model = build(family)
        optimizer = make_optimizer(model, memory="off")
        state, accelerator = TrainState(model, optimizer), Accelerator(cpu=True)
        with entered(savers, model, optimizer):
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                steps = [
                    train_step(state, [batch_of(family, rows)], chunked_loss, accelerator, learning_rate=1e-2)
                    for rows in (2, 3, 5)  # not 1, for which torch would compile once more
                ]
        losses.append([step.loss.item() for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_compile_refuses_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    model = build("t5")
    message = r"^compile needs g\+\+ or clang\+\+: install it or remove compile$"
    with pytest.raises(UsageError, match=message), compiled(model):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def test_compile_refuses_a_model_without_known_layers():
    with pytest.raises(UsageError, match="Linear has no layers"), compiled(torch.nn.Linear(2, 2)):
        pass


def test_a_model_that_changes_kept_results_in_place_is_refused_under_recompute_cheap():
    fields = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 1}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("longt5", **fields, decoder_start_token_id=0))
    check_backward(model, chunked_loss)
    with recompute(model):
        check_backward(model, chunked_loss)
    with recompute_cheap(model), pytest.raises(UsageError, match="LongT5.* changes results in place .* recompute=full"):
        check_backward(model, chunked_loss)
    assert all(parameter.grad is None for parameter in model.parameters())
