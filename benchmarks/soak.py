"""Kill a run of two processes at random instants and resume it, again and again: it must end as one never killed.

    python benchmarks/soak.py --kills=50 --output=benchmarks/results/soak.md
    python benchmarks/soak.py --kills=3

Exit code 1: it did not. See README.md.
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
MOST_SAVES = 2  # of a run between two kills; a kill aimed at the first undoes all that came before it
POLL_SECONDS = 0.0005
LIMIT_SECONDS = 120  # for anything that is waited for

VICTIMS = {"rank 0": (0,), "rank 1": (1,), "all": (0, 1)}
"""The ranks that each kind of kill ends; "all" ends their launcher too."""


@dataclass(frozen=True)
class Kill:
    """What one kill hit and cost."""

    victim: str
    in_save: bool
    """Whether a checkpoint was half written, or half removed, at that instant."""
    step: int
    """The last step that was logged."""
    resumed_from: int
    """The step of the newest checkpoint then."""
    seconds: float
    """Until the last process of the run had ended."""


@dataclass(frozen=True)
class Soak:
    """A run that was killed, beside one that was not."""

    kills: list[Kill]
    steps: int
    same_weights: bool
    """Every byte of every tensor in the final model and in the last checkpoint, the optimizer's too."""
    same_losses: bool
    """The loss of each step, each once."""

    def failures(self) -> list[str]:
        """What must not be, a line for each."""
        most = max(kill.step - kill.resumed_from for kill in self.kills)
        lines = [f"a kill cost {most} steps, saves are {SAVE_STEPS} apart"] if most > SAVE_STEPS else []
        lines += [] if self.same_weights else ["the final weights differ from those of the uninterrupted run"]
        return lines + ([] if self.same_losses else ["the losses differ from those of the uninterrupted run"])


def soak(folder: Path, *, kills: int, seed: int = 0, tell: Callable[[str], None] = print) -> Soak:
    """Train without a kill and with `kills` of them, in `folder`. Raises RuntimeError where a run ends in another way
    than it should, or has not ended or got on within LIMIT_SECONDS, and UsageError for a checkpoint that is not whole.
    """
    chance, aims = random.Random(seed), ("a save", "a step")
    deck = [(list(VICTIMS)[number % 3], aims[(number + number // 3) % 2]) for number in range(kills)]
    chance.shuffle(deck)
    (folder / "t5.json").write_text(json.dumps(MODEL_SHAPES["t5-tiny"] | {"dropout_rate": 0.1}))
    steps = (kills * MOST_SAVES + 2) * SAVE_STEPS  # the run must outlast its kills
    done = []
    with Run(folder, "whole", steps) as uninterrupted:  # beside the others: bits do not depend on who else runs
        for number, (victim, aim) in enumerate(deck):
            with Run(folder, "killed", steps) as run:
                run.go_on(aim, chance)
                done.append(run.kill(victim))
            tell(f"kill {number + 1} of {kills}, aimed at {victim} in {aim}: {done[-1]}")
        with Run(folder, "killed", steps) as run:
            run.end()
        uninterrupted.end()
    whole, killed = (Path(folder, name) for name in ("whole", "killed"))
    curve = losses(whole)
    assert [step for step, _ in curve] == list(range(1, steps + 1)), "the uninterrupted run has not logged each step"
    return Soak(done, steps, tensors(whole) == tensors(killed), curve == losses(killed))


class Run:
    """One launch of two processes, from the newest checkpoint of its folder on; whatever is left of it ends with it."""

    def __init__(self, folder: Path, name: str, steps: int):
        self._output, self._log = folder / name, folder / f"{name}.log"
        self._resumed_from = self._standing()
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
        """Wait until it is done."""
        if self._launcher.wait(timeout=10 * LIMIT_SECONDS):
            raise RuntimeError(f"{self._output.name} failed: {self._told()}")

    def go_on(self, aim: str, chance: random.Random) -> None:
        """Return at a random instant after a checkpoint stands: within a save, or so many steps after the start."""
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
        """End it by SIGKILL of some ranks, and wait until the others have ended by themselves."""
        if self._launcher.poll() is not None:
            raise RuntimeError(f"it ended before it could be killed: {self._told()}")
        victims = [self._ranks[rank] for rank in VICTIMS[victim]]
        for process in [*victims, *([self._launcher] if victim == "all" else [])]:
            process.kill()
        in_save, started = self._is_saving(), time.monotonic()
        _, alive = psutil.wait_procs([self._launcher, *self._ranks.values()], timeout=LIMIT_SECONDS)
        if alive:
            told = self._told()
            raise RuntimeError(f"{LIMIT_SECONDS} s after the kill of {victim} {len(alive)} processes live: {told}")
        return Kill(victim, in_save, self._logged_step(), self._standing(), time.monotonic() - started)

    def _standing(self) -> int:
        """The step of the newest checkpoint, 0 if there is none yet; all of them must be whole."""
        found = checkpoints(self._output / "checkpoints")
        for checkpoint in found:
            verify_checkpoint(checkpoint)
        if not found and (self._output / "metrics.jsonl").exists():
            raise RuntimeError(f"no checkpoint stands in {self._output}")
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
        """The workers by rank, as far as they have been started."""
        for process in self._launcher.children() if len(self._ranks) < 2 and self._launcher.is_running() else ():
            try:
                if "RANK" in (environment := process.environ()):
                    self._ranks[int(environment["RANK"])] = process
            except psutil.Error:  # between fork and exec, or gone already
                continue
        return self._ranks

    def _told(self) -> str:
        """The end of what it printed, less the launcher's own report."""
        lines = self._log.read_text().splitlines()
        mine = [line for line in lines if line.startswith("error") or "Error: " in line]
        return "\n".join(mine[-5:] + lines[-5:])

    def _wait(self, condition: Callable[[], object]) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > limit or self._launcher.poll() is not None:
                raise RuntimeError(f"{self._output.name} does not get on: {self._told()}")
            time.sleep(POLL_SECONDS)


def losses(output: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def tensors(output: Path) -> dict[str, bytes]:
    """The bytes of each file of tensors in the final model and in the last checkpoint."""
    folders = (output / "model", checkpoints(output / "checkpoints")[-1])
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def table(result: Soak, command: str) -> str:
    """Markdown of a soak."""
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
            f"checkpoint every {SAVE_STEPS}.",
            "",
            "| kill -9 of | kills | of them in a save | seconds until all had ended, median and most |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"- resumed {len(lost)} times, every checkpoint whole at each of them; steps lost by a kill: "
            f"median {median(lost):g}, most {max(lost)}",
            f"- final weights and optimizer state equal the uninterrupted run's bits: {yes(result.same_weights)}",
            f"- the loss of each step equals the uninterrupted run's bits: {yes(result.same_losses)}",
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
    parser.add_argument("--seed", type=int, default=0, help="draws who is killed, and when after progress")
    parser.add_argument("--output", type=Path, help="markdown to write")
    flags = parser.parse_args()
    if flags.kills < 1:
        parser.error(f"--kills={flags.kills}: set 1 or more")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), kills=flags.kills, seed=flags.seed)
    print(f"{time.monotonic() - started:.0f} s")
    told = table(result, shlex.join(["python", *sys.argv]))
    print(told)
    if flags.output:
        flags.output.write_text(told)
    for failure in result.failures():
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if result.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
