"""Results as the project's README tells them: for each file of `results/` a function, what it holds -> Markdown lines.

`readme.py` puts them in their places. Every number is of the file; under each table stands what it was measured on.
"""

import re
from collections.abc import Sequence
from itertools import product
from statistics import median

from checkpoint import flipped_bit, known, mib, seconds
from comparison import ROWS_EXTRAPOLATED, by_system, memory_field, ratios, reasons, spread, versions
from data import PLACES, grid, told
from launchers import STRATEGIES
from memory import BASELINE, GIB, peaks_of
from records import MIB, Record

# What the README calls the systems of a benchmark, in its order.
READERS = {
    ("lowmem", "parquet-100k"): "parquet, {groups:,} row groups",
    ("lowmem", "parquet-default"): "parquet, pyarrow's default row groups, copied once in {seconds:.1f} s",
    ("lowmem", "jsonl"): "JSONL of {gigabytes:.1f} GB, indexed once in {seconds:.1f} s",
    ("datasets streaming", "parquet-100k"): "`datasets`, the {groups:,} row groups",
}
PREDICTED = {
    BASELINE.name: "`Trainer`, gradient checkpointing",
    "lowmem exact, recompute": "exact",
    "lowmem exact, recompute, offload_activations": "exact, offloaded",
    "lowmem lean, recompute": "lean",
    "lowmem lean, recompute, offload_activations": "lean, offloaded",
}
SAVED = {
    "lowmem-off": "lowmem, `--memory=off` (fp32)",
    "lowmem-exact": "lowmem, exact",
    "lowmem-lean": "lowmem, lean",
    "accelerate": "`accelerator.save_state`",
    "trainer": "`Trainer`",
    "torch.save": "`torch.save`",
    "dcp": "`torch.distributed.checkpoint`",
}


def by(records: Sequence[Record], *names: str) -> dict[tuple, list[Record]]:
    """Records by the values of these fields."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def pick(records: Sequence[Record], **fields: object) -> Record | None:
    """The last one with these fields, if there is one; None as a field's value is that it has none."""
    found = (record for record in reversed(records) if all(record.get(name) == fields[name] for name in fields))
    return next(found, None)


def source(records: Sequence[Record], how: str) -> str:
    """The line under a table: how its numbers were found, on what, with what, and by which commands on which days."""
    runs: dict[str, list[str]] = {}
    for record in records:
        machine = {"cpu": "", "cores": ""} | record.get("machine", {})
        cores = f"{machine['cores']} cores" if machine["cores"] else ""
        where = ", ".join(filter(None, [machine["cpu"], cores, machine.get("device", "")]))
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        command = f"`{record['command']}` ({record['date'].partition('T')[0]})"
        runs.setdefault("; ".join(filter(None, [where, versions])), []).append(command)
    return " ".join([f"{how}.", *(f"{on}; {', '.join(dict.fromkeys(commands))}." for on, commands in runs.items())])


# --- a part each
def rows(records: Sequence[Record]) -> list[str]:
    """Start, memory, speed and resume of reading the largest files; the peak with the smallest."""
    most, least = (choose(record["rows"] for record in records) for choose in (max, min))
    place = max(PLACES)

    def line(system: str, kind: str) -> list[str]:
        of = [record for record in records if (record["system"], record["kind"]) == (system, kind)]
        draws = [record for record in of if record["what"] == "draw" and record["processes"] == 1]
        encoder = "bpe" if system == "lowmem" else None  # what others read is not encoded
        draw, few = (pick(draws, rows=number, encoder=encoder) for number in (most, least))
        once, mixed = (pick(of, rows=most, what=what) for what in ("once", "shuffle"))
        resumed = pick(of, rows=most, what="resume", place=place)
        is_same = all(record.get("same_rows") for record in of if record["what"] == "resume")
        lost = f"{told(resumed, 'lost_rows')} rows of the epoch lost, {told(resumed, 'repeated_rows')} repeated"
        facts = (once or {}) | {"groups": mixed["groups"], "gigabytes": draw["file_bytes"] / 1e9}
        return [
            READERS[system, kind].format(**facts),
            f"{told(draw, 'start_seconds', '.2f')} s",
            f"{told(draw, 'peak_bytes', unit=MIB)} MiB ({told(few, 'peak_bytes', unit=MIB)})",
            told(pick(draws, rows=most, encoder=None), "rows_per_second"),
            f"{told(resumed, 'seconds', '.2f')} s",
            "the same" if is_same else lost,
            told(mixed, "commonest_group_rows"),
        ]

    head = [f"{most:,} rows:", "first batch after opening", f"peak RSS above imports (of {least:,} rows)"]
    head += ["rows/s, bare", f"resumed at row {int(most * place):,}: first batch", "beside an unbroken run's:"]
    encoded = [record for record in records if record.get("encoder") == "bpe" and record["processes"] == 1]
    speeds = [record["rows_per_second"] for record in encoded if record["rows"] == most]
    waits = {record["prefetch"]: record["share"] for record in records if record["what"] == "wait"}
    return [
        *grid([*head, "rows of a batch of 32 from one row group"], [line(*reader) for reader in READERS]),
        "",
        f"lowmem's peaks are those with a BPE tokenizer, which encodes {min(speeds):,.0f} to {max(speeds):,.0f} rows/s "
        f"in the thread beside training. A small model's steps wait for {waits[2]:.1%} of their time, with "
        f"`--prefetch_steps=0` for {waits[0]:.1%}.",
        "",
        source(records, "Each measured once"),
    ]


def memory(records: Sequence[Record]) -> list[str]:
    """Predicted peaks, GiB and x Trainer's with gradient checkpointing."""
    peaks = peaks_of(records)
    sizes = {record["model"]: f"{record['model']} {record['batch']} x {record['seq_len']}" for record in records}
    places = list(product(sizes, dict.fromkeys(work for _, _, work in peaks)))

    def cell(system: str, place: tuple[str, str]) -> str:
        ratio = f", {peaks[system, *place] / peaks[BASELINE.name, *place]:.2f} x" if system != BASELINE.name else ""
        return f"{peaks[system, *place] / GIB:.1f}{ratio}"

    lines = [[name, *(cell(system, place) for place in places)] for system, name in PREDICTED.items()]
    head = ["GiB:", *(f"{sizes[model]}, {work}" for model, work in places)]
    return [*grid(head, lines), "", source(records, "Counted on tensors without data")]


def checkpoint(records: Sequence[Record]) -> list[str]:
    """Seconds and memory of saving and loading on one process, and what the files withstand."""
    of = by(records, "system")

    def line(system: str) -> list[str]:
        turns = of[(system,)]
        return [
            *(SAVED[system], f"{turns[0]['disk_bytes'] / 1e9:.1f}"),
            *(seconds(turns, "save", "seconds", "sync_seconds"), seconds(turns, "load", "seconds")),
            " / ".join(mib(turns, action, "peak_bytes") for action in ("save", "load")),
            # the last is no result: it is read in the sources
            *(flipped_bit(turns), str(len(turns[0]["pickles"])), known(system)[0]),
        ]

    first = records[0]
    head = [f"{first['model']}, AdamW:", "GB", "saved and on disk, s", "loaded, s"]
    head += ["MiB above the run, saving / loading", "a flipped bit is:", "pickles"]
    head += ["a kill leaves it whole or absent, by its source:"]
    measured = [record["save"] | record for record in records]
    return [*grid(head, list(map(line, SAVED))), "", source(measured, f"One process; medians of {first['repeats']}")]


def soak(text: str) -> list[str]:
    """How often a run was killed, and what became of it."""
    kills = [tuple(map(int, numbers)) for numbers in re.findall(r"^\|[^|]+\| (\d+) \| (\d+) \|", text, re.MULTILINE)]
    times, in_saves = map(sum, zip(*kills, strict=True))
    lines = text.splitlines()
    (command,) = (line.strip() for line in lines if line.startswith("    "))
    (about,) = (line for line in lines if re.match(r"\d{4}-", line))
    facts = [line for line in lines if line.startswith("- ")]
    day, _, where = about.partition("; ")
    killed = f"A run killed {times:,} times with -9, {in_saves:,} of them inside a save:"
    return [killed, "", *facts, "", f"{where.removesuffix('.')}; `{command}` ({day.partition('T')[0]})."]


def comparison(records: Sequence[Record]) -> list[str]:
    """Speed and memory, medians, and the ratios to Trainer's of the same turn: median, least and most."""
    lines, about = [], []
    for run in by(records, "date").values():
        turns = by_system(run)
        first = run[0]
        tokens = f"({first['seq_len']} + {first['seq_len']})" if first["model"].startswith("t5") else first["seq_len"]
        work = f"{first['model']}, {first['processes']} x {first['batch']} x {tokens} tokens x accumulation "
        work += f"{first['accumulation']}, {first['mixed_precision']}, {first['rows']} rows"
        for system in dict.fromkeys(record["system"] for record in run):
            mine = turns.get(system, [])
            number = [str(len(mine))] if mine else []
            lines.append([work, system, "; ".join([*number, *reasons(run, system)])])
            lines[-1] += _compared(mine, turns, system) if mine else [""] * 7
            work = ""  # said once
        about.append(next(iter(turns.values()))[0] | {"versions": versions(turns)})
    memory = "peak device memory" if records[0].get("peak_device_bytes") else "peak memory above imports"
    head = ["work:", "system", "turns", "tokens/s", "x `Trainer`", f"{memory}, MiB", "x `Trainer`"]
    head += ["first step after, s", "lines of its loop", f"hours for {ROWS_EXTRAPOLATED // 10**6} M rows, extrapolated"]
    how = "Systems in turns; medians of the turns, and of the ratios within a turn (least to most)"
    return [*grid(head, lines), "", source(about, how)]


def _compared(mine: Sequence[Record], turns: dict[str, list[Record]], system: str) -> list[str]:
    def middle(name: str) -> float:
        return median(record[name] for record in mine)

    memory = memory_field(mine[0])
    return [
        f"{middle('tokens_per_second'):,.0f}",
        spread(ratios(turns, system, "tokens_per_second")),
        f"{middle(memory) / MIB:,.0f}",
        spread(ratios(turns, system, memory)),
        f"{middle('first_step_seconds'):.1f}",
        f"{mine[0]['code_lines']}",
        f"{ROWS_EXTRAPOLATED / middle('samples_per_second') / 3600:,.0f}",
    ]


def plan(records: Sequence[Record]) -> list[str]:
    """How many predictions were measured and how far off they are."""

    def error(record: Record) -> float:
        return record["predicted_bytes"] / record["measured_bytes"] - 1

    real = [record for record in records if "measured_bytes" in record]
    furthest = max(real, key=lambda record: abs(error(record)))
    settings = "".join(f", {name}={value}" for name, value in furthest["settings"].items())
    close = sum(abs(error(record)) < 0.01 for record in real)
    where = "a GPU" if records[0]["on_gpu"] else "a CPU"
    line = f"{len(real)} of {len(records)} predictions for small trainings were measured (the most that torch's "
    line += f"allocator had handed out in a step, on {where}): {close} are off by less than 1%, at most by "
    line += f"{error(furthest):+.1%} ({furthest['shape']} {furthest['tier']}{settings}, on {furthest['processes']}); "
    line += "below zero is less than it took."
    sources = [*records, *(record["measurement"] for record in real)]
    return [line, "", source(sources, "Each once")]


def launchers(records: Sequence[Record]) -> list[str]:
    """For each strategy bytes of state a process, and how far it lies from one process, over launchers and models."""
    alone = {(record["date"], record["model"]): record for record in records if record["processes"] == 1}
    divided = [record for record in records if record["processes"] > 1]
    models = dict.fromkeys(record["model"] for record in divided)
    places = list(product(models, sorted({record["processes"] for record in divided})))

    def line(strategy: str) -> list[str]:
        mine = [record for record in divided if record["strategy"] == strategy]
        ran = [record for record in mine if "failed" not in record]
        of = by(ran, "model", "processes")
        states = [max((turn["state_bytes"] for turn in of.get(place, [])), default=None) for place in places]
        pairs = [(run, alone[run["date"], run["model"]]) for run in ran]
        losses = [abs(a / b - 1) for run, one in pairs for a, b in zip(run["loss"], one["loss"], strict=True)]
        norms = [abs(run["grad_norm"] / one["grad_norm"] - 1) for run, one in pairs if "grad_norm" in run]
        return [
            *(strategy, *("-" if state is None else f"{state / MIB:.1f}" for state in states)),
            *(f"{max(each):.1e}" if each else "-" for each in (losses, norms)),
            f"{len(mine)}" + (f", {len(mine) - len(ran)} failed" if len(ran) < len(mine) else ""),
        ]

    head = ["MiB of weights and optimizer a process:", *(f"{model} on {processes}" for model, processes in places)]
    head += ["a step's loss beside one process's, relative, at most", "first gradient's norm, the same", "trainings"]
    whole = {model: f"{model} {record['state_bytes'] / MIB:.1f} MiB" for (_, model), record in alone.items()}
    names = ", ".join(dict.fromkeys(record["launcher"] for record in divided))
    how = f"fp32, each training once; one process has {', '.join(whole.values())}; launchers: {names}"
    strategies = [strategy for strategy in STRATEGIES if (strategy,) in by(divided, "strategy")]
    return [*grid(head, list(map(line, strategies))), "", source(records, how)]
