"""Prompts of several columns, alpaca and sharegpt rows, and JSON arrays converted to JSONL."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import ByT5Tokenizer

from lowmem.config.prompt_template import fill, parse_template, template_columns
from lowmem.config.row_formats import format_of
from lowmem.data.encode import encode_causal, encode_chat, encode_seq2seq, make_encoder
from lowmem.data.files.convert import convert
from lowmem.data.rows import open_rows
from lowmem.errors import ColumnsError, UsageError
from tests.models import qa_rows
from tests.processes import train
from tests.runs import flags, write_files

ALPACA = r"{instruction}\n{input}\n"
TOKENIZER = ByT5Tokenizer()
CHAT = ByT5Tokenizer(
    chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        (ALPACA, {"instruction": "Add", "input": "1 2"}, "Add\n1 2\n"),
        (ALPACA, {"instruction": "Greet", "input": ""}, "Greet\n"),
        (ALPACA, {"instruction": "two\n\nlines", "input": "x"}, "two\n\nlines\nx\n"),
        ("Q: {q} ({lang})\n\nA:", {"q": "why", "lang": ""}, "Q: why ()\n\nA:"),
        ("Q: {q}\nin: {lang}\nA:", {"q": "why", "lang": ""}, "Q: why\nA:"),
        (r"{{{a b}}}\t\\n{x.y}", {"a b": "1", "x.y": "2"}, "{1}\t\\n2"),
        ("{a}{a}", {"a": "1"}, "11"),
    ],
)
def test_a_template_takes_the_text_of_columns_and_omits_lines_whose_columns_are_empty(template, row, text):
    assert fill(parse_template(template), row.__getitem__) == text
    assert template_columns(template) == list(row)


@pytest.mark.parametrize("template", ["no column", "", "{}", "{a!r}", "{a:>3}", "{a", "a}"])
def test_a_template_without_a_column_or_with_other_braces_is_refused(template):
    with pytest.raises(ValueError, match="column|brace|'}'|'{'"):
        parse_template(template)


@pytest.mark.parametrize("encode_kind", [encode_seq2seq, encode_causal])
def test_a_template_gives_the_tokens_of_its_text(encode_kind):
    encode = encode_kind(TOKENIZER, max_seq_len=64, prompt_template=ALPACA, response_column="output")
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    expected = encode_kind(TOKENIZER, max_seq_len=64)({"prompt": "Add\n1 2\n", "response": "3"})
    assert encode(row) == expected
    is_encoder_decoder = encode_kind is encode_seq2seq
    options = {"prompt_column": None, "response_column": "output", "prompt_template": ALPACA}
    made = make_encoder(TOKENIZER, is_encoder_decoder=is_encoder_decoder, max_seq_len=64, **options)
    assert made(row) == expected
    with pytest.raises(ValueError, match="column 'input' must hold text, found null"):
        encode(row | {"input": None})


def test_sharegpt_messages_are_chat_messages():
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("user", "Bye"), ("assistant", "Bye!")]
    roles = {"human": "user", "gpt": "assistant"}
    theirs = {"conversations": [{"from": role, "value": text, "weight": None} for role, text in turns]}
    plain = {"conversations": [{"role": roles.get(role, role), "content": text} for role, text in turns]}
    encode = encode_chat(CHAT, max_seq_len=256, messages_column="conversations")
    assert encode(theirs) == encode(plain)
    with pytest.raises(ValueError, match="message that cannot be used: it is from 'bot', which is none of human"):
        encode({"conversations": [{"from": "bot", "value": "Hi"}]})


def test_files_of_sharegpt_rows_are_read_as_messages(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 1}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for name in ("rows.parquet", "rows.jsonl"):
        opened = open_rows(tmp_path / name, messages_column="conversations")
        assert opened[0]["conversations"] == rows[0]["conversations"]
        assert opened.unread == ["id"]
        with pytest.raises(ColumnsError) as error:
            open_rows(tmp_path / name, columns=["prompt"])
        assert format_of(error.value.present)[0] == "sharegpt"


def test_formats_are_recognized_by_their_columns():
    settings = {"prompt_template": ALPACA, "response_column": "output"}
    assert format_of(["id", "output", "input", "instruction"]) == ("alpaca", settings)
    assert format_of(["instruction", "output"])[1]["prompt_template"] == r"{instruction}\n"
    assert format_of(["instruction", "response"]) is None


ROWS = [{"a": "b\n\u2028é😀", "n": [1, 2.5, {"x": None}]}, {}, {"a": "]},{"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS, ensure_ascii=False),
        " \n[ {} , " + json.dumps(ROWS)[1:] + "\n",
        "\ufeff[]",
    ],
)
def test_a_json_array_becomes_a_line_for_each_row(tmp_path, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    expected = json.loads(text.removeprefix("\ufeff"))
    message = convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    assert message == f"{tmp_path}/rows.jsonl: {len(expected)} rows"
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and [json.loads(line) for line in lines] == expected
    with pytest.raises(UsageError, match="rows.jsonl exists: remove it"):
        convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")


def test_an_array_is_converted_in_pieces(tmp_path):
    rows = [{"number": number, "text": "x" * (number * 7919 % 200_000)} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "row 1: a JSON array of objects was expected, found '{"),
        ("", "row 1: a JSON array of objects was expected, found ''"),
        ('[{"a": 1}, 2]', "row 2: a JSON object was expected, found '2]'"),
        ('[{"a": 1} {"a": 2}]', "row 2: ',' or ']' was expected, found '{"),
        ('[{"a": 1}, {"a": ', "row 2: Expecting value"),
        ('[{"a": 1}', "row 2: ',' or ']' was expected, found ''"),
        ('[{"a": 1}]]', "row 2: the end of the file was expected"),
        ('[{"a": 1, "a": 2}]', "row 1: key 'a' occurs twice"),
        ('[{"a": NaN}]', "row 1: NaN is not a JSON value"),
        ('[{"a": "\\ud800"}]', "row 1: 'utf-8' codec can't encode"),
        ("[" + '{"a":' * 20_000, "row 1: "),
    ],
)
def test_what_is_no_array_of_objects_is_refused_and_nothing_is_left(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UsageError) as error:
        convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_an_array_is_refused_with_the_command_that_converts_it(tmp_path):
    write_files(tmp_path, num_rows=4)
    (tmp_path / "rows.json").write_text(json.dumps(qa_rows(20), indent=1))
    changes = {"max_steps": 1, "max_predict_samples": 0}
    refused = train("train", *flags(tmp_path, "array", train_file=tmp_path / "rows.json", **changes))
    assert refused.returncode == 2 and "`train_low_mem.py convert rows.json rows.jsonl` converts" in refused.stderr
    done = train("convert", tmp_path / "rows.json", tmp_path / "new.jsonl")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/new.jsonl: 20 rows\n")
    rows = open_rows(tmp_path / "new.jsonl")
    assert [rows[number] for number in range(20)] == qa_rows(20)


def test_alpaca_rows_are_found_by_their_columns_and_evaluate_takes_the_same(tmp_path):
    write_files(tmp_path, num_rows=4)
    rows = [{"instruction": r["prompt"], "input": "", "output": r["response"], "id": 7} for r in qa_rows(20)]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": tmp_path / "alpaca.jsonl", "max_steps": 2, "max_predict_samples": 0}
    done = train("train", *flags(tmp_path, "found", **changes))
    assert done.returncode == 0, done.stderr
    line = r"the rows are alpaca: using --prompt_template='{instruction}\\n{input}\\n' --response_column='output'"
    assert done.stdout.splitlines()[:2] == [line, "columns that are not read: id (see --prompt_template)"]
    saved = json.loads((tmp_path / "found" / "model" / "lowmem.json").read_text())
    assert (saved["prompt_template"], saved["prompt_column"], saved["response_column"]) == (ALPACA, None, "output")
    model, test_file = f"--model_name_or_path={tmp_path}/found/model", f"--test_file={tmp_path}/alpaca.jsonl"
    evaluated = train("evaluate", model, test_file)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "alpaca" not in evaluated.stdout.replace("alpaca.jsonl", "") and '"test_rows": 20' in evaluated.stdout
    by_flag = train("train", *flags(tmp_path, "flag", **changes, row_format="alpaca"))
    assert by_flag.returncode == 0 and "the rows are" not in by_flag.stdout
    refused = train("train", *flags(tmp_path, "columns", **changes, prompt_column="prompt"))
    assert refused.returncode == 2 and "no column 'prompt' and no column 'response'" in refused.stderr


def test_sharegpt_rows_need_a_causal_model(tmp_path):
    write_files(tmp_path, num_rows=4)
    (tmp_path / "chats.jsonl").write_text('{"conversations": [{"from": "gpt", "value": "Hi"}]}\n')
    changes = {"train_file": tmp_path / "chats.jsonl", "model_config": "t5-tiny"}
    refused = train("train", *flags(tmp_path, "chats", **changes))
    assert refused.returncode == 2 and "--messages_column needs a causal model" in refused.stderr
