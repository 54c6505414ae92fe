"""Report a run: metrics.jsonl, trackers, and lines on the terminal."""

import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from lowmem.data.batch import Batch
from lowmem.data.mixture import PERIOD
from lowmem.data.stream import Stream
from lowmem.distributed.collectives import gather_json, on_main_rank, sum_over_ranks
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import DataParallelRank
from lowmem.errors import SaveError, UsageError
from lowmem.evaluation import Answer
from lowmem.memory.pipeline import idle_share
from lowmem.recover import Halving
from lowmem.run_output import MetricsLog, print_lines
from lowmem.step import StepResult

_NOT_SHOWN = ("num_tokens", "samples_per_second", "data_wait_seconds", "source_", "peak_")  # beginnings of names
_SHOWN_IF_ANY = ("cut_rows", "cut_tokens", "bad_rows")
# What accelerate's trackers call the name of a run. The others that have projects take theirs from the project.
_RUN_NAMES = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}
_RUN_NAMES |= {"clearml": "task_name"}


def print_answers(answers: Sequence[Answer]) -> None:
    print_lines(*(f"  {x.prompt!r} -> {x.prediction!r} (expected {x.reference!r})" for x in answers[:3]))


def peak_memory_bytes() -> dict[str, int]:
    """This process's peak memory: on its GPU (0 without a GPU) and in host memory (resident).

    Of the GPU, `peak_device_bytes` are of tensors. `peak_active_bytes` add freed blocks that a stream may still use,
    and `peak_reserved_bytes` all that the allocator holds.
    """
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    of_device = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return {
        "peak_device_bytes": of_device.get("allocated_bytes.all.peak", 0),
        "peak_active_bytes": of_device.get("active_bytes.all.peak", 0),
        "peak_reserved_bytes": of_device.get("reserved_bytes.all.peak", 0),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit,
    }


def memory_notes(measured: Mapping[str, float]) -> list[str]:
    """Say how much memory of the GPU tensors have taken at most, and how much torch has reserved; nothing on a CPU."""
    taken, reserved = (measured[name] / 2**30 for name in ("peak_device_bytes", "peak_reserved_bytes"))
    return [f"peak {taken:.1f} GiB of the GPU, {reserved:.1f} GiB reserved"] if taken else []


def _precision_hints(accelerator: Accelerator, tier: str) -> list[str]:
    """Return a line if the GPU computes much faster in another precision."""
    if accelerator.device.type != "cuda":
        return []
    faster = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    is_slow = torch.cuda.get_device_capability(accelerator.device) < (7, 0)  # GPUs without tensor cores
    if is_slow or tier != "off" or accelerator.mixed_precision in ("bf16", faster):
        return []
    return [f"this GPU computes several times faster in {faster}: set --mixed_precision={faster}"]


def _idle_hints(model: nn.Module, micro_batches: int) -> list[str]:
    """Return a line if the stages of a pipeline wait for each other during more than a quarter of a step."""
    stages = stages_of(model)
    if stages is None or (idle := idle_share(stages.number, micro_batches)) <= 0.25:
        return []
    enough = 3 * (stages.number - 1)
    advice = f"--gradient_accumulation_steps={enough}, or a larger --global_batch_size, makes it 25% or less"
    return [f"each stage idles for {idle:.0%} of a step: {advice}"]


def _open_folder(folder: Path, settings: Mapping, resumed_step: int | None) -> tuple[MetricsLog, MetricsLog]:
    """Write config.json; return metrics.jsonl and predictions.jsonl."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resumed_step is None:
            for stale in folder.glob("bad_rows-*.jsonl"):  # left by an earlier run that saved no checkpoint
                stale.unlink()
        if settings:
            (folder / "config.json").write_text(json.dumps(dict(settings), indent=2))
        log = MetricsLog(folder / "metrics.jsonl", step=resumed_step)
        # an evaluation writes its answers before its metrics, and is repeated if it has written only these
        kept = resumed_step if resumed_step is None or "eval_loss" in log.resumed_at else resumed_step - 1
        return log, MetricsLog(folder / "predictions.jsonl", step=kept)
    except OSError as error:
        raise UsageError(f"output_dir {folder} cannot be written: {error.strerror}") from error


class Report:
    """Report a run from the main rank, in `folder` and on the terminal. Call each method on every rank.

    The constructor opens `folder`, or raises UsageError if it cannot be written. A run that `resumed` (None: if `step`
    is not 0) continues the files there, from which the constructor removes what came after `step`; else they begin
    empty. `settings` are written to config.json (none: no file) and to the trackers of `accelerator`.
    After each step, call `count`, and to record it, `training`; metrics of your own are recorded by `record`.
    Before each write, the main rank calls `check_folder`; if that raises an error, every rank does.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, object],
        accelerator: Accelerator,
        *,
        total_steps: int,
        step: int = 0,
        resumed: bool | None = None,
        run_name: str | None = None,
        check_folder: Callable[[], None] = lambda: None,
    ):
        self._check_folder = check_folder
        on_main_rank(check_folder)
        folder, resumed = Path(folder), step > 0 if resumed is None else resumed
        opened = on_main_rank(partial(_open_folder, folder, settings, step if resumed else None))
        self._log, self._predictions = opened or (None, None)
        self.resumed_at: dict[str, float | None] = gather_json(self._log and self._log.resumed_at)[0]
        """The metrics recorded at the step that this run resumes from, on every rank."""
        trackers = [str(name) for name in accelerator.log_with]
        self._folder, self._accelerator, self._has_trackers = folder, accelerator, bool(trackers)
        if trackers:
            named = {name: {_RUN_NAMES[name]: run_name} for name in trackers if name in _RUN_NAMES and run_name}
            project = run_name if run_name and not named else "lowmem"
            accelerator.init_trackers(project, config=dict(settings), init_kwargs=named)
        self._first_step, self._step, self._total_steps = step, step, total_steps
        # disable=None shows the bar only on a terminal
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=None if self._log else True)
        self._rows = self._tokens = self._skipped = 0
        self._counts: dict[str, int] = {}
        self._seconds = self._waited = self._waited_before = 0.0
        self._clock = time.perf_counter()
        self._started: float | None = None

    def print_lines(self, *lines: str) -> None:
        if self._log:
            print_lines(*lines)

    def bar(self, batches: Collection[Batch], name: str) -> Iterable[Batch]:
        return tqdm(batches, desc=name, leave=False, disable=None if self._log else True)

    def restart_timer(self) -> None:
        """Restart the clock of the training speed, to exclude evaluation and saving."""
        self._clock = time.perf_counter()
        self._started = self._started or self._clock

    def opening(
        self, model: nn.Module, weights: str, stream: Stream, rank: DataParallelRank, *, tier: str, sharding: str
    ) -> None:
        """Print the model, devices, rows and steps.

        `weights` counts the model's weights; `sharding` says how processes share the model, if they do.
        """
        devices = f"{self._accelerator.num_processes} x {self._accelerator.device.type}{sharding and f', {sharding}'}"
        one, several = "process", "processes"
        if rank.size < self._accelerator.num_processes:  # the processes of each share a model, and rows
            one, several = ("group", "groups") if stages_of(model) is None else ("pipeline", "pipelines")
        ranks = f"{rank.size} {several if rank.size > 1 else one}"
        pieces = f"{ranks} x {stream.micro_batches} micro-batches of at most {stream.batch_size}"
        self.print_lines(
            f"{weights} ({model.dtype}, memory={tier}) on {devices}, {stream.num_rows:,} rows",
            f"steps {self._step} to {self._total_steps}, each of {stream.global_batch_size} rows: {pieces}",
            *(self._sources(stream) if stream.mixture is not None else ()),
            *_precision_hints(self._accelerator, tier),
            *_idle_hints(model, stream.micro_batches),
        )

    def _sources(self, stream: Stream) -> Iterator[str]:
        """Return a line for each source of a mixture: its share, and how often the run takes each of its rows."""
        mixture, total = stream.mixture, self._total_steps * stream.global_batch_size
        for number, (name, rows) in enumerate(zip(mixture.names, mixture.sources, strict=True), 1):
            share = mixture.weights[number - 1] / PERIOD
            epochs = f"{total * share / len(rows):.3g}"
            yield f"source {number}: {share:.2%} of the rows, {epochs} epoch{'s' * (epochs != '1')} of {name}"

    def resuming(
        self, checkpoint: Path | None, changes: Sequence[str], row_changes: Sequence[str], can_save: bool
    ) -> None:
        """Print which checkpoint this run resumes, what changed since then, and a warning if this run cannot save."""
        if not can_save:
            self.print_lines("this run saves no checkpoints: if it ends early, its steps are lost")
        if checkpoint:
            self.print_lines(f"resumed from {checkpoint}{', with ' if changes else ''}{', '.join(changes)}")
        self.print_lines(*(f"training rows differ from the checkpoint's: {change}" for change in row_changes))

    def count(self, result: StepResult, stream: Stream | None = None) -> None:
        """Count a step, and the seconds since `restart_timer` (if that was not called, since the previous step)."""
        waited = 0.0 if stream is None else stream.wait_seconds
        now = time.perf_counter()
        self._seconds += now - self._clock + waited - self._waited
        self._clock, self._waited = now, waited
        self._rows += 0 if stream is None else stream.global_batch_size
        self._tokens += int(result.num_tokens)
        self._step += 1
        self._bar.update()
        if not result.updated:
            self._skipped += 1
            self.print_lines(f"step {self._step}: no update, {result.reason}")

    def halving(self, halving: Halving) -> None:
        found = {"rank": halving.rank, "batch_size": halving.batch_size}
        self._write({"event": "out_of_memory", "step": halving.step, **found})
        self.print_lines(str(halving))

    def training(
        self,
        result: StepResult,
        stream: Stream | None = None,
        rank: DataParallelRank | None = None,
        *,
        learning_rate: float,
    ) -> None:
        """Record the last step, the speed since the previous record, and the stream's counts summed over ranks.

        `rank` is this process's `data_place(model)`, which matters under tensor parallelism.
        """
        of_stream = {}
        if stream is not None:
            is_counted = rank is None or rank.is_counted
            counts = sum_over_ranks(*(count if is_counted else 0 for count in stream.counts.values()))
            self._counts = dict(zip(stream.counts, counts, strict=True))
            of_stream = {f"source_{number}_rows": rows for number, rows in enumerate(stream.rows_of_sources, 1)}
        measured = {
            **({} if stream is None else {"epoch": stream.position / stream.rows_per_epoch}),
            "loss": result.loss.item(),
            "grad_norm": result.grad_norm.item(),
            "learning_rate": learning_rate,
            **({} if result.loss_scale is None else {"loss_scale": int(result.loss_scale)}),
            "num_tokens": int(result.num_tokens),
            **({} if stream is None else {"samples_per_second": self._rows / self._seconds}),
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait_seconds": self._waited - self._waited_before,
        }
        metrics = {name: value.item() for name, value in result.metrics.items()}
        counts = self._counts | of_stream | (peaks := peak_memory_bytes())
        if taken := sorted(metrics.keys() & (measured | counts).keys()):
            raise UsageError(f"a step reports {', '.join(taken)} itself: rename that metric of the loss function")
        self.record(measured | metrics | counts, notes=[*memory_notes(peaks), *self._time_left()])
        self._rows, self._tokens, self._seconds, self._waited_before = 0, 0, 0.0, self._waited

    def _time_left(self) -> list[str]:
        """Say how long the rest takes at the average speed since the first step, with evaluations and saves."""
        left, done = self._total_steps - self._step, self._step - self._first_step
        if self._started is None or left <= 0:
            return []
        return [f"{tqdm.format_interval((time.perf_counter() - self._started) / done * left)} left"]

    def evaluation(self, metrics: Mapping[str, float], answers: Sequence[Answer] = ()) -> Mapping[str, float]:
        """Record an evaluation, and its answers in predictions.jsonl.

        Returns the main rank's metrics on every rank, so that all make the same decisions by them.
        """
        on_main_rank(self._check_folder)
        if self._log and answers:
            about = {"step": self._step, "rows": "test" if "test_loss" in metrics else "eval"}
            self._predictions.write(*(about | answer._asdict() for answer in answers))
        self.record(metrics)
        if self._log:
            print_answers(answers)
        return gather_json(dict(metrics))[0]

    def metrics_of(self, step: int) -> dict[str, float | None]:
        """Return the training loss and the evaluation that are recorded for `step`; on other ranks, nothing."""
        recorded = self._log.metrics_of(step) if self._log else {}
        return {name: value for name, value in recorded.items() if name == "loss" or name.startswith("eval_")}

    def record(self, metrics: Mapping[str, float], *, notes: Sequence[str] = ()) -> None:
        """Write one record of this step to metrics.jsonl, the trackers and the terminal, there with `notes`.

        Raises UsageError if a metric is not a number of Python, or is named as other fields of a record.
        """
        if taken := sorted(metrics.keys() & {"step", "event"}):
            raise UsageError(f"a record has a {taken[0]} of its own: rename that metric")
        if wrong := [name for name, x in metrics.items() if not isinstance(x, int | float)]:
            found = f"the metric {wrong[0]} is a {type(metrics[wrong[0]]).__name__}, not an int or float"
            raise UsageError(f"{found}: convert it, such as by .item()")
        if self._has_trackers:
            self._accelerator.log(dict(metrics), step=self._step)
        self._write({"step": self._step, **metrics})
        if self._log:
            shown = {name: x for name, x in metrics.items() if x or name not in _SHOWN_IF_ANY}
            words = (
                f"{name} {x:,}" if isinstance(x, int) else f"{name} {x:.4g}"
                for name, x in shown.items()
                if not name.startswith(_NOT_SHOWN)
            )
            print_lines(f"step {self._step}/{self._total_steps}: {', '.join([*words, *notes])}")

    def _write(self, record: Mapping[str, object]) -> None:
        on_main_rank(self._check_folder)
        if self._log:
            self._log.write(record)

    def unsaved(self, error: SaveError) -> None:
        self.print_lines(f"step {self._step}: the checkpoint was not saved, training continues: {error}")

    def preempted(self, can_save: bool = True) -> None:
        """Print that a signal ended the run early, and close the files."""
        self._close()
        what_now = "set --resume=auto to continue" if can_save else "nothing is saved, start the run again"
        self.print_lines(f"preempted after step {self._step} of {self._total_steps}: {what_now}")

    def done(self, best: Mapping[str, float] | None = None, *, model_step: int | None = None) -> None:
        """Record the end of the run, which has saved the model of `model_step` (None: none).

        Its row counts cover only the steps since this run started or resumed.
        """
        self._bar.close()
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self._counts.items() if count)
        if counts:
            self.print_lines(f"rows of steps {self._first_step + 1} to {self._step}: {counts}")
        end = {"event": "end", "steps": self._step, "skipped": self._skipped}
        self._write(end | self._counts | {"best": best})
        self._close()
        model = "the model" if model_step == self._step else f"the model of step {model_step}, the best,"
        saved = f"{model} is in {self._folder / 'model'}, " if model_step is not None else ""
        self.print_lines(f"done: {saved}metrics in {self._folder / 'metrics.jsonl'}")

    def _close(self) -> None:
        self._bar.close()
        if self._log:
            self._log.close()
            self._predictions.close()
