"""What a run writes: lines on the terminal, and files of JSON records."""

import json
import math
import os
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from lowmem.distributed.signals import ignore_closed_output


def print_lines(*lines: str) -> None:
    """Print lines above the progress bar; ignore a closed stdout. Characters that it cannot show become escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        for line in lines:
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        ignore_closed_output()


class MetricsLog:
    """metrics.jsonl: one JSON object per line, with floats in full precision. On a full disk, lines wait in memory.

    The constructor deletes what a run resumed at `step` will write again (None: all). `resumed_at`: metrics of `step`.
    """

    def __init__(self, path: Path, *, step: int | None):
        lines = path.read_bytes().splitlines(True) if path.exists() and step is not None else []
        kept = [line for line in lines if _is_kept(line, step)]
        self.resumed_at: dict[str, float | None] = {}
        for record in map(json.loads, kept):
            self.resumed_at |= record if record["step"] == step else {}
        rewritten = path.with_suffix(".rewritten")
        rewritten.unlink(missing_ok=True)
        with open(rewritten, "xb") as file:  # a new file, never one that a link names
            file.write(b"".join(kept))
        os.replace(rewritten, path)
        self._path, self._size, self._waiting = path, path.stat().st_size, b""

    def write(self, *records: Mapping[str, object]) -> None:
        was_waiting = bool(self._waiting)
        self._waiting += b"".join(map(_line, records))
        try:
            with open(self._path, "r+b") as file:
                file.seek(self._size)  # overwrites a half-written line
                file.write(self._waiting)
        except OSError as error:
            if not was_waiting:
                print_lines(f"{self._path} cannot be written ({error.strerror}): keeping its records in memory for now")
        else:
            self._size, self._waiting = self._size + len(self._waiting), b""

    def metrics_of(self, step: int) -> dict[str, float | None]:
        """Return all that was recorded for `step`, in one dictionary."""
        with open(self._path, "rb") as file:
            lines = file.read(self._size) + self._waiting  # without what a failed write has left in the file
        records = map(json.loads, lines.splitlines())
        return dict(chain.from_iterable(record.items() for record in records if record.get("step") == step))

    def close(self) -> None:
        """Print how many records could not be written."""
        if self._waiting:
            print_lines(f"{self._waiting.count(10)} records of {self._path} are lost: the file cannot be written")


def _line(record: Mapping[str, object]) -> bytes:
    # JSON has no NaN and no infinity: such a value is written as null
    is_bad = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    plain = {name: None if name in is_bad else value for name, value in record.items()}
    return f"{json.dumps(plain, allow_nan=False)}\n".encode()


def _is_kept(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # half a line, from a killed run
        return False
    # drop the test and end records of this step, because a run that is resumed after its last step writes them again
    is_test = record.get("rows") == "test" or "test_loss" in record
    is_final = (is_test and record["step"] == step) or record.get("event") == "end"
    return not is_final and record["step"] <= step
