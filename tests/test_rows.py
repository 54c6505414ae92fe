import gzip
import json
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lowmem.data.bundled import NUM_BUNDLED_ROWS, BundledRows
from lowmem.data.files.lines import JsonLinesFile
from lowmem.data.files.parquet import ParquetFile
from lowmem.data.files.source import Source
from lowmem.data.rows import FileRows, as_rows, open_rows, split_rows
from lowmem.errors import ReadError, RowError, UsageError
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


def open_file(path):
    return (ParquetFile if path.suffix == ".parquet" else JsonLinesFile)(Source(str(path)), None)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_read_in_any_order(tmp_path, suffix):
    rows = open_rows(write(tmp_path / f"rows{suffix}"), columns=["prompt", "response"])
    assert len(rows) == len(ROWS)
    assert rows.groups.num_rows == len(ROWS)
    for index in [204, 0, 63, 64, 65, 20, 19, 204, 128]:
        assert rows[index] == ROWS[index]


def test_text_lines_are_rows(tmp_path):
    rows = open_rows(write(tmp_path / "rows.txt"))
    assert [rows[i]["text"] for i in range(len(rows))] == [row["prompt"] for row in ROWS]


def test_blank_lines_are_not_rows(tmp_path):
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


def test_groups_are_freed_so_that_at_most_a_window_is_loaded(tmp_path):
    file = open_file(write(tmp_path / "rows.parquet"))
    two_groups = int(np.sort(file.group_bytes)[-2:].sum())
    rows = FileRows([file], window_bytes=two_groups)
    for index in range(len(rows)):
        assert rows[index] == ROWS[index]
        assert len(rows.loaded) <= 3 and rows.loaded_bytes <= two_groups
        assert rows.loaded_bytes == file.group_bytes[list(rows.loaded)].sum()


def test_a_loaded_group_is_read_once(tmp_path):
    path = write(tmp_path / "rows.parquet")
    rows = open_rows(path)
    assert rows[3] == ROWS[3]
    path.unlink()
    assert rows[19] == ROWS[19]
    with pytest.raises(ReadError, match="No such file"):
        rows[20]


def test_the_least_recently_used_group_is_freed(tmp_path):
    path = write(tmp_path / "rows.parquet")
    file = open_file(path)
    rows = FileRows([file], window_bytes=int(np.sort(file.group_bytes)[-3:].sum()))
    for group in (0, 1, 2, 0, 3):
        assert rows[20 * group] == ROWS[20 * group]
    path.unlink()
    assert rows[0] == ROWS[0] and rows[60] == ROWS[60]
    with pytest.raises(ReadError):
        rows[20]


def test_threads_may_read_the_same_rows(tmp_path):
    file = open_file(write(tmp_path / "rows.parquet", ROWS * 4))
    rows, errors = FileRows([file], window_bytes=int(file.group_bytes.max())), []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, len(rows), 300).tolist():
            try:
                assert rows[index] == ROWS[index % 205]
            except Exception as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not errors
    assert rows.loaded_bytes == file.group_bytes[list(rows.loaded)].sum()


def test_the_traceback_of_a_stored_error_does_not_grow(tmp_path):
    path = write(tmp_path / "rows.parquet")
    rows = FileRows([open_file(path)], retry_seconds=(0.01,))
    path.unlink()
    lengths = []
    for _ in range(3):
        with pytest.raises(ReadError) as caught:
            rows[0]
        frame, length = caught.value.__cause__.__traceback__, 0
        while frame:
            frame, length = frame.tb_next, length + 1
        lengths.append(length)
    assert lengths[0] == lengths[2]


def rename_later(path, away):
    time.sleep(0.5)
    away.rename(path)


def test_a_temporarily_unreadable_file_is_read(tmp_path):
    """The disk error is real, not a mock: reading address 0 of /proc/self/mem fails with it."""
    path, away = write(tmp_path / "rows.jsonl", ROWS * 2), tmp_path / "away.jsonl"
    rows = open_rows(path)
    path.rename(away)
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"), open(path, "rb") as file:
        file.read(10)
    thread = threading.Thread(target=rename_later, args=(path, away))
    thread.start()
    assert rows[300] == ROWS[300 - 205]
    thread.join()


def test_a_lasting_disk_error_is_reported_with_the_file_after_the_last_retry(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    rows = FileRows([open_file(path)], retry_seconds=(0.01, 0.02))
    path.unlink()
    path.symlink_to("/proc/self/mem")
    for _ in range(2):  # the second read raises the stored error, without retries
        with pytest.raises(ReadError, match=r"rows.jsonl, .*cannot be read after 3 attempts: .*Input/output error"):
            rows[0]


def test_a_damaged_row_is_a_bad_row_and_not_a_read_error(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        pa.Table.from_pylist(ROWS), path, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    data = bytearray(path.read_bytes())
    data[data.index("问题 7 ".encode())] ^= 1
    path.write_bytes(data)
    with pytest.raises(RowError, match="rows.parquet, row 9 cannot be read: .*CRC") as caught:
        FileRows([open_file(path)], retry_seconds=(0.01,))[9]
    assert not isinstance(caught.value, ReadError)


def test_held_out_rows_are_the_last_rows_and_only_those(tmp_path):
    train, held_out = split_rows(open_rows(write(tmp_path / "rows.parquet")), 33)
    assert [train[i] for i in range(len(train))] == ROWS[:-33]
    assert [held_out[i] for i in range(len(held_out))] == ROWS[-33:]
    assert train.groups.num_rows == 172 and held_out.groups.num_rows == 33
    assert held_out.where(0).endswith("row 172")
    with pytest.raises(IndexError):
        train[172]
    with pytest.raises(UsageError, match="at least one must remain"):
        split_rows(held_out, 33)


def test_bundled_rows_never_repeat_so_held_out_ones_are_new():
    rows = BundledRows()
    train, held_out = split_rows(rows, 240)
    prompts = [train[i]["prompt"] for i in range(len(train))]
    held_out_prompts = {held_out[i]["prompt"] for i in range(len(held_out))}
    assert len(set(prompts)) == len(prompts) == NUM_BUNDLED_ROWS - 240
    assert len(held_out_prompts) == 240 and not held_out_prompts & set(prompts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.parquet", None, "does not exist"),
        ("rows.csv", b"a,b", "must end in .parquet"),
        ("empty.jsonl", b"", "contains no rows"),
        ("empty.parquet", b"", "cannot be read as parquet"),
        ("pretty.json", b'[\n  {"prompt": "a"}\n]', "one object per line"),
        ("array.json", b'[{"prompt": "a"}]', "one object per line"),
        ("broken.jsonl", b'{"prompt": \n', "line 1 "),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        open_rows(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_missing_column_is_reported_with_the_file_and_its_columns(tmp_path, suffix):
    write(tmp_path / f"a{suffix}")
    write(tmp_path / f"b{suffix}", [{"question": "x", "response": "y"}])
    with pytest.raises(UsageError, match=rf"b{suffix} has no column 'prompt', it has 'question', 'response'"):
        open_rows(f"{tmp_path}/*{suffix}", columns=["prompt", "response"])


def test_a_file_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="rows.parquet twice"):
        open_rows(f"{path},{tmp_path}/*.parquet")


def test_files_of_different_kinds_form_one_sequence(tmp_path):
    half = write(tmp_path / "a.parquet", ROWS[:50])
    other = write(tmp_path / "b.jsonl", ROWS[50:])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(other.read_bytes()))
    rows = open_rows([half, other, tmp_path / "c.jsonl.gz"], columns=["prompt", "response"])
    assert [rows[i] for i in range(len(rows))] == ROWS + ROWS[50:]
    assert rows.where(60).startswith(f"{other}, line 11 (byte ")
    assert [name for name, _ in rows.fingerprints()] == [str(half), str(other), f"{tmp_path}/c.jsonl.gz"]


def test_a_folder_that_the_datasets_package_saved_is_read(tmp_path):
    Dataset = pytest.importorskip("datasets").Dataset
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    rows = open_rows(tmp_path / "saved", columns=["prompt"])
    assert [rows[i] for i in range(len(rows))] == [{"prompt": row["prompt"]} for row in ROWS]


def test_a_dataset_that_can_only_be_streamed_is_refused_with_advice():
    with pytest.raises(UsageError, match="generator has no random access.*parquet"):
        as_rows(row for row in ROWS)
    assert as_rows(ROWS) is ROWS


def test_a_replaced_file_is_reported_immediately_and_not_as_a_bad_row(tmp_path):
    path = write(tmp_path / "rows.parquet")
    rows = open_rows(path)
    write(path, ROWS[1:])
    start = time.monotonic()
    with pytest.raises(ReadError, match="row 50 cannot be read: .*rows.parquet is not the file that was opened"):
        rows[50]
    assert time.monotonic() - start < 0.2


def test_reading_a_damaged_row_is_not_retried(tmp_path):
    path = write(tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), path, write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    rows = open_rows(path)
    start = time.monotonic()
    with pytest.raises(RowError):
        rows[0]
    assert time.monotonic() - start < 0.2
