"""Train one system in this process, and write a record of its losses, speed and memory.

`compare.py` starts `run_system.py SETTINGS` (JSON), with or without a launcher, and reads each process's record.
"""

import ast
import io
import json
import os
import sys
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from systems import SYSTEMS, WARM_UP_STEPS, Run, build, machine, resident_bytes


def measured(run: Run, settings: SimpleNamespace) -> dict[str, object]:
    """Return this process's record. Speeds, CPU use and energy exclude the first WARM_UP_STEPS steps."""
    import torch

    assert len(run.losses) == len(run.marks) == settings.steps, "the system did not take --steps steps"
    marks = run.marks[WARM_UP_STEPS - 1 :]
    first, last = marks[0], marks[-1]
    wall = last.wall - first.wall
    samples = (settings.steps - WARM_UP_STEPS) * settings.rows_per_step
    joules = None if last.joules is None else (last.joules - first.joules) / samples
    system = SYSTEMS[settings.system]
    packages = ["torch", "transformers", "accelerate", *filter(None, [system.package])]
    return {
        "loss": run.losses,
        "tokens_per_second": sum(settings.tokens[WARM_UP_STEPS:]) / wall,
        "samples_per_second": samples / wall,
        "seconds_per_step": median(b.wall - a.wall for a, b in zip(marks, marks[1:], strict=False)),
        "first_step_seconds": run.first_step_at - settings.started,
        "phase_seconds": phase_seconds(run.phases[WARM_UP_STEPS:]),
        "cores_busy": (last.cpu - first.cpu) / wall,
        "joules_per_sample": joules,
        "peak_rss_bytes": run.peak_rss_bytes,
        "peak_rss_above_import_bytes": run.peak_rss_bytes - run.imported_bytes,
        "peak_device_bytes": run.peak_device_bytes,
        "code_lines": code_lines(Path(__file__).with_name("loops") / f"{system.loop}.py"),
        "machine": {
            **machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {name: version(name) for name in packages},
    }


def phase_seconds(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each phase's median over steps; empty on a GPU, which runs phases later than the host starts them."""
    import torch

    names = [] if torch.cuda.is_available() else dict.fromkeys(name for step in steps for name in step)
    return {name: median(step.get(name, 0.0) for step in steps) for name in names}


def code_lines(path: Path) -> int:
    """Count the lines of a program without blank lines, comments and docstrings."""
    source = path.read_text()
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.string.strip()]
    lines = {n for token in tokens if token.type not in no_code for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)


def main() -> None:
    settings = SimpleNamespace(**json.loads(sys.argv[1]))
    import torch

    torch.set_num_threads(settings.threads)
    if settings.system == "build":
        build(settings)
        return
    system = SYSTEMS[settings.system]
    settings.recompute = system.recompute or settings.recompute
    loop = import_module(f"loops.{system.loop}")
    reader = "pyarrow.parquet" if system.loop == "lowmem" and settings.train_file else None
    for package in filter(None, [system.package, reader]):
        import_module(package)  # import now, so that imports do not count as memory of training
    run = Run(imported_bytes=resident_bytes())
    loop.train(settings, system, run)
    record = {"settings": asdict(system), **measured(run, settings)}
    Path(settings.output, f"record-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
