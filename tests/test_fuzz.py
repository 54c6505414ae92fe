"""benchmarks/fuzz.py reports each kind of fault, and finds none in damaged lines."""

import os
import time

import numpy as np

from benchmarks.fuzz import OUTCOMES, Bench, fuzz
from benchmarks.fuzz_inputs import Case
from lowmem.errors import UsageError
from tests.processes import finish, started_function

ROWS = ["'first'", "'second'"]


def refuse():
    raise UsageError("refused")


# What a reader does with a damaged file, by the outcome that is reported.
READERS = {
    "same": lambda: ROWS,
    "row errors": lambda: ["'first'", None],
    "refused": refuse,
    "undetectable": lambda: ["'other'"],
    "death": os.abort,
    "hang": lambda: time.sleep(60),
    "uncaught": lambda: {}["absent"],
    "memory": lambda: [str(np.ones(2**23).sum())],  # 64 MiB
    "silent": lambda: ["'second'"],
}


def damage_a_file(folder):
    path = folder / "rows"
    path.write_text("intact")
    with open(folder / "log", "a+") as log:
        for outcome, read in READERS.items():
            first, second = (
                lambda read=read: ROWS if path.read_text() == "intact" else read()
                for read in (read, lambda: ["'other'"])
            )
            bench = Bench("text", Case(folder, [path], first, second))
            found, details, _ = bench.run(
                path, b"damaged", log.fileno(), most_seconds=0.3 if outcome == "hang" else 10, most_bytes=2**25
            )
            assert found == outcome, (found, outcome, details)
            bench.place(path, b"intact")


def test_each_outcome_is_reported(tmp_path):
    assert [*READERS] == OUTCOMES
    with started_function(damage_a_file, tmp_path) as process:
        done = finish(process)
    assert done.returncode == 0, done.stderr


def test_damaged_lines_end_in_no_fault():
    result = fuzz("gz", mutations=8, processes=1)
    assert result["faults"] == [] and sum(result["counts"].values()) == 8
