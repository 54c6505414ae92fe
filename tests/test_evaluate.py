import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast

from lowmem import init_distributed
from lowmem.data.batch import collate
from lowmem.data.encode import encode_causal, encode_chat, encode_seq2seq, encode_text
from lowmem.data.eval_batches import open_eval
from lowmem.data.rows import open_rows
from lowmem.errors import RowError, UsageError
from lowmem.evaluation import Answer, Evaluation, evaluate, generate, text_metrics
from lowmem.loss import chunked_loss, plain_loss
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.test_chat import CHATS, TOKENIZERS

ROWS, TOKENIZER = qa_rows(23), ByT5Tokenizer()


def encoder(family):
    return (encode_seq2seq if family == "t5" else encode_causal)(TOKENIZER, max_seq_len=64)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_loss_is_the_mean_over_tokens_at_any_batch_size(family, batch_size):
    model = build(family)
    whole = collate([encoder(family)(row) for row in ROWS])
    expected = (plain_loss(model.eval(), whole) / whole.num_targets).item()
    batches = open_eval(ROWS, encoder(family), batch_size=batch_size)
    metrics = evaluate(model, batches, chunked_loss, Accelerator(cpu=True), prefix="test")
    assert metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_dropout_is_off_during_evaluation_and_on_again_after():
    model = build("t5", dropout_rate=0.5)
    batches = open_eval(ROWS, encoder("t5"), batch_size=5)
    first, second = (evaluate(model, batches, chunked_loss, Accelerator(cpu=True)) for _ in range(2))
    assert first == second and model.training


@pytest.mark.parametrize(
    ("family", "causal"), [("t5", False), ("llama", True), ("llama", False)], ids=["t5", "llama", "llama with masks"]
)
def test_answers_of_a_batch_are_those_of_each_row_alone(family, causal):
    model = build(family)
    # Each batch has 3 rows. Their lengths differ, except in two batches: one has prompts of equal length, the other
    # has rows of equal total length.
    even = [{"prompt": f"number {i}", "response": f"{i}" * (i + 1)} for i in range(3)]
    even += [{"prompt": f"{i}" * (1 + i), "response": f"{i}" * (3 - i)} for i in range(3)]
    rows = ROWS[:21] + even
    batches = open_eval(rows, encoder(family), batch_size=3, collate=partial(collate, causal=causal))
    masked = ["attention_mask" in batch.inputs for batch in batches]
    assert set(masked) == ({False} if causal else {True, False})
    answers = generate(model, TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=6)
    assert [answer.row_id for answer in answers] == list(range(27))
    for answer, row in zip(answers, rows, strict=True):
        assert (answer.prompt, answer.reference) == (row["prompt"], row["response"])
        ids = torch.tensor([TOKENIZER(row["prompt"], add_special_tokens=family == "t5").input_ids])
        written = model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0]
        written = written if family == "t5" else written[ids.shape[1] :]
        assert answer.prediction == TOKENIZER.decode(written, skip_special_tokens=True)


def test_padding_is_removed_from_a_causal_prompt_without_a_target():
    def encode(row):
        return {"input_ids": row["ids"], "labels": [-100] * len(row["ids"])}

    rows = [{"ids": TOKENIZER(text, add_special_tokens=False).input_ids} for text in ("a longer one", "short")]
    batches = open_eval(rows, encode, batch_size=2, collate=partial(collate, causal=True))
    answers = generate(build("llama"), TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=2)
    alone = open_eval(rows, encode, batch_size=1, collate=partial(collate, causal=True))
    assert answers == generate(build("llama"), TOKENIZER, alone, Accelerator(cpu=True), max_new_tokens=2)
    assert [answer.prompt for answer in answers] == ["a longer one", "short"]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_two_ranks_measure_what_one_measures(family, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = measure_rows(family, tmp_path, Accelerator(cpu=True))
    assert fork_ranks(2, measure_on_a_rank, family, tmp_path) == [0, 0]
    for rank in range(2):
        metrics, answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == pytest.approx(expected[0], rel=1e-6)
        assert [Answer(*answer) for answer in answers] == expected[1]


def measure_rows(family, folder, accelerator):
    options = {"batch_size": 4, "num_answers": 11, "max_new_tokens": 5}
    measure = Evaluation(build(family), TOKENIZER, encoder(family), chunked_loss, accelerator, **options)
    return measure(open_rows(f"{folder}/rows.jsonl"))


def measure_on_a_rank(family, folder):
    accelerator = init_distributed()
    measured = measure_rows(family, folder, accelerator)
    with open(f"{folder}/{accelerator.process_index}.json", "w") as file:
        json.dump(measured, file)
    accelerator.end_training()


def test_exact_matches_are_counted_and_characters_compared():
    answers = [Answer(0, "a", "四十", "四十"), Answer(1, "b", "42", " 42 "), Answer(2, "c", "42", "43")]
    metrics = text_metrics(answers)
    assert metrics["eval_exact_match"] == pytest.approx(2 / 3)
    assert text_metrics([]) == {}
    assert 50 < metrics["eval_chrf"] < 100


def test_rows_without_a_target_are_refused():
    batches = [collate([{"input_ids": [4], "labels": [-100]}])]
    with pytest.raises(ValueError, match="no target token"):
        evaluate(build("t5"), batches, chunked_loss, Accelerator(cpu=True))


GPT2 = {"vocab_size": 384, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["a"]},
        {"num_return_sequences": 3, "num_beams": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"do_sample": True, "temperature": 2.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_answers_are_greedy_whatever_the_models_own_settings_are(settings):
    batches = [replace(collate([encoder("llama")(row) for row in ROWS[:3]], causal=True), row_ids=[0, 1, 2])]
    model = build("llama")
    expected = generate(model, TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=4)
    own = GenerationConfig(**settings)
    model.generation_config = own
    assert generate(model, TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=4) == expected
    assert model.generation_config is own


def test_answers_keep_the_start_and_forced_tokens_that_the_model_needs():
    batches = [replace(collate([encoder("t5")(row) for row in ROWS[:2]]), row_ids=[0, 1])]
    model = build("t5")
    model.generation_config = GenerationConfig(num_beams=3)  # the start token is in config.json only
    expected = generate(model, TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=4)
    forced = TOKENIZER("z", add_special_tokens=False).input_ids[0]
    model.generation_config = GenerationConfig(forced_bos_token_id=forced)
    answers = generate(model, TOKENIZER, batches, Accelerator(cpu=True), max_new_tokens=4)
    assert all(answer.prediction.startswith("z") for answer in answers) and answers != expected


def test_a_pad_token_without_an_embedding_is_not_used():
    model, tokenizer = build("llama"), ByT5Tokenizer()
    rows = [encoder("llama")(row) for row in ROWS[:3]]
    batches = [replace(collate(rows, causal=True), row_ids=[0, 1, 2])]
    expected = generate(model, tokenizer, batches, Accelerator(cpu=True), max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    answers = generate(model, tokenizer, batches, Accelerator(cpu=True), max_new_tokens=4)
    assert [answer.prediction for answer in answers] == [answer.prediction for answer in expected]


def test_a_dict_instead_of_a_batch_is_an_error_that_names_the_remedy():
    batch = collate([encoder("llama")(ROWS[0])], causal=True)
    with pytest.raises(TypeError, match="must be a lowmem.Batch, found dict: make it with lowmem.collate"):
        evaluate(build("llama"), [batch.inputs], plain_loss, Accelerator(cpu=True))


def test_answers_end_at_the_last_position():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2))
    rows = [{"input_ids": [5] * 14 + [6], "labels": [-100] * 14 + [6]}]
    answers = generate(
        model, TOKENIZER, [replace(collate(rows), row_ids=[0])], Accelerator(cpu=True), max_new_tokens=64
    )
    assert len(answers) == 1


def test_answers_need_neither_special_tokens_nor_a_prompt():
    tokenizer = ByT5Tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    rows = [{"input_ids": [], "labels": [70]}, {"input_ids": [70, 71], "labels": [72]}]
    model = build("t5")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    answers = generate(
        model, tokenizer, [replace(collate(rows), row_ids=[0, 1])], Accelerator(cpu=True), max_new_tokens=3
    )
    assert [answer.row_id for answer in answers] == [0, 1]


def test_a_chat_is_answered_after_its_last_question_until_the_end_of_the_turn():
    tokenizer = TOKENIZERS["chatml"]
    rows = [{"messages": chat} for chat in CHATS[:2] + CHATS[3:4]]
    encode, accelerator = encode_chat(tokenizer, max_seq_len=200), Accelerator(cpu=True)
    model = build("llama", vocab_size=len(tokenizer), eos_token_id=None)
    model.generation_config.eos_token_id = 0  # not the token that ends a turn
    (batch,) = open_eval(rows, encode, batch_size=3, collate=partial(collate, causal=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        (chunked_loss(model, batch) / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    answers = generate(model, tokenizer, [batch], accelerator, max_new_tokens=40)
    for row, answer in zip(rows, answers, strict=True):
        last = max(turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant")
        text = tokenizer.apply_chat_template(row["messages"][:last], add_generation_prompt=True, tokenize=False)
        assert answer.prompt == tokenizer.decode(tokenizer(text).input_ids[1:], skip_special_tokens=True)
        assert answer.reference == row["messages"][last]["content"] == answer.prediction
    assert text_metrics(answers)["eval_exact_match"] == 1


def evaluation(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"batch_size": 2, "num_answers": 2, "max_new_tokens": 4}
    parts = (build("llama"), TOKENIZER, encoder("llama"), chunked_loss, Accelerator(cpu=True))
    return Evaluation(*parts, **defaults | options), open_rows(path)


def test_the_check_finds_bad_rows_and_a_model_that_cannot_answer(tmp_path):
    measure, rows = evaluation(tmp_path, ROWS)
    measure.check(rows, "validation")
    measure, rows = evaluation(tmp_path, [*ROWS, {"prompt": "a", "response": None}])
    with pytest.raises(RowError, match="cannot be encoded: column 'response' must hold text, found null"):
        measure.check(rows, "validation")
    measure, rows = evaluation(tmp_path, ROWS)
    measure._answers.args[0].prepare_inputs_for_generation = None
    with pytest.raises(UsageError, match="the model cannot generate answers .*: set --max_predict_samples=0"):
        measure.check(rows, "validation")


def test_the_check_says_that_responses_have_tokens_which_the_tokenizer_does_not_know(tmp_path):
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": text}) + "\n" for text in ("a", "{", "a")))
    messages, encode = [], encode_causal(tokenizer, max_seq_len=8)
    parts = (build("llama"), tokenizer, encode, chunked_loss, Accelerator(cpu=True))
    measure = Evaluation(*parts, batch_size=2, num_answers=0, max_new_tokens=4, tell=messages.append)
    measure.check(open_rows(path), "validation")
    assert messages[0].startswith("1 of 3 validation rows have unknown tokens in their responses")


def test_the_check_counts_rows_that_lose_their_targets(tmp_path):
    messages = []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"text": "a"}, {"text": ""}, {"text": "b"})))
    encode = encode_text(TOKENIZER, max_seq_len=2)
    parts = (build("llama"), TOKENIZER, encode, chunked_loss, Accelerator(cpu=True))
    measure = Evaluation(*parts, batch_size=2, num_answers=0, max_new_tokens=4, tell=messages.append)
    measure.check(open_rows(path, columns=["text"]), "test")
    assert messages == ["1 of 3 test rows have no target, or lose theirs to --max_seq_len"]


def test_an_evaluation_that_cannot_answer_returns_the_loss_and_says_why(tmp_path):
    messages = []
    measure, rows = evaluation(tmp_path, ROWS, tell=messages.append)
    measure._answers.args[0].prepare_inputs_for_generation = None
    metrics, answers = measure(rows)
    assert metrics["eval_loss"] > 0 and answers == []
    assert messages[0].startswith("no answers, because generating them failed: ")
