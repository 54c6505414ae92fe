import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pytest

from lowmem.config.parse import resolve
from lowmem.data.files.source import Source, expand, is_damage, reading
from lowmem.errors import UsageError
from tests.processes import run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names):
    for name in names:
        path = Path(os.path.expanduser(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a row\n")


def content(source):
    with source.open() as file:
        return file.read()


def names(files):
    return [str(source) for source in expand(files)]


def test_files_keep_the_given_order_and_globs_are_sorted_by_name(folder):
    make("b.txt", "a.txt", "z/2.txt", "z/y/1.txt")
    assert names("z/**/*.txt, b.txt,a.txt,") == ["z/2.txt", "z/y/1.txt", "b.txt", "a.txt"]
    assert names(["b.txt", Path("a.txt")]) == ["b.txt", "a.txt"]
    assert names("?.txt") == ["a.txt", "b.txt"]


def test_the_name_of_an_existing_file_may_contain_commas_and_wildcards(folder):
    odd = ["a,b.txt", "[ab].txt", "a*.txt", "a?b.txt", " a.txt ", "a.txt"]
    make(*odd)
    for name in odd:
        assert names(name) == names([name]) == names(Path(name)) == [name]
        assert content(Source(name)) == b"a row\n"
    assert names("a.txt,[ab].txt") == ["a.txt", "[ab].txt"]
    assert Source("a?b.txt").suffixes == Source("https://a/b.txt?c.d").suffixes == [".txt"]


def test_an_escaped_comma_belongs_to_the_name(folder):
    make("Smith, J/1.txt", "Smith, J/2.txt", "c.txt")
    assert names(r"Smith\, J/*.txt, c.txt") == ["Smith, J/1.txt", "Smith, J/2.txt", "c.txt"]
    assert names(resolve({"train_file": ["Smith, J/2.txt", "c.txt"]}).train_file) == ["Smith, J/2.txt", "c.txt"]
    with pytest.raises(UsageError, match=r"Smith does not exist: .*if the name has a comma, write \\,"):
        expand("Smith, J/*.txt")


def test_wildcards_in_the_names_of_existing_folders_are_literal(folder):
    make("run [1]/a [2]/1.txt", "run [1]/a [2]/2.txt", "run 1/a 2/3.txt", "set [b]/4.txt")
    expected = ["run [1]/a [2]/1.txt", "run [1]/a [2]/2.txt"]
    assert names("run [1]/a [2]/*.txt") == names("run [1]/**/?.txt") == names("run [1]/*/[12].txt") == expected
    assert names(f"{folder}/run [1]/a [2]/*.txt") == [f"{folder}/{name}" for name in expected]
    assert names("run [0-9]/*/*.txt") == ["run 1/a 2/3.txt"]


def test_a_tilde_expands_to_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    make("~/a.txt", "~/b.txt", "~/c,d.txt")
    expected = [f"{folder}/home/a.txt", f"{folder}/home/b.txt"]
    assert names("~/a.txt,~/b.txt") == names("~/?.txt") == names([Path("~/a.txt"), "~/b.txt"]) == expected
    assert names("~/c,d.txt") == [f"{folder}/home/c,d.txt"]


def test_a_file_that_is_named_twice_is_refused_even_by_different_names(folder):
    make("a.txt", "b.txt")
    Path("link.txt").symlink_to("a.txt")
    for other in ("a.txt", "./a.txt", f"{folder}/a.txt", "link.txt", "?.txt"):
        with pytest.raises(UsageError, match=f"names {folder}/a.txt twice"):
            expand(["b.txt", "a.txt", other] if other != "?.txt" else ["a.txt", other])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("no.txt", "no.txt does not exist: name a"),
        ("no*.txt", r"no\*.txt matches no file: name a"),
        ("a.txt/no.txt", "a.txt/no.txt does not exist"),
        (".", r"\. is a folder"),
        ([], r"\[\] names no file: name a"),
        (" , ", "' , ' names no file: name a"),
        ("link.txt", r"link.txt is a broken link to gone.txt: name a"),
        ("loop.txt", r"loop.txt is a broken link to loop.txt: name a"),
        ("fifo.txt", r"fifo.txt is a FIFO: name a"),
        (
            "*.txt",
            r"fifo.txt is a FIFO, link.txt is a broken link to gone.txt, loop.txt is a broken link to loop.txt: ",
        ),
        ("/dev/null", "/dev/null is a device: name a"),
        ("n" * 300, "n{300} cannot be accessed .*File name too long"),
        (["a\0b"], "does not exist: name a"),
        ("memory://no/such.txt", "memory://no/such.txt cannot be reached .FileNotFoundError.*: check name, access"),
        ("memory://no/*.txt", r"memory://no/\*.txt matches no file"),
        ("nosuch://a.txt", "nosuch://a.txt cannot be opened .*name a local file"),
    ],
)
def test_values_that_name_no_file_are_refused(folder, files, message):
    make("a.txt")
    os.mkfifo("fifo.txt")
    os.symlink("gone.txt", "link.txt")
    os.symlink("loop.txt", "loop.txt")
    with pytest.raises(UsageError, match=message):
        expand(files)


def test_urls_name_files_and_matches_of_url_globs_are_sorted():
    for name in ("b.txt", "a.txt", "a.txt?mark=[x]", "c,d.txt"):
        with fsspec.open(f"memory://globs/{name}", "wb") as file:
            file.write(b"far away")
    assert names("memory://globs/b.txt,memory://globs/a.txt") == ["memory://globs/b.txt", "memory://globs/a.txt"]
    assert names("memory://globs/[ab].txt") == ["memory:///globs/a.txt", "memory:///globs/b.txt"]
    assert names(["memory://globs/c,d.txt"]) == ["memory://globs/c,d.txt"]
    (source,) = expand("memory://globs/a.txt?mark=[x]")
    assert content(source) == b"far away" and source.stamp()[0] == 8 and source.suffixes == [".txt"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


def test_an_unreachable_server_is_a_user_error_at_the_start_and_a_lost_connection_later(folder):
    pytest.importorskip("aiohttp")
    make("b.txt", "a.txt")
    server = ThreadingHTTPServer(("localhost", 0), partial(_Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    assert names(f"{url}/*.txt") == [f"{url}/a.txt", f"{url}/b.txt"]
    (source,) = expand(f"{url}/a.txt")
    assert content(source) == b"a row\n"
    with pytest.raises(UsageError, match=f"{url}/no.txt cannot be reached"):
        expand(f"{url}/no.txt")
    server.shutdown()
    server.server_close()
    for name in (f"{url}/a.txt", f"{url}/*.txt"):
        with pytest.raises(UsageError, match="cannot be reached"):
            expand(name)
    for look in (source.open, source.stamp):
        with pytest.raises(OSError) as caught:
            look()
        assert not is_damage(caught.value)


def test_an_unreachable_hub_is_a_user_error_at_the_start_and_a_lost_connection_later():
    pytest.importorskip("huggingface_hub")
    code = """
import sys
from lowmem.errors import UsageError
from lowmem.data.files.source import Source, expand
url = "hf://datasets/some/rows/rows.jsonl"
try: expand(url)
except UsageError as error: print(error)
for look in (Source(url).open, Source(url).stamp):
    try: look()
    except ConnectionError as error: print(type(error).__name__)
"""
    result = run(sys.executable, "-c", code, HF_HUB_OFFLINE="", HF_ENDPOINT="http://localhost:9")
    message, *lost = result.stdout.splitlines()
    assert message.startswith("hf://datasets/some/rows/rows.jsonl cannot be reached (ConnectionError(")
    assert lost == ["ConnectionError"] * 2


def test_only_network_errors_that_are_not_os_errors_become_connection_errors():
    aiohttp = pytest.importorskip("aiohttp")
    with pytest.raises(ConnectionError, match="ClientPayloadError: cut off"), reading():
        raise aiohttp.ClientPayloadError("cut off")
    for error in (KeyError("a"), UsageError("a"), FileNotFoundError(2, "a"), aiohttp.ClientOSError(111, "a")):
        with pytest.raises(type(error)) as caught, reading():
            raise error
        assert caught.value is error


def test_damage_is_distinguished_from_other_errors():
    for damage in (
        OSError("Couldn't deserialize thrift"),
        pa.ArrowInvalid("a"),
        pa.ArrowKeyError("a"),
        ValueError("a"),
    ):
        assert is_damage(damage)
    for trouble in (OSError(5, "a"), FileNotFoundError("a"), ConnectionError("a"), TimeoutError("a"), KeyError("a")):
        assert not is_damage(trouble)


def test_a_file_replaced_by_one_of_the_same_size_and_time_has_another_stamp(folder):
    make("a.txt", "b.txt")
    before, times = Source("a.txt").stamp(), os.stat("a.txt")
    Path("b.txt").write_text("b row\n")
    os.utime("b.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace("b.txt", "a.txt")
    assert os.stat("a.txt").st_mtime_ns == times.st_mtime_ns and Source("a.txt").stamp() != before
