"""A row's weight multiplies its token losses, and the loss is the weighted mean in any split of the rows."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import ByT5Tokenizer

from lowmem import evaluate, init_distributed, parallelize
from lowmem.data.batch import IGNORED, Batch, collate
from lowmem.data.encode import encode_causal, encode_seq2seq, with_weights
from lowmem.data.packing import pack
from lowmem.data.stream import open_stream
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.savers import entered, layered
from lowmem.model.checks import check_model
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.processes import train
from tests.runs import flags, losses, records, write_files

WEIGHTS = [0.5, 2, 0, 1.25, 3, 0.1]
ROWS = [row | {"weight": weight} for row, weight in zip(qa_rows(16), itertools.cycle(WEIGHTS), strict=False)]


def encoder(family):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)
    return with_weights(encode, "weight")


def first_step(family, **options):
    padded = partial(collate, causal=family != "t5")
    return next(open_stream(ROWS, encoder(family), collate=padded, seed=2, prefetch=0, **options))


def gradient_of_step(model, batches, accelerator, loss_fn=chunked_loss, savers=()):
    """Take a step of SGD at learning rate 1; return the gradient that SGD subtracts, and the step's result."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, name="sgd", memory="off")
    with entered(savers, model, optimizer):
        result = train_step(TrainState(model, optimizer), batches, loss_fn, accelerator, learning_rate=1.0)
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}, result


def weighted_mean(family):
    """Return the weighted mean loss of all rows, its gradients and the sum of weights, one row at a time by torch."""
    model, encode = build(family), encoder(family)
    total, denominator = 0.0, 0.0
    for row in ROWS:
        encoded = encode(row)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
        logits = model(input_ids=ids, labels=labels if family == "t5" else None).logits[0]
        targets = labels[0] if family == "t5" else F.pad(labels[0, 1:], (0, 1), value=IGNORED)
        total = total + row["weight"] * F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        denominator += row["weight"] * int((targets != IGNORED).sum())
    (total / denominator).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return (total / denominator).item(), gradients, denominator


def assert_is_weighted_mean(family, gradient, loss, denominator):
    expected, gradients, sum_of_weights = weighted_mean(family)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert denominator == pytest.approx(sum_of_weights, rel=1e-7)
    for name, other in gradients.items():
        torch.testing.assert_close(gradient[name], other, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize(
    ("family", "split"),
    list(itertools.product(["t5", "llama"], ["whole", "micro-batches", "layered", "packed"])),
)
def test_any_split_has_the_weighted_mean_and_its_gradient(family, split, loss_fn):
    sizes = {"batch_size": 16} if split == "whole" else {"batch_size": 3, "global_batch_size": 16}
    packing = {"packed_seq_len": 96, "is_encoder_decoder": family == "t5"} if split == "packed" else {}
    batches = first_step(family, **sizes, **packing)
    assert len({batch.denominator / batch.num_targets for batch in batches}) == len(batches)
    savers = [layered] if split == "layered" else []
    gradient, result = gradient_of_step(build(family), batches, Accelerator(cpu=True), loss_fn, savers)
    assert_is_weighted_mean(family, gradient, result.loss.item(), result.denominator)
    assert result.num_tokens == sum(batch.num_targets for batch in batches) and isinstance(result.denominator, float)


def step_on_a_rank(folder):
    accelerator = init_distributed()
    rank = accelerator.process_index
    batches = first_step("llama", batch_size=3, global_batch_size=16, rank=rank, world_size=2)
    gradient, result = gradient_of_step(parallelize(build("llama"), accelerator), batches, accelerator)
    torch.save([gradient, result.loss.item(), result.denominator], f"{folder}/{rank}.pt")
    if rank == 1:
        batches = [replace(batch, weights=batch.weights * 0) for batch in batches]
    gradient, result = gradient_of_step(parallelize(build("llama"), accelerator), batches, accelerator)
    torch.save([gradient, result.loss.item(), result.denominator], f"{folder}/{rank}-without-1.pt")
    accelerator.end_training()


def test_two_processes_have_the_weighted_mean_and_its_gradient(tmp_path):
    assert fork_ranks(2, step_on_a_rank, tmp_path) == [0, 0]
    for rank in range(2):
        assert_is_weighted_mean("llama", *torch.load(tmp_path / f"{rank}.pt"))
    # all weights of rank 1 are 0
    batches = first_step("llama", batch_size=3, global_batch_size=16, rank=0, world_size=2)
    gradient, result = gradient_of_step(build("llama"), batches, Accelerator(cpu=True))
    for rank in range(2):
        found, loss, denominator = torch.load(tmp_path / f"{rank}-without-1.pt")
        assert (loss, denominator) == (pytest.approx(result.loss.item(), rel=1e-6), result.denominator)
        for name, other in gradient.items():
            torch.testing.assert_close(found[name], other, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("elements", [1000, 10**7])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_chunked_loss_is_the_plain_loss_with_label_smoothing(family, elements):
    (batch,) = first_step(family, batch_size=16)
    found = []
    for loss_fn in (plain_loss, partial(chunked_loss, slice_elements=elements)):
        model = build(family)
        loss = loss_fn(model, batch, label_smoothing=0.1) / batch.denominator
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_each_label_has_its_own_weight(family, loss_fn):
    encoded = encoder(family)(ROWS[7])
    labels = encoded["labels"]
    last = collate([encoded | {"weights": [float(n == len(labels) - 1) for n in range(len(labels))]}])
    others = {"labels": [IGNORED] * (len(labels) - 1) + labels[-1:]}
    alone = collate([{"input_ids": encoded["input_ids"], **others}])
    if family == "t5":  # whose decoder reads the labels
        shifted = [0, *labels[:-1]]
        alone = replace(alone, inputs=alone.inputs | {"decoder_input_ids": torch.tensor([shifted])})
    assert loss_fn(build(family), last).item() == pytest.approx(plain_loss(build(family), alone).item(), rel=1e-6)
    assert last.denominator == 1


def test_weights_of_1_change_no_bit():
    rows = [row | {"weight": 1} for row in ROWS]
    weighted, plain = (
        next(open_stream(rows, encode, batch_size=16, prefetch=0))
        for encode in (encoder("t5"), encode_seq2seq(ByT5Tokenizer(), max_seq_len=64))
    )
    found = [gradient_of_step(build("t5"), batches, Accelerator(cpu=True)) for batches in (weighted, plain)]
    assert weighted[0].weights is not None and plain[0].weights is None
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    assert found[0][1].denominator == found[1][1].denominator == found[1][1].num_tokens


def test_batches_and_packed_rows_keep_the_weight_of_each_label():
    rows = [
        {"input_ids": [5] * n, "labels": [IGNORED] + [6] * (n - 1), "weights": [w] * n} for n, w in ((3, 2), (2, 7))
    ]
    rows.append({"input_ids": [8], "labels": [8]})
    batch = collate(rows, causal=True)
    assert batch.weights.tolist() == [[2] * 3 + [0] * 5, [7] * 2 + [0] * 6, [1] + [0] * 7]
    assert (batch.denominator, batch.num_targets) == (2 + 2 + 7, 3)
    ((packed,),) = pack(list(enumerate(rows)), max_seq_len=8, micro_batches=1)
    assert packed["weights"] == [2] * 3 + [7] * 2 + [1]
    assert collate([packed], causal=True).denominator == 11
    doubled = replace(batch, weights=batch.weights * 2)
    assert doubled.denominator == doubled.to("cpu").denominator == 22
    assert replace(doubled, row_ids=[1]).denominator == 22 and replace(doubled, weights=None).denominator == 3
    with pytest.raises(ValueError, match="a row has 1 weights for 2 labels"):
        collate([{"input_ids": [1], "labels": [1, 2], "weights": [1.0]}])


def test_a_step_whose_weights_are_all_0_is_only_counted():
    batches = [replace(batch, weights=batch.weights * 0) for batch in first_step("t5", batch_size=16)]
    gradient, result = gradient_of_step(build("t5"), batches, Accelerator(cpu=True))
    assert not result.updated and result.reason == "all target tokens have the weight 0"
    assert not any(change.any() for change in gradient.values())
    with pytest.raises(UsageError, match="all target tokens of the evaluation rows have the weight 0: check their w"):
        evaluate(build("t5"), batches, plain_loss, Accelerator(cpu=True))


def test_an_evaluation_of_weighted_batches_is_the_weighted_mean():
    metrics = evaluate(
        build("t5"), first_step("t5", batch_size=4, global_batch_size=16), plain_loss, Accelerator(cpu=True)
    )
    assert metrics["eval_loss"] == pytest.approx(weighted_mean("t5")[0], rel=1e-6)
    assert metrics["eval_rows"] == 16


def test_a_loss_that_ignores_weights_is_refused():
    def unweighted(model, batch):
        return plain_loss(model, Batch(batch.inputs, batch.num_targets, batch.row_ids))

    for family in ("t5", "llama"):
        for loss_fn in (plain_loss, chunked_loss):
            check_model(build(family), loss_fn, packing=False, max_seq_len=8, weighted=True)
        check_model(build(family), unweighted, packing=False, max_seq_len=8)
        with pytest.raises(UsageError, match="the loss ignores weights.* multiply token losses by batch.weights"):
            check_model(build(family), unweighted, packing=False, max_seq_len=8, weighted=True)


@pytest.mark.parametrize("weight", [None, "1", True, -0.5, math.inf, math.nan, 1e39, 10**400])
def test_a_row_without_a_weight_of_0_or_more_is_bad(weight):
    with pytest.raises(ValueError, match="column 'weight' must hold a weight, a number from 0 to 3.4e.38, found"):
        encoder("t5")({"prompt": "a", "response": "b", "weight": weight})


def test_a_weight_may_be_a_number_of_numpy_or_torch():
    for weight in (np.float32(2.5), np.int64(2), torch.tensor(2.5, dtype=torch.bfloat16)):
        encoded = encoder("t5")({"prompt": "a", "response": "b", "weight": weight})
        assert encoded["weights"] == [float(weight)] * len(encoded["labels"])


def test_a_run_weights_its_training_rows_but_not_its_evaluations(tmp_path):
    write_files(tmp_path, num_rows=24)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    weighted = [row | {"weight": 2.5} for row in rows]
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighted))
    changes = {"validation_file": tmp_path / "rows.jsonl", "max_predict_samples": 0, "max_steps": 3}
    with_column = {"train_file": tmp_path / "weighted.jsonl", "weight_column": "weight"}
    for name, more in (("plain", {}), ("weighted", with_column)):
        result = train("train", *flags(tmp_path, name, **changes, **more))
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path, "weighted") == pytest.approx(losses(tmp_path, "plain"), rel=1e-5)
    assert records(tmp_path, "weighted")[-2]["eval_loss"] == pytest.approx(records(tmp_path, "plain")[-2]["eval_loss"])
    missing = train("train", *flags(tmp_path, "missing", **changes, weight_column="weight"))
    assert missing.returncode == 2 and "rows.jsonl has no column 'weight'" in missing.stderr
    assert "set --weight_column to a column (for all files)" in missing.stderr
