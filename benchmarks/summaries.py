"""Render the tables of README.md and docs/: each function turns the records of one results file into Markdown lines.

`documents.py` writes the tables. Every number comes from the results file; `source` writes the line under a table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import median

from checkpoint import flipped_bit, known, mib, seconds
from comparison import ROWS_EXTRAPOLATED, by_system, memory_field, ratios, reasons, spread, versions
from data import EPOCH_FRACTIONS, cell, grid
from launchers import STRATEGIES
from memory import BASELINE, GIB, MODELS, peaks_of
from records import MIB, Record
from strategies import by_shape, compared, latest

from lowmem.config.elsewhere import DEFAULTS, FRACTION, SOURCES
from lowmem.config.help import help_text
from lowmem.config.train_config import FIELDS

# For each benchmark, the names under which the tables show its systems, in the order of the tables' rows.
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


Summary = Callable[..., list[str]]


def by(records: Sequence[Record], *names: str) -> dict[tuple, list[Record]]:
    """Group records by the values of the fields `names`."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def pick(records: Sequence[Record], **fields: object) -> Record | None:
    """Return the last record with these values, or None. A value of None matches records that lack the field."""
    found = (record for record in reversed(records) if all(record.get(name) == fields[name] for name in fields))
    return next(found, None)


def source(records: Sequence[Record], how: str) -> str:
    """Return the line under a table: `how` it was measured, the machine, the versions, the commands and their dates."""
    runs: dict[str, list[str]] = {}
    for record in records:
        machine = {"cpu": "", "cores": ""} | record.get("machine", {})
        cores = f"{machine['cores']} cores" if machine["cores"] else ""
        where = ", ".join(filter(None, [machine["cpu"], cores, machine.get("device", "")]))
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        command = f"`{record['command']}` ({record['date'].partition('T')[0]})"
        runs.setdefault("; ".join(filter(None, [where, versions])), []).append(command)
    return " ".join([f"{how}.", *(f"{on}; {', '.join(dict.fromkeys(commands))}." for on, commands in runs.items())])


# --- one function per table
def rows(records: Sequence[Record]) -> list[str]:
    """Tabulate start, memory, speed and resume for the largest files, and in parentheses the smallest files' peaks."""
    most, least = (choose(record["rows"] for record in records) for choose in (max, min))
    fraction = max(EPOCH_FRACTIONS)

    def line(system: str, kind: str) -> list[str]:
        of = [record for record in records if (record["system"], record["kind"]) == (system, kind)]
        draws = [record for record in of if record["what"] == "draw" and record["processes"] == 1]
        encoder = "bpe" if system == "lowmem" else None  # the other systems do not encode
        draw, few = (pick(draws, rows=number, encoder=encoder) for number in (most, least))
        once, mixed = (pick(of, rows=most, what=what) for what in ("once", "shuffle"))
        resumed = pick(of, rows=most, what="resume", place=fraction)
        is_same = all(record.get("same_rows") for record in of if record["what"] == "resume")
        lost = f"{cell(resumed, 'lost_rows')} rows of the epoch lost, {cell(resumed, 'repeated_rows')} repeated"
        facts = (once or {}) | {"groups": mixed["groups"], "gigabytes": draw["file_bytes"] / 1e9}
        return [
            READERS[system, kind].format(**facts),
            f"{cell(draw, 'start_seconds', '.2f')} s",
            f"{cell(draw, 'peak_bytes', unit=MIB)} MiB ({cell(few, 'peak_bytes', unit=MIB)})",
            cell(pick(draws, rows=most, encoder=None), "rows_per_second"),
            f"{cell(resumed, 'seconds', '.2f')} s",
            "as in an uninterrupted run" if is_same else lost,
            cell(mixed, "commonest_group_rows"),
        ]

    head = [f"{most:,} rows:", "first batch after opening", f"peak RSS above imports (of {least:,} rows)"]
    head += ["rows/s, not encoded", f"first batch after a resume at row {int(most * fraction):,}"]
    head += ["rows after a resume:"]
    encoded = [record for record in records if record.get("encoder") == "bpe" and record["processes"] == 1]
    speeds = [record["rows_per_second"] for record in encoded if record["rows"] == most]
    waits = {record["prefetch"]: record["share"] for record in records if record["what"] == "wait"}
    return [
        *grid([*head, "rows from the most common row group in a batch of 32"], [line(*reader) for reader in READERS]),
        "",
        f"lowmem's peaks are measured while a thread encodes rows with a BPE tokenizer, at {min(speeds):,.0f} to "
        f"{max(speeds):,.0f} rows/s. A small model spends {waits[2]:.1%} of its step time waiting for rows, and "
        f"{waits[0]:.1%} with `--prefetch_steps=0`.",
        "",
        source(records, "Each row of the table was measured once"),
    ]


def peaks(records: Sequence[Record]) -> list[str]:
    """Tabulate the predicted peaks, in GiB, of Trainer and of both tiers, with accumulation and clipping."""
    found = peaks_of(records)
    systems = {"`Trainer`, gradient checkpointing": BASELINE.name}
    systems |= {f"`--memory={tier}`": f"lowmem {tier}, recompute" for tier in ("exact", "lean")}
    sizes = {each["model"]: f"{each['model']}, {each['batch']} x {each['seq_len']} tokens" for each in records}
    lines = [
        [size, *(f"{found[system, model, 'accumulated'] / GIB:.1f}" for system in systems.values())]
        for model, size in sizes.items()
    ]
    return grid(["GiB, bf16, `--recompute=full`:", *systems], lines)


def memory(records: Sequence[Record]) -> list[str]:
    """Tabulate the predicted peaks, in GiB and relative to Trainer's with gradient checkpointing."""
    found = peaks_of(records)
    sizes = {record["model"]: f"{record['model']} {record['batch']} x {record['seq_len']}" for record in records}
    columns = list(product(sizes, dict.fromkeys(work for _, _, work in found)))

    def peak(system: str, column: tuple[str, str]) -> str:
        ratio = f", {found[system, *column] / found[BASELINE.name, *column]:.2f} x" if system != BASELINE.name else ""
        return f"{found[system, *column] / GIB:.1f}{ratio}"

    lines = [[name, *(peak(system, column) for column in columns)] for system, name in PREDICTED.items()]
    head = ["GiB:", *(f"{sizes[model]}, {work}" for model, work in columns)]
    return [*grid(head, lines), "", source(records, "Predicted on fake tensors")]


def layered(records: Sequence[Record]) -> list[str]:
    """Tabulate the predicted peaks with 16 micro-batches a step, in GiB, and what is on the host."""
    records = [record for record in records if record["section"] == "memory"]
    found = {(record["tier"], record["way"], record["model"]): record for record in records}
    models, rows = (list(dict.fromkeys(name)) for name in ([x[2] for x in found], [x[:2] for x in found]))

    def peak(record: Record) -> str:
        on_host = f" + {record['host'] / GIB:.1f} on the host" if record["host"] else ""
        return f"{record['device'] / GIB:.1f}{on_host}"

    sizes = [f"{name} {MODELS[name].batch_size} x {MODELS[name].seq_len}" for name in models]
    lines = [[f"{tier}, {way}", *(peak(found[tier, way, model]) for model in models)] for tier, way in rows]
    head = ["GiB, 16 micro-batches:", *sizes]
    return [*grid(head, lines), "", source(records, "Predicted on fake tensors, as `plan` does")]


def checkpoint(records: Sequence[Record]) -> list[str]:
    """Tabulate time and memory of saving and loading on one process, and what a flipped bit and a kill do."""
    of = by(records, "system")

    def line(system: str) -> list[str]:
        runs = of[(system,)]
        return [
            *(SAVED[system], f"{runs[0]['disk_bytes'] / 1e9:.1f}"),
            *(seconds(runs, "save", "seconds", "sync_seconds"), seconds(runs, "load", "seconds")),
            " / ".join(mib(runs, action, "peak_bytes") for action in ("save", "load")),
            # the last column is not measured: it comes from the systems' sources
            *(flipped_bit(runs), str(len(runs[0]["pickles"])), known(system)[0]),
        ]

    first = records[0]
    head = [f"{first['model']}, AdamW:", "GB", "save + sync, s", "load, s"]
    head += ["extra MiB while saving / loading", "a flipped bit is:", "pickles"]
    head += ["complete or absent after a kill (from source code):"]
    measured = [record["save"] | record for record in records]
    return [*grid(head, list(map(line, SAVED))), "", source(measured, f"1 process; medians of {first['repeats']} runs")]


def soak(text: str) -> list[str]:
    """Report how often runs were killed, and how they compare with uninterrupted runs."""
    found = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \| [\d.]+, [\d.]+ \|$", text, re.MULTILINE)
    times, in_saves, in_evaluations = (sum(map(int, column)) for column in zip(*found, strict=True))
    lines = text.splitlines()
    (command,) = (line.strip() for line in lines if line.startswith("    "))
    (about,) = (line for line in lines if re.match(r"\d{4}-", line))
    facts = [line for line in lines if line.startswith("- ")]
    day, _, where = about.partition("; ")
    killed = (
        f"Runs killed {times:,} times with SIGKILL, {in_saves:,} of them during a save and {in_evaluations:,} during "
        "an evaluation:"
    )
    return [killed, "", *facts, "", f"{where.removesuffix('.')}; `{command}` ({day.partition('T')[0]})."]


def comparison(records: Sequence[Record]) -> list[str]:
    """Tabulate speed and memory: medians, and ratios to Trainer in the same round (median, smallest, largest)."""
    lines, about = [], []
    for command in by(records, "date").values():
        runs = by_system(command)
        first = command[0]
        tokens = f"({first['seq_len']} + {first['seq_len']})" if first["model"].startswith("t5") else first["seq_len"]
        work = f"{first['model']}, {first['processes']} x {first['batch']} x {tokens} tokens x accumulation "
        work += f"{first['accumulation']}, {first['mixed_precision']}, {first['rows']} rows"
        for system in dict.fromkeys(record["system"] for record in command):
            mine = runs.get(system, [])
            number = [str(len(mine))] if mine else []
            lines.append([work, system, "; ".join([*number, *reasons(command, system)])])
            lines[-1] += _compared(mine, runs, system) if mine else [""] * 7
            work = ""  # shown only in the first row of a command
        about.append(next(iter(runs.values()))[0] | {"versions": versions(runs)})
    memory = "peak device memory" if records[0].get("peak_device_bytes") else "peak memory above imports"
    head = ["work:", "system", "runs", "tokens/s", "x `Trainer`", f"{memory}, MiB", "x `Trainer`"]
    head += ["first step finished after, s", "lines of loop code"]
    head += [f"hours for {ROWS_EXTRAPOLATED // 10**6} M rows, extrapolated"]
    how = "Interleaved runs; medians of the runs, and of the ratios within a round (smallest to largest)"
    return [*grid(head, lines), "", source(about, how)]


def _compared(mine: Sequence[Record], runs: dict[str, list[Record]], system: str) -> list[str]:
    def middle(name: str) -> float:
        return median(record[name] for record in mine)

    memory = memory_field(mine[0])
    return [
        f"{middle('tokens_per_second'):,.0f}",
        spread(ratios(runs, system, "tokens_per_second")),
        f"{middle(memory) / MIB:,.0f}",
        spread(ratios(runs, system, memory)),
        f"{middle('first_step_seconds'):.1f}",
        f"{mine[0]['code_lines']}",
        f"{ROWS_EXTRAPOLATED / middle('samples_per_second') / 3600:,.0f}",
    ]


def plan(records: Sequence[Record]) -> list[str]:
    """Report how many predictions were measured, and their errors."""

    def error(record: Record) -> float:
        return record["predicted_bytes"] / record["measured_bytes"] - 1

    real = [record for record in records if "measured_bytes" in record]
    furthest = max(real, key=lambda record: abs(error(record)))
    settings = "".join(f", {name}={value}" for name, value in furthest["settings"].items())
    close = sum(abs(error(record)) < 0.01 for record in real)
    where = "a GPU" if records[0]["on_gpu"] else "a CPU"
    line = f"{len(real)} of {len(records)} predictions for small training runs were compared with the peak of torch's "
    line += f"allocator within a step, on {where}: {close} are within 1 %; the largest error is "
    line += f"{error(furthest):+.1%} ({furthest['shape']} {furthest['tier']}{settings}, {furthest['processes']} "
    line += f"process{'es' if furthest['processes'] > 1 else ''}); a negative error is a prediction that was too low."
    sources = [*records, *(record["measurement"] for record in real)]
    return [line, "", source(sources, "Each run measured once")]


def launchers(records: Sequence[Record]) -> list[str]:
    """Tabulate each strategy's state per process and largest differences from one process, over all launchers."""
    single = {(record["date"], record["model"]): record for record in records if record["processes"] == 1}
    several = [record for record in records if record["processes"] > 1]
    models = dict.fromkeys(record["model"] for record in several)
    columns = list(product(models, sorted({record["processes"] for record in several})))

    def line(strategy: str) -> list[str]:
        mine = [record for record in several if record["strategy"] == strategy]
        ran = [record for record in mine if "failed" not in record]
        of = by(ran, "model", "processes")
        states = [max((run["state_bytes"] for run in of.get(column, [])), default=None) for column in columns]
        pairs = [(run, single[run["date"], run["model"]]) for run in ran]
        losses = [abs(a / b - 1) for run, one in pairs for a, b in zip(run["loss"], one["loss"], strict=True)]
        norms = [abs(run["grad_norm"] / one["grad_norm"] - 1) for run, one in pairs if "grad_norm" in run]
        return [
            *(strategy, *("-" if state is None else f"{state / MIB:.1f}" for state in states)),
            *(f"{max(each):.1e}" if each else "-" for each in (losses, norms)),
            f"{len(mine)}" + (f", {len(mine) - len(ran)} failed" if len(ran) < len(mine) else ""),
        ]

    head = ["MiB of weights and optimizer per process:", *(f"{model}, {number} processes" for model, number in columns)]
    largest = "largest relative difference from one process:"
    head += [f"{largest} loss of a step", f"{largest} first gradient norm", "runs"]
    unsharded = {model: f"{record['state_bytes'] / MIB:.1f} MiB ({model})" for (_, model), record in single.items()}
    names = ", ".join(dict.fromkeys(record["launcher"] for record in several))
    how = f"fp32; one run each; one process holds {' or '.join(unsharded.values())}; launchers: {names}"
    strategies = [strategy for strategy in STRATEGIES if (strategy,) in by(several, "strategy")]
    return [*grid(head, list(map(line, strategies))), "", source(records, how)]


def strategies(records: Sequence[Record]) -> list[str]:
    """Tabulate ways to train: what a process holds and sends, and what that costs."""
    measured, predicted = (latest(records, section) for section in ("measured", "predicted"))
    rounds = len({record["round"] for record in measured})
    how = f"Medians of {rounds} interleaved runs (smallest to largest)" if rounds > 1 else "One run each"
    return [*compared(records), "", source([*measured, *predicted], how)]


def shapes(records: Sequence[Record]) -> list[str]:
    """Tabulate what a card sends in a step, and what it holds, on several cards."""
    return [*by_shape(records), "", source(latest(records, "shapes"), "Predicted on fake tensors, as `plan` does")]


def flags(_: str) -> list[str]:
    """List every flag with its values and its explanation."""
    return ["```text", *help_text(full=True).splitlines(), "```"]


def elsewhere(_: str) -> list[str]:
    """List what the settings of other trainers are here, a table for each trainer, and defaults that differ."""
    lines = []
    for source, answers in SOURCES.items():
        table = [row for names, answer in answers.items() for row in _answers(names.split(), answer)]
        lines += [f"### {source}", "", *grid(["there:", "here:"], table), ""]
    found = {name: FIELDS[name].default for name in DEFAULTS}
    table = [[f"`{name}`", f"`{DEFAULTS[name]}`", f"`{value}`"] for name, value in found.items()]
    return [*lines, "### Other defaults of flags that have the same name here", ""] + grid(
        ["flag:", "Trainer:", "here:"], table
    )


def _answers(names: Sequence[str], answer: str | Mapping[str, str]) -> list[list[str]]:
    """Render a row of `elsewhere`: a line, or one for each value."""
    there = ", ".join(f"`{name}`" for name in names)
    if isinstance(answer, str):
        return [[there, _code(answer)]]
    values = {"*": "other values", FRACTION: "a fraction of all steps or rows"}
    keys = [", ".join(values.get(value, f"`{value}`") for value in key.split()) for key in answer]
    return [[f"{there}: {key}", _code(text)] for key, text in zip(keys, answer.values(), strict=True)]


def _code(answer: str) -> str:
    """Mark flags as code. Flags that take the value as it is are shown without it; else it is X."""
    short = answer.replace("={}", "").replace("{}", "X")
    return re.sub(r"(?<!`)--\w+(=[^\s,()]+)?", lambda flag: f"`{flag[0]}`", short)
