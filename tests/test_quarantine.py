"""A bad row raises an error on all ranks, or it is skipped, counted and recorded, and the stream continues."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from lowmem.data.batch import IGNORED, Batch, collate
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.encoder import BadRow
from lowmem.data.eval_batches import open_eval
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import open_rows
from lowmem.data.stream import open_stream
from lowmem.distributed.setup import init_distributed
from lowmem.errors import RankError, ReadError, RowError
from lowmem.evaluation import evaluate, generate
from lowmem.loss import plain_loss
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build, qa_rows

ENCODE = encode_seq2seq(ByT5Tokenizer(), max_seq_len=64)
BAD = {3, 4, 5, 6, 7, 17, 39}


def write(path, bad=BAD, count=40):
    lines = [json.dumps(row, ensure_ascii=False) for row in qa_rows(count)]
    path.write_text("".join(f"{'{broken' if i in bad else line}\n" for i, line in enumerate(lines)))
    return path


def drawn(stream, steps):
    """For each of the next `steps` steps, yield the sorted row ids of each micro-batch, then advance the stream."""
    for batches in itertools.islice(stream, steps):
        yield [sorted(batch.row_ids) for batch in batches]
        stream.advance()


def test_bad_rows_are_left_out_but_advance_the_position(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    good = drawn(open_stream(write(tmp_path / "good.jsonl", bad=()), ENCODE, batch_size=8, seed=2), 10)
    quarantine = Quarantine(100)
    stream = open_stream(path, ENCODE, batch_size=8, seed=2, quarantine=quarantine)
    for expected, found in zip(good, drawn(stream, 10), strict=True):
        assert found == [[row_id for row_id in expected[0] if row_id not in BAD]]
    assert stream.position == 80
    assert len(quarantine) == len(BAD)  # each bad row was read in two epochs, but counts once


def test_the_good_rows_of_a_step_are_split_into_the_usual_number_of_micro_batches(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    options = {"batch_size": 2, "global_batch_size": 8, "shuffle": False, "quarantine": Quarantine(100)}
    stream = open_stream(path, ENCODE, **options)
    assert [len(batch.row_ids) for batch in next(stream)] == [1, 1, 1, 0]  # of rows 0 to 7, only 0 to 2 are good
    assert [len(batch.row_ids) for batch in next(stream)] == [2, 2, 2, 2]


@pytest.mark.parametrize("packed_seq_len", [None, 64])
def test_a_micro_batch_without_a_good_row_has_no_targets_but_can_be_run(tmp_path, packed_seq_len):
    path = write(tmp_path / "rows.jsonl", bad=range(4))
    encode = encode_causal(ByT5Tokenizer(), max_seq_len=64)
    stream = open_stream(
        path,
        encode,
        batch_size=2,
        gradient_accumulation_steps=2,
        shuffle=False,
        quarantine=Quarantine(9),
        collate=partial(collate, causal=True),
        packed_seq_len=packed_seq_len,
    )
    batches = next(stream)
    assert [(batch.row_ids, batch.num_targets) for batch in batches] == [([], 0), ([], 0)]
    assert all((batch.inputs["labels"] == IGNORED).all() for batch in batches)
    assert plain_loss(build("llama"), batches[0]) == 0
    accelerator, model = init_distributed(), build("llama")
    before = model.lm_head.weight.clone()
    state = TrainState(model, make_optimizer(model, memory="off"), stream)
    assert not train_step(state, batches, plain_loss, accelerator, learning_rate=0.1).updated
    assert model.lm_head.weight.equal(before) and stream.position == 4


def test_a_row_that_replaces_missing_ones_does_not_count_in_a_loss_of_rows(tmp_path):
    model, accelerator = build("llama"), init_distributed()
    options = {"collate": collate_words, "shuffle": False, "quarantine": Quarantine(9)}
    path = write(tmp_path / "rows.jsonl", bad={1})
    stream = open_stream(path, encode_words, batch_size=1, gradient_accumulation_steps=2, **options)
    state, batches = TrainState(model, make_optimizer(model, memory="off"), stream), next(iter(stream))
    assert [(batch.row_ids, batch.num_targets) for batch in batches] == [([0], 1), ([], 0)]
    alone = loss_of_rows(model, batches[0])[0].item()
    result = train_step(state, batches, loss_of_rows, accelerator, learning_rate=0.1)
    assert result.loss.item() == pytest.approx(alone) and result.metrics["row_ids"].item() == 1

    options = {"batch_size": 2, "collate": collate_words}
    expected, split = (
        [
            batch
            for rank in range(world_size)
            for batch in open_eval(qa_rows(5), encode_words, rank=rank, world_size=world_size, **options)
        ]
        for world_size in (1, 2)
    )
    assert [len(batch.row_ids) for batch in split] == [2, 1, 2, 0]  # the last rank's last batch has no row
    expected, found = (evaluate(model, batches, loss_of_rows, accelerator) for batches in (expected, split))
    assert found == pytest.approx(expected, rel=1e-6)


def encode_words(row):
    return {"ids": [3 + len(word) for word in row["prompt"].split()]}  # no labels


def collate_words(rows):
    length = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [0] * (length - len(row["ids"])) for row in rows])
    return Batch({"input_ids": ids}, num_targets=len(rows), row_ids=[])


def loss_of_rows(model, batch):
    logits = model(batch.inputs["input_ids"]).logits[:, 0]
    return logits.logsumexp(-1).sum(), {"row_ids": (len(logits), 1)}


def test_each_bad_row_is_recorded_once_with_its_location_even_after_a_restart(tmp_path):
    path, log = write(tmp_path / "rows.jsonl", bad={3}), tmp_path / "out" / "bad_rows-0.jsonl"
    rows = open_rows(path)

    def encode(row):
        if row["response"] == "7" * 9:
            raise ValueError("seven is not wanted")
        return ENCODE(row)

    def run(quarantine):
        list(drawn(open_stream(rows, encode, batch_size=8, quarantine=quarantine), 11))

    assert not log.exists()
    run(Quarantine(9, log))
    run(Quarantine(9, log))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(record["error"] for record in records) == sorted(set(record["error"] for record in records))
    (broken,) = (record for record in records if record["row"] is None)
    assert "rows.jsonl, line 4 (byte " in broken["error"]
    unwanted = [record for record in records if record["row"]]
    assert all("seven is not wanted" in record["error"] for record in unwanted)
    assert [record["row"] for record in unwanted] == [row for row in qa_rows(40) if row["response"] == "7" * 9]


def test_a_record_that_a_kill_cut_short_is_written_again(tmp_path):
    log = tmp_path / "bad.jsonl"
    bad = [BadRow({"prompt": {"nested": i}}, RowError(f"row {i}")) for i in range(3)]
    whole = Quarantine(9, log)
    for row in bad[:2]:
        whole.add(row)
    lines = log.read_bytes()
    for cut in range(lines.index(b"\n") + 1, len(lines)):
        log.write_bytes(lines[:cut])
        for _ in range(2):  # two restarts
            again = Quarantine(9, log)
            for row in bad:
                again.add(row)
            assert [json.loads(line)["error"] for line in log.read_text().splitlines()] == ["row 0", "row 1", "row 2"]


def test_more_bad_rows_than_allowed_end_the_run(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    stream = open_stream(path, ENCODE, batch_size=8, shuffle=False, quarantine=Quarantine(5, tmp_path / "bad.jsonl"))
    assert len(next(stream)[0].row_ids) == 3
    next(stream)
    message = r"line 18 .*More than --max_bad_rows=5 rows are bad .the others are in .*bad.jsonl.*--max_bad_rows"
    with pytest.raises(RowError, match=message):
        next(stream)[0]


def test_evaluation_leaves_bad_rows_out_too_and_counts_each_once(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    quarantine = Quarantine(len(BAD))  # so a row counted twice would be an error
    passes = [
        open_eval(path, ENCODE, batch_size=3, rank=rank, world_size=2, quarantine=quarantine) for rank in range(2)
    ]
    for _ in range(2):
        batches = [list(one) for one in passes]
    assert len(batches[0]) == len(batches[1]) == 7
    seen = [row_id for batch in itertools.chain(*batches) for row_id in batch.row_ids]
    assert sorted(seen) == sorted(set(range(40)) - BAD)
    assert len(quarantine) == len(BAD)


def fail_on_rank_1(path: str) -> None:
    """Only rank 1 has a bad row, but training, evaluation and generation raise an error that names it on all ranks."""
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = build("t5")
    state = TrainState(model, make_optimizer(model, memory="off"))
    ranks = {"rank": rank, "world_size": accelerator.num_processes}
    message = r"rows\.jsonl, line 18 .*cannot be read: "
    kind, message = (RowError, message) if rank == 1 else (RankError, f"rank 1 .*{message}")
    stream = open_stream(path, ENCODE, batch_size=5, shuffle=False, **ranks)
    steps = iter(stream)
    train_step(state, next(steps), plain_loss, accelerator, learning_rate=0.1)
    weights = model.shared.weight.clone()
    with pytest.raises(kind, match=message):
        train_step(state, next(steps), plain_loss, accelerator, learning_rate=0.1)
    assert state.step == 1 and model.shared.weight.equal(weights)
    with pytest.raises(kind, match=message):
        evaluate(model, open_eval(path, ENCODE, batch_size=5, **ranks), plain_loss, accelerator)
    with pytest.raises(kind, match=message):
        generate(model, ByT5Tokenizer(), open_eval(path, ENCODE, batch_size=5, **ranks), accelerator, max_new_tokens=1)
    accelerator.end_training()


def test_all_ranks_raise_an_error_that_names_the_bad_row_of_one_rank(tmp_path):
    path = write(tmp_path / "rows.jsonl", bad={17})
    assert fork_ranks(2, fail_on_rank_1, str(path)) == [0, 0]


def lose_the_file_on_rank_1(path: str) -> None:
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = build("t5")
    state = TrainState(model, make_optimizer(model, memory="off"))
    rows = open_rows(path)
    if rank == 0:
        assert rows[0]  # reading one row loads all rows of its group
    accelerator.wait_for_everyone()
    if rank == 1:
        Path(path).rename(f"{path}.gone")
    stream = open_stream(rows, ENCODE, batch_size=5, rank=rank, world_size=2, quarantine=Quarantine(100))
    kind, start = (RowError, "^/") if rank == 1 else (RankError, "^rank 1 failed with ReadError: /")
    with pytest.raises(kind, match=rf"{start}.*rows\.jsonl, .*cannot be read after 4 attempts: .*No such file"):
        train_step(state, next(iter(stream)), plain_loss, accelerator, learning_rate=0.1)
    accelerator.end_training()


def test_a_missing_file_ends_the_run_even_if_another_file_can_be_read(tmp_path):
    kept, lost = write(tmp_path / "a.jsonl", bad=()), write(tmp_path / "b.jsonl", bad=())
    rows = open_rows([kept, lost])
    lost.unlink()
    stream = open_stream(rows, ENCODE, batch_size=20, quarantine=Quarantine(100))
    with pytest.raises(ReadError, match="b.jsonl"):
        next(stream)[0]


def test_if_every_row_is_bad_the_first_is_reported_without_reading_all(tmp_path):
    encoded = []

    def encode(row):
        encoded.append(row)
        raise ValueError("not this one")

    stream = open_stream(qa_rows(5000), encode, batch_size=4, shuffle=False, quarantine=Quarantine(3), prefetch=0)
    with pytest.raises(RowError, match="row 0 cannot be encoded: not this one; all rows read after it fail too"):
        next(stream)[0]
    assert len(encoded) < 1000


def test_a_missing_file_is_not_a_bad_row_but_ends_the_run_on_all_ranks(tmp_path):
    """Rank 0 loads all rows before the file disappears, so only rank 1 fails to read."""
    path = write(tmp_path / "rows.jsonl", bad=())
    assert fork_ranks(2, lose_the_file_on_rank_1, str(path)) == [0, 0]
