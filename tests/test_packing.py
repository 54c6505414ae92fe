import copy
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.data.batch import IGNORED, collate
from lowmem.data.packing import pack
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.model.checks import check_model
from lowmem.model.packing_checks import check_packing
from tests.models import build

GPT2 = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def documents(lengths, seed=0):
    """Make rows of the given lengths with different numbers of targets; row i has the id 100 + i."""
    source, rows = random.Random(seed), []
    for number, length in enumerate(lengths):
        ids = [source.randrange(3, 384) for _ in range(length)]
        num_masked = source.randrange(length) if number % 3 else 0
        rows.append((100 + number, {"input_ids": ids, "labels": [IGNORED] * num_masked + ids[num_masked:]}))
    return rows


def lognormal(count, longest, seed=0):
    source = random.Random(seed)
    return [min(longest, 1 + int(source.lognormvariate(4.5, 1.0))) for _ in range(count)]


def length(row):
    return len(row["input_ids"])


def unpacked(row):
    """Split a packed row where its position ids restart at 0; return {row id: (input_ids, labels)}."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    parts = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length(row)], strict=True)]
    for part in parts:
        assert row["position_ids"][part] == list(range(part.stop - part.start))
    return {i: (row["input_ids"][part], row["labels"][part]) for i, part in zip(row["row_ids"], parts, strict=True)}


@pytest.mark.parametrize("micro_batches", [1, 4, 7])
@pytest.mark.parametrize(
    "lengths",
    [[1] * 9, [64] * 7, [64, 1, 63, 2, 30, 30, 4, 64], lognormal(300, longest=64), [33] * 20, [5] * 7],
    ids=["ones", "full", "mixed", "many", "halves", "few"],
)
def test_every_row_is_in_one_packed_row_of_limited_length_and_no_micro_batch_is_empty(lengths, micro_batches):
    rows = documents(lengths)
    packed = pack(rows, max_seq_len=64, micro_batches=micro_batches)
    assert len(packed) == micro_batches and all(packed)
    assert all(0 < length(row) <= 64 for part in packed for row in part)
    sizes = [len(part) for part in packed]
    assert max(sizes) - min(sizes) <= 1
    numbers = [number for part in packed for row in part for number in row["row_ids"]]
    assert sorted(numbers) == [number for number, _ in rows]
    found = {number: document for part in packed for row in part for number, document in unpacked(row).items()}
    assert found == {number: (row["input_ids"], [IGNORED, *row["labels"][1:]]) for number, row in rows}


def test_packing_is_a_function_of_its_arguments_and_leaves_them_alone():
    rows = documents(lognormal(100, longest=64))
    before = copy.deepcopy(rows)
    packed = pack(rows, max_seq_len=64, micro_batches=3)
    assert rows == before
    assert packed == pack(before, max_seq_len=64, micro_batches=3)


def test_rows_of_one_length_keep_their_order():
    packed = pack(documents([16] * 12), max_seq_len=64, micro_batches=1)
    assert [row["row_ids"] for row in packed[0]] == [[100 + i for i in range(first, first + 4)] for first in (0, 4, 8)]


def padded_tokens(parts):
    """Return the number of tokens of each micro-batch, including padding."""
    return [len(part) * max(map(length, part)) for part in parts]


@pytest.mark.parametrize(
    ("count", "micro_batches", "packed_padding", "unpacked_padding"),
    [(32, 4, 0.001, 0.35), (64, 1, 0.001, 0.85), (256, 4, 0.001, 0.55), (4000, 16, 0.003, 0.40)],
)
def test_little_of_packed_rows_is_padding(count, micro_batches, packed_padding, unpacked_padding):
    lengths = lognormal(count, longest=2048)
    packed = sum(padded_tokens(pack(documents(lengths), max_seq_len=2048, micro_batches=micro_batches)))
    assert 1 - sum(lengths) / packed < packed_padding
    in_order, size = sorted(lengths, reverse=True), count // micro_batches
    unpacked = sum(size * in_order[first] for first in range(0, count, size))  # without packing, including padding
    assert 1 - sum(lengths) / unpacked > unpacked_padding


def test_best_fit_needs_fewer_packed_rows_than_packing_in_order():
    packed = pack(documents([10, 20, 54, 44, 34, 30]), max_seq_len=64, micro_batches=1)
    assert [length(row) for row in packed[0]] == [64, 64, 64]


def test_the_largest_micro_batch_comes_first_and_exceeds_the_mean_by_at_most_a_hundredth():
    packed = padded_tokens(pack(documents(lognormal(500, longest=256)), max_seq_len=256, micro_batches=6))
    assert packed == sorted(packed, reverse=True)
    assert packed[0] <= 1.01 * sum(packed) / 6


def test_rows_of_similar_length_share_a_micro_batch():
    packed = pack(documents([64, 50, 40, 33, 31]), max_seq_len=64, micro_batches=2)
    assert [[length(row) for row in part] for part in packed] == [[64, 64], [50, 40]]


def test_a_blank_row_has_no_row_id():
    rows = [(None, row) for _, row in documents([3, 4])]
    assert pack(rows, max_seq_len=8, micro_batches=1)[0][0]["row_ids"] == [None, None]


def test_a_row_without_a_token_takes_no_space():
    packed = pack([(0, {"input_ids": [], "labels": []}), *documents([3])], max_seq_len=8, micro_batches=1)
    assert packed[0][0]["row_ids"] == [100, 0]
    assert packed[0][0]["position_ids"] == [0, 1, 2]


def test_a_packed_row_has_no_num_cut():
    packed = pack([(0, {"input_ids": [5, 6], "labels": [5, 6], "num_cut": 3})], max_seq_len=8, micro_batches=1)
    assert packed == [[{"input_ids": [5, 6], "labels": [IGNORED, 6], "position_ids": [0, 1], "row_ids": [0]}]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5] * 9, "labels": [5] * 9}, "row 7 has 9 tokens, but max_seq_len=8: shorten the row"),
        ({"input_ids": [5, 6], "labels": [6]}, "label for every token, row 7 has 1 labels and 2 tokens"),
        ({"input_ids": [5], "labels": [5], "token_type_ids": [1]}, "row 7 also has token_type_ids: remove these keys"),
    ],
)
def test_a_row_that_cannot_be_packed_is_refused_with_its_row_id(row, message):
    with pytest.raises(ValueError, match=message):
        pack([(3, {"input_ids": [5], "labels": [5]}), (7, row)], max_seq_len=8, micro_batches=1)


def loss_and_gradients(model, loss_fn, batches):
    model.zero_grad()
    total = sum(loss_fn(model, batch) for batch in batches)
    total.backward()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_documents_have_the_loss_and_gradients_of_separate_ones(family, attention, loss_fn):
    model = build(family)
    model.set_attn_implementation(attention)
    rows = documents([1, 64, 2, 17, 40, 1, 9, 64, 30, 5])
    packed = pack(rows, max_seq_len=64, micro_batches=2)
    assert min(len(part) for part in packed) > 1 and max(len(row["row_ids"]) for row in packed[-1]) > 2
    batches = [collate(part, causal=True) for part in packed]
    alone = [collate([row | {"labels": [IGNORED, *row["labels"][1:]]}], causal=True) for _, row in rows]
    assert sum(batch.num_targets for batch in batches) == sum(batch.num_targets for batch in alone)
    loss, gradients = loss_and_gradients(model, loss_fn, batches)
    expected, expected_gradients = loss_and_gradients(model, loss_fn, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_models_that_keep_documents_apart_pass_the_check_unchanged(family, attention, dtype):
    model = causal(**GPT2) if family == "gpt2" else build(family)
    model.to(dtype).set_attn_implementation(attention)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for is_training in (True, False):
        check_packing(model.train(is_training))
        assert model.training == is_training
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def causal(model_type, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    "fields",
    [  # Models without support for packing; each comment names what lets packed documents affect each other.
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},  # recurrent state
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi
        {  # learned positions, and a mask that ignores position_ids
            "model_type": "opt",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
    ],
    ids=lambda fields: fields["model_type"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_which_packed_documents_affect_each_other_are_refused(fields, dtype):
    model = causal(vocab_size=384, **fields).to(dtype).train()
    message = f"in {type(model).__name__} .*, packed documents affect each other: train without packing$"
    with pytest.raises(UsageError, match=message):
        check_packing(model)
    assert model.training


def test_a_model_whose_positions_hide_that_it_mixes_documents_is_refused():
    """Positions change its logits much more than other documents do, so `check_packing` alone accepts it."""
    model = causal("openai-gpt", vocab_size=384, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(UsageError, match="packed documents affect each other's loss: .*: train without packing"):
        check_model(model, chunked_loss, packing=True, max_seq_len=16)


def test_a_model_that_misreads_an_additive_mask_is_refused():
    """Such a model keeps documents apart with the boolean masks that transformers makes, but not in our losses."""

    def misread(attention, args, options):
        mask = options["attention_mask"]
        return args, options | {"attention_mask": mask if mask is None else mask != 0}

    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(misread, with_kwargs=True)
    with pytest.raises(UsageError, match="packed documents affect each other"):
        check_packing(model)


def test_a_model_that_takes_no_position_ids_is_refused():
    class Positionless(torch.nn.Module):
        """A custom model that takes neither position_ids nor **kwargs."""

        def __init__(self):
            super().__init__()
            self.inner = build("llama")
            self.config = self.inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(UsageError, match="takes position_ids, Positionless does not: train it without packing"):
        check_packing(Positionless())
