"""Render the records of `compare.py` as a table and a figure."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from records import MIB, Record
from systems import WARM_UP_STEPS

ROWS_EXTRAPOLATED = 10_000_000
REFERENCE = "trainer"


def by_system(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group the successful runs by system."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        if not {"left_out", "failed"} & record.keys():
            runs.setdefault(record["system"], []).append(record)
    return runs


def reasons(records: Sequence[Record], system: str) -> list[str]:
    """List the distinct reasons for which runs of a system are missing."""
    mine = [record for record in records if record["system"] == system]
    found = [record["left_out"] for record in mine if "left_out" in record]
    found += [f"failed: {record['failed']}" for record in mine if "failed" in record]
    return list(dict.fromkeys(found))


def pairs(runs: dict[str, list[Record]], system: str) -> list[tuple[Record, Record]]:
    """Pair each record of a system with the reference's of the same round, so that a slow machine affects both."""
    reference = {record["repeat"]: record for record in runs.get(REFERENCE, [])}
    return [(record, reference[record["repeat"]]) for record in runs[system] if record["repeat"] in reference]


def ratios(runs: dict[str, list[Record]], system: str, name: str) -> list[float]:
    """For each round, divide the system's value of the field `name` by the reference's."""
    return [mine[name] / theirs[name] for mine, theirs in pairs(runs, system)]


def memory_field(record: Record) -> str:
    """Return the name of the field to compare: device bytes on a GPU, resident bytes on a CPU."""
    return "peak_rss_above_import_bytes" if record["peak_device_bytes"] is None else "peak_device_bytes"


def versions(runs: dict[str, list[Record]]) -> dict[str, str]:
    """Return the version of each package.

    If a later system has other versions of some, its own package's version lists them: "0.9.5 (with torch 2.4.0)".
    """
    found: dict[str, str] = {}
    for of in runs.values():
        own = of[0]["versions"]
        others = [f"{name} {number}" for name, number in own.items() if found.get(name, number) != number]
        new = {name: number for name, number in own.items() if name not in found}
        found |= {name: f"{number} (with {', '.join(others)})" if others else number for name, number in new.items()}
    return found


def spread(values: Sequence[float]) -> str:
    """Format the median, with the smallest and the largest value."""
    if not values:
        return "-"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def largest_difference(runs: dict[str, list[Record]], system: str) -> str:
    """Format the largest difference of a system's losses from the reference's, over all rounds and steps."""
    losses = [zip(mine["loss"], theirs["loss"], strict=True) for mine, theirs in pairs(runs, system)]
    return f"{max(abs(a - b) for pair in losses for a, b in pair):.1e}" if losses else "-"


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command: medians of values and of their ratios to Trainer's."""
    runs = by_system(records)
    rows = []
    for system in dict.fromkeys(record["system"] for record in records):
        if system in runs:
            rows.append(_row(runs, system))
        rows += [f"| {system} | {reason} |{' |' * (len(_COLUMNS) - 1)}" for reason in reasons(records, system)]
    first = next(iter(runs.values()), records)[0]
    return "\n".join([*_about(first, runs), "", _HEAD, *rows, "", *_phases(runs)])


def _phases(runs: dict[str, list[Record]]) -> list[str]:
    """Return Markdown that says where the time of a step goes: medians over rounds of each phase's seconds."""
    timed = {system: of for system, of in runs.items() if of[0].get("phase_seconds")}
    if not timed:
        return []
    names = list(dict.fromkeys(name for of in timed.values() for name in of[0]["phase_seconds"]))
    lines = [f"| seconds of a step | {' | '.join(names)} | rest | all |\n|---{'|---:' * (len(names) + 2)}|"]
    for system, of in timed.items():
        found = [median(record["phase_seconds"].get(name, 0.0) for record in of) for name in names]
        whole = median(record["seconds_per_step"] for record in of)
        cells = (f"{seconds:.3f}" for seconds in (*found, whole - sum(found), whole))
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return [*lines, ""]


def _about(first: Record, runs: dict[str, list[Record]]) -> list[str]:
    tokens = f"{first['seq_len']} + {first['seq_len']}" if first["model"].startswith("t5") else first["seq_len"]
    clipping = f"clipped to {first['max_grad_norm']}" if first["max_grad_norm"] else "not clipped"
    title = (
        f"## {first['model']}, {first['processes']} x {first['batch']} x ({tokens}) tokens x accumulation "
        f"{first['accumulation']}, mixed_precision {first['mixed_precision']}, recompute {first['recompute']}, "
        f"{clipping}"
    )
    if not runs:
        return [title, "", f"    {first['command']}"]
    machine, packages = first["machine"], ", ".join(f"{name} {number}" for name, number in versions(runs).items())
    ran = (
        f"{first['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads per process, "
        f"device {machine['device']}; {packages}; {first['rows']} "
        f"rows; medians (smallest to largest) of {max(map(len, runs.values()))} rounds of {first['steps']} steps; the "
        f"first {WARM_UP_STEPS} steps are not timed."
    )
    return [title, "", f"    {first['command']}", "", ran]


_COLUMNS = (
    "tokens/s",
    "x trainer",
    "samples/s",
    "first step finished after, s",
    "RSS above imports, MiB",
    "x trainer",
    "RSS, MiB",
    "device, MiB",
    "x trainer",
    "fewest cores busy",
    "last loss",
    "largest loss difference",
    "lines of loop code",
    "hours for 10 M rows, extrapolated",
    "kWh for 10 M rows, extrapolated",
)
_HEAD = f"| system | {' | '.join(_COLUMNS)} |\n|---{'|---:' * len(_COLUMNS)}|"


def _row(runs: dict[str, list[Record]], system: str) -> str:
    mine = runs[system]

    def middle(name: str, show: Callable[[float], str]) -> str:
        values = [record[name] for record in mine]
        return "-" if values[0] is None else show(median(values))

    def mebibytes(num_bytes: float) -> str:
        return f"{num_bytes / MIB:,.0f}"

    cells = [
        middle("tokens_per_second", lambda x: f"{x:,.0f}"),
        spread(ratios(runs, system, "tokens_per_second")),
        middle("samples_per_second", lambda x: f"{x:.2f}"),
        middle("first_step_seconds", lambda x: f"{x:.1f}"),
        middle("peak_rss_above_import_bytes", mebibytes),
        spread(ratios(runs, system, "peak_rss_above_import_bytes")),
        middle("peak_rss_bytes", mebibytes),
        middle("peak_device_bytes", mebibytes),
        spread([] if mine[0]["peak_device_bytes"] is None else ratios(runs, system, "peak_device_bytes")),
        f"{min(record['cores_busy'] for record in mine):.2f}",
        f"{mine[0]['loss'][-1]:.6f}",
        largest_difference(runs, system),
        str(mine[0]["code_lines"]),
        middle("samples_per_second", lambda x: f"{ROWS_EXTRAPOLATED / x / 3600:,.0f}"),
        middle("joules_per_sample", lambda x: f"{ROWS_EXTRAPOLATED * x / 3.6e6:,.1f}"),
    ]
    return f"| {system} | {' | '.join(cells)} |"


def draw(commands: Sequence[Sequence[Record]], picture: Path) -> None:
    """Draw the systems' tokens/s and memory relative to Trainer's, a row per command; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ModuleNotFoundError:
        return
    compared = [(records[0], runs) for records in commands if REFERENCE in (runs := by_system(records))]
    if not compared:
        return
    heights = [1 + 0.32 * len(runs) for _, runs in compared]
    figure = Figure(figsize=(11, sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(compared), 2, squeeze=False, height_ratios=heights, sharey="row")
    for (first, runs), row in zip(compared, panels, strict=True):
        memory = memory_field(runs[REFERENCE][0])
        shown = {"tokens_per_second": "tokens/s", memory: "peak device memory" if "device" in memory else "peak memory"}
        for (name, title), panel in zip(shown.items(), row, strict=True):
            values = [ratios(runs, system, name) or [math.nan] for system in runs]
            middles = [median(each) for each in values]
            reach = [[m - min(each) for m, each in zip(middles, values, strict=True)]]
            reach += [[max(each) - m for m, each in zip(middles, values, strict=True)]]
            colors = ["C0" if system.startswith("lowmem") else "C7" for system in runs]
            panel.barh(range(len(runs)), middles, xerr=reach, color=colors, height=0.7, error_kw={"lw": 1})
            panel.set_yticks(range(len(runs)), list(runs), fontsize=9)
            panel.axvline(1, color="black", lw=0.8)
            panel.set_title(f"{first['model']}, {first['processes']} processes: {title}, x Trainer", fontsize=10)
        row[0].invert_yaxis()
    figure.savefig(picture, format="png")
