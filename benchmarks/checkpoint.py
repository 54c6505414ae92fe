"""Measure the time, disk size and host memory of saving and loading checkpoints with lowmem and other libraries.

    python benchmarks/checkpoint.py --folder=/tmp/checkpoints --output=benchmarks/results/checkpoint.jsonl
    python benchmarks/checkpoint.py --quick

Appends JSON lines to --output, and writes tables (of medians) to the .md file of the same name. See README.md.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from checkpoint_systems import SYSTEMS
from metrics import disk_bytes
from records import MIB, Record, append

from lowmem.config.presets import MODEL_SHAPES

LIMIT_SECONDS = 600

# Two columns of the second table are not measured, but come from source and documentation of the measured versions.
KNOWN = {
    "lowmem": ("yes", "yes"),
    "accelerate": ("no", "weights and optimizer, but neither the random state nor the position in the rows"),
    "trainer": ("no", "weights and optimizer, not random state"),
    "torch.save": ("no", "up to the caller"),
    "dcp": ("its .metadata is written last", "yes"),
}
"""For each library: whether a kill during a save leaves a complete checkpoint or none, and whether a different number
of processes can load a checkpoint."""


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parse the flags. A user error exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=list(MODEL_SHAPES), default="t5-base")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"comma list of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds: A B C A B C ...")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of model and optimizer")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="smoke test: t5-tiny, one round")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args(arguments)
    flags.systems = flags.systems.split(",")
    if unknown := [name for name in flags.systems if name not in SYSTEMS]:
        parser.error(f"--systems has unknown names {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    if flags.device == "cuda":  # `run` exposes a single GPU, so leave out the systems with two processes
        flags.systems = [name for name in flags.systems if SYSTEMS[name].processes == 1]
    if flags.repeats < 1:
        parser.error(f"--repeats={flags.repeats} measures nothing: set 1 or more")
    if flags.output and flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the table goes to a .md file of the same name")
    if flags.quick:
        flags.model, flags.repeats = "t5-tiny", 1
    return flags


def run(system: str, folder: Path, flags: argparse.Namespace, *, is_load: bool) -> Record:
    """Save into `folder` or load from it, in new processes. The record has the largest seconds and bytes of any rank.

    Raises RuntimeError with the last line that the first failed rank printed to stderr.
    """
    settings = {"system": system, "is_load": is_load, "folder": str(folder)}
    settings |= {"device": flags.device, "shape": MODEL_SHAPES[flags.model]}
    command = [sys.executable, Path(__file__).with_name("checkpoint_systems.py"), json.dumps(settings)]
    world_size = SYSTEMS[system].processes
    # expose a single GPU, because Trainer would wrap the model in DataParallel if it saw several
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if flags.device == "cuda" else ""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices, "HF_HUB_OFFLINE": "1"}
    group = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"}
    group |= {"MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | group for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | (rank if world_size > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, errors in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError((errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    records = [json.loads(folder.with_name(f"record-{rank}.json").read_text()) for rank in range(world_size)]
    assert len({record["digest"] for record in records}) == 1, f"{system}: the ranks hold different states"
    numbers = [name for name in records[0] if name.endswith(("_bytes", "seconds"))]
    return records[0] | {name: max(record.get(name, 0) for record in records) for name in numbers}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def measure(system: str, folder: Path, flags: argparse.Namespace, *, is_damaged: bool) -> Record:
    """Save and load; if `is_damaged`, load again after flipping one bit of the largest file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    saved = run(system, folder, flags, is_load=False)
    record = {"save": saved, "disk_bytes": disk_bytes(str(folder)), "pickles": list(pickles(folder))}
    record["load"] = run(system, folder, flags, is_load=True)
    assert record["load"]["digest"] == saved["digest"], f"{system} did not load what it saved"
    if is_damaged:
        flip_a_bit(max(filter(Path.is_file, folder.rglob("*")), key=lambda path: path.stat().st_size))
        try:
            digest = run(system, folder, flags, is_load=True)["digest"]
            record["flipped_bit"] = "not seen" if digest == saved["digest"] else "loaded"
        except RuntimeError as error:
            record["flipped_bit"] = f"refused: {error}"
    shutil.rmtree(folder)
    return record


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of the file, within the data of a tensor."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def pickles(folder: Path) -> Iterator[str]:
    """Yield the names of all files that are a pickle, or a torch.save archive that contains one."""
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        with open(path, "rb") as file:
            start = file.read(2)
        is_archive = zipfile.is_zipfile(path)
        if start[:1] == b"\x80" and start[1:] <= b"\x05" or is_archive and _holds_pickle(path):
            yield path.name


def _holds_pickle(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


# --- the report
def seconds(records: list[Record], action: str, *names: str) -> str:
    """In each record of one system, add up the seconds in the fields `names`; return the median of these sums."""
    return f"{median(sum(record[action][name] for name in names) for record in records):.2f}"


def mib(records: list[Record], action: str, name: str) -> str:
    """Return the median MiB that a save or load adds, without the optimizer state that a load creates."""
    return f"{median(record[action][name] - record[action].get('made_bytes', 0) for record in records) / MIB:,.0f}"


def flipped_bit(records: list[Record]) -> str:
    """Return the outcome of the load after a bit was flipped."""
    return next((record["flipped_bit"].partition(":")[0] for record in records if "flipped_bit" in record), "-")


def known(system: str) -> tuple[str, str]:
    return KNOWN[system.partition(" ")[0].partition("-")[0]]


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command: medians over its repeats."""
    of: dict[str, list[Record]] = {}
    for record in records:
        of.setdefault(record["system"], []).append(record)

    def numbers(system: str) -> list[str]:
        return [
            f"{of[system][0]['disk_bytes'] / 1e6:,.0f}",
            seconds(of[system], "save", "seconds"),
            seconds(of[system], "save", "seconds", "sync_seconds"),
            mib(of[system], "save", "peak_bytes"),
            seconds(of[system], "load", "seconds"),
            mib(of[system], "load", "peak_bytes"),
            mib(of[system], "load", "anonymous_bytes"),
        ]

    def promises(system: str) -> list[str]:
        atomic, elastic = known(system)
        return [system, atomic, flipped_bit(of[system]), ", ".join(of[system][0]["pickles"]) or "none", elastic]

    first = records[0]
    save = first["save"]
    versions = ", ".join(f"{name} {number}" for name, number in save["versions"].items())
    head = "| system | MB | save, s | save + sync, s | save peak, MiB | load, s | load peak, MiB | without mmap, MiB |"
    return "\n".join(
        [
            f"## {first['model']}, AdamW",
            "",
            f"    {first['command']}",
            "",
            f"{first['date']}; {save['machine']['cpu']}, {save['machine']['cores']} cores, 1 thread per process, model "
            f"on {save['machine']['device']}; {versions}; medians of {first['repeats']}.",
            "",
            head,
            "|---" + "|---:" * 7 + "|",
            *(f"| {' | '.join([system, *numbers(system)])} |" for system in of),
            "",
            "| system | complete or absent after a kill | a flipped bit is | pickle files | other process count |",
            "|---" * 5 + "|",
            *(f"| {' | '.join(promises(system))} |" for system in of if SYSTEMS[system].processes == 1),
            "",
        ]
    )


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    shown = list(sys.argv)
    if flags.folder:  # keep the folder's path out of the results
        shown = [argument.replace(str(flags.folder), "FOLDER") for argument in shown]
        flags.folder.mkdir(parents=True, exist_ok=True)
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *shown])}
    shared |= {"model": flags.model, "repeats": flags.repeats}
    records = []
    with nullcontext(flags.folder) if flags.folder else tempfile.TemporaryDirectory() as folder:
        for repeat in range(flags.repeats):
            for system in flags.systems:
                found = measure(system, Path(folder, "checkpoint"), flags, is_damaged=repeat == 0)
                records.append({"system": system, "repeat": repeat, **shared, **found})
                seconds = ", ".join(f"{action} {found[action]['seconds']:.2f} s" for action in ("save", "load"))
                print(f"{system}, repeat {repeat}: {seconds}", file=sys.stderr)
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "checkpoint.py")


if __name__ == "__main__":
    main()
