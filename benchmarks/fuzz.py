"""Damage small data files and checkpoints at random, read each in a process of its own, and count what goes wrong.

    python benchmarks/fuzz.py --output=benchmarks/results/fuzz.md
    python benchmarks/fuzz.py --only=arrow,jsonl --mutations=500 --keep=KEPT
    python benchmarks/fuzz.py --run=KEPT/arrow.text-stream.17.rows.arrow

Exits with code 1 if an input ends in a fault. See README.md. Needs Linux.
"""

import argparse
import faulthandler
import gc
import json
import os
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from random import Random
from threading import RLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from tqdm import tqdm

from benchmarks.fuzz_inputs import KINDS, Case, Rows
from benchmarks.mutations import mutate
from benchmarks.systems import machine
from lowmem.errors import UsageError

FAULTS = ["death", "hang", "uncaught", "memory", "silent"]
OUTCOMES = ["same", "row errors", "refused", "undetectable", *FAULTS]
ADDRESS_BYTES = 2**31
LIMITS = {resource.RLIMIT_FSIZE: 2**28, resource.RLIMIT_CORE: 0}
ALLOCATION = re.compile(r"alloc|out of memory", re.IGNORECASE)
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # in memory, because lowmem syncs indices and copies to disk

# --- one input


class Bench:
    """The files of one case. `run` damages one of them, and reads them in a forked process."""

    def __init__(self, label: str, case: Case):
        self.label, self.case, self.folder = label, case, case.folder
        self.clean = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}
        self.times = {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in self.clean}
        self.structures = {path: case.structure(self.clean[path]) for path in case.targets}
        self.expected = case.read()  # also imports what the forks need
        assert self.expected and None not in self.expected, f"{label} cannot be read undamaged"
        assert case.second is None or case.second() == self.expected, f"{label}: the two readers disagree"

    def damage(self, number: int, seed: int) -> tuple[Path, bytes]:
        """Return the file that input `number` damages, and its new content."""
        chance = Random(f"{seed} {self.label} {number}")
        target = chance.choice(self.case.targets)
        return target, mutate(self.clean[target], chance, self.structures[target])

    def place(self, target: Path, data: bytes) -> None:
        """Write all files, `target` with `data`. Keeps inodes and times, which indices record."""
        for path in self.folder.rglob("*"):
            if path not in self.clean and not path.is_dir():
                path.unlink()
        for path, content in self.clean.items():
            path.write_bytes(data if path == target else content)
        self.case.reseal(target)
        for path, times in self.times.items():
            os.utime(path, ns=times)

    def run(
        self, target: Path, data: bytes, log: int, *, most_seconds: float = 10, most_bytes: int = 2**29
    ) -> tuple[str, str, int]:
        """Return the outcome of one input, its details, and by how many bytes the process grew. `log` is its stderr."""
        self.place(target, data)
        os.ftruncate(log, 0)
        pages = Path("/proc/self/statm").read_text().split()[:3]
        mapped, resident, of_files = (resource.getpagesize() * int(number) for number in pages)
        receiving, sending = os.pipe()
        if (child := os.fork()) == 0:
            signal.setitimer(signal.ITIMER_REAL, most_seconds)
            for limit, value in {**LIMITS, resource.RLIMIT_AS: mapped + ADDRESS_BYTES}.items():
                resource.setrlimit(limit, (value, value))
            outcome = self.examine(lambda: os.write(sending, b"\n"))
            os.write(sending, json.dumps(outcome).encode())
            os._exit(0)
        os.close(sending)
        with open(receiving, "rb") as pipe:
            sent = pipe.read()
        _, status, used = os.wait4(child, 0)
        grown = max(0, 1024 * used.ru_maxrss - (resident - of_files))  # a fork starts without the pages of files
        if (code := os.waitstatus_to_exitcode(status)) != 0:
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            outcome = "hang" if code == -signal.SIGALRM else "death"
            if sent:
                outcome, what = "silent", f"the rows differ, and the second reader ends with {what}"
            return outcome, f"{what}\n{os.pread(log, 3000, 0).decode(errors='replace')}", grown
        outcome, details = json.loads(sent)
        left = [path.name for path in self.folder.rglob("*") if path.suffix in (".lock", ".unfinished")]
        if grown > most_bytes:
            outcome, details = "memory", f"grew by {grown:,} bytes ({outcome})\n{details}"
        elif left:
            outcome, details = "uncaught", f"{left[0]} is left ({outcome})\n{details}"
        return outcome, details, grown

    def examine(self, before_second: Callable[[], object]) -> tuple[str, str]:
        """Read the files, and compare the rows with the undamaged ones and with those of the second reader."""
        try:
            rows = self.case.read()
        except UsageError as error:
            return ("memory" if ALLOCATION.search(str(error)) else "refused"), str(error)
        except BaseException as error:  # a panic in Rust is not an Exception
            outcome = "memory" if isinstance(error, MemoryError) else "uncaught"
            return outcome, f"{error!r:.500}\n{traceback.format_exc()[-3000:]}"
        if agree(rows, self.expected):
            return ("row errors" if None in rows else "same"), ""
        odd = next((row for row in rows if row not in (None, *self.expected)), "rows are missing, repeated or moved")
        if self.case.second is None:
            return "silent", f"checksums should have found it\n{odd:.500}"
        before_second()
        try:
            if agree(rows, self.case.second()):
                return "undetectable", ""
            return "silent", f"the second reader reads other rows\n{odd:.500}"
        except Exception as error:
            return "silent", f"the second reader: {error!r:.500}\n{odd:.500}"


def make_bench(kind: str, name: str, parent: Path) -> Bench:
    folder = parent / name
    folder.mkdir()
    return Bench(f"{kind}.{name}", KINDS[kind][name](folder))


def agree(rows: Rows, others: Rows) -> bool:
    """Whether `rows` are `others`, possibly with errors in place of some of them."""
    left = iter(others)
    return (None in rows or len(rows) == len(others)) and all(row in left for row in rows if row is not None)


# --- many inputs


def fuzz_share(kind: str, share: int, shares: int, mutations: int, seed: int, keep: Path | None) -> dict[str, object]:
    """Run every `shares`-th input of a kind. Returns the number of each outcome, the faults, and the largest growth."""
    tqdm.monitor_interval = 0  # no thread, because the process forks
    tqdm.set_lock(RLock())  # the default lock leaves semaphores behind
    counts, faults, peak = Counter(), [], 0
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder, open(Path(folder, "log"), "a+") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        faulthandler.enable(log)
        faulthandler.register(signal.SIGALRM, log, chain=True)
        benches = [make_bench(kind, name, Path(folder)) for name in KINDS[kind]]
        gc.freeze()  # otherwise each fork would copy the memory of objects that it only visits
        started = time.monotonic()
        for number in range(share, mutations, shares):
            bench = benches[number // shares % len(benches)]
            target, data = bench.damage(number, seed)
            outcome, details, grown = bench.run(target, data, log.fileno())
            counts[outcome] += 1
            peak = max(peak, grown)
            if outcome in FAULTS:
                name = f"{bench.label}.{number}.{target.name}"
                faults.append({"input": name, "outcome": outcome, "sort": sort_of(outcome, details)})
                if keep:
                    (keep / name).write_bytes(data)
                    (keep / f"{name}.txt").write_text(f"{outcome}: {details}\n")
        seconds = time.monotonic() - started
    return {"counts": counts, "faults": faults, "peak": peak, "seconds": seconds}


def sort_of(outcome: str, details: str) -> str:
    """Return the error or signal without numbers, and the line of lowmem in which it occurred."""
    frames = re.findall(r'File ".*/(lowmem/[^"]+)", line (\d+)', details)
    where = f" at {':'.join(frames[-1 if 'Traceback' in details else 0])}" if frames else ""
    what = re.sub(r"/\S*/", "", details.partition("\n")[0])
    what = what.partition("(")[0] if outcome == "uncaught" else what
    return f"{outcome}: {re.sub(r'[0-9]+', 'N', what)[:150]}{where}"


def fuzz(
    kind: str, *, mutations: int, seed: int = 0, processes: int = 2, keep: Path | None = None
) -> dict[str, object]:
    """Run `mutations` inputs of a kind. Returns "kind", "counts", "faults", "peak", and "speed" per process."""
    tasks = [(kind, share, processes, mutations, seed, keep) for share in range(processes)]
    with get_context("spawn").Pool(processes) as pool:
        parts = pool.starmap(fuzz_share, tasks, chunksize=1)
    return {
        "kind": kind,
        "counts": sum((part["counts"] for part in parts), Counter()),
        "faults": [fault for part in parts for fault in part["faults"]],
        "peak": max(part["peak"] for part in parts),
        "speed": mutations / sum(part["seconds"] for part in parts),
    }


def run_kept(path: Path) -> None:
    """Read one kept input in this process, without limits."""
    faulthandler.enable()
    kind, name, *_ = path.name.split(".", 3)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        bench = make_bench(kind, name, Path(folder))
        target = next(each for each in bench.case.targets if path.name.endswith(f".{each.name}"))
        bench.place(target, path.read_bytes())
        print(f"reading {target}", flush=True)
        print(": ".join(bench.examine(lambda: print("the rows differ: starting the second reader", flush=True))))


def table(results: list[dict], command: str) -> str:
    """Return Markdown for the results."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("pyarrow", "safetensors", "numpy", "torch"))
    lines = [
        "# fuzz",
        "",
        "Generated by benchmarks/fuzz.py.",
        "",
        f"    {command}",
        "",
        f"{datetime.now(UTC).isoformat(timespec='seconds')}; {machine()['cpu']}, {machine()['cores']} cores; "
        f"Python {sys.version.split()[0]}, {versions}.",
        "",
        f"| input | {' | '.join(OUTCOMES)} | largest growth, MiB | inputs/s per process |",
        f"|---|{'---:|' * (len(OUTCOMES) + 2)}",
    ]
    for result in results:
        numbers = [*(result["counts"][outcome] for outcome in OUTCOMES), result["peak"] / 2**20, result["speed"]]
        lines.append(f"| {result['kind']} | {' | '.join(f'{number:,.0f}' for number in numbers)} |")
    sorts = Counter(f"{each['kind']}, {fault['sort']}" for each in results for fault in each["faults"])
    first = {f"{each['kind']}, {fault['sort']}": fault["input"] for each in results for fault in each["faults"][::-1]}
    lines += ["", *(f"- {number:,} x {sort} (such as {first[sort]})" for sort, number in sorts.most_common())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--mutations", type=int, default=20_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"kinds, separated by commas: {', '.join(KINDS)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for each input that ends in a fault, and for its error")
    parser.add_argument("--run", type=Path, help="read this kept input in the foreground, and do nothing else")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    flags = parser.parse_args()
    kinds = flags.only.split(",") if flags.only else list(KINDS)
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"--only={','.join(unknown)}: choose from {', '.join(KINDS)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Large pages make a fork of a process that has imported torch three times as fast.
    os.environ |= {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    if flags.run:
        run_kept(flags.run)
        return 0
    if flags.keep:
        flags.keep.mkdir(parents=True, exist_ok=True)
    options = {"mutations": flags.mutations, "seed": flags.seed, "processes": flags.processes, "keep": flags.keep}
    results = []
    for kind in kinds:
        results.append(fuzz(kind, **options))
        print(f"{kind}: {dict(results[-1]['counts'])}", flush=True)
    text = table(results, shlex.join(["python", *sys.argv]))
    print(text)
    if flags.output:
        flags.output.write_text(text)
    return 1 if any(result["faults"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
