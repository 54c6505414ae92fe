"""What a run tells while it runs: metrics.jsonl, peak memory, and lines on the terminal."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from lowmem.config import UsageError
from lowmem.evaluation import Answer


def open_output(folder: Path, settings: Mapping[str, object], *, step: int) -> "MetricsLog":
    """The first things a run writes: its config.json, and metrics.jsonl cut back to `step`. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(settings), indent=2))
        return MetricsLog(folder / "metrics.jsonl", step=step)
    except OSError as error:
        raise UsageError(f"output_dir {folder} cannot be written: {error.strerror}") from error


class MetricsLog:
    """metrics.jsonl: one JSON object a line, floats in full precision. The main process alone opens one.

    Opening it cuts it back to the records up to `step`, so that a resumed run continues it without a repetition.
    """

    def __init__(self, path: Path, *, step: int):
        kept = [line for line in path.read_bytes().splitlines(True) if _belongs(line, step)] if path.exists() else []
        rewritten = path.with_suffix(".rewritten")
        rewritten.write_bytes(b"".join(kept))
        os.replace(rewritten, path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self, **summary: object) -> None:
        """The run is over: write the end event."""
        self.write({"event": "end", **summary})
        self._file.close()


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # the half line of a killed run
        return False
    return "event" not in record and record["step"] <= step


class Speed:
    """Rows, target tokens and waiting per second of training since the last reading; what lies between is left out."""

    def __init__(self):
        self._rows = self._tokens = 0
        self._seconds = self._waited = self._waited_before = 0.0
        self.go_on()

    def go_on(self) -> None:
        """Start the clock again, after evaluating or saving."""
        self._started = time.perf_counter()

    def count(self, rows: int, tokens: int, waited: float) -> None:
        """One step is done; `waited` is the stream's waiting in all."""
        now = time.perf_counter()
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        self._seconds, self._started = self._seconds + now - self._started, now
        self._waited = waited

    def read(self) -> dict[str, float]:
        reading = {
            "samples_per_second": self._rows / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait_seconds": self._waited - self._waited_before,
        }
        self._rows, self._tokens, self._seconds, self._waited_before = 0, 0, 0.0, self._waited
        return reading


def peak_memory_bytes() -> dict[str, int]:
    """Most memory that this process has held: tensors on its accelerator (0 on CPU), and resident on the host."""
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes,
    }


def tell(*lines: str) -> None:
    """Print lines for a person, above a progress bar if there is one."""
    for line in lines:
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def tell_answers(answers: Iterable[Answer]) -> None:
    """Print what the model wrote, to look at."""
    tell(*(f"  {answer.prompt!r} -> {answer.prediction!r} (expected {answer.reference!r})" for answer in answers))
