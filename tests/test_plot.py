"""`plot` draws metrics.jsonl as a picture or in the terminal, or reports why it cannot draw."""

import json
import struct
import sys
import zlib

import pytest

from lowmem.cli import main
from lowmem.plot import read_curves, text_charts
from tests import runs
from tests.processes import run, train

WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None  # as if it were not installed
from lowmem.cli import main
code = main(arguments=["plot", *sys.argv[1:]])
assert "torch" not in sys.modules
sys.exit(code)
"""


def record(step, **values):
    common = {"learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 1000.0}
    return {"step": step, **common, "peak_device_bytes": 0, "peak_host_bytes": 3 * 2**20, **values}


def write(folder, records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def falling(tmp_path):
    """Write the metrics of a run whose loss falls from 17 to 10 in eight steps, and is not finite at step 4."""
    records = [record(step, loss=None if step == 4 else float(18 - step)) for step in range(1, 9)]
    return write(tmp_path / "falling", [*records, {"step": 8, "eval_loss": 0.5}, {"event": "end", "steps": 8}])


def test_a_curve_is_drawn_in_the_terminal(falling):
    curves = read_curves(falling / "metrics.jsonl")
    assert curves["loss"] == [(1, 17.0), (2, 16.0), (3, 15.0), (5, 13.0), (6, 12.0), (7, 11.0), (8, 10.0)]
    assert curves["evaluation loss"] == [(8, 0.5)] and curves["peak host memory, MiB"][0] == (1, 3.0)
    lines = list(text_charts({"falling": curves}))
    assert lines[0] == "loss: 17 at step 1, 10 at 8"
    assert max(map(len, lines)) <= 80 and len(lines) == 6 * 6  # six curves of six lines each
    # Eight steps span 70 columns. Step 4 has no value, so its columns repeat the bar of step 3. A loss of 10 + x has a
    # bar whose height is 1 + 31 x / 7 eighths of a line.
    steps = [lines[row][10:] for row in range(1, 5)]
    assert lines[1].startswith("       17 ") and lines[4].startswith("       10 ")
    assert [[line.ljust(70)[column] for line in steps] for column in (0, 9, 19, 29, 40, 50, 60, 69)] == [
        list("████"),
        list("▄███"),
        list(" ▇██"),
        list(" ▇██"),
        list("  ▆█"),
        list("  ▂█"),
        list("   ▅"),
        list("   ▁"),
    ]


def test_without_matplotlib_several_runs_are_shown_on_one_scale(falling, tmp_path):
    other = write(tmp_path / "other", [record(1, loss=24.0), record(16, loss=17.0)])
    result = run(sys.executable, "-c", WITHOUT_MATPLOTLIB, falling, other)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "loss, falling: 17 at step 1, 10 at 8" and lines[5] == "loss, other: 24 at step 1, 17 at 16"
    assert lines[1].split() == ["24"] and lines[6].startswith("       24 ████")
    assert len(lines[4]) == 10 + 1 + 7 * 69 // 15 and len(lines[9]) == 80  # one run ends at step 8, the other at 16
    assert lines[-1] == "matplotlib is not installed: for an image, pip install 'lowmem[plot]'"
    assert not (falling / "plot.png").exists()


def pixels(png):
    """Check the checksum of each chunk of a PNG and the number of pixel bytes; return the width and height."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    offset, image = 8, b""
    while offset < len(data):
        (size,), kind = struct.unpack(">I", data[offset : offset + 4]), data[offset + 4 : offset + 8]
        body, checksum = data[offset + 8 : offset + 8 + size], data[offset + 8 + size : offset + 12 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(checksum, "big")
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
        image += body if kind == b"IDAT" else b""
        offset += 12 + size
    assert kind == b"IEND" and (depth, colour) == (8, 6)
    assert len(zlib.decompress(image)) == height * (1 + 4 * width)
    return width, height


def test_several_runs_are_drawn_in_one_picture(falling, tmp_path, capsys):
    other = write(tmp_path / "other", [record(step, loss=3.0) for step in range(1, 100)])
    assert main(arguments=["plot", str(falling)]) == 0
    alone = (falling / "plot.png").read_bytes()
    assert main(arguments=["plot", str(falling), str(other / "metrics.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{falling / 'plot.png'} shows falling", f"{falling / 'plot.png'} shows falling, other"]
    assert pixels(falling / "plot.png") == (1620, 768)
    assert (falling / "plot.png").read_bytes() != alone and not list(falling.glob(".plot*"))


def test_all_curves_of_a_real_run_are_read(tmp_path):
    runs.write_files(tmp_path, num_rows=12)
    result = train("train", *runs.flags(tmp_path, "out", max_steps=2))
    assert result.returncode == 0, result.stderr
    titles = ["loss", "learning rate", "gradient norm", "target tokens/s", "peak host memory, MiB"]
    curves = read_curves(tmp_path / "out" / "metrics.jsonl")
    assert list(curves) == titles and all([step for step, _ in points] == [1, 2] for points in curves.values())


def test_what_cannot_be_drawn_is_reported(falling, tmp_path, capsys):
    def error_of(*words):
        assert main(arguments=["plot", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "`plot` needs OUT" in error_of()
    assert "--dpi: `plot` has no such flag" in error_of(falling, "--dpi=3")
    missing = tmp_path / "none" / "metrics.jsonl"
    assert f"{missing} cannot be read: No such file or directory; pass the output_dir" in error_of(falling, missing)
    empty = write(tmp_path / "empty", [{"step": 0, "eval_loss": 2.0}])
    assert "empty/metrics.jsonl contains no training step yet" in error_of(empty)
    path = falling / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 9, "lo')  # as if a run were still writing this line
    assert main(arguments=["plot", str(falling)]) == 0
    for damage in (b'{"step": 9, "lo\n', b"[1]\n", b'{"loss": 1.0}\n', b'{"step": 9, "loss": "a"}\n', b"\xff\n"):
        path.write_bytes(whole + damage)
        assert f"{path}, line 11 is not a record of a run (" in error_of(falling)
    path.write_bytes(whole)
    (falling / "plot.png").unlink()
    (falling / "plot.png").mkdir()
    assert "plot.png cannot be written: Is a directory" in error_of(falling)
