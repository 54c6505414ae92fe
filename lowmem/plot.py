"""The `plot` command: draw the curves in metrics.jsonl of one or more runs, as an image or as text."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lowmem.errors import UsageError

_SERIES = {
    "loss": "loss",
    "evaluation loss": "eval_loss",
    "learning rate": "learning_rate",
    "gradient norm": "grad_norm",
    "target tokens/s": "tokens_per_second",
    "peak GPU memory, MiB": "peak_device_bytes",
    "peak host memory, MiB": "peak_host_bytes",
}
_UNITS = {"peak_device_bytes": 2**20, "peak_host_bytes": 2**20}

_WIDTH, _LABELS, _ROWS = 80, 10, 4  # a text chart's width and label width (columns), and its height (rows)
_BLOCKS = " ▁▂▃▄▅▆▇█"

Points = list[tuple[int, float]]
"""(step, value) pairs in step order, without values that are not finite."""
Curves = dict[str, Points]
"""The points of each quantity, by title. A quantity without points is left out."""


def plot(out: Sequence[str]) -> str:
    """Draw runs (output folders or metrics.jsonl files) as plot.png in the first folder; return the text to print.

    Without matplotlib the text contains the charts. Raises UsageError for a file that is missing, empty or damaged.
    """
    files = [Path(path) if path.endswith(".jsonl") else Path(path) / "metrics.jsonl" for path in out]
    curves = [read_curves(file) for file in files]
    names = [file.absolute().parent.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.parent) for file in files]
    runs = dict(zip(names, curves, strict=True))  # a run given twice is drawn once
    picture = files[0].parent / "plot.png"
    try:
        draw(runs, picture)
    except ModuleNotFoundError:
        lines = [*text_charts(runs), "matplotlib is not installed: for an image, pip install 'lowmem[plot]'"]
        return "\n".join(lines)
    except OSError as error:
        raise UsageError(f"{picture} cannot be written: {error.strerror}") from error
    return f"{picture} shows {', '.join(runs)}"


def read_curves(file: Path) -> Curves:
    """Read the curves of one metrics.jsonl, ignoring a last line that is still being written."""
    try:
        *lines, _ = file.read_bytes().split(b"\n")
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror}; pass the output_dir of a run that has started"
        raise UsageError(problem) from error
    curves: Curves = {title: [] for title in _SERIES}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            for title, name in _SERIES.items():
                if record.get(name) is not None:
                    curves[title].append((record["step"], record[name] / _UNITS.get(name, 1)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{file}, line {number} is not a record of a run ({error}): remove the line or resume the run"
            raise UsageError(problem) from error
    if any(value for _, value in curves["peak GPU memory, MiB"]):
        del curves["peak host memory, MiB"]  # on a GPU, host memory is not the limit
    else:
        del curves["peak GPU memory, MiB"]
    curves = {title: points for title, points in curves.items() if points}
    if "loss" not in curves:
        raise UsageError(f"{file} contains no training step yet: wait until --logging_steps steps are done")
    return curves


def draw(runs: Mapping[str, Curves], picture: Path) -> None:
    """Write a PNG with a panel per quantity and a line per run. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    titles = _titles(runs)
    columns = min(3, len(titles))
    figure = Figure(figsize=(4.5 * columns, 3.2 * -(-len(titles) // columns)), dpi=120, layout="constrained")
    panels = figure.subplots(-(-len(titles) // columns), columns, squeeze=False).flatten()
    for panel in panels[len(titles) :]:
        panel.remove()
    for title, panel in zip(titles, panels, strict=False):
        for index, (name, curves) in enumerate(runs.items()):
            if points := curves.get(title):
                marker = "." if len(points) < 30 else None
                panel.plot(*zip(*points, strict=True), label=name, color=f"C{index % 10}", marker=marker)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if title.startswith("peak"):
            panel.set_ylim(bottom=0)
    if len(runs) > 1:
        panels[0].legend(fontsize=9)  # the loss panel, because every run has a loss
    unfinished = picture.with_name(f".{picture.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png")
        os.replace(unfinished, picture)
    finally:
        unfinished.unlink(missing_ok=True)


def text_charts(runs: Mapping[str, Curves]) -> Iterator[str]:
    """Yield the lines of a small chart for each quantity and run; all charts of a quantity have the same scale."""
    for title in _titles(runs):
        shown = {name: curves[title] for name, curves in runs.items() if title in curves}
        all_points = [point for points in shown.values() for point in points]
        steps, values = zip(*all_points, strict=True)
        low, high = min(values), max(values)
        for name, points in shown.items():
            suffix = f", {name}" if len(runs) > 1 else ""
            (first, first_value), (last, last_value) = points[0], points[-1]
            yield f"{title}{suffix}: {first_value:,.4g} at step {first}, {last_value:,.4g} at {last}"[:_WIDTH]
            columns = _columns(points, min(steps), max(steps))
            # bar heights in eighths of a row; the lowest value gets one eighth
            heights = [
                0 if x is None else 1 + round((x - low) / ((high - low) or 1) * (8 * _ROWS - 1)) for x in columns
            ]
            labels = [f"{high:,.4g}", *[""] * (_ROWS - 2), f"{low:,.4g}"]
            for row, label in zip(reversed(range(_ROWS)), labels, strict=True):
                bar = "".join(_BLOCKS[min(8, max(0, height - 8 * row))] for height in heights)
                yield f"{label:>{_LABELS - 1}} {bar}".rstrip()
        yield ""


def _titles(runs: Mapping[str, Curves]) -> list[str]:
    return [title for title in _SERIES if any(title in curves for curves in runs.values())]


def _columns(points: Points, first: int, last: int) -> list[float | None]:
    """Return each chart column's mean. An empty column repeats the previous mean; before and after all points: None."""
    count = _WIDTH - _LABELS
    inside: list[list[float]] = [[] for _ in range(count)]
    for step, value in points:
        column = (step - first) * (count - 1) // max(1, last - first)
        inside[column].append(value)
    columns: list[float | None] = []
    for values in inside[: column + 1]:
        columns.append(sum(values) / len(values) if values else columns[-1] if columns else None)
    return columns + [None] * (count - len(columns))
