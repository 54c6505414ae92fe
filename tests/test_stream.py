import itertools
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ByT5Tokenizer, masking_utils

from lowmem.data.batch import IGNORED, Batch, collate
from lowmem.data.bundled import BundledRows
from lowmem.data.encode import encode_causal, encode_seq2seq, encode_text
from lowmem.data.eval_batches import open_eval
from lowmem.data.files.lines import TextFile
from lowmem.data.files.source import Source
from lowmem.data.order import WINDOW_BYTES, Groups, rows_at
from lowmem.data.rows import FileRows
from lowmem.data.stream import open_stream
from lowmem.errors import ReadError, RowError, UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.model.build import build_model, config_from
from tests.architectures import tiny_fields
from tests.models import build, qa_rows

ROWS = qa_rows(50)
ALL = Groups.of([50])
ENCODE = encode_seq2seq(ByT5Tokenizer(), max_seq_len=64)


def draw(stream, steps):
    """Return the row ids of each of the next `steps` steps, in micro-batch order; advance the stream after each."""
    drawn = []
    for batches in itertools.islice(stream, steps):
        drawn.append([row_id for batch in batches for row_id in batch.row_ids])
        stream.advance()
    return drawn


def by_step(drawn):
    """Return the row ids of each step, sorted."""
    return [sorted(step) for step in drawn]


def test_batches_are_padded_to_the_multiple_of_8_that_fits_their_longest_row():
    batch = collate([{"input_ids": [5] * 9, "labels": [6]}, {"input_ids": [7], "labels": [8] * 8}])
    assert batch.inputs["input_ids"].tolist() == [[5] * 9 + [0] * 7, [7] + [0] * 15]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 9 + [0] * 7, [1] + [0] * 15]
    assert batch.inputs["labels"].tolist() == [[6] + [IGNORED] * 7, [8] * 8]
    assert batch.num_targets == 9


@pytest.mark.parametrize("causal", [False, True])
def test_inputs_of_one_length_are_neither_padded_nor_masked(causal):
    batch = collate([{"input_ids": [5] * 9, "labels": [6]}, {"input_ids": [7] * 9, "labels": [8] * 3}], causal=causal)
    assert batch.inputs.keys() == {"input_ids", "labels"}
    assert batch.inputs["input_ids"].tolist() == [[5] * 9, [7] * 9]
    first = IGNORED if causal else 8  # nothing predicts a causal row's first token
    assert batch.inputs["labels"].tolist() == [[IGNORED if causal else 6, IGNORED, IGNORED], [first, 8, 8]]
    assert batch.num_targets == (2 if causal else 4)


def test_padding_stops_at_max_seq_len():
    rows = [{"input_ids": [5] * n, "labels": [6] * n} for n in (11, 3)]
    assert collate(rows).inputs["input_ids"].shape[1] == 16
    assert collate(rows, max_seq_len=12).inputs["input_ids"].shape[1] == 12
    assert collate(rows, max_seq_len=9).inputs["input_ids"].shape[1] == 11


def test_a_row_without_tokens_becomes_masked_padding():
    batch = collate([{"input_ids": [], "labels": [6]}])
    assert batch.inputs["input_ids"].tolist() == [[0]] and batch.inputs["attention_mask"].tolist() == [[0]]


def test_padded_causal_rows_get_a_mask_only_if_one_has_no_target():
    rows = [{"input_ids": [5] * n, "labels": [IGNORED] + [5] * (n - 1)} for n in (9, 3)]
    whole = collate(rows)
    batch = collate(rows, causal=True)
    assert whole.inputs.keys() - batch.inputs.keys() == {"attention_mask"}
    assert all(batch.inputs[name].equal(whole.inputs[name]) for name in batch.inputs)
    assert batch.num_targets == whole.num_targets == 10
    rows[1]["labels"] = [IGNORED] * 3
    assert collate(rows, causal=True).inputs["attention_mask"].sum(1).tolist() == [9, 3]


def loss_and_gradients(model, batch, loss_fn):
    model.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_causal_loss_and_its_gradients_need_no_mask(family, loss_fn):
    model = build(family)
    rows = [encode_causal(ByT5Tokenizer(), max_seq_len=64)(row) for row in ROWS[:7]]
    masked, unmasked = collate(rows), collate(rows, causal=True)
    assert masked.inputs["attention_mask"].min() == 0 and "attention_mask" not in unmasked.inputs
    expected = loss_and_gradients(model, masked, loss_fn)
    torch.testing.assert_close(loss_and_gradients(model, unmasked, loss_fn), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_t5_without_a_mask_has_the_gradients_of_t5_with_a_mask_of_ones(attention):
    model = build("t5", attn_implementation=attention)
    rows = [ENCODE({"prompt": "a" * 13, "response": "b" * n}) for n in (1, 9, 30)]
    unmasked = collate(rows)
    assert "attention_mask" not in unmasked.inputs
    masked = replace(unmasked, inputs=unmasked.inputs | {"attention_mask": torch.ones(3, 14, dtype=torch.int64)})
    expected = loss_and_gradients(model, masked, chunked_loss)
    torch.testing.assert_close(loss_and_gradients(model, unmasked, chunked_loss), expected, rtol=1e-6, atol=1e-6)


class Reads(TorchDispatchMode):
    """Count how often Python reads a tensor's value, which on a GPU waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


BART = {"model_type": "bart", "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 0}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
GEMMA = {"model_type": "gemma3_text", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def row_of(*lengths):
    tokens = [*range(5, 5 + sum(lengths))]
    positions = [position for length in lengths for position in range(length)]
    return {"input_ids": tokens, "labels": tokens} | ({"position_ids": positions} if len(lengths) > 1 else {})


@pytest.mark.parametrize("loss_fn", [plain_loss, chunked_loss])
@pytest.mark.parametrize(
    ("family", "changes", "rows", "reads"),
    [
        ("llama", {}, [row_of(16), row_of(16)], 1),
        ("llama", {}, [row_of(10, 6), row_of(9, 4)], 1),
        ("llama", {"model_type": "gpt2", "pad_token_id": 7}, [row_of(16), row_of(9)], 2),
        ("llama", GEMMA, [row_of(16), row_of(9)], 2),
        ("llama", GEMMA, [row_of(10, 6), row_of(9, 4)], 2),
        ("t5", {}, [row_of(16), row_of(9)], 2),
        ("t5", {"attn_implementation": "eager"}, [row_of(16), row_of(9)], 2),
        ("t5", BART, [row_of(16), row_of(16)], 1),
        ("t5", BART, [row_of(16), row_of(9)], 3),
    ],
)
def test_a_forward_reads_no_tensor_to_choose_masks_and_has_the_bits_of_one_that_does(
    family, changes, rows, reads, loss_fn
):
    model = build(family, **changes)
    batch = collate(rows, causal=family == "llama")
    found = []
    for each in (batch, replace(batch, needs_its_masks=False)):
        torch.manual_seed(0)  # of dropout
        with Reads() as counted:
            found.append((loss_and_gradients(model, each, loss_fn), counted.count))
    (ours, our_reads), (theirs, their_reads) = found
    assert their_reads - our_reads == reads
    # BART of transformers 5.17 also reads random numbers, which are on the host
    assert our_reads == 0 or changes is BART
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


class Masks(TorchFunctionMode):
    """Keep the masks that layers give to attention, so that no two are at the same address."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.found.append(kwargs["attn_mask"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_share_one_additive_mask_of_the_packed_documents(dtype):
    batch = collate([row_of(10, 6), row_of(9, 4)], causal=True)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), Masks() as masks:
        chunked_loss(build("llama"), batch)
    first, second = masks.found
    assert first is second and first.dtype == dtype and first.shape == (2, 1, 16, 16)
    documents = [[0] * 10 + [1] * 6, [0] * 9 + [1] * 4 + [2] * 3]
    expected = [[[a == b and i >= j for j, b in enumerate(row)] for i, a in enumerate(row)] for row in documents]
    assert (first[:, 0] == 0).tolist() == expected and first.min() == torch.finfo(dtype).min


def test_packed_documents_of_a_model_with_sparse_attention_under_autocast():
    model, batch = build_model(config_from(tiny_fields("deepseek_v32"))).train(), collate([row_of(40, 30)], causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [chunked_loss(model, each) for each in (batch, replace(batch, needs_its_masks=False))]
    assert torch.equal(*losses)


def test_masks_of_packed_documents_come_from_the_users_function_for_sdpa_which_stays():
    calls, interface = [], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS

    def own(**options):
        calls.append(options)
        return masking_utils.sdpa_mask(**options)

    interface["sdpa"] = own
    try:
        chunked_loss(build("llama"), collate([row_of(10, 6)], causal=True))
        assert len(calls) == 1 and interface["sdpa"] is own
    finally:
        del interface["sdpa"]


def test_packed_rows_of_one_document_each_get_no_positions_because_they_need_no_mask():
    alone = [row_of(16) | {"position_ids": [*range(16)]} for _ in range(2)]
    assert collate(alone, causal=True).inputs.keys() == {"input_ids", "labels"}
    assert "position_ids" in collate([alone[0], row_of(9, 7)], causal=True).inputs


def test_masks_are_read_if_a_user_made_the_batch_or_the_model():
    class Own(type(build("llama"))):
        pass

    batch = collate([row_of(16), row_of(16)], causal=True)
    own, model = Own(build("llama").config), build("llama")
    for each, inputs in ((own, batch), (model, replace(batch, needs_its_masks=False))):
        with Reads() as counted:
            chunked_loss(each, inputs)
        assert counted.count == 1


def test_a_causal_batch_counts_the_targets_of_the_shifted_loss():
    rows = [*ROWS[:3], {"prompt": "", "response": "nothing before it"}]
    batch = collate([encode_causal(ByT5Tokenizer(), max_seq_len=64)(row) for row in rows])
    assert batch.num_targets == int((batch.inputs["labels"][:, 1:] != IGNORED).sum())


def test_the_number_of_targets_does_not_depend_on_the_split_even_if_a_response_repeats_its_prompt():
    rows = [ENCODE({"prompt": "yes", "response": "yes"}), ENCODE({"prompt": "a", "response": "bcd"})]
    assert collate(rows).num_targets == collate(rows[:1]).num_targets + collate(rows[1:]).num_targets == 8


def test_each_epoch_holds_each_row_once():
    stream = open_stream(ROWS, ENCODE, batch_size=4, gradient_accumulation_steps=2)
    drawn = draw(stream, 25)  # 25 steps of 8 rows are 4 epochs of 50
    assert by_step(drawn) == by_step(rows_at(0, 200, ALL, seed=0).reshape(25, 8).tolist())
    assert Counter(itertools.chain(*drawn)) == Counter(list(range(50)) * 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_split_one_stream_of_rows(world_size):
    streams = [
        open_stream(ROWS, ENCODE, batch_size=2, global_batch_size=12, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    row_ids = rows_at(0, 108, ALL, seed=3).reshape(9, world_size, -1)
    for rank, stream in enumerate(streams):
        assert by_step(draw(stream, 9)) == by_step(row_ids[:, rank].tolist())


def test_a_rank_splits_its_rows_of_a_step_into_micro_batches_longest_rows_first():
    options = {"batch_size": 3, "global_batch_size": 13, "world_size": 2, "seed": 5}
    lengths = [sum(map(len, ENCODE(row).values())) for row in ROWS]
    assert len(set(lengths)) < 50  # some rows have equal lengths
    for rank, (first, stop) in enumerate([(0, 6), (6, 13)]):
        stream = open_stream(ROWS, ENCODE, rank=rank, **options)
        for step, batches in enumerate(itertools.islice(stream, 8)):
            drawn = rows_at(13 * step + first, 13 * step + stop, ALL, seed=5).tolist()
            expected = sorted(drawn, key=lambda row_id: (-lengths[row_id], drawn.index(row_id)))
            assert [row_id for batch in batches for row_id in batch.row_ids] == expected
            for batch in batches:
                again = collate([ENCODE(ROWS[row_id]) for row_id in batch.row_ids])
                assert again.num_targets == batch.num_targets
                assert again.inputs["input_ids"].equal(batch.inputs["input_ids"])


def test_the_length_of_a_custom_row_is_the_total_length_of_its_lists_and_tensors():
    sizes = [(1, 2), (4, 4), (2, 0), (0, 7)]

    def encode(row):
        chosen, rejected = row["sizes"]
        return {
            "chosen": [1] * chosen,
            "rejected": torch.ones(1, rejected),
            "margin": torch.tensor(0.5),
            "weight": 3.0,
            "name": row["name"],
        }

    rows = [{"sizes": pair, "name": "x" * 10 * i} for i, pair in enumerate(sizes)]
    seen = []

    def collate(encoded):
        seen.append([row["name"] for row in encoded])
        return Batch({}, num_targets=len(encoded), row_ids=[])

    stream = open_stream(rows, encode, batch_size=2, gradient_accumulation_steps=2, shuffle=False, collate=collate)
    assert [batch.row_ids for batch in next(stream)] == [[1, 3], [0, 2]]
    assert seen[:2] == [[rows[i]["name"] for i in pair] for pair in ([1, 3], [0, 2])]


def test_uneven_global_batches_give_micro_batches_that_differ_by_one_row_at_most():
    streams = [open_stream(ROWS, ENCODE, batch_size=3, global_batch_size=13, rank=r, world_size=2) for r in range(2)]
    steps = [next(stream) for stream in streams]
    assert [len(batch.row_ids) for step in steps for batch in step] == [2, 2, 2, 2, 2, 3]
    assert streams[0].micro_batches == streams[1].micro_batches == 3


def test_an_empty_micro_batch_is_refused():
    with pytest.raises(UsageError, match="empty"):
        open_stream(ROWS, ENCODE, batch_size=1, global_batch_size=3, rank=0, world_size=2)
    with pytest.raises(UsageError, match="no rows found: pass at least one row"):
        open_stream([], ENCODE, batch_size=1)


def test_rank_and_world_size_are_given_together_also_before_the_process_group_starts(monkeypatch):
    with pytest.raises(UsageError, match="found rank=1 and world_size=None: pass both"):
        open_stream(ROWS, ENCODE, batch_size=1, rank=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes need rank and world_size"):
        open_stream(ROWS, ENCODE, batch_size=1)


def test_prefetch_does_not_move_the_position():
    stream = open_stream(ROWS, ENCODE, batch_size=4)
    iterator = iter(stream)
    for _ in range(3):
        next(iterator)
    assert stream.state_dict()["position"] == 0
    stream.advance()
    assert stream.state_dict()["position"] == 4


def test_resumed_stream_continues_exactly():
    whole = open_stream(ROWS, ENCODE, batch_size=4, gradient_accumulation_steps=2, seed=9)
    expected = draw(whole, 20)
    for stop in (0, 1, 6, 13):  # after 6 steps, 2 rows of epoch 1 remain; after 13, epoch 3 has begun
        first = open_stream(ROWS, ENCODE, batch_size=4, gradient_accumulation_steps=2, seed=9)
        assert draw(first, stop) == expected[:stop]
        next(first)  # a step that is read ahead, but never trained on, does not advance the stream
        second = open_stream(ROWS, ENCODE, batch_size=4, gradient_accumulation_steps=2, seed=9)
        list(itertools.islice(second, 2))
        second.load_state_dict(first.state_dict())
        assert draw(second, 20 - stop) == expected[stop:]


def test_a_run_resumed_near_the_end_of_an_epoch_of_3000_rows_continues_exactly():
    rows = qa_rows(3000)
    stream = open_stream(rows, ENCODE, batch_size=20, seed=4)
    stream.load_state_dict(stream.state_dict() | {"position": 2900})
    drawn = draw(stream, 155)
    expected = rows_at(0, 6000, Groups.of([3000]), seed=4)
    assert by_step(drawn) == by_step(expected[2900:].reshape(155, 20).tolist())
    drawn = list(itertools.chain(*drawn))
    assert sorted(expected[:2900].tolist() + drawn[:100]) == sorted(drawn[100:]) == list(range(3000))


class InGroups(list):
    """Rows in groups of unequal size; a shuffling window holds one or two groups."""

    groups = Groups.of([7, 1, 13, 0, 4, 25], [WINDOW_BYTES // 2] * 6)


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(1, 50),
    st.integers(0, 99),
)
@example([(2, 4), (3, 1), (1, 3), (4, 9)], 50, 0)  # resume 2 rows before the end of epoch 1, and twice in epoch 2
@example([(2, 1), (3, 1), (1, 4), (2, 6)], 12, 0)  # each step is an epoch
@example([(3, 2), (2, 2), (1, 2)], 1, 0)  # one row, which each step reads twelve times
@settings(deadline=None, derandomize=True, max_examples=25)
def test_a_run_resumed_on_any_numbers_of_processes_sees_one_sequence_of_global_batches(plan, num_rows, seed):
    rows = InGroups(ROWS[:num_rows])
    if num_rows < 50:
        rows.groups = Groups.of([num_rows - num_rows // 3, num_rows // 3], [WINDOW_BYTES] * 2)
    state, drawn = None, []
    for world_size, steps in plan:
        options = {"batch_size": 3, "global_batch_size": 12, "seed": seed, "world_size": world_size}
        streams = [open_stream(rows, ENCODE, rank=rank, **options) for rank in range(world_size)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        of_ranks = [draw(stream, steps) for stream in streams]
        drawn += [list(itertools.chain(*parts)) for parts in zip(*of_ranks, strict=True)]
        states = [stream.state_dict() for stream in streams]
        assert all(other == states[0] for other in states)
        state = states[0]
    expected = rows_at(0, 12 * len(drawn), rows.groups, seed=seed).reshape(-1, 12)
    assert by_step(drawn) == by_step(expected.tolist())


def test_changed_rows_may_be_accepted_but_not_another_number_of_rows_per_step():
    saved = open_stream(Grouped(ROWS), ENCODE, batch_size=4).state_dict() | {"position": 8}
    stream = open_stream(ROWS[:-1], ENCODE, batch_size=4, accept_changed_data=True)
    stream.load_state_dict(saved)
    assert draw(stream, 1) and stream.position == 12
    assert stream.changes[0] == "num_rows was 50 and is 49"
    with pytest.raises(UsageError, match="global_batch_size was 4 and is 5"):
        open_stream(ROWS, ENCODE, batch_size=5, accept_changed_data=True).load_state_dict(saved)


def test_an_error_in_collate_is_raised_when_the_step_is_read():
    stream = open_stream(ROWS, ENCODE, batch_size=4, collate=lambda rows: 1 / 0)
    for _ in range(2):
        batches = next(stream)
        with pytest.raises(ZeroDivisionError):
            batches[0]


def test_a_closed_stream_encodes_no_further_steps():
    threads, has_begun, may_continue = [], threading.Event(), threading.Event()

    def encode(row):
        threads.append(threading.current_thread())
        has_begun.set()
        may_continue.wait(30)
        return ENCODE(row)

    stream = open_stream(ROWS, encode, batch_size=4, prefetch=3)
    iter(stream)
    assert has_begun.wait(30)
    stream.close()
    may_continue.set()
    threads[0].join(30)
    assert not threads[0].is_alive() and len(threads) == 4


def test_rows_drawn_but_not_trained_on_are_drawn_again():
    stream = open_stream(ROWS, ENCODE, batch_size=4)
    first = next(iter(stream))
    assert next(iter(stream))[0].row_ids == first[0].row_ids


class Grouped(list):
    groups = Groups.of([20, 30])


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"batch_size": 5}, {"rows": ROWS[:-1]}, {"rows": BundledRows(0, 50)}, {"shuffle": False}],
    ids=["seed", "rows per step", "rows", "row groups", "shuffle"],
)
def test_the_state_of_another_stream_is_refused(other):
    options = {"rows": Grouped(ROWS), "seed": 0, "batch_size": 4} | other
    saved = open_stream(Grouped(ROWS), ENCODE, batch_size=4).state_dict()
    with pytest.raises(UsageError, match="this stream differs from the one in the checkpoint"):
        open_stream(options.pop("rows"), ENCODE, **options).load_state_dict(saved)


def test_a_row_that_cannot_be_encoded_is_reported_with_its_index():
    rows = [*ROWS[:3], {"prompt": "x", "response": None}]
    stream = open_stream(rows, ENCODE, batch_size=4, shuffle=False)
    batches = next(stream)
    with pytest.raises(RowError, match="row 3 cannot be encoded: column 'response' must hold text"):
        batches[0]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_one_background_thread_encodes_the_set_number_of_steps_ahead(prefetch):
    threads, encoded = set(), []

    def encode(row):
        threads.add(threading.current_thread())
        encoded.append(row)
        return ENCODE(row)

    stream = open_stream(ROWS, encode, batch_size=4, prefetch=prefetch)
    next(stream)
    deadline = time.monotonic() + 30
    while len(encoded) < 4 * (1 + prefetch) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # enough time to encode too many rows, if nothing stopped the stream
    assert len(encoded) == 4 * (1 + prefetch)
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_without_prefetch_a_step_is_encoded_when_it_is_requested():
    threads = []

    def encode(row):
        threads.append(threading.current_thread())
        return ENCODE(row)

    stream = open_stream(ROWS, encode, batch_size=4, prefetch=0)
    assert draw(stream, 15) == draw(open_stream(ROWS, ENCODE, batch_size=4), 15)
    assert threads == [threading.main_thread()] * 60


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (2, 4), (3, 5), (4, 16)])
def test_evaluation_sees_each_row_once_in_the_same_number_of_batches_on_all_ranks(world_size, batch_size):
    passes = [
        open_eval(ROWS, ENCODE, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [list(one) for one in passes]
    assert len({len(of_rank) for of_rank in batches}) == 1
    seen = [row_id for of_rank in batches for batch in of_rank for row_id in batch.row_ids]
    assert sorted(seen) == list(range(50))
    targets = sum(batch.num_targets for of_rank in batches for batch in of_rank)
    assert targets == sum(len(ENCODE(row)["labels"]) for row in ROWS)
    for batch in itertools.chain(*batches):
        assert batch.num_targets == int((batch.inputs["labels"] != IGNORED).sum())
        assert batch.inputs["input_ids"].dtype == torch.int64
    assert [batch.row_ids for batch in passes[0]] == [batch.row_ids for batch in batches[0]]  # a pass repeats exactly


def test_a_resume_is_refused_if_the_next_rows_changed_between_the_samples_of_the_fingerprint(tmp_path):
    rows = pa.table({"prompt": [f"{number:05d} " * 20 for number in range(20_000)], "response": ["x"] * 20_000})
    path = tmp_path / "rows.parquet"
    parquet.write_table(rows, path, row_group_size=5000, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    stream = open_stream(str(path), ENCODE, batch_size=4, shuffle=False)
    for _ in range(1800):
        stream.advance()
    saved = stream.state_dict()
    for number, is_refused in ((7201, True), (3100, False)):  # row 3100 was trained on
        text = b"%05d " % number * 20
        path.write_bytes(whole.replace(text, text.upper().replace(b" ", b"_")))
        resumed = open_stream(str(path), ENCODE, batch_size=4, shuffle=False)
        assert resumed.state_dict()["files"] == saved["files"]
        with pytest.raises(UsageError, match="the next rows are not the same") if is_refused else nullcontext():
            resumed.load_state_dict(saved)
    accepting = open_stream(str(path), ENCODE, batch_size=4, shuffle=False, accept_changed_data=True)
    accepting.load_state_dict({name: value for name, value in saved.items() if name != "next_rows"})


def test_a_resume_whose_next_rows_cannot_be_read_ends_with_the_reason_at_the_first_step(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a row\n" * 8)
    encode = encode_text(ByT5Tokenizer(), max_seq_len=64)
    saved = open_stream(str(path), encode, batch_size=4).state_dict()
    resumed = open_stream(FileRows([TextFile(Source(str(path)), None)], retry_seconds=()), encode, batch_size=4)
    path.unlink()
    resumed.load_state_dict(saved)
    with pytest.raises(ReadError, match="No such file"):
        list(itertools.islice(next(resumed), 1))
