"""Measure lowmem on one GPU in a few minutes. The sections are in order of worth, and each result is saved at once.

    python benchmarks/gpu.py --output=benchmarks/results/gpu.jsonl
    python benchmarks/gpu.py --output=dry.jsonl --sections=bits,update --dry    # tiny shapes on a CPU

Appends JSON lines to --output, and writes tables to the .md file of the same name. See README.md.
"""

import argparse
import gc
import os
import shlex
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import gpu_steps
import gpu_updates
import psutil
import torch
from data import grid
from gpu_measure import Case
from records import MIB, Record, append
from systems import machine

GRACE_SECONDS = 5  # for a section that has to stop


class Section(NamedTuple):
    cases: Callable[[torch.device], Iterable[Case]]
    share: float
    """The most that it may take, as a share of --minutes."""
    needs_cuda: bool = False


SECTIONS = {
    "bits": Section(gpu_updates.bits, 0.12),
    "update": Section(gpu_updates.update, 0.12),
    "memory": Section(gpu_steps.memory, 0.2),
    "speed": Section(gpu_steps.speed, 0.45),
    "syncs": Section(gpu_steps.syncs, 0.08, needs_cuda=True),
    "offload": Section(gpu_steps.offload, 0.1),
    "out_of_memory": Section(gpu_steps.out_of_memory, 0.1, needs_cuda=True),
    "resume": Section(gpu_steps.resume, 0.25),
    "sdpa": Section(gpu_updates.sdpa, 0.08),
}


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8, help="sections that have not started by then are left out")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma list, in order; default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="run tiny shapes on the CPU; the default without a GPU")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to append to; also writes NAME.md")
    flags = parser.parse_args()
    flags.sections = flags.sections.split(",")
    if unknown := [name for name in flags.sections if name not in SECTIONS]:
        parser.error(f"--sections has unknown names {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    if flags.output.suffix != ".jsonl":
        parser.error(f"--output={flags.output} must end in .jsonl; the tables go to a .md file of the same name")
    return flags


# --- sections
def run_sections(
    sections: Mapping[str, Section], device: torch.device, output: Path, *, minutes: float, about: Record
) -> None:
    """Run each section in a process of its own, so that the next one runs whatever happens to it.

    Appends each result to `output` as it comes, with the fields of `about`. A section that must not or cannot run has
    its reason in "skipped" or "left_out", and a section or case that failed has its error in "failed".
    """
    signal.signal(signal.SIGTERM, interrupt)
    deadline = time.monotonic() + 60 * minutes
    for name, section in sections.items():
        started = time.monotonic()
        seconds = min(60 * minutes * section.share, deadline - started)

        def write(record: Record, name: str = name) -> None:
            record = {"section": name} | record | about
            print(*(f"{key}={shown(key, record[key])}" for key in record if key not in about), flush=True)
            append(output, [record], table, "gpu.py")

        if section.needs_cuda and device.type == "cpu":
            write({"skipped": "needs a GPU"})
        elif seconds <= 0:
            write({"left_out": f"{minutes:g} minutes were over"})
        else:
            process = get_context("fork").Process(target=run_cases, args=(section, device, write))
            process.start()
            try:
                process.join(seconds)
                is_late = process.is_alive()
            finally:
                stop(process)
            if is_late:
                write({"failed": f"it did not end within {seconds:.0f} s"})
            elif process.exitcode:
                write({"failed": f"its process ended with exit code {process.exitcode}"})
            write({"section_seconds": time.monotonic() - started})


def interrupt(number: int, frame: object) -> None:
    """Handle the first SIGTERM like Ctrl-C, so that all processes end. Later ones are ignored: `timeout` sends two."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_cases(section: Section, device: torch.device, write: Callable[[Record], None]) -> None:
    """Take the measurements of a section. If one fails, write its error and take the next one."""
    cases, labels, is_over = iter(section.cases(device)), {}, False
    while not is_over:
        try:
            labels, work = {}, None  # so that an error of the section itself has no labels
            labels, work = next(cases)
            for record in work():
                write(labels | record)
        except StopIteration:
            is_over = True
        except KeyboardInterrupt:  # from `stop`, whose caller writes why
            is_over = True
        except Exception as error:
            traceback.print_exc()
            at = traceback.extract_tb(error.__traceback__)[-1]
            text = traceback.format_exception_only(error)[-1].strip()[:300]
            write(labels | {"failed": text, "at": f"{Path(at.filename).name}:{at.lineno}"})
            is_over = work is None
        gc.collect()
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # an earlier error of the GPU; the section's other cases will fail, too
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def stop(process: BaseProcess) -> None:
    """Interrupt a section, which then ends its own processes; kill what is left of it."""
    children = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
    process.terminate()
    process.join(GRACE_SECONDS)
    process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.join()


# --- the report
def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command: a table for each section."""
    first = records[0]
    where, versions = first["machine"], ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"## {where['device']}", "", f"    {first['command']}", ""]
    lines += [
        f"{first['date']}; {where['cpu']}, {where['cores']} cores, driver {where['driver'] or '-'}; {versions}.",
        "",
    ]
    for name in dict.fromkeys(record["section"] for record in records):
        mine = [_own(record) for record in records if record["section"] == name]
        took = [f", {record['section_seconds']:.0f} s" for record in mine if "section_seconds" in record]
        lines += [f"### {name}{''.join(took)}", ""]
        results = [record for record in mine if "section_seconds" not in record]
        columns = list(dict.fromkeys(column for record in results for column in record))
        heads = [column.replace("_bytes", ", MiB").replace("_", " ") for column in columns]
        lines += grid(heads, [[shown(column, record.get(column)) for column in columns] for record in results])
        lines.append("")
    return "\n".join(lines)


def _own(record: Record) -> Record:
    shared = ("section", "date", "command", "machine", "versions")
    return {name: value for name, value in record.items() if name not in shared}


def shown(name: str, value: object) -> str:
    """Format the value of a field; bytes in MiB."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(f"{each:.4f}" if isinstance(each, float) else str(each) for each in value) or "none"
    if name.endswith("_bytes"):
        return f"{value / MIB:,.1f}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "/").replace("\n", " ")


def about(flags: argparse.Namespace, device: torch.device) -> Record:
    """Return what all records of this command share. Does not initialize CUDA, because the sections are forked."""
    gpu, driver = "cpu", None
    if device.type == "cuda":
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            gpu = pool.submit(torch.cuda.get_device_name).result()
        with suppress(OSError, subprocess.CalledProcessError):  # nvidia-smi is missing in some containers
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.check_output(query, text=True).split()[0]
    command = ["python", "benchmarks/gpu.py", f"--output={flags.output.name}"]  # keeps local paths out of the results
    command += [f"--minutes={flags.minutes:g}", f"--sections={','.join(flags.sections)}", *(["--dry"] * flags.dry)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "machine": machine() | {"device": gpu, "driver": driver},
        "versions": dict(_versions("torch", "triton", "transformers", "accelerate", "bitsandbytes")),
    }


def _versions(*names: str) -> Iterator[tuple[str, str]]:
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def main() -> None:
    flags = parse_flags()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that is_available does not initialize CUDA
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    is_dry = flags.dry or not torch.cuda.is_available()
    if is_dry:
        print(f"{'--dry' if flags.dry else 'torch has no GPU'}: runs tiny shapes on the CPU", flush=True)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device("cpu" if is_dry else "cuda")
    sections = {name: SECTIONS[name] for name in flags.sections}
    run_sections(sections, device, flags.output, minutes=flags.minutes, about=about(flags, device))


if __name__ == "__main__":
    main()
