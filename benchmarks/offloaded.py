"""Measure training with offloaded weights: a process's peak memory, what it reads and writes, and a kill and resume.

The section `throttled` compares steps with what `plan` predicts, at a bandwidth that sleeping limits.

    python benchmarks/offloaded.py --store=/fast/disk --output=benchmarks/results/offloaded.jsonl
    python benchmarks/offloaded.py --store=/fast/disk --sections=depth

Appends a JSON line per result to --output, and writes tables to the .md file of the same name. See README.md.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from records import Record, append

PROGRAM = Path(__file__).parent.parent / "train_low_mem.py"
GIB = 2**30
LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
NARROW = {"vocab_size": 384, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
WIDE = {
    "vocab_size": 384,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 6,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
}
CASES = {"lean, released": "lean", "lean, clipped": "lean", "exact, released": "exact", "exact, clipped": "exact"}
RELEASED = {"release": True, "max_grad_norm": 0}
MICRO_BATCHES, TOKENS = 4, 128
THROTTLED = {
    "lean, released": {"memory": "lean"} | RELEASED,
    "lean, clipped": {"memory": "lean"},
    "exact, released": {"memory": "exact"} | RELEASED,
    "exact, clipped": {"memory": "exact"},
    "lean, adafactor, released": {"memory": "lean", "optimizer": "adafactor"} | RELEASED,
}
RATIOS = (3, 1, 1 / 3)  # of the seconds that streaming takes to those that computing takes
TIMED_STEPS = 5
SLEEP_BYTES = 2**20  # are moved between two sleeps


def write_model(folder: Path, shape: Mapping[str, int]) -> int:
    """Write a Llama with random bf16 weights, one tensor at a time. Returns the number of weights."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    with init_empty_weights():
        weights = LlamaForCausalLM(config).state_dict()
    generator, weight_map = torch.Generator().manual_seed(0), {}
    folder.mkdir(parents=True)
    for index, (name, weight) in enumerate(weights.items()):
        values = torch.ones(weight.shape, dtype=torch.bfloat16)
        if weight.dim() > 1:
            values.normal_(0, 0.02, generator=generator)
        weight_map[name] = f"model-{index:05d}.safetensors"
        save_file({name: values}, folder / weight_map[name], metadata={"format": "pt"})
    total = sum(weight.numel() for weight in weights.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return total


def write_words(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of this vocabulary, whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": vocabulary - 2, "<eos>": vocabulary - 1}
    tokens = {str(number): number for number in range(vocabulary - 2)} | special
    words = Tokenizer(models.WordLevel(tokens, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def flags_of(model: Path, store: Path, output: Path, **changes: object) -> list[str]:
    shape = {"batch_size": 1, "gradient_accumulation_steps": MICRO_BATCHES, "max_seq_len": TOKENS}
    rows = {"text_column": "prompt", "prefetch_steps": 0, "logging_steps": 1, "learning_rate": 1e-4}
    where = {"model_name_or_path": model, "offload_weights": store, "output_dir": output, "mixed_precision": "bf16"}
    options = {"offload_activations": True, "max_steps": 2, "save_steps": 0, "save_model": False}
    return [f"--{name}={value}" for name, value in (shape | rows | where | options | changes).items()]


def run(*flags: str, data_bytes: int | None = None, bandwidth: float | None = None) -> subprocess.Popen:
    """Start a run in a process that reports its memory; with `data_bytes`, under this limit of private memory.

    With `bandwidth`, all reads and writes of offloaded tensors take turns, at this many bytes per second.
    """

    def limit() -> None:
        if data_bytes:
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))

    command = [sys.executable, __file__, "--child", str(bandwidth or ""), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=limit)


def finished(process: subprocess.Popen, output: Path) -> Record:
    """Wait for a run; return its memory and times, and the losses and seconds of its steps."""
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}:\n{printed}")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    seconds = [step["num_tokens"] / step["tokens_per_second"] for step in steps]
    measured = json.loads(printed.splitlines()[-1])
    return measured | {"losses": [step["loss"] for step in steps], "step_seconds": seconds}


def throttle(file_class: type, bandwidth: float) -> None:
    """Let all reads and writes of files of this class together take `bandwidth`, in bytes per second, by sleeping."""
    lock, free_at = threading.Lock(), 0.0

    def throttled(move: Callable) -> Callable:
        def moved(self: object, address: int, data) -> None:
            nonlocal free_at
            for start in range(0, len(data), SLEEP_BYTES):
                part = data[start : start + SLEEP_BYTES]
                with lock:
                    # a sleep that ends late shortens the next one, but idle time is lost
                    free_at = end = max(free_at, time.perf_counter() - 0.05) + len(part) / bandwidth
                move(self, address + start, part)
                time.sleep(max(0.0, end - time.perf_counter()))

        return moved

    file_class.read, file_class.write = throttled(file_class.read), throttled(file_class.write)


def child(bandwidth: str, flags: list[str]) -> None:
    """Train in this process, and print a line of JSON: peak memory, and seconds and bytes of the file of weights.

    `steps` has those of each step.
    """
    from lowmem import step
    from lowmem.storage import records

    if bandwidth:
        throttle(records.ScratchFile, float(bandwidth))
    found = {"read_seconds": 0.0, "write_seconds": 0.0, "wait_seconds": 0.0, "read_bytes": 0, "written_bytes": 0}
    files: set[io.FileIO] = set()
    disk = [0]

    def measure_disk() -> None:
        """Note the bytes that the files take on the disk, twice a second."""
        while True:
            blocks = sum(os.fstat(file.fileno()).st_blocks for file in [*files] if not file.closed)
            disk.append(max(disk.pop(), blocks * 512))
            time.sleep(0.5)

    def timed(owner: type, name: str, seconds: str, num_bytes: str | None) -> None:
        function = getattr(owner, name)

        def measured(*arguments):
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                found[seconds] += time.perf_counter() - began
                if num_bytes:
                    files.add(arguments[0]._file)
                    found[num_bytes] += arguments[-1].nbytes

        setattr(owner, name, measured)

    timed(records.ScratchFile, "read", "read_seconds", "read_bytes")
    timed(records.ScratchFile, "write", "write_seconds", "written_bytes")
    timed(records.Transfer, "wait", "wait_seconds", None)
    threading.Thread(target=measure_disk, daemon=True).start()
    train_step, steps = step.train_step, []

    def counted_step(*arguments, **options):
        before, began = dict(found), time.perf_counter()
        result = train_step(*arguments, **options)
        steps.append({name: value - before[name] for name, value in found.items()})
        steps[-1]["seconds"] = time.perf_counter() - began
        return result

    step.train_step = counted_step  # before the modules that import it
    sys.argv = [str(PROGRAM), "train", *flags]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    # not ru_maxrss, which includes the process that started this one
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps(found | {"peak_bytes": int(peak) * 1024, "disk_bytes": disk[0], "steps": steps}))


def memory(work: Path, rows: Path, store: Path, cases: list[str]) -> Iterator[Record]:
    """Yield the peak memory, imports included, and the times of two steps of a Llama of 1.1 B weights."""
    num_weights = write_model(work / "llama", LLAMA_1B)
    for case in cases:
        changes = {"train_file": rows, "memory": CASES[case]} | (RELEASED if "released" in case else {})
        flags = flags_of(work / "llama", store, work / case, **changes)
        yield {"section": "memory", "case": case, "weights": num_weights} | finished(run(*flags), work / case)


def limited(work: Path, rows: Path, store: Path) -> Iterator[Record]:
    """Yield a run of `memory` whose private memory the system limits."""
    changes = {"train_file": rows, "memory": "lean"} | RELEASED
    flags = flags_of(work / "llama", store, work / "limited", **changes)
    most = int(2.5 * GIB)  # counts what is reserved, too: arenas of threads, private mappings of files
    found = finished(run(*flags, data_bytes=most), work / "limited")
    yield {"section": "limited", "case": f"RLIMIT_DATA {most / GIB:.1f} GiB"} | found


def resume(work: Path, rows: Path, store: Path) -> Iterator[Record]:
    """Yield whether a run of `memory` that is killed after its first checkpoint resumes with the same losses."""
    changes = {"train_file": rows, "memory": "lean", "save_steps": 1, "max_steps": 2} | RELEASED
    whole = finished(run(*flags_of(work / "llama", store, work / "whole", **changes)), work / "whole")
    flags = flags_of(work / "llama", store, work / "killed", **changes | {"resume": "auto"})
    process, saved = run(*flags), work / "killed" / "checkpoints" / "step-00000001" / "manifest.json"
    while not saved.exists():
        time.sleep(0.1)
        assert process.poll() is None, "the run ended before its first checkpoint"
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = finished(run(*flags), work / "killed")
    yield {"section": "resume", "case": "killed after step 1", "equal": resumed["losses"] == whole["losses"]} | resumed


def depth(work: Path, rows: Path, store: Path) -> Iterator[Record]:
    """Yield the peak memory of models with 8, 16 and 32 layers of one width."""
    for layers in (8, 16, 32):
        name = f"{layers} layers"
        num_weights = write_model(work / name, NARROW | {"num_hidden_layers": layers})
        flags = flags_of(work / name, store, work / f"out {layers}", train_file=rows, memory="exact")
        yield {"section": "depth", "case": name, "weights": num_weights} | finished(run(*flags), work / f"out {layers}")


def scratch(work: Path, rows: Path, store: Path) -> Iterator[Record]:
    """Yield two steps, of the same four rows, of a Llama of 8 B random weights that is never whole in memory."""
    config, words = work / "config.json", work / "words"
    config.write_text(json.dumps(LLAMA_8B | {"model_type": "llama", "tie_word_embeddings": False}))
    write_words(words, LLAMA_8B["vocab_size"])
    numbers = [" ".join(str(row * 1000 + 7 * n) for n in range(TOKENS)) for row in range(MICRO_BATCHES)]
    (work / "four.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in numbers))
    changes = {"train_file": work / "four.jsonl", "memory": "lean", "model_config": config} | RELEASED
    flags = flags_of(work, store, work / "scratch", tokenizer_name_or_path=words, **changes)
    flags = [flag for flag in flags if not flag.startswith("--model_name_or_path")]
    yield {"section": "scratch", "case": "8 B, lean, released"} | finished(run(*flags), work / "scratch")


def throttled(work: Path, rows: Path, store: Path, cases: list[str]) -> Iterator[Record]:
    """Yield the times of steps at several bandwidths, and what `plan` predicts.

    The first run of a case is not throttled. The others have bandwidths at which streaming takes longer than computing
    in this run, about as long, and less long.
    """
    from lowmem.config.parse import resolve
    from lowmem.plan.parts import Cluster
    from lowmem.plan.predict import planners, predicting

    num_weights = write_model(work / "wide", WIDE)
    for case in cases:
        changes = {"max_seq_len": 256, "gradient_accumulation_steps": 2, "max_steps": 1 + TIMED_STEPS} | THROTTLED[case]
        with planners() as pool:
            flags = flags_of(work / "wide", store, work / "out", train_file=rows, **changes)
            config = resolve(dict(flag.removeprefix("--").split("=", 1) for flag in flags))
            (prediction,) = predicting(pool, Cluster(1, 1, on_gpu=False))([config])
        traffic, unthrottled = prediction.traffic, None
        for number, ratio in enumerate((None, *RATIOS)):
            bandwidth = None
            if ratio:
                bandwidth = float(f"{(traffic.read + traffic.written) / (ratio * unthrottled):.1e}")
            output = work / f"{case} {number}"
            flags = flags_of(work / "wide", store, output, train_file=rows, **changes)
            found = finished(run(*flags, bandwidth=bandwidth), output)
            steps = found.pop("steps")[1:]
            medians = {name: median(step[name] for step in steps) for name in steps[0]}
            computing = median(step["seconds"] - step["wait_seconds"] for step in steps)
            unthrottled = unthrottled or computing
            found |= {"bandwidth": bandwidth, "medians": medians, "computing_seconds": computing, "steps": steps}
            found |= {"traffic": dataclasses.asdict(traffic)}
            yield {"section": "throttled", "case": case, "weights": num_weights} | found


def throttled_table(records: list[Record]) -> list[str]:
    """Return a table of step times, and of predictions from the computing of the run and of the unthrottled one."""
    from lowmem.plan.parts import Traffic

    lines = [
        "| run | GB/s | read, written GB | `plan` | streaming + computing s | step s | `plan` | unthrottled |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        medians, traffic, bandwidth = record["medians"], Traffic(**record["traffic"]), record["bandwidth"]
        if bandwidth is None:
            unthrottled = record["computing_seconds"]
        streaming = (traffic.read + traffic.written) / (bandwidth or math.inf)
        seconds = sorted(step["seconds"] for step in record["steps"])
        both = streaming + record["computing_seconds"]
        cells = [
            record["case"],
            f"{bandwidth / 1e9:g}" if bandwidth else "not limited",
            f"{medians['read_bytes'] / 1e9:.3f}, {medians['written_bytes'] / 1e9:.3f}",
            f"{traffic.read / 1e9:.3f}, {traffic.written / 1e9:.3f}",
            f"{streaming:.1f} + {record['computing_seconds']:.1f} = {both:.1f}",
            f"{medians['seconds']:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
        ]
        for computing in (record["computing_seconds"], unthrottled):
            predicted = traffic.step_seconds(bandwidth=bandwidth or math.inf, computing=computing)
            cells.append(f"{predicted:.1f} ({predicted / medians['seconds'] - 1:+.0%})" if bandwidth else "")
        lines.append("| " + " | ".join(cells) + " |")
    explained = (
        "Step: median of five, with the fastest and slowest. Computing: the median seconds of a step in which its "
        "thread does not wait for reads or writes. `plan`: bytes, and the time of a step from the run's own "
        "computing; last, from that of the run that is not limited."
    )
    return [*lines, "", explained]


def table(records: list[Record]) -> str:
    """Return Markdown for the records of one command."""
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [f"    {first['command']}", "", f"{first['date']}; {versions}; {first['threads']} threads.", ""]
    if throttled_records := [record for record in records if record["section"] == "throttled"]:
        lines += [*throttled_table(throttled_records), ""]
    if not (records := [record for record in records if record["section"] != "throttled"]):
        return "\n".join(lines)
    lines += ["| run | weights | peak, GiB | disk, GB | s per step | read, written GB | read, write, wait s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for record in records:
        steps = " ".join(f"{seconds:.1f}" for seconds in record["step_seconds"])
        moved = f"{record['read_bytes'] / 1e9:.1f}, {record['written_bytes'] / 1e9:.1f}"
        times = ", ".join(f"{record[f'{name}_seconds']:.1f}" for name in ("read", "write", "wait"))
        equal = {None: "", True: ": same losses", False: ": OTHER LOSSES"}[record.get("equal")]
        weights = f"{record['weights']:,}" if "weights" in record else ""
        disk = f"{record['disk_bytes'] / 1e9:.1f}" if "disk_bytes" in record else ""
        cells = [f"{record['section']}, {record['case']}{equal}", weights, f"{record['peak_bytes'] / GIB:.2f}", disk]
        lines.append("| " + " | ".join([*cells, steps, moved, times]) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--store", type=Path, required=True, help="folder for weights and models, tens of GB")
    parser.add_argument("--sections", default="memory,limited,resume,depth,scratch,throttled", help="comma list")
    parser.add_argument("--cases", default=";".join(CASES), help=f"semicolon list for memory: {'; '.join(CASES)}")
    parser.add_argument(
        "--throttled_cases", default=";".join(THROTTLED), help=f"semicolon list for throttled: {'; '.join(THROTTLED)}"
    )
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    flags = parser.parse_args()
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv])}
    shared |= {"versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}}
    shared |= {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
    sections, cases = flags.sections.split(","), flags.cases.split(";")
    flags.store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.store) as folder:
        work, rows = Path(folder), Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"prompt": f"{n} " * 200}) + "\n" for n in range(200)))
        if "memory" not in sections and {"limited", "resume"} & {*sections}:
            write_model(work / "llama", LLAMA_1B)
        found = {
            "memory": lambda: memory(work, rows, flags.store, cases),
            "limited": lambda: limited(work, rows, flags.store),
            "resume": lambda: resume(work, rows, flags.store),
            "depth": lambda: depth(work, rows, flags.store),
            "scratch": lambda: scratch(work, rows, flags.store),
            "throttled": lambda: throttled(work, rows, flags.store, flags.throttled_cases.split(";")),
        }
        records = []
        for section in sections:
            for record in found[section]():
                print(json.dumps(record), file=sys.stderr, flush=True)
                records.append(record | shared)
    print(table(records))
    if flags.output:
        append(flags.output, records, table, "offloaded.py")


if __name__ == "__main__":
    main()
