import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from lowmem.config import UsageError
from lowmem.data.bundled import NUM_BUNDLED_ROWS, BundledRows
from lowmem.data.rows import RowError, open_rows, split_rows
from tests.models import qa_rows

ROWS = qa_rows(205)


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(row["prompt"] + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_any_row_is_read_in_any_order(tmp_path, suffix):
    rows = open_rows(write(tmp_path / f"rows{suffix}"), columns=["prompt", "response"])
    assert len(rows) == len(ROWS)
    assert sum(rows.group_sizes) == len(ROWS) and len(rows.group_sizes) > 1
    for index in [204, 0, 63, 64, 65, 20, 19, 204, 128]:
        assert rows[index] == ROWS[index]


def test_text_lines_are_rows(tmp_path):
    rows = open_rows(write(tmp_path / "rows.txt"))
    assert [rows[i]["text"] for i in range(len(rows))] == [row["prompt"] for row in ROWS]


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + '{"a": 1}\n\n' * 100 + '{"a": 2}')
    rows = open_rows(path)
    assert len(rows) == 101
    assert rows[99] == {"a": 1} and rows[100] == {"a": 2}


def test_a_comma_list_and_a_glob_give_files_in_order(tmp_path):
    for name, part in {"b2": ROWS[100:], "b1": ROWS[50:100], "a": ROWS[:50]}.items():
        write(tmp_path / f"{name}.parquet", part)
    rows = open_rows(f"{tmp_path}/a.parquet,{tmp_path}/b*.parquet")
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows.where(60) == f"{tmp_path}/b1.parquet, row 10"


def test_decoded_groups_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.data.rows.WINDOW_ROWS", 40)
    rows = open_rows(write(tmp_path / "rows.parquet"))
    for index in range(len(rows)):
        assert rows[index] == ROWS[index]
        assert sum(table.num_rows for table in rows._cache.values()) <= 60


def test_held_out_rows_are_the_last_and_no_others(tmp_path):
    train, held_out = split_rows(open_rows(write(tmp_path / "rows.parquet")), 33)
    assert [train[i] for i in range(len(train))] == ROWS[:-33]
    assert [held_out[i] for i in range(len(held_out))] == ROWS[-33:]
    assert sum(train.group_sizes) == 172 and sum(held_out.group_sizes) == 33
    assert held_out.where(0).endswith("row 172")
    with pytest.raises(IndexError):
        train[172]
    with pytest.raises(UsageError, match="at least one must be left"):
        split_rows(held_out, 33)


def test_bundled_rows_never_repeat_so_held_out_ones_are_new():
    rows = BundledRows()
    train, held_out = split_rows(rows, 240)
    prompts = [train[i]["prompt"] for i in range(len(train))]
    asked = {held_out[i]["prompt"] for i in range(len(held_out))}
    assert len(set(prompts)) == len(prompts) == NUM_BUNDLED_ROWS - 240
    assert len(asked) == 240 and not asked & set(prompts)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.parquet", None, "does not exist"),
        ("rows.csv", b"a,b", "files end in .parquet"),
        ("empty.jsonl", b"", "holds no rows"),
        ("empty.parquet", b"", "cannot be read as parquet"),
        ("pretty.json", b'[\n  {"prompt": "a"}\n]', "one object a line"),
        ("array.json", b'[{"prompt": "a"}]', "one object a line"),
        ("broken.jsonl", b'{"prompt": \n', "first row"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=told) as caught:
        open_rows(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_missing_column_is_told_with_file_and_columns(tmp_path, suffix):
    write(tmp_path / f"a{suffix}")
    write(tmp_path / f"b{suffix}", [{"question": "x", "response": "y"}])
    with pytest.raises(UsageError, match=rf"b{suffix} has no column 'prompt', it has 'question', 'response'"):
        open_rows(f"{tmp_path}/*{suffix}", columns=["prompt", "response"])


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="rows.parquet cannot be read as parquet"):
        open_rows(path)


def test_a_flipped_bit_in_a_page_is_found_where_the_file_has_checksums(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    place = data.index("问题 7 ".encode())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(RowError, match="rows.parquet, row 0 cannot be read: .*CRC"):
        open_rows(path)[0]


def test_a_column_of_numbers_is_refused_from_the_schema(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"prompt": 3, "response": "x"}])
    with pytest.raises(UsageError, match="column 'prompt' must hold text, it holds int64"):
        open_rows(path, columns=["prompt", "response"])


def test_a_file_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="rows.parquet twice"):
        open_rows(f"{path},{tmp_path}/*.parquet")


def test_a_broken_row_is_told_with_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    rows = open_rows(path)
    assert rows[2] == {"a": 3}
    with pytest.raises(ValueError, match="rows.jsonl, row 1 cannot be read: "):
        rows[1]
