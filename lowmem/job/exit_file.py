"""exit.json: how the run in a folder ended, for users who see only a launcher's exit code. Imports no torch."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil

from lowmem.distributed.signals import PREEMPTED

CODES = {"done": 0, "failed": 1, "mistake": 2, "preempted": PREEMPTED}
"""Exit code by cause."""
_FINAL = ("mistake", "preempted")
_START_ERROR_SECONDS = 2.0  # process start times are accurate to about a second


def write_exit(folder: Path, cause: str, message: str = "", *, step: int | None, rank: int) -> None:
    """Write `folder`/exit.json atomically. Keeps an existing file, because the first cause counts.

    `cause` is a key of CODES, `step` the last optimizer step, if known. Does nothing if `folder` is missing.
    """
    if not folder.is_dir():
        return
    launch = this_launch()
    record = {"cause": cause, "code": CODES[cause], "message": message, "step": step, "rank": rank}
    record |= {"host": launch["host"], "launch": launch, "time": datetime.now(UTC).isoformat()}
    unfinished, path = folder / f".exit-{uuid4().hex}.json", folder / "exit.json"
    try:
        with open(unfinished, "x") as file:  # a new file, never one that a link names
            file.write(json.dumps(record, indent=2) + "\n")
        try:
            os.link(unfinished, path)  # not a rename, which would replace an earlier exit.json
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
    """The contents of exit.json if this launch ended by user error or preemption (it must not restart), else None."""
    try:
        record = json.loads((folder / "exit.json").read_text())
        is_final = record["cause"] in _FINAL and _is_of_this_launch(record["launch"], record["time"])
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not in our format
        return None
    return record | {"code": CODES[record["cause"]]} if is_final else None


def this_launch() -> dict[str, object]:
    """Identify this launch by run id, host, and the process id ("launcher") and start time ("since") of our parent."""
    try:
        since = psutil.Process(os.getppid()).create_time()
    except psutil.Error:  # the first process of a container has no parent
        since = psutil.Process().create_time()
    run_id, host = os.environ.get("TORCHELASTIC_RUN_ID"), socket.gethostname()
    started = datetime.fromtimestamp(since, UTC).isoformat()
    return {"run_id": run_id, "host": host, "launcher": os.getppid(), "since": started}


def _is_of_this_launch(launch: Mapping[str, object], time: str) -> bool:
    """Whether a record written in `launch` at `time` (ISO 8601) is from this process's launch.

    Hosts of a launch share its run id. Run and process ids may repeat, so a record older than our launcher is not ours.
    """
    ours = this_launch()
    age = (datetime.fromisoformat(time) - datetime.fromisoformat(ours["since"])).total_seconds()
    if (launch["host"], launch["launcher"]) == (ours["host"], ours["launcher"]):
        return age > -_START_ERROR_SECONDS
    return launch["run_id"] == ours["run_id"] and age > 0
