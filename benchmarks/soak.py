"""Kill and resume a run of two processes many times; its result must be bit-identical to an uninterrupted run's.

    python benchmarks/soak.py --kills=50 --output=benchmarks/results/soak.md
    python benchmarks/soak.py --kills=3

Exits with code 1 if a result differs, or if a kill cost too many steps. See README.md.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from benchmarks.systems import machine
from lowmem.checkpoint.manifest import checkpoints, step_of, verify_checkpoint
from lowmem.config.presets import MODEL_SHAPES

PROGRAM = Path(__file__).resolve().parents[1] / "train_low_mem.py"
SAVE_STEPS = 5
MOST_SAVES = 2  # saves that a launch may start before its kill; a kill during the first loses all steps of the launch
POLL_SECONDS = 0.0005
LIMIT_SECONDS = 120  # the time limit of a wait; `Run.end` waits ten times as long

VICTIMS = {"rank 0": (0,), "rank 1": (1,), "all": (0, 1)}
"""The ranks that each kind of kill hits; "all" includes the launcher."""


@dataclass(frozen=True)
class Kill:
    """One kill and its cost."""

    victim: str
    in_save: bool
    """Whether a checkpoint was being written or removed."""
    step: int
    """The last step logged before the kill."""
    resumed_from: int
    """The step of the newest checkpoint after the kill."""
    seconds: float
    """Time from the kill until the run's last process exited."""


@dataclass(frozen=True)
class Soak:
    """The result of the program: all kills, and whether the killed run equals an uninterrupted one."""

    kills: list[Kill]
    steps: int
    same_weights: bool
    """Whether the final model and the last checkpoint, optimizer state included, have the same bits in both runs."""
    same_losses: bool
    """Whether the killed run logged each step once, with the same loss as the uninterrupted run."""

    def failures(self) -> list[str]:
        """Return one line for each requirement that is not met."""
        most = max(kill.step - kill.resumed_from for kill in self.kills)
        lines = [f"a kill lost {most} steps, but the run saves every {SAVE_STEPS} steps"] if most > SAVE_STEPS else []
        lines += [] if self.same_weights else ["the final weights differ from those of the uninterrupted run"]
        return lines + ([] if self.same_losses else ["the losses differ from those of the uninterrupted run"])


def soak(folder: Path, *, kills: int, seed: int = 0, log: Callable[[str], None] = print) -> Soak:
    """Train in `folder` once without kills and once with `kills` kills, and compare the results.

    Raises RuntimeError if a run fails or makes no progress, psutil.TimeoutExpired if it does not end in time, and
    UsageError if a checkpoint is damaged.
    """
    chance, aims = random.Random(seed), ("a save", "a step")
    deck = [(list(VICTIMS)[number % 3], aims[(number + number // 3) % 2]) for number in range(kills)]
    chance.shuffle(deck)
    (folder / "t5.json").write_text(json.dumps(MODEL_SHAPES["t5-tiny"] | {"dropout_rate": 0.1}))
    steps = (kills * MOST_SAVES + 2) * SAVE_STEPS  # enough that the killed run does not finish before its last kill
    done = []
    with Run(folder, "whole", steps) as uninterrupted:  # trains at the same time, which changes no bits
        for number, (victim, aim) in enumerate(deck):
            with Run(folder, "killed", steps) as run:
                run.advance(aim, chance)
                done.append(run.kill(victim))
            log(f"kill {number + 1} of {kills}, aimed at {victim} in {aim}: {done[-1]}")
        with Run(folder, "killed", steps) as run:
            run.end()
        uninterrupted.end()
    whole, killed = (Path(folder, name) for name in ("whole", "killed"))
    curve = losses(whole)
    assert [step for step, _ in curve] == list(range(1, steps + 1)), "the uninterrupted run did not log each step once"
    return Soak(done, steps, tensors(whole) == tensors(killed), curve == losses(killed))


class Run:
    """One launch of two processes, which resume from the newest checkpoint. Leaving the context kills them."""

    def __init__(self, folder: Path, name: str, steps: int):
        self._output, self._log = folder / name, folder / f"{name}.log"
        self._resumed_from = self._newest_step()
        flags = {"model_config": folder / "t5.json", "mixed_precision": "bf16", "memory": "lean"}
        flags |= {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "validation_rows": 0}
        flags |= {"max_steps": steps, "save_steps": SAVE_STEPS, "logging_steps": 1}
        flags |= {"output_dir": self._output, "resume": "auto"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        program = [str(PROGRAM), "train", *(f"--{flag}={value}" for flag, value in flags.items())]
        with open(self._log, "w") as log:
            self._launcher = psutil.Popen(
                [sys.executable, *launcher, *program],
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._ranks: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._launcher, *self._find_ranks().values()):
            if process.is_running():
                process.kill()
        self._launcher.wait()

    def end(self) -> None:
        """Wait until the run is done."""
        if self._launcher.wait(timeout=10 * LIMIT_SECONDS):
            raise RuntimeError(f"{self._output.name} failed: {self._log_tail()}")

    def advance(self, aim: str, chance: random.Random) -> None:
        """Wait for a checkpoint, and then for a random moment: during a save, or some steps after the resume."""
        self._wait(lambda: len(self._find_ranks()) == 2 and checkpoints(self._output / "checkpoints"))
        if aim == "a step":
            goal = self._resumed_from + chance.randint(1, MOST_SAVES * SAVE_STEPS)
            self._wait(lambda: self._logged_step() >= goal)
            time.sleep(chance.uniform(0, 0.05))
            return
        for number in range(chance.randint(1, MOST_SAVES)):
            if number:
                self._wait(lambda: not self._is_saving())
            self._wait(self._is_saving)
        time.sleep(chance.uniform(0, 0.03))

    def kill(self, victim: str) -> Kill:
        """Send SIGKILL to some ranks, and wait until the others have exited on their own."""
        if self._launcher.poll() is not None:
            raise RuntimeError(f"the run ended before the kill: {self._log_tail()}")
        victims = [self._ranks[rank] for rank in VICTIMS[victim]]
        for process in [*victims, *([self._launcher] if victim == "all" else [])]:
            process.kill()
        in_save, started = self._is_saving(), time.monotonic()
        _, alive = psutil.wait_procs([self._launcher, *self._ranks.values()], timeout=LIMIT_SECONDS)
        if alive:
            tail = self._log_tail()
            raise RuntimeError(f"{LIMIT_SECONDS} s after killing {victim}, {len(alive)} processes still run: {tail}")
        return Kill(victim, in_save, self._logged_step(), self._newest_step(), time.monotonic() - started)

    def _newest_step(self) -> int:
        """Verify all checkpoints, and return the step of the newest, or 0 if there is none yet."""
        found = checkpoints(self._output / "checkpoints")
        for checkpoint in found:
            verify_checkpoint(checkpoint)
        if not found and (self._output / "metrics.jsonl").exists():
            raise RuntimeError(f"no checkpoint is left in {self._output}")
        return step_of(found[-1]) if found else 0

    def _logged_step(self) -> int:
        try:
            lines = (self._output / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.endswith(b"\n")]
        return json.loads(whole[-1])["step"] if whole else 0

    def _is_saving(self) -> bool:
        return any((self._output / "checkpoints").glob(".unfinished-*"))

    def _find_ranks(self) -> dict[int, psutil.Process]:
        """Return the workers that have started so far, by rank."""
        for process in self._launcher.children() if len(self._ranks) < 2 and self._launcher.is_running() else ():
            try:
                if "RANK" in (environment := process.environ()):
                    self._ranks[int(environment["RANK"])] = process
            except psutil.Error:  # the process has not called exec yet, or has exited
                continue
        return self._ranks

    def _log_tail(self) -> str:
        """Return the last errors and the last lines that the run printed."""
        lines = self._log.read_text().splitlines()
        mine = [line for line in lines if line.startswith("error") or "Error: " in line]
        return "\n".join(mine[-5:] + lines[-5:])

    def _wait(self, condition: Callable[[], object]) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > limit or self._launcher.poll() is not None:
                raise RuntimeError(f"{self._output.name} makes no progress: {self._log_tail()}")
            time.sleep(POLL_SECONDS)


def losses(output: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def tensors(output: Path) -> dict[str, bytes]:
    """Return the bytes of each safetensors file in the final model and in the last checkpoint."""
    folders = (output / "model", checkpoints(output / "checkpoints")[-1])
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def table(result: Soak, command: str) -> str:
    """Return Markdown for the result."""
    lost = [kill.step - kill.resumed_from for kill in result.kills]
    rows = []
    for victim in VICTIMS:
        of = [kill for kill in result.kills if kill.victim == victim]
        rows.append(f"| {victim} | {len(of)} | {sum(kill.in_save for kill in of)} | {ended(of)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    return "\n".join(
        [
            "# soak",
            "",
            "Generated by benchmarks/soak.py.",
            "",
            f"    {command}",
            "",
            f"{datetime.now(UTC).isoformat(timespec='seconds')}; {machine()['cpu']}, {machine()['cores']} cores; "
            f"{versions}; 2 processes, 1 thread each; a T5 with dropout in memory=lean, {result.steps} steps, a "
            f"checkpoint every {SAVE_STEPS} steps.",
            "",
            "| SIGKILL to | kills | during a save | seconds until all had exited, median and maximum |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"- resumed {len(lost)} times, with every checkpoint intact each time; steps lost per kill: "
            f"median {median(lost):g}, maximum {max(lost)}",
            f"- final weights and optimizer state bit-identical to the uninterrupted run's: {yes(result.same_weights)}",
            f"- the loss of each step bit-identical to the uninterrupted run's: {yes(result.same_losses)}",
            "",
        ]
    )


def ended(kills: list[Kill]) -> str:
    seconds = [kill.seconds for kill in kills]
    return f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else "-"


def yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="random seed for which ranks are killed, and when")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    flags = parser.parse_args()
    if flags.kills < 1:
        parser.error(f"--kills={flags.kills}: set 1 or more")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), kills=flags.kills, seed=flags.seed)
    print(f"{time.monotonic() - started:.0f} s")
    text = table(result, shlex.join(["python", *sys.argv]))
    print(text)
    if flags.output:
        flags.output.write_text(text)
    for failure in result.failures():
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if result.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
