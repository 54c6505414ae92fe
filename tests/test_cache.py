import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lowmem.data.files.cache import derive
from lowmem.data.files.source import Source
from lowmem.errors import UsageError
from tests.processes import ROOT, environment, run

# Other processes run this code. build() copies FILE (argument 1) in upper case, and logs begin and end to FILE.notes.
BUILDER = """
import os, sys, time
import numpy as np
from lowmem.errors import UsageError
from lowmem.data.files.cache import derive
from lowmem.data.files.source import Source

def note(word):
    with open(sys.argv[1] + ".notes", "a") as notes:
        notes.write(word + "\\n")

def build(copy, update, seconds=0.0, fails=False):
    note("begin")
    with open(sys.argv[1], "rb") as file:
        text = file.read()
    copy.write(text[:10].upper())
    copy.flush()
    time.sleep(seconds)
    note("end")
    if fails:
        raise UsageError("no luck")
    copy.write(text[10:].upper())
    return {"bytes": np.array([len(text)])}

def run(build=build):
    return derive(Source(sys.argv[1]), build, kind="test", copies=True)
"""


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows").write_bytes(b"some rows that exist in a file")
    return Source(str(tmp_path / "rows"))


class Builder:
    """Builds an upper-case copy and an index (size and first bytes) of a file, and counts how often it builds."""

    def __init__(self, source):
        self.source, self.times = source, 0

    def __call__(self, copy, update):
        self.times += 1
        with self.source.open() as file:
            text = file.read()
        if copy is not None:
            copy.write(text.upper())
        return {"size": np.array([len(text)]), "first": np.frombuffer(text[:20], np.uint8)}

    def derive(self, copies=True):
        return derive(self.source, self, kind="test", copies=copies)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_index_of_a_small_file_is_rebuilt_each_time_and_not_stored(source, tmp_path):
    builder = Builder(source)
    for _ in range(2):
        found = builder.derive(copies=False)
        assert found.copy is None and found.index["size"] == [30]
    assert builder.times == 2 and names(tmp_path) == ["rows"]


def test_the_index_of_a_large_file_is_made_once(source, tmp_path):
    Path(source.name).write_bytes(b"row\n" * 2**20)
    builder = Builder(source)
    for _ in range(2):
        found = builder.derive(copies=False)
        assert found.index["size"] == [2**22] and found.index["first"].tobytes() == b"row\n" * 5
    assert builder.times == 1 and names(tmp_path) == [".rows.lowmem-test.index", "rows"]


def test_a_copy_is_made_once_and_again_when_the_file_has_changed(source, tmp_path):
    builder = Builder(source)
    for _ in range(2):
        assert builder.derive().copy.read_bytes() == b"SOME ROWS THAT EXIST IN A FILE"
    assert builder.times == 1 and names(tmp_path) == [".rows.lowmem-test.index", ".rows.lowmem-test.rows", "rows"]
    Path(source.name).write_bytes(b"same size, but it's other rows")
    assert builder.derive().copy.read_bytes() == b"SAME SIZE, BUT IT'S OTHER ROWS"
    assert builder.times == 2


def test_an_index_with_a_bit_flipped_in_any_byte_is_made_again(source):
    builder = Builder(source)
    path = builder.derive().copy.with_suffix(".index")
    whole = path.read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in (*flips, whole.replace(b"I64", b"U64")):
        path.write_bytes(damaged)
        index = builder.derive().index
        assert index["size"].dtype == np.int64 and index["size"].tolist() == [30]
        assert index["first"].dtype == np.uint8 and index["first"].tobytes() == b"some rows that exist"
    assert builder.times == 1 + len(whole) + 1


@pytest.mark.parametrize("damage", [b"", b"SOME ROWS", None])
def test_a_copy_that_was_truncated_or_removed_is_made_again(source, damage):
    builder = Builder(source)
    copy = builder.derive().copy
    copy.unlink() if damage is None else copy.write_bytes(damage)
    assert builder.derive().copy.read_bytes() == b"SOME ROWS THAT EXIST IN A FILE"
    assert builder.times == 2


def test_lowmem_cache_sets_the_folder_of_copies(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "a" / "cache"))
    builder = Builder(source)
    for _ in range(2):
        assert builder.derive().copy.parent == tmp_path / "a" / "cache"
    assert builder.times == 1 and names(tmp_path) == ["a", "rows"]


def test_a_copy_next_to_the_file_is_not_used_when_lowmem_cache_is_set(source, tmp_path, monkeypatch):
    builder = Builder(source)
    builder.derive()
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    assert builder.derive().copy.parent == tmp_path / "cache" and builder.times == 2


def test_lowmem_cache_may_be_relative_to_home_or_to_the_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for named, cache in (("~/cache", "home/cache"), ("cache", "cache")):
        monkeypatch.setenv("LOWMEM_CACHE", named)
        assert Builder(source).derive().copy.parent == tmp_path / cache


def test_without_a_home_folder_the_copy_is_next_to_the_file(source):
    code = """
import fsspec, pwd
def unknown(number): raise KeyError(number)
pwd.getpwuid = unknown  # as in a container whose user is not in /etc/passwd
del os.environ["HOME"]
print(run().copy)
fsspec.open("memory://a", "wb").open().close()
try: derive(Source("memory://a"), build, kind="test", copies=True)
except UsageError as error: print(error)
"""
    result = run(sys.executable, "-c", BUILDER + code, source.name)
    assert result.returncode == 0, result.stderr
    *_, copy, error = result.stdout.splitlines()
    assert copy == str(Path(source.name).with_name(".rows.lowmem-test.rows"))
    message = "memory://a needs a copy of its rows, but no folder can be used (there is no home folder): set"
    assert error.startswith(message)


def test_all_paths_of_a_file_share_one_index(source, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to("../rows")
    for cache in ("", str(tmp_path / "cache")):
        monkeypatch.setenv("LOWMEM_CACHE", cache)
        copies = {Builder(source).derive().copy}
        links = [(tmp_path / "b", "link")] if cache else []
        for folder, name in ((tmp_path, "rows"), (tmp_path / "b", "../rows"), *links):
            monkeypatch.chdir(folder)
            builder = Builder(Source(name))
            copies.add(builder.derive().copy)
            assert builder.times == 0
        assert len(copies) == 1 and names(tmp_path / "b") == ["link"]


def test_a_copy_of_a_symbolic_link_is_next_to_the_link(source, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to("../rows")
    builder = Builder(Source(str(tmp_path / "b" / "link")))
    for _ in range(2):
        assert builder.derive().copy == tmp_path / "b" / ".link.lowmem-test.rows"
    assert builder.times == 1 and names(tmp_path) == ["b", "rows"]
    Path(source.name).write_bytes(b"other rows in the same file")
    assert builder.derive().copy.read_bytes() == b"OTHER ROWS IN THE SAME FILE"


@pytest.mark.parametrize("name", ["😀" * 62, "n" * 250, "s" + "\udcff" * 249])
def test_copies_of_files_with_very_long_names_are_in_the_cache(tmp_path, name):
    source = Source(str(tmp_path / name))
    Path(source.name).write_bytes(b"some rows")
    builder = Builder(source)
    for _ in range(2):
        assert builder.derive().copy.parent == Path.home() / ".cache" / "lowmem"
    assert builder.times == 1 and names(tmp_path) == [name]


def test_unfinished_files_of_killed_processes_are_removed_after_a_day(source, tmp_path):
    old, new, other = (tmp_path / f".{name}.unfinished" for name in ("rows.lowmem-test.a", "rows.lowmem-test.b", "c.a"))
    for path, hours in ((old, 25), (new, 23), (other, 25)):
        path.touch()
        os.utime(path, (time.time() - hours * 3600,) * 2)
    Builder(source).derive()
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_files_with_the_same_name_in_two_folders_have_separate_copies_in_the_cache(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "b").mkdir()
    other = Source(str(shutil.copy2(source.name, tmp_path / "b")))
    assert Builder(source).derive().copy != Builder(other).derive().copy


def cached():
    return Path.home() / ".cache" / "lowmem"


@pytest.mark.parametrize("kind", ["link", "hard link", "FIFO", "folder"])
@pytest.mark.parametrize("suffix", ["lock", "index", "rows", "unfinished"])
def test_a_planted_link_fifo_or_folder_is_neither_followed_nor_waited_for(source, tmp_path, capsys, kind, suffix):
    name = f"{os.uname().nodename}.unfinished" if suffix == "unfinished" else suffix
    planted, precious = tmp_path / f".rows.lowmem-test.{name}", tmp_path / "precious"
    precious.write_text("precious")
    make = {"link": planted.symlink_to, "hard link": planted.hardlink_to}
    make.get(kind, lambda path: os.mkfifo(planted) if kind == "FIFO" else planted.mkdir())(precious)
    builder = Builder(source)
    for _ in range(2):
        copy = builder.derive().copy
        assert copy.read_bytes() == b"SOME ROWS THAT EXIST IN A FILE"
    assert precious.read_text() == "precious" and builder.times == 1
    is_obstacle = suffix == "lock" or kind == "folder"  # other files are in our folder, so they are removed
    assert copy.parent == (cached() if is_obstacle else tmp_path)
    why = f"making a copy of its rows once, in {cached()} ({planted}: Is a "
    assert (why in capsys.readouterr().out) == is_obstacle


@pytest.mark.parametrize("suffix", ["index", "rows"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user_are_not_used(source, suffix):
    builder = Builder(source)
    copy = builder.derive().copy
    os.chown(copy.with_suffix(f".{suffix}"), 65534, -1)
    assert builder.derive().copy == copy and builder.times == 2
    assert copy.stat().st_uid == copy.with_suffix(".index").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_nothing_is_written_or_read_in_the_folder_of_another_user(source, tmp_path, capsys):
    Builder(source).derive()
    os.chown(tmp_path, 65534, -1)
    builder = Builder(source)
    for _ in range(2):
        assert builder.derive().copy.parent == cached() and builder.times == 1
    assert f"once, in {cached()} ({tmp_path}: Belongs to user 65534)\n" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_stale_files_of_another_user_that_cannot_be_removed_do_not_refuse_the_run(source, tmp_path, monkeypatch):
    shared = tmp_path / "shared"  # like /tmp: only the owner of a file can remove it
    shared.mkdir()
    shutil.copy(source.name, shared)
    (shared / ".rows.lowmem-test.index").touch(0o666)
    os.chown(shared / ".rows.lowmem-test.index", 1234, -1)
    for folder in (shared, home := tmp_path / "home"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        folder.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    os.seteuid(65534)
    try:
        assert Builder(Source(str(shared / "rows"))).derive().copy.parent == home / ".cache" / "lowmem"
    finally:
        os.seteuid(0)


def test_a_process_does_not_wait_for_a_lock_whose_holder_is_not_alive(source, tmp_path, capsys):
    def derive_impatiently(copies):
        return derive(source, Builder(source), kind="test", copies=copies, patience_seconds=0.2)

    Path(source.name).write_bytes(b"row\n" * 2**20)
    lock = tmp_path / ".rows.lowmem-test.lock"
    with lock.open("w") as file:
        file.write("process 7 on host far")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert derive_impatiently(copies=True).copy.parent == cached()
        assert f"({lock}: Is locked by process 7 on host far)" in capsys.readouterr().out
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", "/dev/null")
            with pytest.raises(
                UsageError, match=f"no folder can be used .{lock}: Is locked by process 7 on host far; "
            ):
                derive_impatiently(copies=True)
            assert derive_impatiently(copies=False).index["size"] == [2**22]
        assert "making an index of its rows at each start, because no folder can be used" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_process_does_not_wait_for_another_users_lock_even_if_its_holder_is_alive(source, tmp_path, capsys):
    lock = tmp_path / ".rows.lowmem-test.lock"
    with lock.open("w") as file:
        os.chown(lock, 1234, -1)
        fcntl.flock(file, fcntl.LOCK_EX)
        found = derive(source, Builder(source), kind="test", copies=True, patience_seconds=1.0)
    assert found.copy.parent == cached()
    assert f"({lock}: Belongs to user 1234)" in capsys.readouterr().out


def test_a_process_waits_for_a_lock_as_long_as_its_holder_is_alive(source, tmp_path):
    with start("run(lambda *x: build(*x, 1.6))", source) as process:
        while "begin" not in ((tmp_path / "rows.notes").read_text() if (tmp_path / "rows.notes").exists() else ""):
            assert process.poll() is None
        builder = Builder(source)
        found = derive(source, builder, kind="test", copies=True, patience_seconds=1.0)
        assert process.wait(timeout=300) == 0 and found.index["bytes"] == [30] and builder.times == 0


def test_an_index_that_is_larger_than_its_file_is_not_read(source, tmp_path):
    builder = Builder(source)
    index = builder.derive().copy.with_suffix(".index")
    whole = index.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    tensors = json.loads(whole[8:end])
    tensors["first"] |= {"shape": [2**40], "data_offsets": [8, 8 + 2**40]}
    header = json.dumps(tensors).encode()
    index.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    os.truncate(index, 8 + len(header) + 8 + 2**40)
    assert builder.derive().index["size"] == [30] and builder.times == 2


@pytest.fixture
def locked_folder():
    """Make a folder that this process can read but not write to; a root process becomes another user until the end."""
    folder = Path(tempfile.mkdtemp())
    (folder / "rows").write_bytes(b"some rows")
    (folder / "home").mkdir(mode=0o777)
    (folder / "home").chmod(0o777)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_copy_that_cannot_be_written_next_to_the_file_is_in_the_cache(locked_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(locked_folder / "home"))
    builder = Builder(Source(str(locked_folder / "rows")))
    for _ in range(2):
        assert builder.derive().copy.parent == locked_folder / "home" / ".cache" / "lowmem"
    assert builder.times == 1


def test_if_neither_folder_is_writable_the_error_names_both(locked_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(locked_folder))
    found = f"{locked_folder}/.rows.lowmem-test.lock: Permission denied; {locked_folder}/.cache: Permission denied"
    message = rf"but no folder can be used \({found}\): set LOWMEM_CACHE to a folder of your own"
    with pytest.raises(UsageError, match=message):
        Builder(Source(str(locked_folder / "rows"))).derive()


def test_a_remote_file_is_copied_into_the_cache_under_a_name_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path))
    url = f"memory://folder/{'r' * 250}?signature={'s' * 400}"
    with fsspec.open(url, "wb") as file:
        file.write(b"far away")
    builder = Builder(Source(url))
    for _ in range(2):
        assert builder.derive().copy.read_bytes() == b"FAR AWAY"
    assert builder.times == 1
    assert [name.partition("-")[2] for name in names(tmp_path)] == ["r" * 80 + ".test.index", "r" * 80 + ".test.rows"]


def test_a_file_that_changes_while_it_is_read_is_refused(source, tmp_path):
    def build(copy, update):
        copy.write(b"half of it")
        Path(source.name).write_bytes(b"other rows")
        return {"size": np.array([10])}

    with pytest.raises(UsageError, match=f"{source} changed while it was read"):
        derive(source, build, kind="test", copies=True)
    assert Builder(source).derive().copy.read_bytes() == b"OTHER ROWS"


def start(code, source):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER + code, source.name], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )


def test_only_one_of_several_processes_makes_the_copy(source, tmp_path):
    processes = [start("assert run(lambda *x: build(*x, 1.0)).index['bytes'] == [30]", source) for _ in range(4)]
    output = b""
    for process in processes:
        output += process.communicate(timeout=300)[0]
        assert process.returncode == 0
    assert output.count(b"making a copy of its rows once") == 1
    assert 1 <= output.count(b"rows: waiting for another process, which is making a copy of its rows\n") <= 3
    assert (tmp_path / "rows.notes").read_text().split() == ["begin", "end"]
    assert not list(tmp_path.glob("*lock*"))


def test_builds_that_fail_do_not_overlap(source, tmp_path):
    code = """
for _ in range(8):
    try:
        run(lambda *x: build(*x, 0.02, fails=True))
    except UsageError:
        pass
"""
    processes = [start(code, source) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert (tmp_path / "rows.notes").read_text().split() == ["begin", "end"] * 32
    assert names(tmp_path) == ["rows", "rows.notes"]


@pytest.mark.parametrize("is_restored", [False, True])
def test_the_copy_is_correct_after_a_kill_at_any_open_rename_or_removal(source, tmp_path, is_restored):
    code = """
seen = 0
def kill(event, words):
    global seen
    if event in ("open", "os.rename", "os.remove") and ".lowmem-" in str(words[0]):
        seen += 1
        if seen == NUMBER:
            os.kill(os.getpid(), 9)
sys.addaudithook(kill)
run()
"""
    path, text, killed = Path(source.name), "some rows that exist in a file", 0
    before = path.stat()
    for number in range(1, 50):
        path.write_text(text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        Builder(source).derive()
        path.write_text(text.replace("row", "cow"))
        process = start(code.replace("NUMBER", str(number)), source)
        process.communicate(timeout=300)
        if is_restored:
            path.write_text(text)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert Builder(source).derive().copy.read_text() == path.read_text().upper()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed >= 7


def test_a_copy_that_a_kill_left_incomplete_is_not_used(source, tmp_path):
    process = start("print('here', flush=True); run(lambda *x: build(*x, 60))", source)
    while "begin" not in ((tmp_path / "rows.notes").read_text() if (tmp_path / "rows.notes").exists() else ""):
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=300)
    builder = Builder(source)
    assert builder.derive().copy.read_bytes() == b"SOME ROWS THAT EXIST IN A FILE"
    assert builder.times == 1
    assert names(tmp_path) == [".rows.lowmem-test.index", ".rows.lowmem-test.rows", "rows", "rows.notes"]


@pytest.mark.parametrize("limit", [20, 100])
def test_at_a_file_size_limit_the_error_names_the_folder_and_nothing_is_left(source, tmp_path, limit):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    run()
except UsageError as error:
    sys.exit(str(error))
"""
    result = run(sys.executable, "-c", BUILDER + code, source.name)
    assert f"{tmp_path} has no room for .rows.lowmem-test (File too large; " in result.stderr
    assert "free disk space, or set LOWMEM_CACHE" in result.stderr
    assert names(tmp_path) == ["rows", "rows.notes"]
