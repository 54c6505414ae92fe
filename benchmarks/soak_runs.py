"""Launch a small training run on one or two processes, watch it from outside, kill it, and read what it wrote."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.records import MIB
from lowmem.checkpoint.manifest import checkpoints, step_of, verify_checkpoint
from lowmem.config.presets import MODEL_SHAPES

PROGRAM = Path(__file__).resolve().parents[1] / "train_low_mem.py"
POLL_SECONDS = 0.002
LIMIT_SECONDS = 600  # without progress
LONGEST_RECORD = 4096  # bytes of a line in metrics.jsonl

_SHAPE = MODEL_SHAPES["t5-tiny"] | {"dropout_rate": 0.1, "num_layers": 1}
_FLAGS = {"mixed_precision": "bf16", "memory": "lean", "batch_size": 2, "learning_rate": 1e-3, "resume": "auto"}
_FLAGS |= {"validation_rows": 4, "max_predict_samples": 2, "generation_max_new_tokens": 4}
_SAME_ON_RESUME = ("step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_")


class Run:
    """One launch, which resumes from the newest checkpoint in `folder`/`name`. Leaving the context kills it.

    Its output is appended to `folder`/`name`.log, and its temporary files are in `folder`/`name`.tmp. Trains on CPUs
    unless `hide_gpus` is False.
    """

    def __init__(self, folder: Path, name: str, *, processes: int, hide_gpus: bool = True, **flags: object):
        self.output, self.temporary, self._log = folder / name, folder / f"{name}.tmp", folder / f"{name}.log"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.resumed_from = self.newest_step()
        (folder / "t5.json").write_text(json.dumps(_SHAPE))
        flags = _FLAGS | flags | {"model_config": folder / "t5.json", "output_dir": self.output}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program = [str(PROGRAM), "train", *(f"--{flag}={value}" for flag, value in flags.items())]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})
        with open(self._log, "a") as log:
            self._log_start = log.tell()
            self._launcher = psutil.Popen(
                [sys.executable, *(launcher if processes > 1 else []), *program],
                env=os.environ | settings | {"TMPDIR": str(self.temporary)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._num_ranks, self._ranks = processes, {} if processes > 1 else {0: self._launcher}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes().values():
            if process.is_running():
                process.kill()
        self._launcher.wait()

    def processes(self) -> dict[str, psutil.Process]:
        """Return the launcher, if there is one, and the ranks that have started so far."""
        for process in self._launcher.children() if len(self._ranks) < self._num_ranks and self.is_running() else ():
            try:
                if "RANK" in (environment := process.environ()):
                    self._ranks[int(environment["RANK"])] = process
            except psutil.Error:  # the process has not called exec yet, or has exited
                continue
        launcher = {"launcher": self._launcher} if self._num_ranks > 1 else {}
        return launcher | {f"rank {rank}": process for rank, process in sorted(self._ranks.items())}

    def is_running(self) -> bool:
        return self._launcher.poll() is None

    def end(self) -> None:
        """Wait until the run is done."""
        try:
            code = self._launcher.wait(timeout=10 * LIMIT_SECONDS)
        except psutil.TimeoutExpired as error:
            raise RuntimeError(f"{self.output.name} does not end: {self.log_tail()}") from error
        if code:
            raise RuntimeError(f"{self.output.name} failed with exit code {code}: {self.log_tail()}")

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()` is true."""
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > limit or not self.is_running():
                raise RuntimeError(f"{self.output.name} makes no progress: {self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def kill(self, names: tuple[str, ...]) -> None:
        """Send SIGKILL to some processes."""
        if not self.is_running():
            raise RuntimeError(f"the run ended before the kill: {self.log_tail()}")
        processes = self.processes()
        for name in names:
            processes[name].kill()

    def wait_for_exit(self) -> None:
        """Wait until all processes have exited on their own."""
        _, alive = psutil.wait_procs(list(self.processes().values()), timeout=LIMIT_SECONDS)
        if alive:
            raise RuntimeError(f"{LIMIT_SECONDS} s after a kill, {len(alive)} processes still run: {self.log_tail()}")

    def newest_step(self) -> int:
        """Verify all checkpoints, and return the step of the newest, or 0 if there is none yet."""
        found = checkpoints(self.output / "checkpoints")
        for checkpoint in found:
            verify_checkpoint(checkpoint)
        if not found and (self.output / "metrics.jsonl").exists():
            raise RuntimeError(f"no checkpoint is left in {self.output}")
        return step_of(found[-1]) if found else 0

    def last_record(self) -> dict[str, object]:
        """Return the last record of a step in metrics.jsonl, or one of step 0."""
        try:
            with open(self.output / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_RECORD))
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return {"step": 0}
        whole = (json.loads(line) for line in reversed(lines) if line.startswith(b"{") and line.endswith(b"\n"))
        return next((record for record in whole if "step" in record), {"step": 0})  # not an event, such as the end

    def has_logged(self) -> bool:
        """Return whether this launch has logged a step. Before that, records and unfinished files are from the last."""
        with open(self._log) as log:
            log.seek(self._log_start)
            return any(line.startswith("step ") for line in log)

    def is_saving(self) -> bool:
        return any((self.output / "checkpoints").glob(".unfinished-*"))

    def log_tail(self) -> str:
        """Return the last errors and the last lines that the run printed."""
        lines = self._log.read_text().splitlines()
        errors = [line for line in lines if line.startswith("error") or "Error: " in line]
        return "\n".join(errors[-5:] + lines[-5:])


def measures(run: Run) -> dict[tuple[str, str], float]:
    """Return the run's measures by name and unit."""
    found: dict[tuple[str, str], float] = {}
    for name, process in run.processes().items():
        try:
            memory, descriptors, threads = process.memory_full_info(), process.num_fds(), process.num_threads()
        except psutil.NoSuchProcess:  # the run has just ended
            continue
        found |= {(f"{name}: RSS", "MiB"): memory.rss / MIB, (f"{name}: USS", "MiB"): memory.uss / MIB}
        found |= {(f"{name}: open descriptors", ""): descriptors, (f"{name}: threads", ""): threads}
    found["files in the output folder", ""] = sum(1 for _ in run.output.rglob("*"))
    found["files in the temporary folder", ""] = sum(1 for _ in run.temporary.rglob("*"))
    return found


def records(output: Path) -> list[dict[str, object]]:
    """Return the records of steps and evaluations, without measured times and memory."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    kept = [{name: line[name] for name in line if name.startswith(_SAME_ON_RESUME)} for line in lines]
    return [record for record in kept if len(record) > 1]


def answers(output: Path) -> set[tuple[str, str]]:
    """Return the answers that all launches printed, each with the line of its evaluation."""
    found, evaluation = set(), ""
    for line in output.with_suffix(".log").read_text().splitlines():
        evaluation = line if line.startswith("step ") else evaluation
        found |= {(evaluation, line)} if line.startswith("  ") and "(expected " in line else set()
    return found


def tensors(output: Path) -> dict[str, bytes]:
    """Return the bytes of each safetensors file in the final model and in the last checkpoint."""
    folders = (output / "model", checkpoints(output / "checkpoints")[-1])
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}
