import gzip
import io
import json
import os
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from lowmem.data.files.cache import derive
from lowmem.data.files.line_index import LONGEST_LINE, are_blank_lines, fits_lines, index_lines
from lowmem.data.files.lines import JsonLinesFile, TextFile
from lowmem.data.files.source import Source
from lowmem.errors import UsageError
from tests.processes import run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path_factory.mktemp("cache")))


def open_lines(path, content=None, wanted=None, **limits):
    if content is not None:
        path.write_bytes(content)
    kind = JsonLinesFile if any(suffix.startswith(".json") for suffix in path.suffixes) else TextFile
    return kind(Source(str(path)), wanted, **limits)


def all_rows(file):
    groups = ((group, file.read_group(group)) for group in range(len(file.group_rows)))
    return [file.row(data, index) for group, data in groups for index in range(file.group_rows[group])]


def all_locations(file):
    return [file.location(g, i) for g in range(len(file.group_rows)) for i in range(file.group_rows[g])]


def reason(path, content, index=1):
    """Return `location: error` for the error that reading row `index` of the first group must raise."""
    file = open_lines(path, content)
    with pytest.raises(ValueError) as caught:
        file.row(file.read_group(0), index)
    return f"{file.location(0, index)}: {caught.value}"


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def random_lines(seed, num_lines, longest=300):
    """Make lines of letters, spaces and umlauts; about one in six is blank, and each ends in LF or CRLF."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(num_lines):
        kind = random.integers(12)
        body = ["", " \t "][kind] if kind < 2 else "".join(random.choice(list("ab zü"), random.integers(1, longest)))
        lines.append(body.encode() + [b"\n", b"\r\n"][random.integers(2)])
    return lines


@pytest.mark.parametrize("piece", [1, 7, 1000, 2**20])
def test_rows_and_locations_do_not_depend_on_the_piece_size(tmp_path, piece):
    lines = random_lines(1, 20 if piece == 1 else 3000)
    lines[-1] = lines[-1].rstrip() + b"the end"
    expected, locations, byte = [], [], 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            expected.append({"text": line.decode().removesuffix("\n").removesuffix("\r")})
            locations.append(f"line {number:,} (byte {byte:,})")
        byte += len(line)
    file = open_lines(tmp_path / "rows.txt", b"".join(lines), piece_bytes=piece)
    assert all_rows(file) == expected
    assert all_locations(file) == locations


def test_groups_do_not_depend_on_the_piece_size(tmp_path):
    path = tmp_path / "rows.txt"
    lines = random_lines(2, 3000) + [b"l" * size + b"\n" for size in (2**20, 2**19 - 1, 2**19 - 1, 2**20 - 1, 3, 2**21)]
    path.write_bytes(b"".join(lines) + b" \n" * 2**20 + b"the end")
    indexes = []
    for piece in (2**12, 2**20, 2**23):
        indexes.append(index_lines(Source(str(path)), None, lambda num_bytes: None, piece_bytes=piece))
    for index in indexes[1:]:
        assert all(np.array_equal(index[name], indexes[0][name]) for name in index)
    sizes, rows = indexes[0]["end_byte"] - indexes[0]["first_byte"], indexes[0]["rows"]
    assert rows.max() == 256 and max(sizes[rows > 1]) == 2**20


def test_the_bytes_of_a_group_include_its_overhead_in_memory(tmp_path):
    file = open_lines(tmp_path / "rows.txt", b"a\n" * 300)
    data = file.read_group(0)
    assert file.group_rows.tolist() == [256, 44]
    held = sys.getsizeof(data.text) + data.starts.nbytes
    assert held <= file.group_bytes[0] <= 1.3 * held


def test_an_empty_file_has_no_groups(tmp_path):
    for content in (b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"):
        assert len(open_lines(tmp_path / "rows.txt", content).group_rows) == 0


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    file = open_lines(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')
    assert all_rows(file) == [{"a": 1}, {"a": 2}]
    assert all_locations(file) == ["line 1 (byte 3)", "line 2 (byte 12)"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "line 2 (byte 9): Expecting ',' delimiter at byte 16"),
        ('{"ü": x}'.encode(), "line 2 (byte 9): Expecting value at byte 16"),
        (b'{"a": "x', "line 2 (byte 9): Unterminated string starting at byte 15"),
        (b'{"a": 1} {"a": 2}', "line 2 (byte 9): Extra data at byte 18"),
        (b'{"a": NaN}', "line 2 (byte 9): NaN is not a JSON value"),
        (b'{"a": -Infinity}', "line 2 (byte 9): -Infinity is not a JSON value"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "line 2 (byte 9): key 'b' occurs twice in one object"),
        (b'{"a": "\\uD83d"}', "line 2 (byte 9): \\ud83d is an unpaired surrogate"),
        (b'{"\\udE00\\ud83d": 1}', "line 2 (byte 9): \\ude00 is an unpaired surrogate"),
        (b'{"a": "\xc3("}', "line 2 (byte 9): UTF-8 was expected, found byte 16 (0xc3), invalid continuation byte"),
        (b'{"a": "\0"}', "line 2 (byte 9): Invalid control character at byte 16"),
        (b"\0\0\0", "line 2 (byte 9): a JSON object was expected, found '\\x00\\x00\\x00'"),
        (b"[1, 2]", "line 2 (byte 9): a JSON object was expected, found '[1, 2]': write one object per line"),
        (b'{"a": ' + b"[" * 10**5, "line 2 (byte 9): the JSON is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 2 (byte 9): Exceeds the limit"),
    ],
)
def test_bad_json_is_refused_with_line_byte_and_reason(tmp_path, line, message):
    assert reason(tmp_path / "rows.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n').startswith(message)
    with pytest.raises(UsageError) as caught:
        open_lines(tmp_path / "first.jsonl", line)
    assert str(caught.value).startswith(f"{tmp_path}/first.jsonl, line 1 (byte 0): ")


def test_escapes_that_are_whole_characters_are_read(tmp_path):
    file = open_lines(tmp_path / "rows.jsonl", rb'{"a": "\ud83d\ude00 \\ud83d \u00fc"}')
    assert all_rows(file) == [{"a": "😀 \\ud83d ü"}]


def test_bad_text_is_refused_with_line_and_byte(tmp_path):
    message = reason(tmp_path / "a.txt", b"good\nbad\0\n")
    assert message.startswith("line 2 (byte 5): expected text, but byte 8 is NUL")
    message = reason(tmp_path / "b.txt", b"good\n\xff\n")
    assert message.startswith("line 2 (byte 5): UTF-8 was expected, found byte 5 (0xff)")


def test_a_line_of_100_megabytes_is_a_bad_row_and_never_whole_in_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as out:
        out.write(b'{"a": 1}\n{"a": "')
        for _ in range(100):
            out.write(b"x" * 10**6)
        out.write(b'"}\n{"a": 3}\n')
    code = (
        "import sys\n"
        "from lowmem.data.files.lines import JsonLinesFile\n"
        "from lowmem.data.files.source import Source\n"
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
        "before = peak()\n"
        "file = JsonLinesFile(Source(sys.argv[1]), None)\n"
        "print(file.group_rows.tolist(), file.group_bytes.max())\n"
        "for group in (0, 2): print(file.row(file.read_group(group), 0), file.location(group, 0))\n"
        "try: file.row(file.read_group(1), 0)\n"
        "except ValueError as error: print(file.location(1, 0), error)\n"
        "print((peak() - before) // 1024)"
    )
    result = run(sys.executable, "-c", code, path, LOWMEM_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    *_, groups, first, third, second, mib = result.stdout.splitlines()
    assert groups == "[1, 1, 1] 529"
    assert first == "{'a': 1} line 1 (byte 0)" and third == "{'a': 3} line 3 (byte 100,000,019)"
    assert second.startswith("line 2 (byte 9) the line has 100,000,010 bytes, the limit is 16,777,216")
    assert int(mib) < 48


@pytest.mark.parametrize("piece", [2**20, 2**25])
def test_a_line_may_have_the_maximum_length_but_not_one_byte_more(tmp_path, piece):
    lines = [b"y" * (LONGEST_LINE - 1), b"z" * LONGEST_LINE, b" " * (LONGEST_LINE - 1), b" " * LONGEST_LINE, b"end"]
    file = open_lines(tmp_path / "rows.txt", b"\n".join(lines), piece_bytes=piece)
    assert file.group_rows.tolist() == [1, 1, 1, 1]
    assert len(file.row(file.read_group(0), 0)["text"]) == LONGEST_LINE - 1
    for group in (1, 2):
        with pytest.raises(ValueError, match="16,777,217 bytes"):
            file.row(file.read_group(group), 0)
    assert file.row(file.read_group(3), 0) == {"text": "end"} and file.location(3, 0).startswith("line 5 ")


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        ({"b": "x"}, {"a": "text"}, "has no column 'a', it has 'b'"),
        ({"a": 3}, {"a": "text"}, "line 2 (byte 1): column 'a' must hold text, found int 3: name another column"),
        ({"a": "x"}, {"a": "messages"}, "column 'a' must hold messages, "),
        ({"a": [{"role": "user"}]}, {"a": "messages"}, "found list [{'role': 'user'}]"),
    ],
)
def test_a_row_of_the_first_group_must_have_the_wanted_columns(tmp_path, row, wanted, message):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UsageError) as caught:
        open_lines(path, b"\n" + json.dumps(row).encode(), wanted)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("rows", ['[\n{"a": 1},\n{"a": 2}\n]', '[{"a": 1},\n{"a": 2}]', f"[{'1,' * 2**23}1]"])
def test_a_file_that_holds_one_json_array_is_refused(tmp_path, rows):
    with pytest.raises(UsageError, match=r"rows.json holds a JSON array, .*: write one object per line \(`train_low"):
        open_lines(tmp_path / "rows.json", rows.encode())


@pytest.mark.parametrize("row", [[1, 2], {"a": "x" * LONGEST_LINE}, {"b": 1}])
def test_a_file_with_a_bad_first_row_is_accepted(tmp_path, row):
    content = json.dumps(row).encode() + b'\n{"a": "good"}\n'
    file = open_lines(tmp_path / "rows.jsonl", content, {"a": "text"})
    group = len(file.group_rows) - 1
    assert file.row(file.read_group(group), int(file.group_rows[group]) - 1) == {"a": "good"}


def test_a_file_of_one_line_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"rows.txt, line 1 \(byte 0\): the line has 16,777,217 bytes"):
        open_lines(tmp_path / "rows.txt", b"x" * (LONGEST_LINE + 1))


def test_a_repeated_key_among_150_000_keys_is_found_in_seconds(tmp_path):
    keys = [*range(150_000), 149_999]
    row = "{" + ",".join(f'"k{key}":1' for key in keys) + "}"
    start = time.monotonic()
    with pytest.raises(UsageError, match="key 'k149999' occurs twice"):
        open_lines(tmp_path / "rows.jsonl", row.encode())
    assert time.monotonic() - start < 5  # counting each key took over 40 s


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "' + b"x" * 2**28 + b'"}\n', "decode to at least"),
        (b'{"a": "' + b"x" * LONGEST_LINE + b'"}\n', "rows.jsonl.zst, line 1: the line has 16,777,226 bytes"),
    ],
    ids=["bomb", "long line"],
)
def test_a_small_file_that_decodes_to_far_more_is_refused_and_its_copy_is_removed(tmp_path, content, message):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(content))
    with pytest.raises(UsageError, match=message):
        open_lines(tmp_path / "rows.jsonl.zst")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl.zst"]


def test_an_object_on_several_lines_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"line 1 \(byte 0\): Expecting .*, and write one object per line"):
        open_lines(tmp_path / "rows.json", json.dumps({"a": 1}, indent=1).encode())


def test_a_file_without_a_suffix_is_plain_text(tmp_path):
    assert all_rows(open_lines(tmp_path / "rows", b"hi\n")) == [{"text": "hi"}]


def test_a_file_damaged_since_it_was_indexed_is_refused_at_the_start(tmp_path):
    path = tmp_path / "rows.jsonl"
    open_lines(path, PLAIN * 200)
    times = path.stat()
    with open(path, "r+b") as file:
        file.write(b"?")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match=f"{path} cannot be read .*differ from what was indexed"):
        open_lines(path)


def test_chats_and_the_text_column_are_read_unchanged(tmp_path):
    chat = {"m": [{"role": "user", "content": "hi", "name": "Jo"}, {"role": "assistant", "content": ""}]}
    assert all_rows(open_lines(tmp_path / "a.jsonl", json.dumps(chat).encode(), {"m": "messages"})) == [chat]
    assert all_rows(open_lines(tmp_path / "a.txt", b"hi", {"text": "text"})) == [{"text": "hi"}]
    with pytest.raises(UsageError, match="a.txt has no column 'prompt', it has 'text'"):
        open_lines(tmp_path / "a.txt", None, {"prompt": "text"})


ROWS = [{"a": f"row {i} ü"} for i in range(1000)]
PLAIN = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".gz", lambda content: gzip.compress(content[:12_345]) + gzip.compress(content[12_345:])),
        (".zst", zstd),
        (".zstd", lambda content: zstd(content[:12_345]) + zstd(content[12_345:])),
    ],
)
def test_compressed_files_have_the_rows_and_the_fingerprint_of_plain_ones(tmp_path, suffix, compress):
    compressed = open_lines(tmp_path / f"rows.jsonl{suffix}", compress(PLAIN), {"a": "text"})
    plain = open_lines(tmp_path / "plain.jsonl", PLAIN)
    assert all_rows(compressed) == all_rows(plain) == ROWS
    assert compressed.fingerprint() == plain.fingerprint()
    assert compressed.location(1, 0) == plain.location(1, 0).replace("byte", "decompressed byte")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".gz", gzip.compress(PLAIN)[:-5]),
        (".gz", gzip.compress(PLAIN)[:1000]),
        (".gz", gzip.compress(PLAIN) + gzip.compress(PLAIN)[:20]),
        (".gz", gzip.compress(PLAIN)[:1000] + b"???" + gzip.compress(PLAIN)[1003:]),
        (".gz", PLAIN),
        (".zst", zstd(PLAIN)[:-5]),
        (".zst", PLAIN),
    ],
)
def test_a_damaged_compressed_file_is_named_and_leaves_no_copy(tmp_path, monkeypatch, suffix, content):
    monkeypatch.delenv("LOWMEM_CACHE")
    path = tmp_path / f"rows.jsonl{suffix}"
    message = f"{path} cannot be decompressed as (gzip|zstd) .*: it is damaged or truncated"
    with pytest.raises(UsageError, match=message):
        open_lines(path, content)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_the_fingerprint_depends_only_on_the_content(tmp_path):
    first = open_lines(tmp_path / "a.jsonl", PLAIN).fingerprint()
    assert open_lines(tmp_path / "b.jsonl", PLAIN).fingerprint() == first
    assert open_lines(tmp_path / "c.jsonl", PLAIN.replace(b"row 700", b"row 7OO")).fingerprint() != first
    assert open_lines(tmp_path / "d.jsonl", PLAIN + b'{"a": "more"}').fingerprint() != first


def test_a_file_that_changes_or_disappears_while_it_is_read_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = open_lines(path, PLAIN)
    where = file.location(1, 3)
    assert where.startswith("line 260 (byte ")
    path.write_bytes(PLAIN.replace(b"row 700", b"row 7OO"))
    assert file.row(file.read_group(0), 0) == ROWS[0]
    with pytest.raises(
        ValueError, match=rf"bytes [\d,]+ to [\d,]+ of {path} differ from what was indexed: .*; write it again"
    ):
        file.read_group(2)
    path.write_bytes(PLAIN[:6000])
    with pytest.raises(ValueError, match="differ from what was indexed"):
        file.read_group(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.read_group(0)
    assert file.location(1, 3).startswith("row 4 from line 257 on (byte ")


def test_a_damaged_copy_is_reported_and_made_again_once_it_is_removed(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    file = open_lines(path, gzip.compress(PLAIN))
    (copy,) = Path(os.environ["LOWMEM_CACHE"]).glob("*.rows")
    damaged = bytearray(PLAIN)
    damaged[100] ^= 1
    copy.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{copy} differ from what was indexed: .* remove it and start again"):
        file.read_group(0)
    copy.unlink()
    assert all_rows(open_lines(path)) == ROWS


def test_a_file_that_grows_while_it_is_indexed_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PLAIN)

    def write_more(num_bytes):
        if path.stat().st_size == len(PLAIN):
            path.write_bytes(PLAIN + PLAIN)

    with pytest.raises(UsageError, match=rf"{path} has {len(PLAIN):,} bytes, but {2 * len(PLAIN):,} were read"):
        index_lines(Source(str(path)), None, write_more)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone.jsonl cannot be read \(.*No such file"):
        open_lines(tmp_path / "gone.jsonl")


class _CutsShort(SimpleHTTPRequestHandler):
    """Like many servers, this one supports no range requests; it sends only the first half of files named cut.*."""

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut." in self.path else content)
        self.close_connection = True

    def log_message(self, *words):
        pass


@pytest.fixture
def url(tmp_path):
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("localhost", 0), partial(_CutsShort, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_files_are_read_from_a_copy(tmp_path, url):
    (tmp_path / "rows.jsonl").write_bytes(PLAIN)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(PLAIN))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        for _ in range(2):
            file = JsonLinesFile(Source(f"{url}/{name}"), {"a": "text"})
            assert all_rows(file) == ROWS
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
        assert all_rows(file) == ROWS
        with pytest.raises(UsageError, match=f"{url}/{name} cannot be read"):
            JsonLinesFile(Source(f"{url}/{name}"), {"a": "text"})


@pytest.mark.parametrize("name", ["cut.jsonl", "cut.jsonl.gz"])
def test_a_lost_connection_leaves_no_copy(tmp_path, url, name):
    (tmp_path / name).write_bytes(gzip.compress(PLAIN) if name.endswith("gz") else PLAIN)
    with pytest.raises(UsageError, match=f"{url}/{name} cannot be read .*not completed"):
        JsonLinesFile(Source(f"{url}/{name}"), {"a": "text"})
    assert not list(Path(os.environ["LOWMEM_CACHE"]).iterdir())


CONTENT = b"\xef\xbb\xbf" + b"".join(b"row %d\n" % number for number in range(2000)) + b"\n \n"


def plant(path, change):
    """Write CONTENT to a .gz file, and store `change(index)` in the way in which readers store its index."""

    def build(copy, report):
        return change(index_lines(Source(str(path)), copy, report))

    path.write_bytes(gzip.compress(CONTENT))
    derive(Source(str(path)), build, kind="lines", copies=True)


def each(change):
    return lambda index: {name: change(column).copy() for name, column in index.items()}


def items(**values):
    """Return a function that sets items of an index, given as name=(position, value), and updates all hashes."""

    def change(index):
        for name, (position, value) in values.items():
            index[name][position] = value
        groups = zip(index["first_byte"], index["end_byte"], strict=True)
        hashes = [xxhash.xxh3_64_intdigest(CONTENT[max(0, first) : max(0, end)]) for first, end in groups]
        return index | {"hash": np.array(hashes, np.uint64)}

    return change


NOT_FITTING = {
    "first half": each(lambda column: column[: len(column) // 2]),
    "last half": each(lambda column: column[len(column) // 2 :]),
    "no group": each(lambda column: column[:0]),
    "some twice": each(lambda column: np.concatenate([column[:3], column[2:]])),
    "other order": each(lambda column: column[::-1]),
    "shape": lambda index: index | {"rows": index["rows"][:-1]},
    "dimensions": each(lambda column: column.reshape(-1, 1)),
    "scalars": each(lambda column: np.array(column[0])),
    "dtype": lambda index: index | {"rows": index["rows"].astype(np.float64)},
    "unsigned": lambda index: index | {"first_byte": index["first_byte"].astype(np.uint64)},
    "more columns": lambda index: index | {"more": index["rows"]},
    "fewer columns": lambda index: {"rows": index["rows"]},
    "negative": items(first_byte=(0, -1)),
    "overflow": items(first_byte=(2, -(2**63)), end_byte=(2, 2**63 - 1)),
    "beyond the end": items(end_byte=(-1, 10**6)),
    "no rows": items(rows=(1, 0)),
    "too many rows": items(rows=(1, 257)),
    "line numbers": items(first_line=(1, 1)),
}


@pytest.mark.parametrize("kind", NOT_FITTING)
def test_an_index_that_does_not_fit_its_file_is_made_again(tmp_path, kind):
    plant(tmp_path / "rows.txt.gz", NOT_FITTING[kind])
    assert all_rows(open_lines(tmp_path / "rows.txt.gz")) == [{"text": f"row {number}"} for number in range(2000)]


WRONG_GROUPS = {
    "a group is left out": each(lambda column: np.delete(column, 3)),
    "other number of rows": items(rows=(3, 250)),
    "a group begins within a line": items(first_byte=(3, 6000), end_byte=(2, 6000)),
    "a row is left out": items(first_byte=(3, CONTENT.index(b"row 769\n")), rows=(3, 255)),
    "the start of a row is left out": items(first_byte=(3, CONTENT.index(b"768\n"))),
}


@pytest.mark.parametrize("kind", WRONG_GROUPS)
def test_reading_a_group_that_is_not_what_the_index_says_is_an_error(tmp_path, kind):
    plant(tmp_path / "rows.txt.gz", WRONG_GROUPS[kind])
    file = open_lines(tmp_path / "rows.txt.gz")
    for group in (0, 1):
        file.read_group(group)
    with pytest.raises(ValueError, match="differ from what was indexed"):
        for group in range(2, len(file.group_rows)):
            file.read_group(group)


@pytest.mark.parametrize("piece", [1, 2**20])
def test_the_index_of_any_file_fits_it(tmp_path, piece):
    path = tmp_path / "rows.txt"
    for seed in range(12):
        lines = random_lines(seed, seed * (10 if piece == 1 else 200), longest=9)
        path.write_bytes(b"\xef\xbb\xbf" * (seed % 2) + b"".join(lines) + b"a" * (seed % 3) + b" " * (seed % 4))
        index = index_lines(Source(str(path)), None, lambda size: None, piece_bytes=piece)
        with path.open("rb") as file:
            assert fits_lines(index, file)


def test_blank_lines_are_whole_and_have_only_blanks():
    file = io.BytesIO(b"a\n \n\n b\n" + b" " * 2**21)
    spans = {(first, stop) for first in range(9) for stop in range(first + 1, 9) if are_blank_lines(file, first, stop)}
    assert spans == {(1, 2), (1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5), (7, 8)}
    assert are_blank_lines(file, 0, 0) and are_blank_lines(file, 7, 8 + 2**21)
    assert not are_blank_lines(file, 7, 7 + 2**21) and not are_blank_lines(file, 7, 9 + 2**21)
