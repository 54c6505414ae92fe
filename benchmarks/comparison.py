"""The records of `compare.py` as a table and a figure."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from records import MIB, Record
from systems import WARM_UP_STEPS

ROWS_EXTRAPOLATED = 10_000_000
REFERENCE = "trainer"


def by_system(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The turns of each system that has any."""
    turns: dict[str, list[Record]] = {}
    for record in records:
        if not {"left_out", "failed"} & record.keys():
            turns.setdefault(record["system"], []).append(record)
    return turns


def reasons(records: Sequence[Record], system: str) -> list[str]:
    """Why a system has fewer turns than others, each reason once."""
    mine = [record for record in records if record["system"] == system]
    told = [record["left_out"] for record in mine if "left_out" in record]
    told += [f"failed: {record['failed']}" for record in mine if "failed" in record]
    return list(dict.fromkeys(told))


def pairs(turns: dict[str, list[Record]], system: str) -> list[tuple[Record, Record]]:
    """A system's record and the reference's of the same turn: a machine that slows down slows both down."""
    reference = {record["repeat"]: record for record in turns.get(REFERENCE, [])}
    return [(record, reference[record["repeat"]]) for record in turns[system] if record["repeat"] in reference]


def ratios(turns: dict[str, list[Record]], system: str, name: str) -> list[float]:
    """Of a value to the reference's, turn by turn."""
    return [mine[name] / theirs[name] for mine, theirs in pairs(turns, system)]


def memory_field(record: Record) -> str:
    """Which bytes are compared: a GPU's, or those of processes on a CPU."""
    return "peak_rss_above_import_bytes" if record["peak_device_bytes"] is None else "peak_device_bytes"


def versions(turns: dict[str, list[Record]]) -> dict[str, str]:
    """Of the packages; with a system's own package, those that it has in other versions than the first system."""
    told: dict[str, str] = {}
    for of in turns.values():
        own = of[0]["versions"]
        others = [f"{name} {number}" for name, number in own.items() if told.get(name, number) != number]
        new = {name: number for name, number in own.items() if name not in told}
        told |= {name: f"{number} (with {', '.join(others)})" if others else number for name, number in new.items()}
    return told


def spread(values: Sequence[float]) -> str:
    """The median, and from where to where they go."""
    if not values:
        return "-"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def largest_difference(turns: dict[str, list[Record]], system: str) -> str:
    """Over all turns and steps, how far its losses lie from the reference's."""
    losses = [zip(mine["loss"], theirs["loss"], strict=True) for mine, theirs in pairs(turns, system)]
    return f"{max(abs(a - b) for pair in losses for a, b in pair):.1e}" if losses else "-"


def table(records: list[Record]) -> str:
    """Markdown for the records of one command: medians over its turns, of values and of ratios to Trainer's."""
    turns = by_system(records)
    rows = []
    for system in dict.fromkeys(record["system"] for record in records):
        if system in turns:
            rows.append(_row(turns, system))
        rows += [f"| {system} | {told} |{' |' * (len(_COLUMNS) - 1)}" for told in reasons(records, system)]
    first = next(iter(turns.values()), records)[0]
    return "\n".join([*_about(first, turns), "", _HEAD, *rows, ""])


def _about(first: Record, turns: dict[str, list[Record]]) -> list[str]:
    tokens = f"{first['seq_len']} + {first['seq_len']}" if first["model"].startswith("t5") else first["seq_len"]
    clipping = f"clipped to {first['max_grad_norm']}" if first["max_grad_norm"] else "not clipped"
    title = (
        f"## {first['model']}, {first['processes']} x {first['batch']} x ({tokens}) tokens x accumulation "
        f"{first['accumulation']}, mixed_precision {first['mixed_precision']}, recompute {first['recompute']}, "
        f"{clipping}"
    )
    if not turns:
        return [title, "", f"    {first['command']}"]
    machine, packages = first["machine"], ", ".join(f"{name} {number}" for name, number in versions(turns).items())
    ran = (
        f"{first['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a process, device "
        f"{machine['device']}; {packages}; {first['rows']} "
        f"rows; medians (and spread) of {max(map(len, turns.values()))} turns of {first['steps']} steps, of which the "
        f"first {WARM_UP_STEPS} are not timed."
    )
    return [title, "", f"    {first['command']}", "", ran]


_COLUMNS = (
    "tokens/s",
    "x trainer",
    "samples/s",
    "first step after, s",
    "RSS above imports, MiB",
    "x trainer",
    "RSS, MiB",
    "device, MiB",
    "x trainer",
    "fewest cores busy",
    "last loss",
    "largest loss difference",
    "lines of its loop",
    "hours for 10 M rows, extrapolated",
    "kWh for 10 M rows, extrapolated",
)
_HEAD = f"| system | {' | '.join(_COLUMNS)} |\n|---{'|---:' * len(_COLUMNS)}|"


def _row(turns: dict[str, list[Record]], system: str) -> str:
    mine = turns[system]

    def middle(name: str, show: Callable[[float], str]) -> str:
        values = [record[name] for record in mine]
        return "-" if values[0] is None else show(median(values))

    def mebibytes(num_bytes: float) -> str:
        return f"{num_bytes / MIB:,.0f}"

    cells = [
        middle("tokens_per_second", lambda x: f"{x:,.0f}"),
        spread(ratios(turns, system, "tokens_per_second")),
        middle("samples_per_second", lambda x: f"{x:.2f}"),
        middle("first_step_seconds", lambda x: f"{x:.1f}"),
        middle("peak_rss_above_import_bytes", mebibytes),
        spread(ratios(turns, system, "peak_rss_above_import_bytes")),
        middle("peak_rss_bytes", mebibytes),
        middle("peak_device_bytes", mebibytes),
        spread([] if mine[0]["peak_device_bytes"] is None else ratios(turns, system, "peak_device_bytes")),
        f"{min(record['cores_busy'] for record in mine):.2f}",
        f"{mine[0]['loss'][-1]:.6f}",
        largest_difference(turns, system),
        str(mine[0]["code_lines"]),
        middle("samples_per_second", lambda x: f"{ROWS_EXTRAPOLATED / x / 3600:,.0f}"),
        middle("joules_per_sample", lambda x: f"{ROWS_EXTRAPOLATED * x / 3.6e6:,.1f}"),
    ]
    return f"| {system} | {' | '.join(cells)} |"


def draw(commands: Sequence[Sequence[Record]], picture: Path) -> None:
    """A PNG with, for each command, tokens/s and memory of each system x Trainer's; none without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: it would look for a screen
    except ModuleNotFoundError:
        return
    compared = [(records[0], turns) for records in commands if REFERENCE in (turns := by_system(records))]
    if not compared:
        return
    heights = [1 + 0.32 * len(turns) for _, turns in compared]
    figure = Figure(figsize=(11, sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(compared), 2, squeeze=False, height_ratios=heights, sharey="row")
    for (first, turns), row in zip(compared, panels, strict=True):
        memory = memory_field(turns[REFERENCE][0])
        shown = {"tokens_per_second": "tokens/s", memory: "peak device memory" if "device" in memory else "peak memory"}
        for (name, title), panel in zip(shown.items(), row, strict=True):
            values = [ratios(turns, system, name) or [math.nan] for system in turns]
            middles = [median(each) for each in values]
            reach = [[m - min(each) for m, each in zip(middles, values, strict=True)]]
            reach += [[max(each) - m for m, each in zip(middles, values, strict=True)]]
            colors = ["C0" if system.startswith("lowmem") else "C7" for system in turns]
            panel.barh(range(len(turns)), middles, xerr=reach, color=colors, height=0.7, error_kw={"lw": 1})
            panel.set_yticks(range(len(turns)), list(turns), fontsize=9)
            panel.axvline(1, color="black", lw=0.8)
            panel.set_title(f"{first['model']}, {first['processes']} processes: {title}, x Trainer", fontsize=10)
        row[0].invert_yaxis()
    figure.savefig(picture, format="png")
