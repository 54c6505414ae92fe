"""Kill and resume runs many times, whose results must be bit-identical to uninterrupted ones; find leaks in long runs.

    python benchmarks/soak.py --kills=100 --steps=0 --output=benchmarks/results/soak.md
    python benchmarks/soak.py --kills=0 --steps=10000 --output=benchmarks/results/soak-steps.md

Exits with code 1 if a result differs, a kill cost too many steps, or a long run leaks. See README.md.
"""

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import linear_regression, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from benchmarks.soak_runs import Run, answers, measures, records, tensors
from benchmarks.systems import machine
from lowmem.checkpoint.manifest import checkpoints

SAVE_STEPS, EVAL_STEPS = 5, 3  # of the killed runs; a long run saves and evaluates 100 times
MOST_STEPS = 2 * SAVE_STEPS  # of a launch before its kill; a kill during the first save loses all steps of the launch

VICTIMS = {
    1: {"the process": ("rank 0",)},
    2: {"rank 0": ("rank 0",), "rank 1": ("rank 1",), "all": ("launcher", "rank 0", "rank 1")},
}
"""The processes that each kind of kill hits, by the number of ranks."""

AIMS = ("save", "evaluation", "step")
WARM_UP = 0.15  # the share of a long run's steps that the slopes leave out
SAMPLE_SECONDS = 2
LEAK = {"MiB": 8.0, "": 1.0}  # growth of the fitted line over a long run that counts as a leak, by unit


@dataclass(frozen=True)
class Kill:
    """One kill and its cost."""

    processes: int
    victim: str
    moment: str
    """What the run was doing, one of AIMS; "save" includes removing an old checkpoint."""
    step: int
    """The last step logged before the kill."""
    resumed_from: int
    """The step of the newest checkpoint after the kill."""
    seconds: float
    """Time from the kill until the run's last process exited."""


@dataclass(frozen=True)
class Soak:
    """The kills of a run, and whether it equals an uninterrupted one."""

    kills: list[Kill]
    steps: int
    same_weights: bool
    """Whether the final model and the last checkpoint, optimizer state included, have the same bits in both runs."""
    same_records: bool
    """Whether each step and evaluation is logged once, with the uninterrupted run's losses, norms and metrics."""
    same_answers: bool
    """Whether each answer that a launch printed is the uninterrupted run's of that evaluation."""

    def failures(self) -> list[str]:
        """Return one line for each requirement that is not met."""
        processes, most = self.kills[0].processes, max(kill.step - kill.resumed_from for kill in self.kills)
        same = {"final weights": self.same_weights, "records": self.same_records, "answers": self.same_answers}
        lines = [f"a kill lost {most} steps, but the run saves every {SAVE_STEPS} steps"] if most > SAVE_STEPS else []
        lines += [f"the {name} differ from the uninterrupted run's" for name, is_same in same.items() if not is_same]
        return [f"processes: {processes}; {line}" for line in lines]


@dataclass(frozen=True)
class Growth:
    """A measure of a long run, sampled after the warm-up."""

    processes: int
    of: str
    unit: str
    samples: Sequence[tuple[int, float]]
    """The step and the value of each sample."""

    @property
    def slope(self) -> float:
        """The slope of the least-squares line, per step."""
        return linear_regression(*zip(*self.samples, strict=True)).slope

    def failures(self) -> list[str]:
        """Return a line if the fitted line grows by more than `LEAK`."""
        grown = self.slope * (self.samples[-1][0] - self.samples[0][0])
        return [f"processes: {self.processes}; {self.of} grew by {grown:.1f} {self.unit}"] * (grown >= LEAK[self.unit])


def soak(
    folder: Path,
    *,
    kills: int,
    processes: int,
    seed: int = 0,
    log: Callable[[str], None] = print,
    **options: object,
) -> Soak:
    """Train in `folder` once without kills and once with `kills` kills, and compare the results.

    `options` are for `Run`: more flags, or hide_gpus=False.
    Raises RuntimeError if a run fails or makes no progress, and UsageError if a checkpoint is damaged.
    """
    chance, victims = random.Random(seed), VICTIMS[processes]
    deck = [(list(victims)[i % len(victims)], AIMS[(i + i // len(AIMS)) % len(AIMS)]) for i in range(kills)]
    chance.shuffle(deck)
    steps = kills * MOST_STEPS + 2 * SAVE_STEPS  # enough that the killed run does not finish before its last kill
    flags = {"processes": processes, "max_steps": steps, "save_steps": SAVE_STEPS, "eval_steps": EVAL_STEPS}
    flags |= {"logging_steps": 1, "gradient_accumulation_steps": 2} | options
    done = []
    with Run(folder, "whole", **flags) as uninterrupted:  # trains at the same time, which changes no bits
        for number, (victim, aim) in enumerate(deck):
            with Run(folder, "killed", **flags) as run:
                advance(run, aim, chance)
                run.kill(victims[victim])
                moment, started = moment_of(run), time.monotonic()
                run.wait_for_exit()
                seconds = time.monotonic() - started
                kill = Kill(processes, victim, moment, run.last_record()["step"], run.newest_step(), seconds)
            done.append(kill)
            log(f"kill {number + 1} of {kills}, aimed at {victim}, {aim}: {kill}")
        with Run(folder, "killed", **flags) as run:
            run.end()
        uninterrupted.end()
    whole, killed = folder / "whole", folder / "killed"
    expected = records(whole)
    logged = [record["step"] for record in expected if "loss" in record]
    assert logged == list(range(1, steps + 1)), "the uninterrupted run did not log each step once"
    assert answers(killed), "no launch printed an answer"
    same_answers = answers(killed) <= answers(whole)  # a launch killed between a record and its answers prints none
    return Soak(done, steps, tensors(whole) == tensors(killed), expected == records(killed), same_answers)


def advance(run: Run, aim: str, chance: random.Random) -> None:
    """Wait for a checkpoint, and then for a random moment: some steps later, or during a save or an evaluation."""
    run.wait(lambda: run.has_logged() and checkpoints(run.output / "checkpoints"))
    goal = run.resumed_from + chance.randint(1, MOST_STEPS if aim == "step" else MOST_STEPS - SAVE_STEPS)
    run.wait(lambda: run.last_record()["step"] >= goal)
    if aim != "step":
        run.wait(lambda: moment_of(run) == aim)
    time.sleep(chance.uniform(0, 0.03))


def moment_of(run: Run) -> str:
    """Return what the run is doing, one of AIMS."""
    if run.is_saving():
        return "save"
    record = run.last_record()
    return "evaluation" if "loss" in record and record["step"] % EVAL_STEPS == 0 else "step"


def watch(folder: Path, *, steps: int, processes: int, log: Callable[[str], None] = print) -> list[Growth]:
    """Train in `folder`, and sample the memory, descriptors, threads and files of the run.

    Raises RuntimeError if the run fails.
    """
    flags = {"processes": processes, "max_steps": steps, "batch_size": 1, "offload_activations": True}
    flags |= {"save_steps": steps // 100, "eval_steps": steps // 100, "logging_steps": 5}
    samples: dict[tuple[str, str], list[tuple[int, float]]] = {}
    with Run(folder, "long", **flags) as run:
        while run.is_running() and (step := run.last_record()["step"]) < steps:
            if step >= WARM_UP * steps:
                for name, value in measures(run).items():
                    samples.setdefault(name, []).append((step, value))
            time.sleep(SAMPLE_SECONDS)
        run.end()
    log(f"processes: {processes}; {steps} steps are done")
    return [Growth(processes, *name, of_one) for name, of_one in samples.items()]


def table(soaks: list[Soak], growths: list[Growth], *, title: str, command: str) -> str:
    """Return Markdown for the results."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    date, where = datetime.now(UTC).isoformat(timespec="seconds"), machine()
    lines = [f"# {title}", "", "Generated by benchmarks/soak.py.", "", f"    {command}", ""]
    lines.append(
        f"{date}; {where['cpu']}, {where['cores']} cores; {versions}; 1 thread per process; "
        "a T5 with dropout in memory=lean."
    )
    if soaks:
        kinds = "| processes | SIGKILL to | kills | during a save | during an evaluation "
        timed = "| seconds until all had exited, median and maximum |"
        lines += ["", kinds + timed, "|---:|---|---:|---:|---:|---:|"]
    for result in soaks:
        for victim in VICTIMS[result.kills[0].processes]:
            kills = [kill for kill in result.kills if kill.victim == victim]
            moments, seconds = Counter(kill.moment for kill in kills), [kill.seconds for kill in kills] or [0]
            counts = f"{len(kills)} | {moments['save']} | {moments['evaluation']}"
            timed = f"{median(seconds):.1f}, {max(seconds):.1f}"
            lines.append(f"| {result.kills[0].processes} | {victim} | {counts} | {timed} |")
    lines += [""] if soaks else []
    for result in soaks:
        lost = [kill.step - kill.resumed_from for kill in result.kills]
        same = {"final weights and optimizer state": result.same_weights}
        same |= {"losses, gradient norms and evaluations": result.same_records, "answers": result.same_answers}
        lines.append(
            f"- processes: {result.kills[0].processes}; {result.steps} steps, a checkpoint every {SAVE_STEPS} and an "
            f"evaluation every {EVAL_STEPS}; resumed {len(lost)} times, with every checkpoint intact each time; steps "
            f"lost per kill: median {median(lost):g}, maximum {max(lost)}; bit-identical to the uninterrupted run: "
            + ", ".join(f"{name}: {'yes' if is_same else 'NO'}" for name, is_same in same.items())
        )
    if growths:
        lines += ["", "| processes | measure | samples | first | last | maximum | slope per 1,000 steps |"]
        lines += ["|---:|---|---:|---:|---:|---:|---:|"]
    for growth in growths:
        values, name = [value for _, value in growth.samples], ", ".join(filter(None, (growth.of, growth.unit)))
        shown = " | ".join(f"{value:.{bool(growth.unit):d}f}" for value in (values[0], values[-1], max(values)))
        lines.append(f"| {growth.processes} | {name} | {len(values)} | {shown} | {growth.slope * 1000:+.3f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=0, help="kills, split over the process counts")
    parser.add_argument("--steps", type=int, default=0, help="steps of a long run on each process count")
    parser.add_argument("--processes", type=int, nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--seed", type=int, default=0, help="random seed for which ranks are killed, and when")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    flags = parser.parse_args()
    each = flags.kills // len(flags.processes)
    if (flags.kills, flags.steps) == (0, 0) or (flags.kills and each < 1) or (flags.steps and flags.steps < 1000):
        parser.error("set --kills to one or more per process count, or --steps to 1000 or more, or both")
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    soaks, growths = [], []
    for number in flags.processes:
        if each:
            soaks.append(soak(folder / f"kills-{number}", kills=each, processes=number, seed=flags.seed))
        if flags.steps:
            growths += watch(folder / f"steps-{number}", steps=flags.steps, processes=number)
    print(f"{time.monotonic() - started:.0f} s")
    title = flags.output.stem if flags.output else "soak"
    text = table(soaks, growths, title=title, command=shlex.join(["python", *sys.argv]))
    print(text)
    if flags.output:
        flags.output.write_text(text)
    failures = [failure for part in (*soaks, *growths) for failure in part.failures()]
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if failures:
        print(f"the runs and their logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
