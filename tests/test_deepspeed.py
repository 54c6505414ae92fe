"""Under five ZeRO strategies of DeepSpeed, two ranks train like one process, each holds its shard, and runs resume."""

import json
import math
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, LlamaForCausalLM, T5ForConditionalGeneration

from lowmem.checkpoint.extra import load_extra
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.manifest import verify_checkpoint
from lowmem.checkpoint.save import check_space, save_checkpoint, save_model
from lowmem.config.zero import complete_zero_config
from lowmem.data.batch import collate
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.eval_batches import open_eval
from lowmem.data.rows import as_rows
from lowmem.data.stream import open_stream
from lowmem.deepspeed_step import deepspeed_step
from lowmem.distributed.sharding import parallelize
from lowmem.distributed.zero import make_accelerator, wrap
from lowmem.errors import SaveError, UsageError
from lowmem.evaluation import evaluate, generate
from lowmem.loss import LOSSES, chunked_loss, plain_loss
from lowmem.model.build import freeze
from lowmem.optim.make import make_optimizer
from lowmem.optim.master import master_weights
from lowmem.step import TrainState, train_step
from tests import runs
from tests.forked import fork_ranks, started_ranks, train_ranks
from tests.models import build, qa_rows
from tests.processes import PROGRAM, ROOT, finish, free_port, module_command, run, run_program, train, wait_until
from tests.test_files import fail_at
from tests.test_no_pickle import forbid_pickles
from tests.test_seams import EMBEDDING, GROUPS, values_of, with_metrics

pytest.importorskip("deepspeed")

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp"}
# at the defaults of these settings, stage 3 would keep small models whole on every rank
STAGE_3 = {"stage": 3} | dict.fromkeys(
    (
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
    ),
    0,
)
STRATEGIES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": STAGE_3,
    "zero3_offload": STAGE_3 | {"offload_optimizer": CPU, "offload_param": CPU},
}
ENCODERS = {"t5": encode_seq2seq, "llama": encode_causal}


def batches_of(family, opened=open_stream, **options):
    encode = ENCODERS[family](ByT5Tokenizer(), max_seq_len=64)
    return opened(as_rows(qa_rows(29)), encode, batch_size=2, **options)


def new_state(family, accelerator, *, seed=0, sharding_strategy="NO_SHARD", frozen=(), groups=(), **changes):
    model = build(family, seed=seed, **changes)
    freeze(model, parts=frozen)
    if accelerator.deepspeed_plugin is None:
        model = parallelize(model, accelerator, sharding_strategy=sharding_strategy)
    optimizer = make_optimizer(model, memory="off", weight_decay=0.1, groups=groups)
    # 7 rows per step: of two ranks, one has micro-batches of 2 and 2 rows, and the other has 2 and 1 rows
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    stream = batches_of(family, global_batch_size=7, collate=collate_of(family), **ranks)
    if accelerator.deepspeed_plugin is not None:
        model = wrap(model, optimizer, accelerator)
    return TrainState(model, optimizer, stream)


def collate_of(family):
    return lambda rows: collate(rows, causal=family == "llama")


def zero_accelerator(zero, *, bf16=False):
    AcceleratorState._reset_state()  # without this, the singleton AcceleratorState would keep the previous strategy
    config = complete_zero_config(json.dumps({"zero_optimization": zero}), batch_size=2, max_grad_norm=1.0, bf16=bf16)
    return make_accelerator(config, on_cpu=True)


def curve_of(state, loss, accelerator, steps=3, **options):
    curve = []
    options = {"learning_rate": 1e-2, "max_grad_norm": 1.0} | options
    for _, batches in zip(range(steps), state.stream, strict=False):
        take_step = train_step if accelerator.deepspeed_plugin is None else deepspeed_step
        result = take_step(state, batches, loss, accelerator, **options)
        curve.append((result.loss.item(), result.grad_norm.item(), int(result.num_tokens)))
    return curve


def bytes_of_state(optimizer):
    return sum(x.numel() * x.itemsize for kept in optimizer.state.values() for x in kept.values())


def results_of(state, family, loss, folder, accelerator):
    """Train and evaluate, then save the weights; return the curve, metrics, answers and sizes to compare."""
    results = {"curve": curve_of(state, LOSSES[loss], accelerator)}
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    # two ranks share batches of 4 rows; the third batch has one row, so the second rank gets no row
    held_out = as_rows(qa_rows(9))
    encode = ENCODERS[family](ByT5Tokenizer(), max_seq_len=64)
    batches = open_eval(held_out, encode, batch_size=2, collate=collate_of(family), **ranks)
    results["evaluation"] = evaluate(state.model, batches, LOSSES[loss], accelerator)
    results["answers"] = generate(state.model, ByT5Tokenizer(), batches, accelerator, max_new_tokens=3)
    results["bytes"] = bytes_of_state(state.optimizer)
    results["weights"] = sum(x.numel() for x in state.model.parameters())
    save_model(state.model, folder / f"{family} {loss}")
    return results


CASES = [("t5", "chunked"), ("llama", "plain")]  # T5's output head is its embedding, so one weight serves as both


def train_with_every_strategy(folder):
    for name, zero in STRATEGIES.items():
        accelerator = zero_accelerator(zero)
        for family, loss in CASES:
            results = results_of(new_state(family, accelerator), family, loss, folder / name, accelerator)
            if accelerator.is_main_process:
                (folder / name / f"{family} {loss}.json").write_text(json.dumps(results))
        accelerator = zero_accelerator(zero, bf16=True)
        state = new_state("llama", accelerator)
        assert {x.dtype for x in state.model.parameters()} == {torch.bfloat16}
        curve = curve_of(state, chunked_loss, accelerator, steps=6, learning_rate=1e-4)
        if accelerator.is_main_process:
            (folder / name / "bf16.json").write_text(json.dumps(curve))
    accelerator.end_training()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    assert fork_ranks(2, train_with_every_strategy, folder, timeout=300) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    accelerator = Accelerator(cpu=True)
    results = {}
    for family, loss in CASES:
        results[family, loss] = results_of(new_state(family, accelerator), family, loss, folder, accelerator)
    return folder, results


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("family", "loss"), CASES)
def test_two_ranks_train_like_one_process(strategy, family, loss, trained, alone):
    folder, expected = alone[0], alone[1][family, loss]
    results = json.loads((trained / strategy / f"{family} {loss}.json").read_text())
    for mine, theirs in zip(results["curve"], expected["curve"], strict=True):
        assert mine[2] == theirs[2]  # tokens
        assert mine[0] == pytest.approx(theirs[0], rel=1e-6)  # loss
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)  # gradient norm
    assert results["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
    assert results["answers"] == [list(answer) for answer in expected["answers"]]
    mine, theirs = (load_file(path / f"{family} {loss}" / "model.safetensors") for path in (trained / strategy, folder))
    assert mine.keys() == theirs.keys()
    for name in mine:
        # Adam divides each gradient by its magnitude. For gradients near 0, this magnifies rounding errors.
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_holds_its_shard_of_the_state(strategy, trained, alone):
    results = json.loads((trained / strategy / "llama plain.json").read_text())
    expected = alone[1]["llama", "plain"]
    assert results["bytes"] < 0.55 * expected["bytes"]
    assert (results["weights"] == 0) == strategy.startswith("zero3")


def skip_nonfinite_losses(folder):
    for name, zero in STRATEGIES.items():
        accelerator = zero_accelerator(zero, bf16=name == "zero1")
        state, rank = new_state("llama", accelerator), accelerator.process_index
        before, _ = curve_of(state, plain_loss, accelerator, steps=1), save_model(state.model, folder / "before")
        bad = state.step

        def loss_of(model, batch):
            is_bad = state.step == bad and rank == 1 and len(batch.row_ids) == 2  # noqa: B023
            return plain_loss(model, batch) + (math.inf if is_bad else 0.0)  # infinite loss, but finite gradients

        with pytest.raises(FloatingPointError, match=r"the loss was not finite on rank 1 with rows"):
            curve_of(state, loss_of, accelerator, steps=1)
        assert state.step == bad
        batches = next(iter(state.stream))
        result = deepspeed_step(state, batches, loss_of, accelerator, learning_rate=1e-2, nonfinite="skip")
        assert not result.updated and "not finite on rank 1" in result.reason
        save_model(state.model, folder / "after")
        then, now = (load_file(folder / path / "model.safetensors") for path in ("before", "after"))
        assert all(torch.equal(then[key], now[key]) for key in then)
        assert curve_of(state, loss_of, accelerator, steps=1)[0][0] < before[0][0] * 1.05  # the bad step had no effect
    accelerator.end_training()


def test_if_the_loss_is_not_finite_on_one_rank_no_rank_updates_its_weights(tmp_path):
    assert fork_ranks(2, skip_nonfinite_losses, tmp_path, timeout=300) == [0, 0]


def use_the_seams(folder):
    """Compare groups, metrics and master weights with those of plain data parallel, and save an average."""
    accelerator, expected = Accelerator(cpu=True), {}
    for name, zero in (("plain", None), ("zero2", STRATEGIES["zero2"]), ("zero3", STRATEGIES["zero3"])):
        accelerator = zero_accelerator(zero, bf16=True) if zero else accelerator
        state = new_state("llama", accelerator, groups=GROUPS)
        before = {name: x.clone() for name, x in master_weights(state.model, state.optimizer)}
        batches = next(iter(state.stream))
        result = (deepspeed_step if zero else train_step)(
            state, batches, with_metrics, accelerator, learning_rate=1e-2, max_grad_norm=1.0
        )
        weights = dict(master_weights(state.model, state.optimizer))
        assert torch.equal(weights[EMBEDDING], before[EMBEDDING])  # its lr_scale is 0
        expected.setdefault("metrics", values_of(result.metrics))
        assert values_of(result.metrics) == pytest.approx(expected["metrics"])
        for key, mine in expected.setdefault("weights", weights).items():
            assert weights[key].dtype == torch.float32 and not (key != EMBEDDING and torch.equal(mine, before[key]))
            torch.testing.assert_close(weights[key], mine, rtol=0, atol=2e-2)  # in bf16, some gradients change sign
        path = save_checkpoint(state, folder / name, accelerator, extra={"average": weights})
        assert all(torch.equal(x, weights[key]) for key, x in load_extra(path, "average").items())
    accelerator.end_training()


def test_groups_metrics_master_weights_and_extra_values_are_those_of_plain_data_parallel(tmp_path):
    assert fork_ranks(2, use_the_seams, tmp_path, timeout=300) == [0, 0]


# (ZeRO, whether in bf16, model): T5's embedding, which is tied, is trained; Llama's is frozen
RESUMED = {
    "zero1": ({"stage": 1}, False, "t5"),
    "zero2_offload": (STRATEGIES["zero2_offload"], False, "t5"),
    "zero3_offload": (STRATEGIES["zero3_offload"], False, "t5"),
    "zero1_bf16": ({"stage": 1}, True, "llama"),
    "zero3_bf16": ({"stage": 3}, True, "llama"),  # each rank keeps all weights of this size whole
}
CLASSES = {"t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}
UNEVEN = {"t5": {"d_model": 35}, "llama": {"intermediate_size": 35}}  # ranks have parts of unequal sizes


def resumed_state(zero, bf16=False, family="t5", **options):
    accelerator = zero_accelerator(zero, bf16=bf16)
    frozen = ["embeddings"] if family == "llama" else []
    return new_state(family, accelerator, frozen=frozen, **UNEVEN[family], **options), accelerator


def logits_of(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).logits.clone()


def resume_with_every_strategy(folder):
    for name, case in RESUMED.items():
        state, accelerator = resumed_state(*case)
        check_space(state, folder / name, saves=1, keep=1)
        first = save_checkpoint(state, folder / name, accelerator)  # has no optimizer state
        curve_of(state, chunked_loss, accelerator, steps=2)
        path = save_checkpoint(state, folder / name, accelerator, max_shard_size="30KB")
        logits, curve = logits_of(state.model), curve_of(state, chunked_loss, accelerator, steps=2)
        other, accelerator = resumed_state(*case, seed=5)
        assert not torch.equal(logits_of(other.model), logits)
        load_checkpoint(other, path, accelerator)
        assert torch.equal(logits_of(other.model), logits), name
        assert curve_of(other, chunked_loss, accelerator, steps=2) == curve, name
        load_checkpoint(other, first, accelerator)  # into a state that has been used
        curve_of(other, chunked_loss, accelerator, steps=2)
        assert curve_of(other, chunked_loss, accelerator, steps=2) == curve, name
        if accelerator.is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(curve))
    accelerator.end_training()


def resume_sharded(folder):
    """Go on from ZeRO-3 without DeepSpeed; then make a state that ZeRO cannot have."""
    accelerator = Accelerator(cpu=True)
    state = new_state("t5", accelerator, sharding_strategy="FULL_SHARD", seed=5, **UNEVEN["t5"])
    load_checkpoint(state, folder / "zero3_offload" / "step-00000002", accelerator)
    expected, _ = json.loads((folder / "zero3_offload.json").read_text())
    (result,) = curve_of(state, chunked_loss, accelerator, steps=1)
    assert result == pytest.approx(expected, rel=1e-6)
    save_checkpoint(state, folder / "sharded", accelerator)
    next(iter(state.optimizer.state.values()))["step"] += 1
    save_checkpoint(state, folder / "uneven", accelerator)
    accelerator.end_training()


def resume_on_three_ranks(folder):
    """Resume from ZeRO on two ranks, and from FULL_SHARD, without a pickle. DeepSpeed uses pickles only in `wrap`."""
    starts = {"zero1": "zero1/step-00000002", "zero2": "sharded/step-00000003", "zero3": "zero3_offload/step-00000002"}
    states = {name: resumed_state(STRATEGIES[name], seed=5) for name in starts}
    forbid_pickles()
    for name, start in starts.items():
        state, accelerator = states[name]
        load_checkpoint(state, folder / start, accelerator)
        expected = json.loads((folder / f"{start.split('/')[0]}.json".replace("sharded", "zero3_offload")).read_text())
        curve = curve_of(state, chunked_loss, accelerator, steps=4 - state.step)
        for mine, theirs in zip(curve, expected[-len(curve) :], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
    path = save_checkpoint(state, folder / "three", accelerator)
    other, accelerator = states["zero2"]
    load_checkpoint(other, path, accelerator)
    assert torch.equal(logits_of(other.model), logits_of(state.model))
    with pytest.raises(UsageError, match=r"step was 3\.0, 4\.0 for different weights, and ZeRO has one step for all"):
        load_checkpoint(other, folder / "uneven" / "step-00000003", accelerator)
    if accelerator.process_index == 1:
        fail_at(3, "no space")
    with pytest.raises(SaveError):  # on every rank: rank 1 continues to gather tensors with the others
        save_checkpoint(state, folder / "full", accelerator, max_shard_size="30KB")


def test_a_run_resumes_with_any_strategy_and_number_of_ranks(tmp_path):
    assert fork_ranks(2, resume_with_every_strategy, tmp_path, timeout=300) == [0, 0]
    for name, (_, _, family) in RESUMED.items():
        verify_checkpoint(path := tmp_path / name / "step-00000002")
        model = CLASSES[family].from_pretrained(path / "model")
        assert {x.dtype for x in model.parameters()} == {torch.float32}  # of bf16 runs, the master weights
    assert fork_ranks(2, resume_sharded, tmp_path) == [0, 0]
    assert fork_ranks(3, resume_on_three_ranks, tmp_path, timeout=300) == [0, 0, 0]


@pytest.fixture(scope="module")
def in_fp32():
    accelerator = Accelerator(cpu=True)
    return curve_of(new_state("llama", accelerator), chunked_loss, accelerator, steps=6, learning_rate=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_weights_have_fp32_master_weights(strategy, trained, in_fp32):
    """At this learning rate, bf16 weights lose most updates to rounding; fp32 master weights keep them."""
    curve = json.loads((trained / strategy / "bf16.json").read_text())
    for (loss, norm, _), (expected_loss, expected_norm, _) in zip(curve, in_fp32, strict=True):
        assert loss == pytest.approx(expected_loss, rel=5e-4)
        assert norm == pytest.approx(expected_norm, rel=5e-3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = runs.write_files(tmp_path_factory.mktemp("work"), num_rows=40)
    (work / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}))
    result = train("train", *flags(work, "alone", batch_size=8))
    assert result.returncode == 0, result.stderr
    return work


def flags(work, name, **changes):
    return runs.flags(work, name, **({"max_steps": 3, "global_batch_size": 8, "batch_size": 2} | changes))


LAUNCHERS = {
    "--deepspeed": [sys.executable, "train_low_mem.py", "train", "--num_processes=2", "--deepspeed=WORK/zero2.json"],
    "accelerate": module_command(
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/deepspeed_zero3_offload.yaml",
        "--main_process_port=PORT",
        "train_low_mem.py",
        "train",
    ),
    # without a ZeRO config, a run under DeepSpeed's launcher uses plain data parallelism
    "deepspeed": module_command(
        "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=PORT", "train_low_mem.py", "train"
    ),
}


def test_every_launcher_trains_like_one_process(work):
    for launcher in LAUNCHERS:
        check_launcher(launcher, work)


def check_launcher(launcher, work):
    command = [word.replace("PORT", str(free_port())).replace("WORK", str(work)) for word in LAUNCHERS[launcher]]
    result = run(*command, *flags(work, launcher), DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    assert "2 processes x 2 micro-batches of at most 2" in result.stdout
    assert runs.losses(work, launcher) == pytest.approx(runs.losses(work, "alone"), rel=1e-6)
    assert runs.weights(work, launcher).keys() == runs.weights(work, "alone").keys()
    verify_checkpoint(work / launcher / "checkpoints" / "step-00000003")


def test_a_killed_run_resumes_at_another_stage_like_one_never_killed(work):
    sizes = {"max_steps": 8, "save_steps": 1}
    result = train("train", *flags(work, "unbroken", batch_size=8, **sizes))
    assert result.returncode == 0, result.stderr
    words = flags(work, "killed", deepspeed='{"zero_optimization": {"stage": 3}}', **sizes)
    second = work / "killed" / "checkpoints" / "step-00000002"
    with started_ranks(2, run_program, PROGRAM, "train", *words) as ranks:
        wait_until(second.exists, ranks[0])  # then both are killed
    words = flags(work, "killed", deepspeed=work / "zero2.json", resume="auto", **sizes)
    for result in train_ranks(2, "train", *words):
        assert result.returncode == 0, result.stderr
    assert runs.steps(work, "killed") == [*range(1, 9)]
    assert runs.losses(work, "killed") == pytest.approx(runs.losses(work, "unbroken"), rel=1e-6)


def test_the_best_model_is_loaded_into_a_state_that_has_been_used(work):
    sizes = {"max_steps": 12, "eval_steps": 2, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    sizes |= {"load_best_model_at_end": True, "early_stopping_patience": 1, "validation_rows": 4}
    sizes |= {"max_predict_samples": 0}
    words = flags(work, "best", deepspeed='{"zero_optimization": {"stage": 3}}', **sizes)
    for result in train_ranks(2, "train", *words):
        assert result.returncode == 0, result.stderr
    found = runs.evaluations(work, "best")
    best, last = min(found, key=lambda pair: pair[1])[0], found[-1][0]
    assert best == last - 2
    saved = work / "best" / "checkpoints" / f"step-{best:08d}" / "model" / "model.safetensors"
    assert (work / "best" / "model" / "model.safetensors").read_bytes() == saved.read_bytes()


def test_a_preempted_run_resumes_without_deepspeed(work):
    words = flags(work, "one", max_steps=10_000, deepspeed=work / "zero2.json")
    with started_ranks(1, run_program, PROGRAM, "train", *words, stderr=subprocess.PIPE) as (process,):
        wait_until(lambda: (work / "one" / "metrics.jsonl").exists() and runs.steps(work, "one"), process)
        process.terminate()
        result = finish(process, timeout=300)
    assert result.returncode == 75, result.stderr
    end = runs.exit_of(work, "one")
    assert end["cause"] == "preempted" and end["step"] > 0
    verify_checkpoint(work / "one" / "checkpoints" / f"step-{end['step']:08d}")
    result = train("train", *flags(work, "one", max_steps=end["step"] + 1, resume="auto"))
    assert result.returncode == 0 and "--deepspeed=None (was " in result.stdout, result.stderr
    assert runs.steps(work, "one") == [*range(1, end["step"] + 2)]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, "a stage of 1, 2 or 3 (found: 0)"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping=0.5, but --max_grad_norm=1.0"),
        ({"train_micro_batch_size_per_gpu": 4}, {}, "train_micro_batch_size_per_gpu=4, but --batch_size=2"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled=true, but --mixed_precision=no"),
        ({"fp16": {"enabled": True}}, {}, "fp16, which needs a run without DeepSpeed"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, {}, "every step reports the norm: remove"),
        ({"optimizer": {"type": "Adam"}}, {}, "set --optimizer or related flags instead"),
        ({"torch_autocast": {"enabled": True}}, {}, "set --mixed_precision or related flags instead"),
        ({"pipeline": {"stages": 2}}, {}, "set --pp_size or related flags instead"),
        ({"bf16": "auto"}, {}, 'bf16="auto": set it to an object {...}'),
        ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, {}, "does nothing below stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "set its nvme_path too"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, {}, "set --save_steps=0 and remove --resume"),
        ({"zero_optimization": {"stage": 2, "bucket": 5}}, {}, "DeepSpeed refuses its config"),
        ({"zero_force_ds_cpu_optimizer": True}, {}, "set it to false"),
        (
            {},
            {"memory": "exact", "mixed_precision": "bf16"},
            "--deepspeed has its own optimizer state and does not support --memory=exact",
        ),
        ({}, {"optimizer": "adafactor"}, "--optimizer=adafactor needs whole ones"),
        ("{", {}, "is not JSON"),
        (None, {}, "cannot be read: No such file"),
    ],
)
def test_unusable_configs_and_flags_are_reported_before_anything_is_written(config, changes, message, work, tmp_path):
    path = tmp_path / "zero.json"
    if config is not None:
        values = {"zero_optimization": {"stage": 2}} | config if isinstance(config, dict) else None
        path.write_text(config if values is None else json.dumps(values))
    (result,) = train_ranks(1, "train", *flags(work, "refused", deepspeed=path, **changes))
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (work / "refused").exists()


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("train", "--deepspeed=other.json", 'accelerate has deepspeed={"zero_optimization":{"stage":2}}'),
        (
            "evaluate",
            "--model_name_or_path=m",
            "configured to shard the model (deepspeed), but `evaluate` needs the whole model",
        ),
    ],
)
def test_settings_from_accelerate_are_not_ignored(command, flag, message, work, tmp_path):
    (tmp_path / "other.json").write_text('{"zero_optimization": {"stage": 3}}')
    flag = flag.replace("other", f"{tmp_path}/other")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    result = train(command, flag, **environment)
    assert result.returncode == 2 and message in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_every_deepspeed_config_begins_with_a_comment(name):
    assert (ROOT / "accelerate_configs" / f"deepspeed_{name}.yaml").read_text().startswith("# ")
