import random
from contextlib import ExitStack
from functools import partial
from shutil import copytree, rmtree

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.integrations import sdpa_attention

from lowmem.data.batch import IGNORED, collate
from lowmem.data.pair_packing import pack_pairs
from lowmem.data.stream import open_stream
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import RankError, StoreError, UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.savers import SAVERS, entered
from lowmem.model.build import model_from
from lowmem.model.checks import check_model
from lowmem.model.documents import documents_apart
from lowmem.model.packing_checks import check_packing
from lowmem.model.replaced import replaced
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.architectures import tiny_fields
from tests.forked import fork_ranks, train_ranks
from tests.models import build
from tests.runs import assert_same_run, evaluations, flags, write_files
from tests.test_stream import Masks

LENGTHS = [(1, 1), (30, 64), (64, 2), (9, 17), (1, 40), (12, 1), (3, 9), (20, 30), (5, 5), (8, 13)]


def documents(lengths, seed=0):
    """Make rows of the given numbers of inputs and labels; row i has the id 100 + i."""
    source, rows = random.Random(seed), []
    for number, sides in enumerate(lengths):
        inputs, labels = ([source.randrange(3, 384) for _ in range(length)] for length in sides)
        rows.append((100 + number, {"input_ids": inputs, "labels": labels}))
    return rows


def lognormal(count, longest):
    source = random.Random(0)

    def length(mean):
        return min(longest, 1 + int(source.lognormvariate(mean, 0.7)))

    return [(length(2.0), length(3.5)) for _ in range(count)]


def seq2seq(family, attention="eager"):
    """Build an encoder-decoder without dropout, in training mode."""
    if family in ("t5", "mt5", "umt5"):
        return build("t5", model_type=family, attn_implementation=attention)
    fields, plain = tiny_fields(family), {"vocab_size": 384, "dropout_rate": 0.0, "attention_dropout": 0.0}
    fields |= plain | {side: {**fields[side], **plain} for side in ("encoder", "decoder") if side in fields}
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = model_from(config, torch.float32, on_meta=False).train()
    model.set_attn_implementation(attention)
    return model


def unpacked(row):
    """Split a packed row where its positions restart at 0; return {row id: (input_ids, labels)}."""
    sides = []
    for tokens, positions in ((row["input_ids"], row["position_ids"]), (row["labels"], row["decoder_position_ids"])):
        starts = [index for index, position in enumerate(positions) if position == 0]
        parts = [slice(*bounds) for bounds in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        assert positions == [position for part in parts for position in range(part.stop - part.start)]
        sides.append([tokens[part] for part in parts])
    return dict(zip(row["row_ids"], zip(*sides, strict=True), strict=True))


@pytest.mark.parametrize("micro_batches", [1, 4, 7])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)] * 9, [(64, 64)] * 7, [(64, 1), (1, 64)] * 4, LENGTHS, lognormal(300, longest=64)],
    ids=["ones", "full", "opposite", "mixed", "many"],
)
def test_every_pair_is_in_one_packed_row_of_limited_length_and_no_micro_batch_is_empty(lengths, micro_batches):
    rows = documents(lengths)
    packed = pack_pairs(rows, max_seq_len=64, micro_batches=micro_batches)
    assert packed == pack_pairs(rows, max_seq_len=64, micro_batches=micro_batches)
    assert len(packed) == micro_batches and all(packed)
    for row in (row for part in packed for row in part):
        assert 0 < len(row["input_ids"]) <= 64 and 0 < len(row["labels"]) <= 64
    numbers = [number for part in packed for row in part for number in row["row_ids"]]
    assert sorted(numbers) == [number for number, _ in rows]
    found = {number: pair for part in packed for row in part for number, pair in unpacked(row).items()}
    assert found == {number: (row["input_ids"], row["labels"]) for number, row in rows}
    sizes = [collate(part, max_seq_len=64).inputs for part in packed]
    padded = [inputs["input_ids"].numel() + inputs["labels"].numel() for inputs in sizes]
    assert padded[0] >= 0.9 * max(padded)


@pytest.mark.parametrize(("count", "micro_batches", "most"), [(32, 4, 0.06), (256, 4, 0.03), (2000, 16, 0.03)])
def test_little_of_packed_pairs_is_padding(count, micro_batches, most):
    lengths = lognormal(count, longest=512)
    packed = pack_pairs(documents(lengths), max_seq_len=512, micro_batches=micro_batches)
    padded = sum(len(part) * max(len(row[side]) for row in part) for part in packed for side in ("input_ids", "labels"))
    assert 1 - sum(map(sum, lengths)) / padded < most


def test_a_pair_without_tokens_still_has_a_document_in_each_sequence():
    rows = [(0, {"input_ids": [], "labels": [7, 8]}), (1, {"input_ids": [5], "labels": []}), *documents([(3, 3)])]
    (row,) = pack_pairs(rows, max_seq_len=8, micro_batches=1)[0]
    assert unpacked(row).keys() == {0, 1, 100}
    assert unpacked(row)[0] == ([0], [7, 8]) and unpacked(row)[1] == ([5], [IGNORED])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5] * 9, "labels": [5]}, "row 7 has 9 input_ids, but max_seq_len=8: shorten the row"),
        ({"input_ids": [5], "labels": [5] * 9}, "row 7 has 9 labels, but max_seq_len=8: shorten the row"),
        ({"input_ids": [5], "labels": [5], "mask": [1]}, "row 7 also has mask: remove these keys"),
    ],
)
def test_a_pair_that_cannot_be_packed_is_refused_with_its_row_id(row, message):
    with pytest.raises(ValueError, match=message):
        pack_pairs([(3, {"input_ids": [5], "labels": [5]}), (7, row)], max_seq_len=8, micro_batches=1)


def test_padding_is_a_document_of_the_encoder_but_not_of_the_decoder():
    rows = [
        row for part in pack_pairs(documents([(3, 4), (2, 5), (9, 9)]), max_seq_len=9, micro_batches=1) for row in part
    ]
    inputs = collate(rows, max_seq_len=9).inputs
    assert inputs.keys() == {"input_ids", "labels", "position_ids", "decoder_position_ids"}
    short = [len(row["row_ids"]) for row in rows].index(2)
    assert (inputs["position_ids"][short] == 0).sum() == 3 and (inputs["decoder_position_ids"][short] == 0).sum() == 2
    assert collate(rows[1 - short :][:1], max_seq_len=9).inputs.keys() == {"input_ids", "labels"}


def loss_and_gradients(model, loss_fn, batches):
    model.zero_grad()
    total = sum(loss_fn(model, batch) for batch in batches)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return total.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("t5", "eager"), ("t5", "sdpa"), ("mt5", "eager"), ("umt5", "eager"), ("t5gemma", "eager")],
)
def test_packed_pairs_have_the_loss_and_gradients_of_separate_ones(family, attention, loss_fn):
    model, rows = seq2seq(family, attention), documents(LENGTHS)
    packed = pack_pairs(rows, max_seq_len=64, micro_batches=2)
    assert max(len(row["row_ids"]) for part in packed for row in part) > 2 and min(map(len, packed)) > 1
    batches = [collate(part, max_seq_len=64) for part in packed]
    assert_same_gradients(model, loss_fn, batches, rows)


def assert_same_gradients(model, loss_fn, batches, rows):
    """Assert that these batches have the loss and the gradients of the rows, one at a time."""
    loss, gradients = loss_and_gradients(model, loss_fn, batches)
    expected, expected_gradients = loss_and_gradients(model, loss_fn, [collate([row]) for _, row in rows])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    size = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * size, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_share_the_sums_of_bias_and_mask_and_gradients_keep_their_bits(dtype):
    model, rows = seq2seq("t5", "sdpa"), documents(LENGTHS)
    (batch,) = [collate(part, max_seq_len=64) for part in pack_pairs(rows, max_seq_len=64, micro_batches=1)]

    def result(layers_share):
        with ExitStack() as stack:
            masks = stack.enter_context(Masks())
            stack.enter_context(torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16))
            if not layers_share:
                stock = replaced(sdpa_attention, "create_position_bias_mask", lambda add, *given: add(*given))
                handle = model.register_forward_pre_hook(lambda *_: stack.enter_context(stock))
                stack.callback(handle.remove)
            return *loss_and_gradients(model, chunked_loss, [batch]), [mask.data_ptr() for mask in masks.found]

    loss, gradients, masks = result(layers_share=True)
    assert len(masks) == 6 and len(set(masks)) == 3  # encoder, decoder and cross-attention, each in two layers
    expected, expected_gradients, masks = result(layers_share=False)
    assert len(set(masks)) > 3
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_of_a_document_changes_the_logits_of_another(attention):
    model, rows = seq2seq("t5", attention).eval(), documents([(6, 5), (3, 7), (4, 4)])

    def logits(rows):
        (row,) = pack_pairs(rows, max_seq_len=16, micro_batches=1)[0]
        found = []
        handle = model.lm_head.register_forward_hook(lambda *values: found.append(values[-1][0]))
        plain_loss(model, collate([row], max_seq_len=16))
        handle.remove()
        lengths = [len(labels) for _, labels in unpacked(row).values()]
        return dict(zip(row["row_ids"], found[0].split(lengths), strict=True))

    before = logits(rows)
    for side in ("input_ids", "labels"):
        changed = [(number, {**row, side: [9] * len(row[side])} if number == 101 else row) for number, row in rows]
        after = logits(changed)
        assert torch.equal(after[100], before[100]) and torch.equal(after[102], before[102])
        assert not torch.allclose(after[101], before[101])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "t5gemma"])
def test_encoder_decoders_with_relative_positions_pass_the_check(family, dtype):
    model = seq2seq(family).to(dtype)
    check_packing(model)
    assert model.training


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bart", "packed documents affect each other, or have absolute positions: train without packing$"),
        ("marian", "packed documents affect each other, or have absolute positions: train without packing$"),
        ("fsmt", "does not take the masks of packed rows .*: train it without packing"),
        ("longt5", "does not take the masks of packed rows .*: train it without packing"),
    ],
)
def test_other_encoder_decoders_are_refused(family, message):
    with pytest.raises(UsageError, match=message):
        check_packing(seq2seq(family, "sdpa" if family in ("bart", "marian") else "eager"))


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def loss_within_documents(model, batch):
    """A loss of a user's own, as docs/library.md describes it."""
    labels, starts = batch.inputs["labels"], batch.inputs.get("decoder_position_ids")
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if starts is None:  # each row is one document
        return cross_entropy(model(batch.inputs["input_ids"], decoder_input_ids=shifted).logits, labels)
    inputs = {name: x for name, x in batch.inputs.items() if name != "labels"}
    inputs["decoder_input_ids"] = torch.where(starts == 0, model.config.decoder_start_token_id, shifted)
    with documents_apart(model):
        return cross_entropy(model(**inputs).logits, labels)


def loss_that_ignores_positions(model, batch):
    if model.config.is_encoder_decoder:  # T5 ignores position_ids
        return cross_entropy(model(**batch.inputs).logits, batch.inputs["labels"])
    return cross_entropy(model(batch.inputs["input_ids"]).logits[:, :-1], batch.inputs["labels"][:, 1:])


def loss_without_starts(model, batch):
    inputs = {name: x for name, x in batch.inputs.items() if name != "labels"}
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.inputs["labels"])
    with documents_apart(model) if "position_ids" in inputs else ExitStack():
        return cross_entropy(model(**inputs).logits, batch.inputs["labels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_mixes_packed_documents_is_refused(dtype):
    check = partial(check_model, packing=True, max_seq_len=16)
    for family in ("t5", "t5gemma"):
        model = seq2seq(family).to(dtype)
        for loss_fn in (plain_loss, chunked_loss, *([loss_within_documents] if family == "t5" else [])):
            check(model, loss_fn)
        with pytest.raises(UsageError, match="each other's loss: it is .* within documents_apart, "):
            check(model, loss_that_ignores_positions)
        check_model(model, loss_that_ignores_positions, packing=False, max_seq_len=16)
    with pytest.raises(UsageError, match="packed documents affect each other"):
        check(seq2seq("t5").to(dtype), loss_without_starts)
    for family in ("llama", "qwen2"):
        for loss_fn in (plain_loss, chunked_loss):
            check(build(family).to(dtype), loss_fn)
        with pytest.raises(UsageError, match="each other's loss: .*, pass position_ids to the model,"):
            check(build(family).to(dtype), loss_that_ignores_positions)


@pytest.mark.parametrize("error", [StoreError("a"), RankError("a"), torch.OutOfMemoryError("a")])
def test_an_error_that_is_not_of_the_model_passes_the_check(error):
    def fail(*_):
        raise error

    model = seq2seq("t5")
    model.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="^a$"):
        check_packing(model)


@pytest.mark.parametrize(("family", "longest"), [("t5gemma", 64), ("t5gemma2", 32)])
def test_a_sliding_window_that_hides_tokens_is_refused(family, longest):
    model = seq2seq(family)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "sliding_window", None):
            module.config.sliding_window = 64
    check_model(model, plain_loss, packing=True, max_seq_len=longest)
    rows = documents([(longest, 20), (longest - 9, longest), (9, 12), (5, 3)])
    packed = pack_pairs(rows, max_seq_len=longest, micro_batches=1)
    assert len(packed[0]) < len(rows)
    assert_same_gradients(model, plain_loss, [collate(packed[0], max_seq_len=longest)], rows)
    remedy = f"has one of 64 tokens: lower --max_seq_len to {longest}, or train it without packing"
    with pytest.raises(UsageError, match=remedy):
        check_model(model, plain_loss, packing=True, max_seq_len=longest + 1)


# --- steps
OPTIONS = {"batch_size": 6, "gradient_accumulation_steps": 1, "global_batch_size": 18, "shuffle": False, "prefetch": 0}


def encode(row):
    return row


def weights_after_two_steps(savers=(), packed_seq_len=64, **sharding):
    rank, world_size = rank_and_world_size()
    accelerator, model = Accelerator(cpu=True), build("t5")
    model = parallelize(model, accelerator, **sharding)
    optimizer = make_optimizer(model, name="sgd", memory="off")
    rows = [row for _, row in documents(lognormal(36, longest=64))]
    pad = partial(collate, max_seq_len=64)
    packing = {"packed_seq_len": packed_seq_len, "is_encoder_decoder": True}
    stream = open_stream(rows, encode, collate=pad, rank=rank, world_size=world_size, **packing, **OPTIONS)
    state, losses = TrainState(model, optimizer, stream), []
    with entered([SAVERS[name] for name in savers], model, optimizer):
        for _ in range(2):
            batches = next(stream)
            assert len(batches) == 3 // world_size
            losses.append(train_step(state, batches, chunked_loss, accelerator, learning_rate=0.1).loss.item())
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.named_parameters()}
    return losses, {name: x.detach() for name, x in whole.items()}


SAVED = [(), ("recompute",), ("recompute_cheap",), ("layered",)]


def check_steps(folder):
    init_distributed()
    expected, expected_weights = torch.load(folder / "expected")
    for sharding in ({}, {"sharding_strategy": "FULL_SHARD"}) if rank_and_world_size()[1] > 1 else ({},):
        for savers in SAVED:
            losses, weights = weights_after_two_steps(savers, **sharding)
            assert losses == pytest.approx(expected, rel=1e-5), (sharding, savers)
            for name, weight in weights.items():
                torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # lowmem.distributed.fully_sharded explains the warning
@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_steps_are_those_of_padded_rows(world_size, tmp_path):
    torch.save(weights_after_two_steps(packed_seq_len=None), tmp_path / "expected")
    assert fork_ranks(world_size, check_steps, tmp_path) == [0] * world_size


# --- runs
def test_a_packed_run_answers_prompts_and_resumes_with_the_same_bits(tmp_path):
    work = write_files(tmp_path, num_rows=60, dropout_rate=0.1)
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2, "packing": True}
    options |= {"validation_rows": 8, "eval_steps": 2, "max_predict_samples": 2, "max_seq_len": 64}
    (result,) = train_ranks(1, "train", *flags(work, "whole", **options))
    assert result.returncode == 0, result.stderr
    assert len(evaluations(work, "whole")) == 2 and result.stdout.count(" (expected ") == 4
    copytree(work / "whole", work / "resumed")
    rmtree(work / "resumed" / "checkpoints" / "step-00000004")
    (result,) = train_ranks(1, "train", *flags(work, "resumed", **options, resume="auto"))
    assert result.returncode == 0, result.stderr
    assert_same_run(work, "resumed", "whole")
