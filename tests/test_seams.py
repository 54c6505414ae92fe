"""The seams for research: gradients before the update, parameter groups, master weights, extra values, metrics."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lowmem
from lowmem import (
    check_model,
    evaluate,
    init_distributed,
    load_checkpoint,
    load_extra,
    make_optimizer,
    master_weights,
    offload_weights,
    parallelize,
    save_checkpoint,
    train_step,
    verify_checkpoint,
)
from lowmem.checkpoint.manifest import checkpoints
from lowmem.deepspeed_step import deepspeed_step
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.placement import data_place
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.savers import entered, layered, layered_offloaded, release
from lowmem.optim.formats import read
from lowmem.report import Report
from lowmem.step import TrainState
from lowmem.storage.files import MOST_JSON_BYTES
from tests.forked import fork_ranks
from tests.models import build
from tests.processes import ROOT
from tests.test_step import assert_same_gradient, gradient_of_step, state_of, stream_of

RATE = {"learning_rate": 1e-2}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def batches_of(count=2, **options):
    return next(stream_of("llama", batch_size=8 // count, gradient_accumulation_steps=count, **options))


def clip_each(gradients):
    """The example of docs/library.md."""
    for gradient in gradients.values():
        gradient.mul_((1.0 / (gradient.norm() + 1e-6)).clamp(max=0.1))


def noting(seen, change):
    """Return a `before_update` that puts whole copies of the gradients into `seen`, then calls `change`."""
    return lambda gradients: (seen.update({name: whole(x) for name, x in gradients.items()}), change(gradients))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# --- before_update


def test_before_update_changes_the_gradient_that_is_measured_clipped_and_applied():
    accelerator = Accelerator(cpu=True)
    expected, plain = gradient_of_step(build("llama"), batches_of(), accelerator)
    for savers in ([], [layered]):
        model, seen = build("llama"), {}

        def change(gradients, seen=seen):
            seen |= {name: gradient.clone() for name, gradient in gradients.items()}
            gradients[HEAD].mul_(2)

        state = state_of(model, name="sgd")
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with entered(savers, model, state.optimizer):
            options = {"learning_rate": 1.0, "max_grad_norm": 1e-2, "before_update": change}
            result = train_step(state, batches_of(), chunked_loss, accelerator, **options)
        assert_same_gradient(seen, expected)
        changed = expected | {HEAD: 2 * expected[HEAD]}
        norm = torch.cat([x.flatten() for x in changed.values()]).norm()
        assert norm > 1.1 * plain.grad_norm
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=0)
        factor = 1e-2 / norm
        applied = {name: (before[name] - x.detach()) / factor for name, x in model.named_parameters()}
        for name, gradient in changed.items():
            torch.testing.assert_close(applied[name], gradient, rtol=0, atol=1e-6 / factor.item(), msg=name)


@pytest.mark.parametrize("memory", ["exact", "lean"])
@pytest.mark.parametrize("count", [1, 2])
def test_in_a_tier_only_weights_whose_gradient_before_update_leaves_are_changed(memory, count):
    state = state_of(build("llama"), memory=memory)
    before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}

    def only_head(gradients):
        for name, gradient in gradients.items():
            gradient.mul_(name == HEAD)
        with pytest.raises(TypeError):  # an assignment, which would have no effect
            gradients[HEAD] = gradients[HEAD] * 2

    train_step(state, batches_of(count), chunked_loss, Accelerator(cpu=True), **RATE, before_update=only_head)
    changed = [name for name, x in state.model.named_parameters() if not torch.equal(x, before[name])]
    assert changed == [HEAD]


def test_in_fp16_before_update_gets_gradients_without_the_loss_scale():
    def gradients_of(mixed_precision):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, seen = Accelerator(cpu=True, mixed_precision=mixed_precision), {}
        state = state_of(build("llama"), name="sgd")

        def note(gradients):
            seen.update({name: gradient.clone() for name, gradient in gradients.items()})

        result = train_step(state, batches_of(), chunked_loss, accelerator, learning_rate=0.0, before_update=note)
        return seen, result

    try:
        (mine, scaled), (expected, plain) = gradients_of("fp16"), gradients_of("no")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert scaled.loss_scale > 1 and scaled.updated
    torch.testing.assert_close(scaled.grad_norm, plain.grad_norm, rtol=1e-2, atol=0)
    torch.testing.assert_close(mine[HEAD], expected[HEAD], rtol=1e-2, atol=1e-2 * expected[HEAD].abs().max().item())


@pytest.mark.parametrize("savers", [[release], [layered, release], [layered_offloaded]])
def test_before_update_is_refused_where_gradients_are_never_there_together(savers):
    state = state_of(build("llama"), memory="exact")
    refused = pytest.raises(UsageError, match="before_update needs all gradients at the same time, but .*: remove one")
    with entered(savers, state.model, state.optimizer), refused:
        train_step(state, batches_of(1), chunked_loss, Accelerator(cpu=True), **RATE, before_update=print)
    with pytest.raises(UsageError, match="before_update needs the gradients, which DeepSpeed's engine keeps"):
        deepspeed_step(state, batches_of(1), chunked_loss, Accelerator(cpu=True), **RATE, before_update=print)


# --- groups

GROUPS = [
    {"params": "*embed_tokens*", "lr_scale": 0.0},
    {"params": "*layers.0.*", "lr_scale": 0.1, "weight_decay": 0.5},
    {"params": "*proj*", "weight_decay": 0},
]


@pytest.mark.parametrize("memory", ["off", "exact", "lean"])
def test_groups_set_the_learning_rate_and_the_decay_of_the_parameters_that_they_match_first(memory):
    model = build("llama")
    state = TrainState(model, make_optimizer(model, memory=memory, weight_decay=0.01, groups=GROUPS))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_step(state, batches_of(), chunked_loss, Accelerator(cpu=True), learning_rate=0.5)
    found = {x: (group["lr"], group["weight_decay"]) for group in state.optimizer.param_groups for x in group["params"]}
    named = {name: found.pop(x) for name, x in model.named_parameters()}
    assert not found
    assert named[EMBEDDING] == (0.0, 0.01) and named[HEAD] == (0.5, 0.01)
    assert named["model.layers.0.self_attn.q_proj.weight"] == (0.5 * 0.1, 0.5)
    assert named["model.layers.0.input_layernorm.weight"] == (0.5 * 0.1, 0.5)  # its decay is given, so also of norms
    assert named["model.layers.1.self_attn.q_proj.weight"] == (0.5, 0)
    assert named["model.layers.1.input_layernorm.weight"] == named["model.norm.weight"] == (0.5, 0.0)
    unchanged = [name for name, x in model.named_parameters() if torch.equal(x, before[name])]
    assert unchanged == [EMBEDDING]


def test_a_group_matches_every_name_of_a_tied_weight_and_one_without_effect_is_refused():
    optimizer = make_optimizer(build("qwen2"), groups=[{"params": "lm_head.*", "lr_scale": 0.1}])
    (scaled,) = (group for group in optimizer.param_groups if "lr_scale" in group)
    assert len(scaled["params"]) == 1
    for groups, message in {
        (("params", "*decoder*"), ("lr_scale", 0.1)): "matches no trained parameter",
        (("params", "*"),): "write it as",
        (("params", "*"), ("lr", 0.1)): "write it as",
        (("params", "*"), ("lr_scale", -1)): "write it as",
        (("lr_scale", 0.1),): "write it as",
    }.items():
        with pytest.raises(UsageError, match=rf"groups\[1\] .*{message}"):
            make_optimizer(build("llama"), groups=[{"params": HEAD, "lr_scale": 0.5}, dict(groups)])
    with pytest.raises(UsageError, match=r"groups\[1\] .*outside earlier groups"):  # it would have no effect
        make_optimizer(build("llama"), groups=[{"params": "*", "lr_scale": 0.5}, {"params": HEAD, "lr_scale": 0.1}])


@pytest.mark.parametrize("memory", ["off", "exact"])
def test_an_optimizer_with_groups_resumes_bit_for_bit(memory, tmp_path):
    accelerator = Accelerator(cpu=True)

    def new_state(seed):
        model = build("llama", seed=seed)
        optimizer = make_optimizer(model, memory=memory, weight_decay=0.01, groups=GROUPS)
        return TrainState(model, optimizer, stream_of("llama", batch_size=4))

    def train(state):
        train_step(state, next(iter(state.stream)), chunked_loss, accelerator, **RATE)

    state, resumed = new_state(0), new_state(5)
    train(state)
    load_checkpoint(resumed, save_checkpoint(state, tmp_path, accelerator), accelerator)
    train(state)
    train(resumed)
    for (name, mine), theirs in zip(state.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


# --- master weights


@pytest.mark.parametrize("place", ["off", "exact", "lean", "offloaded"])
def test_master_weights_are_those_that_the_optimizer_updates_in_fp32(place, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 192} if place == "offloaded" else {}
    model = build("llama", **sizes)
    model.lm_head.requires_grad_(False)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if place == "offloaded":
        offload_weights(model, tmp_path, torch.device("cpu"))
    optimizer = make_optimizer(model, memory={"offloaded": "exact"}.get(place, place))
    masters = dict(master_weights(model, optimizer))
    assert [*masters] == [name for name in original if name != HEAD]
    for name, value in masters.items():
        assert value.dtype == torch.float32 and value.shape == original[name].shape
        is_rounded = place == "lean" and value.dim() > 1 and value.numel() > 4096
        expected = original[name].bfloat16().float() if is_rounded else original[name]
        assert torch.equal(value, expected), name
    kept = {name: value.clone() for name, value in masters.items()}
    savers = [layered] if place == "offloaded" else []
    with entered(savers, model, optimizer):
        state = TrainState(model, optimizer)
        train_step(state, batches_of(), chunked_loss, Accelerator(cpu=True), learning_rate=1e-4)
    assert all(torch.equal(masters[name], kept[name]) for name in kept)  # copies of the caller's own
    now = dict(master_weights(model, optimizer))
    assert not any(torch.equal(now[name], kept[name]) for name in kept)
    for name, parameter in model.named_parameters() if place in ("off", "exact", "lean") else ():
        if name in now:
            held = {"weight": parameter.data, **optimizer.state[parameter]}
            assert torch.equal(now[name], read(held, "weight", slice(None)).view(parameter.shape)), name


# --- extra


def test_extra_values_are_saved_hashed_and_loaded(tmp_path):
    accelerator, state = Accelerator(cpu=True), state_of(build("llama"))
    ema = {name: value * 0.5 for name, value in master_weights(state.model, state.optimizer)}
    note = {"decay": 0.999, "of": ["a", None]}
    extra = {"ema": ema, "counts": {"seen": torch.arange(5), "none": torch.empty(0)}, "note": note, "empty": {}}
    path = save_checkpoint(state, tmp_path, accelerator, extra=extra, max_shard_size="40KB")
    verify_checkpoint(path)
    assert len([*path.glob("extra/ema-*-of-*.safetensors")]) > 1
    loaded = load_extra(path, "ema")
    assert loaded.keys() == ema.keys() and all(torch.equal(loaded[name], ema[name]) for name in ema)
    target = {name: torch.zeros_like(value) for name, value in ema.items()}
    assert load_extra(path, "ema", into=target) is target
    assert all(torch.equal(target[name], ema[name]) for name in ema)
    counts = load_extra(path, "counts")
    assert counts["seen"].dtype == torch.int64 and counts["seen"].tolist() == [*range(5)]
    counts["seen"] += 1  # the caller's own memory
    assert (load_extra(path, "note"), load_extra(path, "empty")) == (note, {})

    with pytest.raises(UsageError, match="has no extra value 'swa', but counts, ema, empty, note"):
        load_extra(path, "swa")
    with pytest.raises(UsageError, match=f"'ema'.* does not match: {HEAD} was F32.* and is BF16"):
        load_extra(path, "ema", into=target | {HEAD: target[HEAD].bfloat16()})
    with pytest.raises(UsageError, match="'note'.* is a JSON value"):
        load_extra(path, "note", into={})
    damaged = tmp_path / "copy"
    for name in ("extra/note.json", "extra/counts.safetensors", "extra/ema.safetensors.index.json"):
        shutil.copytree(path, damaged)
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[:-2] + b"9" + content[-1:])
        with pytest.raises(UsageError, match=f"{name} changed since it was saved"):
            verify_checkpoint(damaged)
        shutil.rmtree(damaged)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"../a": 1}, "extra has the name '../a': use letters"),
        ({"ema": {"a": torch.ones(2), "b": 1}}, "extra\\['ema'\\] has tensors, but 'b' is a int"),
        ({"ema": torch.ones(2)}, "extra\\['ema'\\] is neither a mapping of names to tensors nor a JSON value"),
        ({"ema": {"a": torch.ones(2, dtype=torch.complex64)}}, "checkpoints do not support torch.complex64"),
        ({"ema": {"a": torch.ones(2, device="meta")}}, "extra\\['ema'\\]\\['a'\\] is on meta and has no data"),
        ({"ema": {"a": torch.ones(2).to_sparse()}}, "extra\\['ema'\\]\\['a'\\] has the layout torch.sparse_coo"),
        ({"ema": {"__metadata__": torch.ones(2)}}, "extra\\['ema'\\] has a tensor named __metadata__"),
        ({"note": [{1: "a", "1": "b"}]}, "extra\\['note'\\] is neither .* \\(the key 1 is not text\\): convert it"),
        ({"note": "a" * MOST_JSON_BYTES}, "extra\\['note'\\] has 268,435,458 bytes as JSON, more than 268,435,456"),
    ],
)
def test_an_extra_value_that_cannot_be_saved_is_refused_before_anything_is_written(extra, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        save_checkpoint(state_of(build("llama")), tmp_path, Accelerator(cpu=True), extra=extra)
    assert not [*tmp_path.iterdir()]


# --- metrics


def with_metrics(model, batch):
    targets = batch.inputs["labels"]
    targets = targets[targets != -100]
    metrics = {"mean_row": (sum(batch.row_ids), len(batch.row_ids)), "mean_target": (targets.sum(), targets.numel())}
    if 0 in batch.row_ids:  # not in every micro-batch or on every rank
        metrics["row_0"] = (1, 1)
    return plain_loss(model, batch), metrics


def expected_metrics(batches):
    rows = [row for batch in batches for row in batch.row_ids]
    targets = torch.cat([batch.inputs["labels"][batch.inputs["labels"] != -100] for batch in batches]).double()
    return {"mean_row": sum(rows) / len(rows), "mean_target": targets.mean().item(), "row_0": 1.0}


def values_of(metrics):
    return {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(("savers", "memory"), [([], "off"), ([], "exact"), ([layered], "lean"), ([release], "exact")])
def test_metrics_are_sums_over_sums_of_counts(savers, memory):
    batches = batches_of(1 if savers == [release] else 3, shuffle=False)
    assert savers == [release] or len({len(batch.row_ids) for batch in batches}) == 1
    if len(batches) > 1:  # micro-batches of unequal sizes, so that an average of averages would differ
        batches = [batches[0], *batches_of(1, shuffle=False), batches[2]]
    state = state_of(build("llama"), memory=memory)
    with entered(savers, state.model, state.optimizer):
        result = train_step(state, batches, with_metrics, Accelerator(cpu=True), learning_rate=1e-3)
    assert values_of(result.metrics) == pytest.approx(expected_metrics(batches))
    later = train_step(state_of(build("llama")), batches, plain_loss, Accelerator(cpu=True), learning_rate=1e-3)
    assert later.metrics == {} and later.loss.item() == pytest.approx(result.loss.item(), rel=0.02)


def test_a_metric_that_counts_nothing_is_nan_and_one_that_the_first_step_lacked_is_refused():
    accelerator, state = Accelerator(cpu=True), state_of(build("llama"))
    first = batches_of(2, shuffle=False)
    others = [batch for batch in first if 0 not in batch.row_ids]
    train_step(state, first, with_metrics, accelerator, **RATE)
    without = train_step(state, others, with_metrics, accelerator, **RATE)
    assert math.isnan(without.metrics["row_0"]) and without.metrics["mean_row"] > 0
    blank = [replace(batch, num_targets=0) for batch in first]
    nothing = train_step(state, blank, with_metrics, accelerator, **RATE)
    assert not nothing.updated and all(map(math.isnan, values_of(nothing.metrics).values()))
    assert nothing.metrics.keys() == without.metrics.keys()
    state.metric_names = None
    train_step(state, others, with_metrics, accelerator, **RATE)
    with pytest.raises(UsageError, match="metric row_0, but not in the first step: return \\(0, 0\\)"):
        train_step(state, first, with_metrics, accelerator, **RATE)


def test_a_step_without_a_target_names_no_metric_and_calls_no_before_update():
    accelerator, state = Accelerator(cpu=True), state_of(build("llama"))
    batches = batches_of(2, shuffle=False)
    blank = [replace(batch, num_targets=0) for batch in batches]
    nothing = train_step(state, blank, with_metrics, accelerator, **RATE, before_update=pytest.fail)
    assert nothing.metrics == {} and state.step == 1 and not state.updates
    result = train_step(state, batches, with_metrics, accelerator, **RATE)
    assert values_of(result.metrics) == pytest.approx(expected_metrics(batches))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: (loss, loss), r"returned \(a tensor of shape \[\], a tensor of shape \[\]\): return the summed"),
        (lambda loss: None, "returned NoneType: return the summed loss"),
        (lambda loss: (loss, {"a": 0.5}), r"metric a as float: return \(sum, count\)"),
        (lambda loss: (loss, {"a": (torch.ones(2), 2)}), r"metric a as \(a tensor of shape \[2\], int\)"),
    ],
)
def test_a_loss_function_that_returns_something_else_is_refused(returned, message):
    def loss_fn(model, batch):
        return returned(plain_loss(model, batch))

    with pytest.raises(UsageError, match=message):
        train_step(state_of(build("llama")), batches_of(1), loss_fn, Accelerator(cpu=True), **RATE)


def test_evaluate_and_check_model_accept_metrics():
    model, batches = build("llama"), [*batches_of(2, shuffle=False), *batches_of(1, shuffle=False)]
    check_model(model, with_metrics, packing=False, max_seq_len=16)
    measured = evaluate(model, batches, with_metrics, Accelerator(cpu=True), prefix="dev")
    plain = evaluate(model, batches, plain_loss, Accelerator(cpu=True), prefix="dev")
    expected = {f"dev_{name}": value for name, value in expected_metrics(batches).items()}
    assert measured == pytest.approx(plain | expected)
    with pytest.raises(UsageError, match="evaluate measures perplexity itself"):
        evaluate(model, batches, lambda *x: (plain_loss(*x), {"perplexity": (1, 1)}), Accelerator(cpu=True))


def test_a_report_records_metrics(tmp_path):
    accelerator, state = Accelerator(cpu=True), state_of(build("llama"), stream_of("llama", batch_size=8))
    batches = next(iter(state.stream))
    report = Report(tmp_path, {}, accelerator, step=0, total_steps=2, resumed=False)
    report.restart_timer()
    result = train_step(state, batches, with_metrics, accelerator, **RATE)
    report.count(result, state.stream)
    report.training(result, state.stream, data_place(state.model), learning_rate=1e-2)
    report.evaluation(evaluate(state.model, batches, with_metrics, accelerator), [])
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    expected = expected_metrics(batches)["mean_row"]
    assert (first["mean_row"], second["eval_mean_row"]) == pytest.approx((expected, expected))
    for name in ("grad_norm", "epoch", "bad_rows", "peak_host_bytes"):
        taken = replace(result, metrics={name: torch.ones(())})
        report.count(result, state.stream)
        with pytest.raises(UsageError, match=f"a step reports {name} itself: rename that metric"):
            report.training(taken, state.stream, learning_rate=1e-2)
    for metrics, message in {
        (("reward", torch.ones(())),): "the metric reward is a Tensor, not an int or float: convert it",
        (("step", 3),): "a record has a step of its own: rename",
    }.items():
        with pytest.raises(UsageError, match=message):
            report.record(dict(metrics))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# --- documents


def test_the_code_of_the_documents_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "library.md").read_text().partition("## Metrics")[2].partition("## Your own train.py")[0]
    names = {name: getattr(lowmem, name) for name in lowmem.__all__} | {"torch": torch, "F": F}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        state = state_of(build("llama"), stream_of("llama", batch_size=4), memory="exact")
        names |= {"state": state, "model": state.model, "optimizer": state.optimizer, "stream": state.stream}
        names |= {"accelerator": Accelerator(cpu=True), "batches": batches_of()}
        exec(block.replace("range(1000)", "range(2)"), names)  # noqa: S102
    result, batches = names["result"], names["batches"]
    assert 0 <= result.metrics["accuracy"] < 1 and result.grad_norm > 0 and names["note"] == {"decay": 0.999}
    assert evaluate(build("llama"), batches, names["loss_fn"], Accelerator(cpu=True))["eval_loss"] == pytest.approx(
        evaluate(build("llama"), batches, plain_loss, Accelerator(cpu=True))["eval_loss"]
    )


# --- ranks


def test_on_two_ranks_the_seams_give_what_they_give_on_one(tmp_path):
    accelerator, seen = Accelerator(cpu=True), {}
    state = TrainState(build("llama"), None)
    state.optimizer = make_optimizer(state.model, memory="off", name="sgd", groups=GROUPS)
    batches = batches_of(shuffle=False)
    options = {"learning_rate": 1.0, "before_update": noting(seen, clip_each)}
    result = train_step(state, batches, with_metrics, accelerator, **options)
    save_file(seen, tmp_path / "gradients.safetensors")
    save_file(dict(master_weights(state.model, state.optimizer)), tmp_path / "weights.safetensors")
    measured = evaluate(build("llama"), batches, with_metrics, accelerator)
    (tmp_path / "metrics.json").write_text(json.dumps([values_of(result.metrics), measured]))
    assert fork_ranks(2, compare_on_a_rank, tmp_path) == [0, 0]


def compare_on_a_rank(folder):
    accelerator = init_distributed()
    gradients, weights = (load_file(folder / f"{name}.safetensors") for name in ("gradients", "weights"))
    of_step, of_evaluation = json.loads((folder / "metrics.json").read_text())
    full = {"sharding_strategy": "FULL_SHARD"}
    for options, savers in (({}, []), (full, []), (full, [layered]), ({"tp_size": 2}, [])):
        model = parallelize(build("llama"), accelerator, **options)
        batches = next(
            stream_of("llama", batch_size=2, global_batch_size=8, shuffle=False, **data_place(model).coordinates)
        )
        measured = evaluate(model, batches, with_metrics, accelerator)
        assert measured == pytest.approx(of_evaluation, rel=1e-5)
        optimizer, seen = make_optimizer(model, memory="off", name="sgd", groups=GROUPS), {}
        state = TrainState(model, optimizer)
        with entered(savers, model, optimizer):
            options = {"learning_rate": 1.0, "before_update": noting(seen, clip_each)}
            result = train_step(state, batches, with_metrics, accelerator, **options)
        assert values_of(result.metrics) == pytest.approx(of_step)
        assert_same_gradient(seen, gradients)
        assert_same_gradient({name: whole(x) for name, x in master_weights(model, optimizer)}, weights)
    accelerator.end_training()


def test_an_average_of_sharded_weights_is_saved_whole_and_loaded_on_any_number_of_ranks(tmp_path):
    assert fork_ranks(2, average_on_a_rank, tmp_path) == [0, 0]
    (path,) = checkpoints(tmp_path)
    verify_checkpoint(path)
    loaded = load_extra(path, "ema")
    state = state_of(build("llama"), memory="exact")
    load_checkpoint(state, path, Accelerator(cpu=True))
    now = dict(master_weights(state.model, state.optimizer))
    assert loaded.keys() == now.keys()
    for name, original in build("llama").named_parameters():  # the average that the ranks made after two steps
        torch.testing.assert_close(loaded[name], 0.75 * original.detach() + 0.25 * now[name], rtol=0, atol=1e-6)


def average_on_a_rank(folder):
    accelerator = init_distributed()
    model = parallelize(build("llama"), accelerator, sharding_strategy="FULL_SHARD")
    state = state_of(model, memory="exact")
    ema = dict(master_weights(model, state.optimizer))
    batches = batches_of(rank=accelerator.process_index, world_size=2)
    for _ in range(2):
        train_step(state, batches, chunked_loss, accelerator, **RATE)
    for name, weight in master_weights(model, state.optimizer):
        assert isinstance(weight, DTensor)
        ema[name].lerp_(weight, 0.25)
    for other in ({"ema": ema, "only_here": 1}, {"ema": dict(reversed(ema.items()))}):
        extra = other if accelerator.is_main_process else {"ema": ema}
        with pytest.raises(UsageError, match="extra has other names, .* on another rank: pass the same"):
            save_checkpoint(state, folder, accelerator, extra=extra)
    path = save_checkpoint(state, folder, accelerator, extra={"ema": ema, "note": 3})
    again = {name: torch.zeros_like(weight) for name, weight in ema.items()}
    load_extra(path, "ema", into=again)
    assert all(torch.equal(local_of(again[name]), local_of(ema[name])) for name in ema)
    assert load_extra(path, "note") == 3
    accelerator.end_training()
