"""exit.json: how the run in a folder ended, for who only sees a launcher's exit code. Imports no torch."""

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from lowmem.distributed.signals import PREEMPTED
from lowmem.job.processes import is_of_this_launch, this_launch

CODES = {"done": 0, "failed": 1, "mistake": 2, "preempted": PREEMPTED}
"""Exit code by cause."""
_FINAL = ("mistake", "preempted")


def write_exit(folder: Path, cause: str, message: str = "", *, step: int | None, rank: int) -> None:
    """Write `folder`/exit.json whole or not at all, and only if it is not there yet: the first cause stands.

    `cause` is a key of CODES, `step` the optimizer steps done, as far as known. Without a folder nothing is written; if
    it cannot be written (the disk may be what failed) a line says so.
    """
    if not folder.is_dir():
        return
    launch = this_launch()
    record = {
        "cause": cause,
        "code": CODES[cause],
        "message": message,
        "step": step,
        "rank": rank,
        "host": launch["host"],
        "launch": launch,
        "time": datetime.now(UTC).isoformat(),
    }
    unfinished = folder / f".exit-{launch['host']}-{os.getpid()}.json"
    try:
        try:
            unfinished.write_text(json.dumps(record, indent=2) + "\n")
            _name_once(unfinished, folder / "exit.json")
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        print(f"{folder / 'exit.json'} cannot be written: {error.strerror}", file=sys.stderr)


def _name_once(unfinished: Path, path: Path) -> None:
    """Give the file its name unless another one has it. (A rename would replace that.)"""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(unfinished, path)


def remove_exit(folder: Path) -> None:
    """A run begins: what is told of an earlier one goes."""
    (folder / "exit.json").unlink(missing_ok=True)


def final_exit(folder: Path) -> Mapping[str, object] | None:
    """What exit.json tells if it was written in the launch that we are in, and starting again can change nothing."""
    try:
        record = json.loads((folder / "exit.json").read_text())
        is_final = record["cause"] in _FINAL and is_of_this_launch(record["launch"], record["time"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that nobody of us has written
        return None
    return record if is_final else None
