"""The `train` command trains on padded, packed and chat rows, and refuses bad rows or skips and counts them."""

import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.forked import train_ranks
from tests.models import LLAMA, T5, qa_rows
from tests.processes import train
from tests.runs import flags, losses, records, write_files

ROWS = qa_rows(40)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("work"), num_rows=len(ROWS))
    (folder / "llama.json").write_text(json.dumps(LLAMA | {"vocab_size": 512}))
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in ROWS
    ]
    parquet.write_table(pa.Table.from_pylist(chats), folder / "chats.parquet", row_group_size=16)
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer, byte_pairs.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    byte_pairs.train_from_iterator((row["prompt"] + row["response"] for row in ROWS), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_pairs, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def run_flags(work, name, **changes):
    return ["train", *flags(work, name, **{"batch_size": 4, "max_steps": 10} | changes)]


def assert_done(result):
    assert result.returncode == 0, (result.stdout, result.stderr)


def test_packed_rows_have_the_losses_of_padded_rows(work):
    causal = {"model_config": work / "llama.json", "gradient_accumulation_steps": 2, "max_seq_len": 64}
    assert_done(train(*run_flags(work, "padded", **causal)))
    assert_done(train(*run_flags(work, "packed", **causal, packing=True)))
    assert losses(work, "packed") == pytest.approx(losses(work, "padded"), rel=1e-5)
    tokens = [[record["num_tokens"] for record in records(work, name)[:-1]] for name in ("padded", "packed")]
    assert tokens[0] == tokens[1]
    two = run_flags(work, "packed-2", **causal | {"gradient_accumulation_steps": 1}, packing=True)
    for result in train_ranks(2, *two):
        assert_done(result)
    assert losses(work, "packed-2") == pytest.approx(losses(work, "padded"), rel=1e-5)


def test_chats_are_learned_through_the_template_of_the_tokenizer(work):
    chat = {
        "train_file": work / "chats.parquet",
        "model_config": work / "llama.json",
        "tokenizer_name_or_path": work / "tokenizer",
        "messages_column": "messages",
        "validation_rows": 4,
    }
    assert_done(train(*run_flags(work, "chat", **chat, packing=True)))
    assert losses(work, "chat")[-1] < losses(work, "chat")[0]
    again = train("evaluate", f"--model_name_or_path={work}/chat/model", f"--test_file={work}/chats.parquet")
    assert_done(again)
    assert json.loads(again.stdout.splitlines()[-1])["test_loss"] < losses(work, "chat")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True, "text_column": "prompt", "model_config": "t5-base"}, "--text_column needs a causal model"),
        ({"messages_column": "messages"}, "rows.jsonl has no column 'messages'"),
        ({"max_bad_rows": 5}, "does nothing without --on_bad_row=skip"),
        ({"accept_changed_data": True}, "does nothing unless a run is resumed"),
        ({"on_bad_row": "ignore"}, "must be one of error, skip"),
        ({"prefetch_steps": -1}, "must be 0 or more"),
        ({"messages_column": "m", "text_column": "t"}, "remove one of them"),
    ],
)
def test_invalid_flags_are_refused_and_nothing_is_written(work, changes, message):
    result = train(*run_flags(work, "refused", **changes))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stdout + result.stderr
    assert message in result.stderr
    assert not (work / "refused").exists()


def test_rows_that_are_cut_are_counted_and_reported(work):
    result = train(*run_flags(work, "cut", max_seq_len=16))
    assert_done(result)
    # a prompt or response has one token for each byte, and an end token
    lengths = [[len(text.encode()) + 1 for text in row.values()] for row in ROWS]
    over = [sum(max(0, length - 16) for length in pair) for pair in lengths]
    end = records(work, "cut")[-1]
    assert (end["cut_rows"], end["cut_tokens"]) == (sum(cut > 0 for cut in over), sum(over))
    assert records(work, "cut")[-2]["cut_tokens"] == sum(over)
    assert f"rows of steps 1 to 10: {end['cut_rows']} cut rows, {end['cut_tokens']} cut tokens" in result.stdout


def broken(work):
    lines = (work / "rows.jsonl").read_text().splitlines(True)
    lines[7], lines[21] = '{"prompt": NaN, "response": "x"}\n', '{"prompt": "only ha\n'
    (work / "broken.jsonl").write_text("".join(lines))
    return work / "broken.jsonl"


def test_a_bad_row_ends_the_run_with_its_location_in_one_line(work):
    result = train(*run_flags(work, "stopped", train_file=broken(work)))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert (
        line.startswith("error: ") and "broken.jsonl, line " in line and "(byte " in line and "cannot be read" in line
    )


def test_skipped_rows_are_counted_over_all_ranks_and_recorded(work):
    skipping = {"train_file": broken(work), "on_bad_row": "skip"}
    result, other = train_ranks(2, *run_flags(work, "skipped", **skipping, max_steps=5))
    assert_done(result)
    assert_done(other)
    assert records(work, "skipped")[-1]["bad_rows"] == 2
    assert "rows of steps 1 to 5: 2 bad rows" in result.stdout
    lines = [line for path in (work / "skipped").glob("bad_rows-?.jsonl") for line in path.read_text().splitlines()]
    locations = sorted(json.loads(line)["error"].partition(" (byte")[0] for line in lines)
    assert locations == [f"{work}/broken.jsonl, line {line}" for line in (22, 8)]
    for again in train_ranks(2, *run_flags(work, "skipped", **skipping, max_steps=10, resume="auto")):
        assert_done(again)
    # the resumed run starts its count at 0, and counts both bad rows when it reads them in epoch 2
    assert records(work, "skipped")[-1]["bad_rows"] == 2
    too_many = train(*run_flags(work, "too-many", **skipping, max_bad_rows=1))
    assert too_many.returncode == 1 and "More than --max_bad_rows=1 rows are bad" in too_many.stderr
    repaired = train(*run_flags(work, "too-many", max_steps=2))
    assert_done(repaired)
    assert not list((work / "too-many").glob("bad_rows*"))


def test_bad_held_out_rows_are_left_out_of_the_evaluation(work):
    skip = {"on_bad_row": "skip", "validation_file": broken(work), "max_steps": 2, "max_predict_samples": 0}
    assert_done(train(*run_flags(work, "held-out", **skip)))
    (evaluation,) = (record for record in records(work, "held-out") if "eval_loss" in record)
    assert evaluation["eval_rows"] == 38


def test_a_bad_row_on_one_rank_ends_all_ranks_with_its_location(work):
    for rank in train_ranks(2, *run_flags(work, "two", train_file=broken(work), max_steps=5)):
        (line,) = rank.stderr.splitlines()
        assert rank.returncode == 1 and re.match(r"error(: rank 1| on rank 1, host \S+: ).*broken.jsonl, line ", line)


def test_files_that_changed_are_refused_on_resume_unless_they_are_accepted(work):
    data = work / "changing.jsonl"
    data.write_text((work / "rows.jsonl").read_text())
    assert_done(train(*run_flags(work, "changing", train_file=data, max_steps=5)))
    moved = data.rename(work / "moved.jsonl")
    resumed = {"train_file": moved, "resume": "auto"}
    assert_done(train(*run_flags(work, "changing", **resumed, max_steps=10)))  # renamed, but with the same rows
    text = moved.read_text()
    changed = text.replace('"response": "7', '"response": "8', 1)
    assert len(changed) == len(text) and changed != text
    moved.write_text(changed)
    refused = train(*run_flags(work, "changing", **resumed, max_steps=15))
    assert refused.returncode == 2
    assert "moved.jsonl" in refused.stderr and "--accept_changed_data=True" in refused.stderr
    accepted = train(*run_flags(work, "changing", **resumed, max_steps=15, accept_changed_data=True))
    assert_done(accepted)
    assert f"training rows differ from the checkpoint's: 1 changed: {moved}" in accepted.stdout
    assert len(losses(work, "changing")) == 15


@pytest.mark.parametrize("file", ["validation_file", "test_file"])
def test_a_bad_held_out_row_ends_the_run_before_its_first_step(work, file):
    rows = [*ROWS[:9], {"prompt": "a", "response": "<extra_id_124>"}]  # beyond the embeddings of the tiny T5 below
    (work / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "t5-small-vocabulary.json").write_text(json.dumps(T5 | {"vocab_size": 300}))
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(work / "byt5")
    changes = {"model_config": work / "t5-small-vocabulary.json", "tokenizer_name_or_path": work / "byt5"}
    changes |= {file: work / "late.jsonl", "max_predict_samples": 0}
    result = train(*run_flags(work, f"late-{file}", **changes))
    assert result.returncode == 1
    assert "late.jsonl, line 10" in result.stderr and "the model has 300 embeddings" in result.stderr
    assert not any("loss" in record for record in records(work, f"late-{file}"))


def test_rows_are_not_padded_beyond_the_positions_of_the_model(work):
    rows = [{"prompt": "a" * length, "response": "b"} for length in range(1, 40)]
    (work / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    (work / "gpt2.json").write_text(json.dumps(fields))
    changes = {"model_config": work / "gpt2.json", "train_file": work / "long.jsonl", "max_seq_len": 20}
    assert_done(train(*run_flags(work, "positions", **changes, validation_rows=20, max_steps=3)))
    refused = train(*run_flags(work, "too-few-positions", **changes | {"max_seq_len": 21}))
    assert refused.returncode == 2 and "fails on a row of max_seq_len=21 tokens" in refused.stderr


def test_a_mixture_reports_each_sources_rows_and_resumes_on_two_processes(work):
    for name, first, stop in (("few", 0, 6), ("many", 6, 40)):
        rows = "".join(json.dumps(row) + "\n" for row in ROWS[first:stop])
        (work / f"{name}.jsonl").write_text(rows)
    changes = {"train_file": f"{work}/many.jsonl,{work}/few.jsonl", "train_weights": "0.75,0.25", "max_steps": None}
    changes |= {"global_batch_size": 8, "epochs": 1.2, "validation_file": work / "rows.jsonl", "max_predict_samples": 0}
    result = train(*run_flags(work, "mixture", **changes))
    assert_done(result)
    assert "steps 0 to 7, each of 8 rows" in result.stdout  # 1.2 * 34 / 0.75 rows
    assert f"source 1: 75.00% of the rows, 1.24 epochs of {work}/many.jsonl" in result.stdout
    assert f"source 2: 25.00% of the rows, 2.33 epochs of {work}/few.jsonl" in result.stdout
    logged = [record for record in records(work, "mixture") if "loss" in record]
    assert [(x["source_1_rows"], x["source_2_rows"]) for x in logged] == [(6 * step, 2 * step) for step in range(1, 8)]
    assert logged[-1]["epoch"] == pytest.approx(7 * 8 * 0.75 / 34)
    resumed = changes | {"epochs": 1.6, "resume": "auto", "train_weights": "3,1"}  # the same ratio
    for rank in train_ranks(2, *run_flags(work, "mixture", **resumed)):
        assert_done(rank)
    again = [record for record in records(work, "mixture") if "loss" in record]
    assert again[:5] == logged[:5] and again[-1]["source_2_rows"] == 20
    refused = train(*run_flags(work, "mixture", **changes | {"train_weights": "0.5,0.5", "resume": "auto"}))
    assert refused.returncode == 2 and "--train_weights=0.5,0.5 (was 3,1)" in refused.stderr
    refused = train(*run_flags(work, "unequal", **changes | {"train_weights": "1,1,1"}))
    assert refused.returncode == 2 and "3 weights for 2 sources" in refused.stderr


def test_a_better_evaluation_frees_the_checkpoint_of_the_former_best(work):
    changes = {"validation_rows": 8, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    assert_done(train(*run_flags(work, "best", **changes, learning_rate=1e-3)))
    evaluations = [record["eval_loss"] for record in records(work, "best") if "eval_loss" in record]
    assert evaluations == sorted(evaluations, reverse=True)  # each is the best so far
    assert [path.name for path in (work / "best/checkpoints").glob("step-*")] == ["step-00000006"]
