"""Stop runs at each read, write, growth or sync of the file of offloaded weights; resume them, and compare the bits.

    python benchmarks/store_faults.py --output=benchmarks/results/store_faults.md
    python benchmarks/store_faults.py --points=20

A run is stopped by SIGKILL, or by an error of the file, which must end it with exit code 1 and one line. Exits with
code 1 if a run ends otherwise, leaves a file or a damaged checkpoint, or resumes with other bits. See README.md.
"""

import argparse
import errno
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from benchmarks.systems import machine
from lowmem.checkpoint.manifest import checkpoints
from lowmem.checkpoint.verify import verify
from lowmem.errors import UsageError
from tests.models import LLAMA, qa_rows
from tests.processes import PROGRAM, finish, run_program, started_function

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "attention_dropout": 0.1}  # embeddings are larger than a layer
RUN = {"mixed_precision": "bf16", "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
RUN |= {"max_steps": 3, "logging_steps": 1, "save_steps": 1, "save_total_limit": 0, "resume": "auto"}
CASES = {
    "lean, released": {"memory": "lean", "release": True, "max_grad_norm": 0},
    "exact, clipped": {"memory": "exact", "max_grad_norm": 1.0, "offload_activations": True},
}
FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "SIGKILL": None}
OPERATIONS = ("make", "grow", "read", "write", "sync")
LIMIT_SECONDS = 300


def stopped(number: int, fault: int | None, operations: Path, *flags: str) -> None:
    """Train, and stop at the operation of this number: raise an error, or (None) kill this process.

    Writes the operations until then, in order.
    """
    log, lock = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), threading.Lock()
    left = [number]

    def count(event: str, arguments: tuple) -> None:
        if event == "lowmem.store":
            with lock:
                os.write(log, f"{arguments[0]}\n".encode())
                left[0] -= 1
                is_last = left[0] == 0
            if is_last and fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if is_last:
                raise OSError(fault, os.strerror(fault))

    sys.addaudithook(count)
    run_program(PROGRAM, "train", *flags)


class Case:
    """The runs of one of `CASES`, and what an uninterrupted run wrote."""

    def __init__(self, work: Path, options: dict[str, object]):
        work.mkdir()
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_rows(60)))
        (work / "llama.json").write_text(json.dumps(LLAMA | SHAPE))
        files = {"train_file": work / "rows.jsonl", "model_config": work / "llama.json"}
        self._work, self._flags = work, RUN | options | files
        code, errors, operations = self._run("whole", 0, None)
        assert code == 0, errors
        self.count, self._expected = len(operations), results(work / "whole")

    def problems(self, number: int, name: str) -> tuple[str, list[str]]:
        """Stop a run at an operation, and resume it. Return the operation and what was wrong."""
        run, fault = f"{name}-{number}", FAULTS[name]
        code, errors, operations = self._run(run, number, fault)
        found, output = [], self._work / run
        if fault is None and code != -signal.SIGKILL:
            found.append(f"exit code {code}")
        is_one_line = errors.count("\n") == 1 and "the file for offloaded tensors" in errors
        if fault is not None and (code != 1 or not is_one_line or os.strerror(fault) not in errors):
            found.append(f"exit code {code}, printed: {errors}")
        try:
            if checkpoints(output / "checkpoints"):
                list(verify(output))
        except UsageError as error:
            found.append(str(error))
        code, errors, _ = self._run(run, 0, None)
        if code or errors:
            found.append(f"resumed with exit code {code}, printed: {errors}")
        elif results(output) != self._expected:
            found.append("resumed with other bits")
        rmtree(output, ignore_errors=True)
        operation = operations[number - 1]  # not the last: other threads go on for a moment
        return operation, [f"{operation} {number}, {name}: {problem}" for problem in found]

    def _run(self, run: str, number: int, fault: int | None) -> tuple[int, str, list[str]]:
        """Return exit code, errors and operations of a run."""
        store, log = self._work / f"{run}.store", self._work / f"{run}.operations"
        options = self._flags | {"offload_weights": store, "output_dir": self._work / run}
        flags = [f"--{option}={value}" for option, value in options.items()]
        with started_function(stopped, number, fault, log, *flags) as process:
            result = finish(process, LIMIT_SECONDS)
        left = list(store.iterdir()) if store.exists() else []
        operations = log.read_text().split()
        rmtree(store, ignore_errors=True)
        log.unlink()
        return result.returncode, result.stderr + "".join(f"left {path}\n" for path in left), operations


def results(output: Path) -> dict[str, object]:
    """Return the losses, and the tensor files of the model and of all checkpoints."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    files = sorted(output.rglob("*.safetensors"))
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
    return found | {"losses": [(line["step"], line["loss"]) for line in lines if "loss" in line]}


def swept(case: Case, points: int, pool: ThreadPoolExecutor) -> tuple[list[Counter], list[str]]:
    """Stop runs at `points` operations by each fault (0: at all). Return the counts of operations by fault."""
    chosen = range(1, case.count + 1)
    if 0 < points < case.count:
        chosen = sorted(random.Random(0).sample(chosen, points))
    counts, problems = [], []
    for fault in FAULTS:
        found = list(pool.map(lambda number, fault=fault: case.problems(number, fault), chosen))
        counts.append(Counter(operation for operation, _ in found))
        problems += [problem for _, of_run in found for problem in of_run]
        print(f"{fault}: {len(found)} of {case.count} operations, {len(problems)} problems so far", flush=True)
    return counts, problems


def report(swept_cases: Sequence[tuple[str, Case, list[Counter], list[str]]]) -> str:
    """Return Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    head = ["# store_faults", "", f"    {shlex.join(['python', *sys.argv])}", ""]
    where = machine()
    head += [f"{datetime.now(UTC):%F}; {where['cores']} x {where['cpu']}; {versions}", ""]
    lines = [f"| run | operations | fault | {' | '.join(OPERATIONS)} | problems |"]
    lines += ["|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    for name, case, counts, problems in swept_cases:
        for fault, count in zip(FAULTS, counts, strict=True):
            wrong = sum(f", {fault}: " in problem for problem in problems)
            cells = [name, case.count, fault, *(count[operation] for operation in OPERATIONS), wrong]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    problems = [f"- {name}: {problem}" for name, _, _, problems in swept_cases for problem in problems]
    return "\n".join([*head, *lines, *([""] if problems else []), *problems, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--points", type=int, default=0, help="operations per run and fault, at random (0: all)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, help="file for the report")
    flags = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(flags.workers) as pool:
        for name, options in CASES.items():
            case = Case(Path(folder, name.replace(", ", "-")), options)
            found.append((name, case, *swept(case, flags.points, pool)))
    text = report(found)
    print(text)
    if flags.output:
        flags.output.write_text(text)
    sys.exit(any(problems for *_, problems in found))


if __name__ == "__main__":
    main()
