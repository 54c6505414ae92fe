"""Parquet and Arrow files give the rows that were written. Also tested: damage, copies, and memory use."""

import json
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors import safe_open

from lowmem.data.files.cache import derive
from lowmem.data.files.parquet import ParquetFile
from lowmem.data.files.parquet_headers import Chunk, read_pages
from lowmem.data.files.record_batches import TableLimits, find_batches
from lowmem.data.files.source import Source, dataset_files
from lowmem.data.files.tables import ArrowFile
from lowmem.errors import ChangedError, UsageError
from tests.forked import fork_ranks
from tests.processes import run

WANTED = {"prompt": "text", "response": "text"}
CHATS = {"chat": "messages"}


def row(number):
    chat = [{"role": "system", "content": "be brief " * 20}, {"role": "user", "content": f"问题 {number}"}]
    return {
        "prompt": f"问题 {number} " + "what? " * (number % 7),
        "response": ["yes", "no", None][number % 3],
        "chat": chat[: 1 + number % 2] if number % 5 else [],
        "number": number,
    }


ROWS = [row(number) for number in range(205)]


def table(rows=ROWS, text=None):
    """Return the rows as a table whose texts have the Arrow type `text`; with large_string, chats are large lists."""
    text = text or pa.string()
    large = pa.types.is_large_string(text)
    turn = pa.struct([("role", text), ("content", text)])
    chat = pa.large_list(turn) if large else pa.list_(turn)
    schema = pa.schema([("prompt", text), ("response", text), ("chat", chat), ("number", pa.int64())])
    if pa.types.is_dictionary(text):  # pyarrow cannot build dictionaries within lists from Python values
        return table(rows).cast(schema) if not rows else pa.Table.from_pylist(rows, table(rows).schema).cast(schema)
    return pa.Table.from_pylist(rows, schema)


def write_parquet(path, rows=ROWS, **settings):
    parquet.write_table(table(rows), path, **settings)
    return Source(str(path))


def write_arrow(path, written=None, *, make=pa.ipc.new_stream, max_rows=20, **settings):
    written = table() if written is None else written
    with make(str(path), written.schema, options=pa.ipc.IpcWriteOptions(**settings)) as writer:
        writer.write_table(written, max_chunksize=max_rows)
    return Source(str(path))


def all_rows(file):
    groups = ((file.read_group(group), int(rows)) for group, rows in enumerate(file.group_rows) if rows)
    return [file.row(data, index) for data, rows in groups for index in range(rows)]


def only(columns, rows=ROWS):
    return [{name: row[name] for name in columns} for row in rows]


def flip(path, offset, bit=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


# With COPIED, every row group and record batch is too large, so files are copied; with PIECES, in small pieces.
COPIED = TableLimits(row_group_bytes=0, batch_bytes=0)
PIECES = replace(COPIED, piece_rows=40)


@pytest.mark.parametrize("size", [1, 20, 1000])
@pytest.mark.parametrize("wanted", [WANTED, CHATS, None])
@pytest.mark.parametrize("settings", [{"compression": "zstd"}, {"use_dictionary": False, "write_page_checksum": True}])
def test_a_parquet_file_gives_the_rows_that_were_written(tmp_path, size, wanted, settings):
    file = ParquetFile(write_parquet(tmp_path / "rows.parquet", row_group_size=size, **settings), wanted)
    assert file.group_rows.tolist() == [min(size, 205 - first) for first in range(0, 205, size)]
    assert all_rows(file) == only(wanted or ROWS[0])
    data = file.read_group(len(file.group_rows) - 1)
    assert [file.row(data, index) for index in (0, file.group_rows[-1] - 1)][-1] == only(wanted or ROWS[0])[204]


@pytest.mark.parametrize("text", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("wanted", [WANTED, CHATS])
@pytest.mark.parametrize("limits", [TableLimits(), PIECES], ids=["as it is", "copied"])
def test_texts_of_type_large_string_string_view_and_dictionary_are_read(tmp_path, text, wanted, limits):
    rows = table(text=text)
    source = write_arrow(tmp_path / "rows.arrow", rows, max_rows=1000)
    assert all_rows(ArrowFile(source, wanted, limits=limits)) == only(wanted)
    if text != pa.string_view() or wanted != CHATS:  # pyarrow writes no views within lists to parquet
        parquet.write_table(rows.select(list(wanted)), tmp_path / "rows.parquet", row_group_size=50)
        assert all_rows(ParquetFile(Source(str(tmp_path / "rows.parquet")), wanted, limits=limits)) == only(wanted)


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("wanted", [WANTED, CHATS, None])
def test_an_arrow_file_gives_the_rows_that_were_written(tmp_path, make, wanted):
    file = ArrowFile(write_arrow(tmp_path / "rows.arrow", make=make), wanted)
    assert file.group_rows.tolist() == [20] * 10 + [5]
    assert all_rows(file) == only(wanted or ROWS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_arrow_file_is_copied(tmp_path, make, compression, capsys):
    source = write_arrow(tmp_path / "rows.arrow", make=make, max_rows=100, compression=compression)
    file = ArrowFile(source, WANTED)
    assert all_rows(file) == only(WANTED)
    assert capsys.readouterr().out.count("rows.arrow: making") == 1


def test_an_arrow_stream_whose_dictionary_is_replaced_is_read(tmp_path):
    source = Source(str(tmp_path / "rows.arrow"))
    parts = [pa.record_batch({"prompt": pa.array(texts).dictionary_encode()}) for texts in (["a", "b"], ["c", "d"])]
    with pa.ipc.new_stream(source.name, parts[0].schema) as writer:
        for part in parts:
            writer.write_batch(part)
    assert [row["prompt"] for row in all_rows(ArrowFile(source, {"prompt": "text"}))] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("wanted", [WANTED, CHATS, None])
def test_large_groups_are_copied_once_in_order_and_in_small_pieces(tmp_path, capsys, suffix, wanted):
    path = tmp_path / f"rows.{suffix}"
    source = write_parquet(path, row_group_size=100) if suffix == "parquet" else write_arrow(path, max_rows=100)
    open_file = partial(ParquetFile if suffix == "parquet" else ArrowFile, limits=replace(PIECES, piece_bytes=2000))
    file = open_file(source, wanted)
    assert all_rows(file) == only(wanted or ROWS[0])
    assert file.group_rows.max() <= 40 and file.group_bytes.max() < 4000
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and f"rows.{suffix}: making a copy of its rows once" in output
    again = open_file(source, wanted)
    assert all_rows(again) == only(wanted or ROWS[0]) and capsys.readouterr().out == ""
    assert (again.group_rows == file.group_rows).all() and (again.group_bytes == file.group_bytes).all()


def test_readers_of_different_columns_do_not_share_a_copy(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet")
    prompts, chats = ParquetFile(source, WANTED, limits=PIECES), ParquetFile(source, CHATS, limits=PIECES)
    assert all_rows(prompts) == only(WANTED) and all_rows(chats) == only(CHATS)


def test_a_copy_is_made_again_when_its_file_changed(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet")
    assert all_rows(ParquetFile(source, WANTED, limits=PIECES)) == only(WANTED)
    write_parquet(source.path, ROWS[50:])
    assert all_rows(ParquetFile(source, WANTED, limits=PIECES)) == only(WANTED, ROWS[50:])


def test_empty_row_groups_are_accepted(tmp_path):
    source = Source(str(tmp_path / "rows.parquet"))
    with parquet.ParquetWriter(source.name, table().schema) as writer:
        for rows in ([], ROWS[:3], [], ROWS[3:5], []):
            writer.write_table(table(rows))
    file = ParquetFile(source, WANTED)
    assert file.group_rows.tolist() == [0, 3, 0, 2, 0] and all_rows(file) == only(WANTED, ROWS[:5])
    assert file.location(3, 1) == "row 4"
    copy = ParquetFile(source, WANTED, limits=COPIED)
    assert copy.group_rows.tolist() == [5] and all_rows(copy) == only(WANTED, ROWS[:5])


def test_files_without_rows_can_be_opened(tmp_path):
    empty = write_parquet(tmp_path / "rows.parquet", []), write_arrow(tmp_path / "rows.arrow", table([]))
    for source, open_file in zip(empty, (ParquetFile, ArrowFile), strict=True):
        assert open_file(source, WANTED, limits=PIECES).group_rows.sum() == 0


LONG = ["".join(map(chr, np.random.default_rng(i).integers(97, 123, 2000))) for i in range(10)]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([f"{number} {LONG[0][: number % 200]}" for number in range(5000)]),
        pa.array([f"{number} {LONG[0][: number % 200]}" for number in range(5000)], pa.large_string()),
        pa.array([LONG[number % 10] for number in range(5000)]),
        pa.array([["yes", "no"][number % 2] for number in range(5000)]),
        pa.array(
            [[{"role": "user", "content": text} for text in (LONG[0], f"{i} {LONG[1][:100]}")] for i in range(2000)]
        ),
    ],
    ids=["unique", "large", "repeated", "short", "chats"],
)
def test_group_bytes_are_about_the_decoded_size_of_a_group(tmp_path, column, compression):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path, compression=compression)
    file = ParquetFile(Source(str(path)), None)
    decoded = file.read_group(0)["text"].nbytes
    assert decoded / 1.05 < file.group_bytes[0] < 1.3 * decoded


def test_group_bytes_count_wanted_columns_only(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet")
    every, some = ParquetFile(source, None).group_bytes, [ParquetFile(source, w).group_bytes for w in (WANTED, CHATS)]
    assert 0 < every - sum(some) < 8 * 205 + 200 * 4 + 2000  # the bytes of the column `number`


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"question": "text"}, r"has no column 'question', it has 'prompt', 'response', 'chat', 'number'"),
        ({"number": "text"}, r"column 'number' must hold text, found int64"),
        ({"chat": "text"}, r"column 'chat' must hold text, found list"),
        ({"prompt": "messages"}, r"column 'prompt' must hold messages .* found string"),
    ],
)
def test_a_missing_column_or_one_of_another_type_is_refused(tmp_path, suffix, wanted, message):
    path = tmp_path / f"rows.{suffix}"
    source, open_file = (
        (write_parquet(path), ParquetFile) if suffix == "parquet" else (write_arrow(path, table()), ArrowFile)
    )
    with pytest.raises(UsageError, match=rf"rows.{suffix}.*{message}"):
        open_file(source, wanted)


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": 1, "content": "x"}, "x"])
def test_a_list_that_does_not_hold_messages_is_not_a_chat(tmp_path, turn):
    parquet.write_table(pa.table({"chat": [[turn]]}), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="column 'chat' must hold messages"):
        ParquetFile(Source(str(tmp_path / "rows.parquet")), CHATS)


@pytest.mark.parametrize("keep", [0, 3, 100, -100, -1])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"rows.{suffix}"
    source = write_parquet(path) if suffix == "parquet" else write_arrow(path)
    path.write_bytes(path.read_bytes()[:keep])
    open_file, what = (ParquetFile, "parquet") if suffix == "parquet" else (ArrowFile, "Arrow")
    with pytest.raises(UsageError, match=rf"rows.{suffix} cannot be read as {what} \(.*\): write it again"):
        open_file(source, WANTED)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1\0\0", b"PAR1" * 9, b'{"prompt": "x"}\n']
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "rows").write_bytes(content)
    for open_file in (ParquetFile, ArrowFile):
        with pytest.raises(UsageError, match="rows cannot be read as .*: write it again"):
            open_file(Source(str(tmp_path / "rows")), None)


def test_a_flipped_bit_in_a_page_is_detected_if_the_file_has_checksums(tmp_path):
    settings = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    source = write_parquet(tmp_path / "rows.parquet", **settings)
    flip(source.path, source.path.read_bytes().index("问题 7 ".encode()))
    with pytest.raises(UsageError, match="rows.parquet cannot be read as parquet .*CRC"):  # raised while copying
        ParquetFile(source, WANTED, limits=PIECES)
    with pytest.raises(OSError, match="CRC"):
        ParquetFile(source, WANTED).read_group(0)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_truncated_deleted_or_rewritten_after_it_was_opened_raises_an_error(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    write, open_file = (write_parquet, ParquetFile) if suffix == "parquet" else (write_arrow, ArrowFile)
    file = open_file(write(path), WANTED)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError)):
        file.read_group(len(file.group_rows) - 1)
    changed = ROWS[:-1] + [row(999)]
    write(path, changed if suffix == "parquet" else table(changed))
    with pytest.raises(ChangedError, match="not the file that was opened"):
        file.read_group(len(file.group_rows) - 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.read_group(0)


def test_flipped_bits_in_a_copy_are_detected(tmp_path):
    file = ParquetFile(write_parquet(tmp_path / "rows.parquet"), WANTED, limits=PIECES)
    (copy,) = tmp_path.glob(".*copy*.rows")
    for offset in np.random.default_rng(0).integers(0, copy.stat().st_size, 100).tolist():
        flip(copy, offset)
        group = int(np.searchsorted(np.cumsum(file.group_bytes), offset, side="right"))
        with pytest.raises(ValueError, match=rf"bytes [\d,]+ to [\d,]+ of {copy} .*: delete it"):
            file.read_group(group)
        flip(copy, offset)
    assert all_rows(file) == only(WANTED)


def test_flipped_bits_in_an_arrow_file_raise_an_error_or_change_values_only(tmp_path):
    source = write_arrow(tmp_path / "rows.arrow", max_rows=1000)
    num_errors = 0
    for offset in np.random.default_rng(0).integers(0, source.path.stat().st_size, 300).tolist():
        flip(source.path, offset, bit=64)
        try:
            rows = all_rows(ArrowFile(source, None))
            assert len(rows) == 205 and rows[0].keys() == ROWS[0].keys()
        except ValueError as error:  # raised by opening the file (UsageError) or reading a group
            num_errors += 1
            assert "rows.arrow" in str(error)
        flip(source.path, offset, bit=64)
    assert num_errors > 20


def test_flipped_bits_in_pages_without_checksums_raise_an_error_or_change_values_only(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", compression="none")
    pages = source.path.stat().st_size - parquet.read_metadata(source.path).serialized_size - 8
    num_errors = 0
    for offset in np.random.default_rng(0).integers(4, pages, 300).tolist():
        flip(source.path, offset, bit=64)
        try:
            assert len(all_rows(ParquetFile(source, None))) == 205
        except (OSError, ValueError):
            num_errors += 1
        flip(source.path, offset, bit=64)
    assert num_errors > 20


def test_a_fingerprint_depends_on_the_content_alone(tmp_path):
    rows = [{"prompt": LONG[i % 10] + str(i), "response": "x", "chat": [], "number": i} for i in range(1000)]
    for rows_written in (ROWS, rows):  # the first file is small, and the second, with 2 MB, replaces it
        source = write_parquet(tmp_path / "a.parquet", rows_written)
        first = ParquetFile(source, WANTED).fingerprint()
        (tmp_path / "b.parquet").write_bytes(source.path.read_bytes())
        assert ParquetFile(Source(str(tmp_path / "b.parquet")), CHATS).fingerprint() == first
        write_parquet(source.path, rows_written[1:] + rows_written[:1])
        assert ParquetFile(source, WANTED).fingerprint() != first


def test_flipped_bits_anywhere_in_a_small_file_change_its_fingerprint(tmp_path):
    for rows in (ROWS[:1], ROWS):
        source = write_arrow(tmp_path / "rows.arrow", table(rows))
        file = ArrowFile(source, None)
        first, size = file.fingerprint(), source.path.stat().st_size
        for offset in [0, size - 1, *np.random.default_rng(0).integers(0, size, 50).tolist()]:
            flip(source.path, offset)
            assert file.fingerprint() != first
            flip(source.path, offset)


def test_flipped_bits_anywhere_in_a_parquet_footer_change_the_fingerprint(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", ROWS * 10, row_group_size=2)
    file = ParquetFile(source, None)
    first, size = file.fingerprint(), source.path.stat().st_size
    footer_bytes = parquet.read_metadata(source.path).serialized_size
    assert footer_bytes > 300_000
    for offset in np.random.default_rng(0).integers(size - footer_bytes, size, 50).tolist():
        flip(source.path, offset)
        assert file.fingerprint() != first
        flip(source.path, offset)


def test_remote_parquet_is_read_and_copied_and_remote_arrow_is_refused(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/rows.parquet"
    local = write_parquet(tmp_path / "rows.parquet")
    with fsspec.open(url, "wb") as file:
        file.write(local.path.read_bytes())
    remote = ParquetFile(Source(url), WANTED)
    assert all_rows(remote) == only(WANTED)
    first = remote.fingerprint()
    write_parquet(local.path, ROWS[1:])
    with fsspec.open(url, "wb") as file:
        file.write(local.path.read_bytes())
    assert ParquetFile(Source(url), WANTED).fingerprint() != first
    with fsspec.open(url, "wb") as file:
        file.write(write_parquet(local.path).path.read_bytes())
    assert ParquetFile(Source(url), WANTED).fingerprint() == first
    assert all_rows(ParquetFile(Source(url), WANTED, limits=COPIED)) == only(WANTED)
    assert len(list((tmp_path / "cache").glob("*.rows"))) == 1
    with pytest.raises(UsageError, match="rows.arrow is an Arrow file, which must be local: download it"):
        ArrowFile(Source(f"memory://{tmp_path.name}/rows.arrow"), WANTED)


def test_a_folder_of_a_saved_dataset_names_its_files_in_order(tmp_path):
    assert dataset_files(tmp_path) is None
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    write_arrow(tmp_path / names[0])
    with pytest.raises(UsageError, match=f"lacks {tmp_path}/{names[1]}"):
        dataset_files(tmp_path)
    write_arrow(tmp_path / names[1])
    assert dataset_files(tmp_path) == [tmp_path / name for name in names]
    for broken in ("{}", "{", "[]"):
        (tmp_path / "state.json").write_text(broken)
        with pytest.raises(UsageError, match="cannot be read as a saved dataset"):
            dataset_files(tmp_path)


def test_a_dataset_that_the_datasets_package_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(only(["prompt", "chat"]))
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    files = [ArrowFile(Source(str(path)), {"prompt": "text"} | CHATS) for path in dataset_files(tmp_path / "one")]
    assert len(files) == 3
    assert [row for file in files for row in all_rows(file)] == only(["prompt", "chat"])
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match=f"holds the splits of a dataset: name one of {tmp_path}/two/train"):
        dataset_files(tmp_path / "two")


def test_a_remote_column_is_fetched_once_though_its_page_headers_are_read_first(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    from fsspec.spec import AbstractBufferedFile

    fetched = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            fetched.append(end - start)
            return content[start:end]

    class Remote(fsspec.AbstractFileSystem):
        def info(self, path, **options):
            return {"name": path, "size": len(content), "type": "file"}

        def _open(self, path, mode="rb", **options):
            return File(self, path, mode, **options)

    fsspec.register_implementation("counted", Remote, clobber=True)
    text = np.random.default_rng(0).bytes(4 * 2**20).hex()
    rows = pa.table({"prompt": [text[first : first + 1024] for first in range(0, len(text), 1024)]})
    parquet.write_table(rows, tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "rows.parquet").read_bytes()
    file = ParquetFile(Source("counted://rows.parquet"), None)
    fetched.clear()
    assert len(file.read_group(0)["prompt"]) == 8192
    assert len(fetched) == 2  # blocks of 5 MiB


def test_reading_needs_little_memory_for_one_large_or_many_small_groups(tmp_path):
    rows = pa.table({"prompt": [f"{number} {LONG[number % 10][:100]}" for number in range(400_000)]})
    rows = rows.append_column("response", rows.column("prompt"))
    assert rows.nbytes > 85e6
    parquet.write_table(rows, tmp_path / "one.parquet", row_group_size=400_000, compression="none")
    parquet.write_table(rows, tmp_path / "many.parquet", row_group_size=10_000)
    write_arrow(tmp_path / "one.arrow", rows, max_rows=400_000)
    code = """
        import sys
        from collections import deque
        import pyarrow.parquet, safetensors.numpy, tqdm
        from lowmem.data.files.parquet import ParquetFile
        from lowmem.data.files.tables import ArrowFile
        from lowmem.data.files.source import Source

        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

        before, count, held = peak(), 0, deque(maxlen=int(sys.argv[2]))
        file = (ArrowFile if sys.argv[1].endswith("arrow") else ParquetFile)(Source(sys.argv[1]), None)
        for group, rows in enumerate(file.group_rows):
            data = file.read_group(group)
            held.append(data)
            count += sum(file.row(data, index)["prompt"].startswith(f"{count + index} ") for index in range(0, rows))
        assert count == 400_000
        print(peak() - before)
    """
    for name, held in {"one.parquet": 64, "many.parquet": 6, "one.arrow": 64}.items():  # `held` groups take 15 MiB
        done = run(sys.executable, "-c", textwrap.dedent(code), tmp_path / name, held)
        assert done.returncode == 0, done.stderr
        mebibytes = float(done.stdout.split()[-1])
        assert mebibytes < 52, f"{name}: {mebibytes:.0f} MiB more than after imports"


@pytest.mark.parametrize(
    ("suffix", "write", "open_file"), [("parquet", "write_parquet", ParquetFile), ("arrow", "write_arrow", ArrowFile)]
)
def test_a_copy_holds_the_wanted_columns_in_any_order(tmp_path, suffix, write, open_file):
    source = globals()[write](tmp_path / f"rows.{suffix}")
    for wanted in (WANTED, dict(reversed(WANTED.items())), {"response": "text"}):
        assert all_rows(open_file(source, wanted, limits=COPIED)) == only(wanted)


@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        (pa.binary_view(), pa.large_binary()),
        (pa.list_(pa.dictionary(pa.int32(), pa.string()), 2), pa.list_(pa.string(), 2)),
        (pa.map_(pa.string(), pa.dictionary(pa.int32(), pa.string())), pa.map_(pa.string(), pa.string())),
    ],
    ids=str,
)
def test_a_copy_is_less_than_ten_times_as_large_as_its_rows(tmp_path, kind, copied):
    values = {
        "binary_view": b"%d",
        "map<string, dictionary<values=string, indices=int32, ordered=0>>": [("k", "%d")],
    }
    shape = values.get(str(kind), ["%d", "x"])

    def fill(value, i):
        if isinstance(value, list | tuple):
            return type(value)(fill(item, i) for item in value)
        return value.replace(b"%d", b"%d" % i) if isinstance(value, bytes) else value.replace("%d", str(i))

    rows = [fill(shape, i) for i in range(4000)]
    plain = pa.array(rows, copied)
    source = write_arrow(tmp_path / "rows.arrow", pa.table({"x": plain.cast(kind)}))
    file = ArrowFile(source, None, limits=COPIED)
    assert file.read_group(0)["x"].type == copied
    assert [row["x"] for row in all_rows(file)] == rows
    assert sum(path.stat().st_size for path in tmp_path.glob(".*.rows")) < 10 * plain.nbytes


def test_invalid_utf8_is_reported_for_the_file_and_not_for_its_copy(tmp_path):
    source = write_parquet(
        tmp_path / "rows.parquet",
        [{"prompt": "aXb", "response": "x", "chat": [], "number": 1}],
        use_dictionary=False,
        compression="none",
    )
    data = source.path.read_bytes()
    source.path.write_bytes(data.replace(b"aXb", b"a\xffb"))
    with pytest.raises(UsageError, match=f"{source} cannot be read as parquet .*[Uu][Tt][Ff]"):
        ParquetFile(source, WANTED, limits=COPIED)
    assert not list(tmp_path.glob(".*.rows"))


def test_a_footer_is_parsed_once_for_consecutive_reads_of_a_file(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", ROWS * 10, row_group_size=2)
    file = ParquetFile(source, WANTED)
    file.read_group(0)
    first = ParquetFile._last_parsed[1]
    file.read_group(3)
    assert ParquetFile._last_parsed[1] is first
    write_parquet(source.path, ROWS[:3])
    with pytest.raises(ChangedError, match="is not the file that was opened"):
        file.read_group(0)


def test_a_file_of_very_many_groups_is_copied(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", ROWS * 10, row_group_size=2)
    file = ParquetFile(source, WANTED, limits=TableLimits(footer_bytes=10_000))
    assert len(file.group_rows) < 100 and all_rows(file) == only(WANTED) * 10


@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_column_whose_values_do_not_repeat_is_read(tmp_path, nested):
    """pandas writes such files for categories: the schema declares a dictionary, but the file also has plain values."""
    texts = pa.array([f"{number} {LONG[number % 10][:50]}" for number in range(40_000)])
    column = texts.dictionary_encode()
    if nested:
        column = pa.StructArray.from_arrays([column, texts], names=["role", "content"])
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"x": column}), path)
    found = [row["x"]["role"] if nested else row["x"] for row in all_rows(ParquetFile(Source(str(path)), None))]
    assert found == texts.to_pylist()


def test_a_large_footer_with_larger_groups_needs_no_copy(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"x": LONG * 100}), path, row_group_size=100, use_dictionary=False)
    file = ParquetFile(Source(str(path)), None, limits=TableLimits(footer_bytes=1000))
    assert parquet.read_metadata(path).serialized_size > 1000 and len(file.group_rows) == 10
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wanted", [{"x": "text"}, None])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_duplicate_column_is_refused(tmp_path, suffix, wanted):
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["x", "x"])
    path = tmp_path / f"rows.{suffix}"
    parquet.write_table(twice, path) if suffix == "parquet" else write_arrow(path, twice)
    with pytest.raises(UsageError, match=rf"rows.{suffix} has column 'x' twice"):
        (ParquetFile if suffix == "parquet" else ArrowFile)(Source(str(path)), wanted)


def test_list_views_are_refused_in_a_file_that_needs_a_copy(tmp_path):
    rows = pa.table({"x": pa.array([["a"], ["b"]], pa.list_view(pa.string()))})
    source = write_arrow(tmp_path / "rows.arrow", rows)
    assert all_rows(ArrowFile(source, None)) == [{"x": ["a"]}, {"x": ["b"]}]
    with pytest.raises(UsageError, match="rows.arrow cannot be read as Arrow .*list_view.* use lists"):
        ArrowFile(source, None, limits=COPIED)


def test_a_time_that_python_has_no_date_for_is_a_bad_row(tmp_path):
    source = write_arrow(tmp_path / "rows.arrow", pa.table({"at": pa.array([0, 2**62]).view(pa.timestamp("s"))}))
    file = ArrowFile(source, None)
    data = file.read_group(0)
    assert file.row(data, 0)["at"].year == 1970
    with pytest.raises(ValueError, match="too large"):
        file.row(data, 1)


def test_a_file_copied_for_some_columns_can_be_opened_for_others(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet")
    for wanted in ({"prompt": "text"}, WANTED, {"prompt": "text"}):
        assert all_rows(ParquetFile(source, wanted, limits=PIECES)) == only(wanted)


def test_group_bytes_of_a_column_exclude_those_of_a_column_with_the_same_prefix(tmp_path):
    parquet.write_table(pa.table({"text": ["a"] * 100, "text_en": LONG * 10}), tmp_path / "rows.parquet")
    assert ParquetFile(Source(str(tmp_path / "rows.parquet")), {"text": "text"}).group_bytes[0] < 2000


@pytest.mark.parametrize(("suffix", "max_mebibytes"), [("parquet", 280), ("arrow", 30)])
def test_copying_long_rows_needs_little_memory_for_arrow_and_more_for_parquet(tmp_path, suffix, max_mebibytes):
    """Parquet needs more memory than Arrow: it decodes whole pages, and pyarrow writes all these rows to one page."""
    rows = pa.table({"x": [f"{number} {'q' * 400_000}" for number in range(300)]})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(rows, path, use_dictionary=False)
    else:
        write_arrow(path, rows, max_rows=300)
    code = """
        import sys
        import pyarrow.parquet, safetensors.numpy, tqdm
        from lowmem.data.files.parquet import ParquetFile
        from lowmem.data.files.tables import ArrowFile
        from lowmem.data.files.source import Source

        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

        before = peak()
        file = (ArrowFile if sys.argv[1].endswith("arrow") else ParquetFile)(Source(sys.argv[1]), None)
        assert file.group_rows.max() <= 4 and file.group_rows.sum() == 300
        print(peak() - before)
    """
    done = run(sys.executable, "-c", textwrap.dedent(code), path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < max_mebibytes


PLANTED = {
    "first half": lambda index: {name: column[: len(column) // 2] for name, column in index.items()},
    "some twice": lambda index: {name: np.append(column, column[-1:]) for name, column in index.items()},
    "no batch": lambda index: {name: column[:0] for name, column in index.items()},
    "other order": lambda index: {name: column[::-1].copy() for name, column in index.items()},
    "shape": lambda index: index | {"rows": index["rows"][:-1]},
    "scalars": lambda index: {name: np.array(column[0]) for name, column in index.items()},
    "dtype": lambda index: index | {"hashes": index["hashes"].view(np.int64)},
    "names": lambda index: index | {"more": index["rows"]},
    "negative": lambda index: index | {"rows": -index["rows"]},
    "fewer rows": lambda index: index | {"rows": index["rows"] - 1},
    "other sum": lambda index: index | {"rows": index["rows"] + [2**62, *[0] * (len(index["rows"]) - 1)]},
    "overflow": lambda index: index | {"sizes": index["sizes"] + (2**63 - 1 - index["sizes"].max())},
    "hashed": lambda index: index | {"hashed": index["hashed"] * 0},
}


def plant(source, change):
    """Store a changed index of a copy in the way in which a reader stores it."""
    (copy,) = source.path.parent.glob("*.rows")
    with safe_open(copy.with_suffix(".index"), framework="numpy") as file:
        index = {name: file.get_tensor(name) for name in file.keys()}
    content = copy.read_bytes()
    copy.unlink()

    def build(copy, report):
        copy.write(content)
        return change(index)

    derive(source, build, kind=copy.stem.rpartition(".lowmem-")[2], copies=True)


@pytest.mark.parametrize("kind", PLANTED)
def test_an_index_that_does_not_fit_its_copy_is_made_again(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    source = write_parquet(tmp_path / "rows.parquet")
    ParquetFile(source, WANTED, limits=PIECES)
    plant(source, PLANTED[kind])
    assert all_rows(ParquetFile(source, WANTED, limits=PIECES)) == only(WANTED)


def test_a_batch_that_has_other_rows_than_its_index_says_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    source = write_parquet(tmp_path / "rows.parquet")
    ParquetFile(source, WANTED, limits=PIECES)
    plant(source, lambda index: index | {"rows": index["rows"] + [1, -1, *[0] * (len(index["rows"]) - 2)]})
    with pytest.raises(ValueError, match=r"it has 40 rows, but 41 were indexed\): delete it"):
        ParquetFile(source, WANTED, limits=PIECES).read_group(0)


def read_damaged(folder, suffix, limits):
    """Read the damaged files of a folder. Prints what became of each: "ok" or the class of its error."""
    for path in sorted(folder.glob(f"*.{suffix}")):
        try:
            rows = all_rows((ArrowFile if suffix == "arrow" else ParquetFile)(Source(str(path)), None, limits=limits))
            print("ok" if rows else "empty", flush=True)
        except (OSError, ValueError) as error:
            print(type(error).__name__, flush=True)


def results_of_damaged(folder, suffix, contents, limits, capsys):
    """Read damaged files in another process, which must survive them. Returns the number of each result."""
    for number, content in enumerate(contents):
        (folder / f"{number}.{suffix}").write_bytes(content)
    assert fork_ranks(1, read_damaged, folder, suffix, limits) == [0]
    results = Counter(line.removeprefix("rank 0: ") for line in capsys.readouterr().out.splitlines())
    assert sum(results[name] for name in ("ok", "empty", "UsageError", "ValueError", "OSError")) >= len(contents)
    return results


def flipped(data, offsets, bit):
    copies = [bytearray(data) for _ in offsets]
    for copy, offset in zip(copies, offsets, strict=True):
        copy[offset] ^= bit
    return copies


def test_flipped_bits_in_arrow_files_that_are_copied_end_no_process(tmp_path, capsys):
    contents = []
    for text in (pa.dictionary(pa.int32(), pa.string()), pa.string_view()):
        source = write_arrow(tmp_path / "rows.arrow", table(ROWS[:40], text).select(["prompt", "response"]))
        data = source.path.read_bytes()
        contents += flipped(data, np.random.default_rng(0).integers(0, len(data), 30).tolist(), bit=64)
    results = results_of_damaged(tmp_path, "arrow", contents, COPIED, capsys)
    assert results["UsageError"] > 10 and results["ok"] > 10


def test_flipped_bits_in_a_parquet_footer_end_no_process(tmp_path, capsys):
    """Some make pyarrow find damaged size statistics, others give negative or wrong numbers of rows."""
    data = write_parquet(tmp_path / "rows.parquet", ROWS[:40]).path.read_bytes()
    first = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    contents = flipped(data, range(first, len(data) - 8, 4), bit=2)
    results = results_of_damaged(tmp_path, "parquet", contents, None, capsys)
    assert results["UsageError"] > 10 and results["ok"] > 10


def test_a_first_message_that_is_no_schema_is_refused(tmp_path, capsys):
    source = write_arrow(tmp_path / "rows.arrow")
    fields = b"\n\0\x0c\0\6\0\5\0\x08\0"  # where the fields of the first message are, relative to it
    data = source.path.read_bytes().replace(fields, fields.replace(b"\5", b"\0"), 1)
    assert data != source.path.read_bytes()
    source.path.unlink()
    assert results_of_damaged(tmp_path, "arrow", [data], None, capsys)["UsageError"] == 1


def test_a_message_of_an_unknown_kind_among_the_rows_is_refused_and_not_left_out(tmp_path):
    source = write_arrow(tmp_path / "rows.arrow")
    batches, *_ = find_batches(source)
    data, errors = source.path.read_bytes(), []
    for offset in range(batches.starts[1], batches.starts[1] + batches.hashed[1]):
        if data[offset] == 3:  # in one place, the kind "record batch"
            source.path.write_bytes(data[:offset] + b"\xff" + data[offset + 1 :])
            try:
                assert len(all_rows(ArrowFile(source, None))) == len(ROWS)
            except (UsageError, ValueError) as error:
                errors.append(str(error))
    assert any("rows were expected at byte" in error for error in errors)


def test_a_parquet_footer_with_huge_sizes_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = pa.table({"prompt": ["a"]})
    parquet.write_table(rows, path, compression="none", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    size = parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    sizes = bytes([22, 2 * size, 22, 2 * size])  # two int64 fields: the decoded and the stored size
    huge = b"\x16\xfe" + b"\xff" * 8 + b"\1"  # 2**63 - 1
    assert data.count(sizes) == 1
    for changed in (huge + sizes[2:], huge * 2):
        content = data.replace(sizes, changed)
        footer = int.from_bytes(data[-8:-4], "little") + len(content) - len(data)
        path.write_bytes(content[:-8] + footer.to_bytes(4, "little") + b"PAR1")
        assert parquet.read_metadata(path).num_rows == 1  # pyarrow accepts it
        with pytest.raises(UsageError, match="its footer has impossible sizes for a row group of 1 rows"):
            ParquetFile(Source(str(path)), None)


def test_a_page_header_nested_without_end_is_an_error(tmp_path):
    (tmp_path / "page").write_bytes(b"\x19" * 4000)  # a list in a list in a list ...
    chunk = Chunk(0, 4000, 4000, 1, 0, 0, 1)
    with open(tmp_path / "page", "rb") as file, pytest.raises(ValueError, match="page header at byte 0 is damaged"):
        read_pages(file, chunk, limit=2**20)


def test_a_column_shorter_than_the_footer_says_is_an_error_and_not_rows_of_another_length(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    file = ParquetFile(source, WANTED)
    file.group_rows[0] += 1  # as if the footer said so
    with pytest.raises(ValueError, match="column 'prompt' has 205 rows, the footer says 206"):
        file.read_group(0)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_small_file_of_long_rows_is_refused_or_has_bad_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    for length, is_refused in ((2**28, True), (2**24 + 1, False)):
        rows = pa.table({"prompt": ["a" * length, "b"]})
        if suffix == "parquet":
            parquet.write_table(rows, path, compression="zstd", use_dictionary=False, write_statistics=False)
        else:
            write_arrow(path, rows, compression="zstd")
        open_file = partial(ParquetFile if suffix == "parquet" else ArrowFile, Source(str(path)), None)
        assert path.stat().st_size < 50_000
        if is_refused:
            with pytest.raises(UsageError, match="decodes to 268,435,[0-9]{3}, the limit is 268,435,456"):
                open_file()
            assert list(tmp_path.iterdir()) == [path]
        else:
            file = open_file()
            assert file.group_rows.tolist() == [1, 1] and file.row(file.read_group(1), 0) == {"prompt": "b"}
            with pytest.raises(ValueError, match=r"the row has 16,777,2\d\d bytes, the limit is 16,777,216: split it"):
                file.read_group(0)
            assert sum(copy.stat().st_size for copy in tmp_path.glob(".*.rows")) < 10_000


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_dictionary_whose_long_value_repeats_does_not_take_the_memory(tmp_path, suffix, nested):
    """A file of 100 kB holds 100,000 texts of 300 kB, or two lists of 50,000 of them."""
    texts = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), pa.array(["q" * 300_000]))
    column = pa.ListArray.from_arrays(pa.array([0, 50_000, 100_000], pa.int32()), texts) if nested else texts
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.table({"x": column}), path)
    else:
        write_arrow(path, pa.table({"x": column}), max_rows=10**6, compression="zstd")
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match="decode to at least|the row has 15,000,[0-9,]+ bytes"):
        (ParquetFile if suffix == "parquet" else ArrowFile)(Source(str(path)), None).read_group(0)
    assert pa.default_memory_pool().max_memory() - before < 400e6


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_text_changed_in_place_is_noticed_by_the_files_time(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        source = write_parquet(path, compression="none", use_dictionary=False)
    else:
        source = write_arrow(path)
    file = (ParquetFile if suffix == "parquet" else ArrowFile)(source, WANTED)
    file.read_group(0)
    with open(path, "r+b") as opened:
        opened.seek(path.read_bytes().index("问题 7 ".encode()))
        opened.write("答案".encode())
    with pytest.raises(ChangedError, match="is not the file that was opened"):
        file.read_group(0)
