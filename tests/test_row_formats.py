"""Prompts of several columns, alpaca and sharegpt rows, and JSON arrays converted to JSONL."""

import io
import json
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import ByT5Tokenizer

from lowmem.config.parse import resolve
from lowmem.config.prompt_template import fill, parse_template, template_columns
from lowmem.config.row_formats import format_of
from lowmem.data.encode import encode_causal, encode_chat, encode_seq2seq, make_encoder
from lowmem.data.files.convert import _rows, convert
from lowmem.data.files.line_index import LONGEST_LINE
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
    without_input = encode_kind(TOKENIZER, max_seq_len=64)({"prompt": "Add\n", "response": "3"})
    assert encode(row | {"input": None}) == encode({"instruction": "Add", "output": "3"}) == without_input
    for empty in ({"input": ""}, {"instruction": None, "input": ""}):
        with pytest.raises(ValueError, match="'instruction', 'input' are all empty, so there is no prompt: fix the"):
            encode({"output": "3"} | empty)
    with pytest.raises(ValueError, match="column 'input' must hold text, found int 5"):
        encode(row | {"input": 5})
    with pytest.raises(ValueError, match="column 'output' must hold text, found null"):
        encode(row | {"output": None})


def test_make_encoder_refuses_what_the_command_line_refuses():
    make = partial(make_encoder, TOKENIZER, is_encoder_decoder=False, max_seq_len=64)
    for other in ("prompt_column", "text_column", "messages_column"):
        with pytest.raises(UsageError, match="exclude each other: set one"):
            make(prompt_template=ALPACA, **{other: "x"})
    with pytest.raises(UsageError, match="prompt_template='{a' cannot be used: expected '}'"):
        make(prompt_template="{a")


def test_sharegpt_messages_are_chat_messages():
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("user", "Bye"), ("assistant", "Bye!")]
    roles = {"human": "user", "gpt": "assistant"}
    theirs = {"conversations": [{"from": role, "value": text, "weight": None} for role, text in turns]}
    plain = {"conversations": [{"role": roles.get(role, role), "content": text} for role, text in turns]}
    encode = encode_chat(CHAT, max_seq_len=256, messages_column="conversations")
    assert encode(theirs) == encode(plain)
    with pytest.raises(ValueError, match="cannot be used: it is from 'bot', but must be from one of human, .*: rename"):
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
    assert format_of(["instruction", "output"]) == ("alpaca", settings)
    assert format_of(["instruction", "response"]) is None


def _write(path, rows, schema=None):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_files_may_lack_the_input_of_alpaca_rows_but_no_other_column_of_a_template(tmp_path, name):
    options = {"columns": ["output"], "prompt_template": ALPACA}
    rows = [{"instruction": "Greet", "output": "Hi"}, {"instruction": "Bow", "output": "I bow"}]
    opened = open_rows(_write(tmp_path / name, rows), **options)
    assert [opened[0], opened[1]] == rows and not opened.unread
    with pytest.raises(ColumnsError, match="no column 'lang', it has .*: set --prompt_template"):
        open_rows(tmp_path / name, columns=["output"], prompt_template="{instruction} ({lang})")
    with pytest.raises(ColumnsError, match="no column 'instruction'"):
        open_rows(_write(tmp_path / f"other-{name}", [{"input": "1 2", "output": "3"}]), **options)
    nulls = [row | {"input": None} for row in rows]
    assert open_rows(_write(tmp_path / f"null-{name}", nulls), **options)[1] == nulls[1]
    with pytest.raises(UsageError, match="column 'input' must hold text or null, found int"):
        open_rows(_write(tmp_path / f"numbers-{name}", [rows[0] | {"input": 5}]), **options)


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
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UsageError, match=r"rows.jsonl exists \(it is a file\): remove it"):
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
        ('[{"a": 1},\n\n{"a": x}]', "row 2: Expecting value; fix the file"),
        ('{"a": 1}\n{"a": 2}\n', "rows.json has one object per line, so it is JSONL, not a JSON array: train on it"),
        ('{"version": 1, "data": [{"a": 1}]}', "rows.json is an object, whose key 'data' holds an array: write that"),
        ("PAR1", "rows.json is a parquet file, not a JSON array: train on it"),
        ("BZh91AY", "rows.json is compressed (bzip2): decompress it first"),
    ],
)
def test_what_is_no_array_of_objects_is_refused_and_nothing_is_left(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UsageError) as error:
        convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_becomes_a_line_that_can_be_read_or_is_refused(tmp_path):
    array, out = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    row = {"text": "x" * (LONGEST_LINE - len('{"text": ""}\n'))}
    array.write_text(json.dumps([row, {"text": "y"}]))
    convert(array, out)
    assert open_rows(out)[0] == row
    out.unlink()
    array.write_text(json.dumps([{"text": "y"}, {"text": row["text"] + "x"}]))
    with pytest.raises(UsageError, match="row 2: the line has 16,777,217 bytes, the limit is 16,777,216: split it"):
        convert(array, out)
    assert not out.exists() and not list(tmp_path.glob(".convert*"))


def test_an_object_that_does_not_end_is_not_read_to_the_end_of_the_file():
    most = 2 * LONGEST_LINE
    file = io.StringIO('[{"text": "' + "x" * (most + 2**20))
    with pytest.raises(ValueError, match="the object does not end within 33,554,432 characters"):
        list(_rows(file.read))
    assert file.tell() <= most + 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rows.json/out.jsonl", "cannot be used (Not a directory)"),
        ("missing/out.jsonl", "cannot be used (No such file or directory)"),
        ("x" * 256, "cannot be used (File name too long)"),
        ("rows.txt", "must end in .jsonl, by which `train` recognizes the format"),
        ("link", "exists (it is a broken link to nothing)"),
        ("", "exists (it is a folder)"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_by_its_name(tmp_path, name, reason):
    (tmp_path / "rows.json").write_text("[{}]")
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(UsageError) as error:
        convert(tmp_path / "rows.json", tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} {reason}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "rows.json"]
    with pytest.raises(UsageError, match="none.json cannot be used"):
        convert(tmp_path / "none.json", tmp_path / "new.jsonl")
    convert(tmp_path / "rows.json", tmp_path / (f"{'y' * 249}.jsonl"))  # the longest name


def test_a_file_that_appears_during_the_conversion_is_kept(tmp_path):
    os.mkfifo(tmp_path / "rows.json")
    out = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor() as pool:
        converting = pool.submit(convert, tmp_path / "rows.json", out)
        while not list(tmp_path.glob(".convert-*")):
            assert not converting.done(), converting.result()
            time.sleep(0.01)
        with open(tmp_path / "rows.json", "w") as array:
            out.write_text("theirs")
            array.write("[{}]")
        with pytest.raises(UsageError, match=r"rows.jsonl cannot be used \(File exists\)"):
            converting.result(timeout=300)
    assert out.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 2


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
    rows = [{"instruction": r["prompt"], "output": r["response"], "id": 7} for r in qa_rows(20)]
    rows[1:3] = [rows[1] | {"input": "of two"}, rows[2] | {"input": None}]  # the first row does not show all columns
    _write(tmp_path / "alpaca.jsonl", rows)
    changes = {"train_file": tmp_path / "alpaca.jsonl", "max_steps": 2, "max_predict_samples": 0}
    done = train("train", *flags(tmp_path, "found", **changes))
    assert done.returncode == 0, done.stderr
    using, unread = done.stdout.splitlines()[:2]
    assert unread == "columns of the first rows that are not read: id (see --prompt_template)"
    start, *found = shlex.split(using.replace("the rows are alpaca: using", "alpaca"))
    typed = dict(flag.removeprefix("--").split("=", 1) for flag in found)
    assert start == "alpaca" and resolve(typed) == resolve({"row_format": "alpaca"})
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
    assert refused.returncode == 2
    found = "chats.jsonl: the rows are sharegpt: using --messages_column=conversations; --messages_column needs a"
    assert found in refused.stderr and "all files" not in refused.stderr
    (tmp_path / "alpaca.jsonl").write_text('{"instruction": "Bow", "output": "I bow"}\n')
    changes = {"train_file": f"{tmp_path}/rows.jsonl,{tmp_path}/alpaca.jsonl"}
    refused = train("train", *flags(tmp_path, "mixed", **changes))
    found = f"{tmp_path}/rows.jsonl has other columns: all files of a run need the same columns"
    assert refused.returncode == 2 and found in refused.stderr
