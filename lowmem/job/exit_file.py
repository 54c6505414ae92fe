"""exit.json: how the run in a folder ended, for users who see only a launcher's exit code. Imports no torch."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lowmem.distributed.signals import PREEMPTED

CODES = {"done": 0, "failed": 1, "mistake": 2, "preempted": PREEMPTED}
"""Exit code by cause."""
_FINAL = ("mistake", "preempted")
_START_ERROR_SECONDS = 2.0  # the system knows when a process started to about a second


def write_exit(folder: Path, cause: str, message: str = "", *, step: int | None, rank: int) -> None:
    """Write `folder`/exit.json whole or not at all, and only if there is none: the first cause counts.

    `cause` is a key of CODES, `step` the optimizer steps done, if known. Without a folder nothing is written.
    """
    if not folder.is_dir():
        return
    launch = this_launch()
    record = {"cause": cause, "code": CODES[cause], "message": message, "step": step, "rank": rank}
    record |= {"host": launch["host"], "launch": launch, "time": datetime.now(UTC).isoformat()}
    unfinished, path = folder / f".exit-{launch['host']}-{os.getpid()}.json", folder / "exit.json"
    try:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        try:
            os.link(unfinished, path)  # not a rename, which would replace an earlier one
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(unfinished, path)
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror}", file=sys.stderr)
    with suppress(OSError):
        unfinished.unlink()


def remove_exit(folder: Path) -> None:
    (folder / "exit.json").unlink(missing_ok=True)


def final_exit(folder: Path) -> Mapping[str, object] | None:
    """exit.json, if it was written in this launch and another start would end the same way."""
    try:
        record = json.loads((folder / "exit.json").read_text())
        is_final = record["cause"] in _FINAL and _is_of_this_launch(record["launch"], record["time"])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not ours
        return None
    return record if is_final else None


def this_launch() -> dict[str, object]:
    """{"run_id", "host", "launcher": id of this process's parent, "since": the parent's start, or else our own}."""
    try:
        since = psutil.Process(os.getppid()).create_time()
    except psutil.Error:  # the first process of a container has no parent
        since = psutil.Process().create_time()
    run_id, host = os.environ.get("TORCHELASTIC_RUN_ID"), socket.gethostname()
    started = datetime.fromtimestamp(since, UTC).isoformat()
    return {"run_id": run_id, "host": host, "launcher": os.getppid(), "since": started}


def _is_of_this_launch(launch: Mapping[str, object], time: str) -> bool:
    """Whether a process of `launch` that wrote something at `time` (ISO 8601) was in this process's launch.

    All hosts share a run id, but process and run ids recur: what is older than our launcher is of an earlier launch.
    """
    ours = this_launch()
    age = (datetime.fromisoformat(time) - datetime.fromisoformat(ours["since"])).total_seconds()
    if (launch["host"], launch["launcher"]) == (ours["host"], ours["launcher"]):
        return age > -_START_ERROR_SECONDS
    return launch["run_id"] == ours["run_id"] and age > 0
