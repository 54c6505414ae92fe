"""Compare the peak memory that `plan` predicts for small models with the allocator's peak during `train`.

    python benchmarks/plan.py --output=benchmarks/results/plan.jsonl              # predict
    python benchmarks/plan.py --output=benchmarks/results/plan.jsonl --measure    # add measured peaks

Writes a JSON line per run to --output, and a table to the .md file of the same name. See README.md.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import shlex
import socket
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from systems import machine
from transformers import ByT5Tokenizer

from lowmem import resolve
from lowmem.plan.parts import Cluster
from lowmem.plan.predict import CONTEXT, planners, predicting

SHAPES = {
    "t5": {"model_type": "t5", "vocab_size": 6000, "d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 768}
    | {"num_layers": 5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "vocab_size": 5000, "hidden_size": 320, "intermediate_size": 896}
    | {"num_hidden_layers": 7, "num_attention_heads": 10, "num_key_value_heads": 5, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "vocab_size": 9000, "hidden_size": 256, "intermediate_size": 704}
    | {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
TIERS = {"fp32": {}, "exact": {"mixed_precision": "bf16"}, "lean": {"mixed_precision": "bf16", "memory": "lean"}}
SIZES = {"max_seq_len": 160, "batch_size": 4, "gradient_accumulation_steps": 2}
FULL, OFFLOAD = {"recompute": "full"}, {"offload_activations": True}
RELEASE = {"release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0}
# each run: model, memory tier, number of processes, other settings
COMBINATIONS = [
    ("t5", "fp32", 1, {}),
    ("t5", "exact", 1, FULL | {"global_batch_size": 10}),  # micro-batches of 4, 3 and 3 rows
    ("t5", "exact", 2, FULL | {"sharding_strategy": "FULL_SHARD"}),
    ("t5", "lean", 2, {}),
    ("llama", "fp32", 2, FULL | {"sharding_strategy": "SHARD_GRAD_OP"}),
    ("llama", "exact", 1, OFFLOAD),
    ("llama", "exact", 2, {"recompute": "cheap", "sharding_strategy": "FULL_SHARD"}),
    ("llama", "lean", 1, FULL | RELEASE),
    ("qwen2", "fp32", 2, {}),
    ("qwen2", "exact", 1, FULL | {"batch_size": 3, "global_batch_size": 7}),  # micro-batches of 3, 2 and 2
    ("qwen2", "lean", 1, {}),
    ("qwen2", "lean", 2, FULL | OFFLOAD | {"sharding_strategy": "FULL_SHARD"}),
    ("llama", "exact", 4, FULL | {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}),
]


def config_for(shape: str, tier: str, flags: dict[str, object], folder: Path):
    path = folder / f"{shape}.json"
    path.write_text(json.dumps(SHAPES[shape]))
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    text = {} if shape == "t5" else {"text_column": "text"}
    sizes = {name: size for name, size in SIZES.items() if name not in flags}
    if "global_batch_size" in flags:
        del sizes["gradient_accumulation_steps"]
    run = {"max_steps": 2, "validation_rows": 0, "output_dir": folder / "out"}
    run["tokenizer_name_or_path"] = folder / "tokenizer"
    return resolve({"model_config": path, **text, **sizes, **TIERS[tier], **flags, **run})


def rows_for(config) -> list[dict[str, str]]:
    """Return rows a little shorter than `plan` assumes (`max_seq_len`). Their lengths differ, so T5 needs a mask."""
    lengths = [config.max_seq_len - 1 - number % 5 for number in range(64)]  # the tokenizer adds an end token
    columns = [config.text_column] if config.text_column else [config.prompt_column, config.response_column]
    return [{column: "x" * length for column in columns} for length in lengths]


def measure(rank: int, processes: int, port: int, config, on_gpu: bool, results) -> None:
    """Train two steps. Put `rank` and its allocator's peak bytes in the second step into `results`."""
    os.environ |= {"OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"ACCELERATE_USE_CPU": "true"})
    if processes > 1:
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in launch.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lowmem.data.rows import RowSets
    from lowmem.distributed.signals import Signals
    from lowmem.train import train

    # make the allocator count all threads' bytes in one sum, because gloo's threads free what this thread allocated
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
    torch.set_num_threads(1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as profiler:  # records building the model, too
        train(config, RowSets(rows_for(config)), signals=Signals())
    kind = "cuda" if on_gpu else "cpu"
    sums, cleared = [], []
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name.startswith("Optimizer.zero_grad"):
            cleared.append((event.start_time_ns, event.end_time_ns))
        elif event.name == "[memory]" and event.extra_fields.device.type == kind:
            sums.append((event.start_time_ns, event.extra_fields.total_allocated))  # for a mapped file, this sum is 0
    (_, _, (begin, _), (_, end)) = sorted(cleared)  # a step begins and ends with zero_grad; take the second step
    before = max(each for each in sums if each[0] < begin)
    results.put((rank, max(num_bytes for moment, num_bytes in [before, *sums] if before[0] <= moment <= end)))


def measured(config, processes: int, on_gpu: bool) -> int:
    """Train on all ranks, and return the peak bytes of rank 0."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    arguments = (processes, port, config, on_gpu, results)
    ranks = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        if rank.exitcode:
            raise SystemExit(f"a rank failed with exit code {rank.exitcode}")
    return dict(results.get() for _ in ranks)[0]


def table(records: list[dict[str, object]]) -> str:
    lines = [
        "# plan",
        "",
        "Generated by benchmarks/plan.py from plan.jsonl: peak bytes of a process's tensors in MiB, predicted, and "
        "measured by torch's allocator (its own sum) in the second step of `train`. Rows are up to four tokens shorter "
        "than the prediction assumes. The mapped files of `offload_activations` count in neither.",
        "",
        "An earlier measurement of the first six rows summed the profiler's events instead. It was 24 % above the "
        "prediction with `offload_activations` and 3 to 10 % above it on two processes, because it counted the mapped "
        "files as memory and missed what gloo's threads free. The predictions were not changed.",
        "",
        "| shape | tier | processes | settings | predicted | measured | error |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for record in records:
        predicted, real = record["predicted_bytes"], record.get("measured_bytes")
        cells = [f"{predicted / 2**20:.2f}", f"{real / 2**20:.2f}" if real else ""]
        cells.append(f"{predicted / real - 1:+.1%}" if real else "")
        settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items())
        words = [record["shape"], record["tier"], str(record["processes"]), settings]
        lines.append("| " + " | ".join([*words, *cells]) + " |")
    return "\n".join([*lines, ""])


def about() -> dict[str, object]:
    """Return the date, the command, the machine and the versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    shared = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv])}
    return shared | {"machine": machine(), "versions": versions}


def predicted(combination, config, on_gpu: bool) -> dict[str, object]:
    shape, tier, processes, settings = combination
    with planners() as pool:
        (prediction,) = predicting(pool, Cluster(processes, processes, on_gpu))([config])
    parts = {name: size for name, size in prediction.device.items() if name != CONTEXT}
    case = {"shape": shape, "tier": tier, "processes": processes, "settings": settings, "on_gpu": on_gpu}
    return case | {"predicted_bytes": sum(parts.values()), "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="NAME.jsonl; also writes NAME.md")
    parser.add_argument("--measure", action="store_true", help="train the combinations that have no measured peak yet")
    parser.add_argument("--cuda", action="store_true", help="predict for a GPU and measure on it; one process only")
    flags = parser.parse_args()
    now = about()
    combinations = [each for each in COMBINATIONS if not flags.cuda or each[2] == 1]
    records = [json.loads(line) for line in flags.output.read_text().splitlines()] if flags.measure else []
    for number, combination in enumerate(combinations):
        with tempfile.TemporaryDirectory() as folder:
            shape, tier, processes, settings = combination
            config = config_for(shape, tier, settings, Path(folder))
            if not flags.measure:
                records.append(predicted(combination, config, flags.cuda) | now)
            elif "measured_bytes" not in records[number]:
                peak = measured(config, processes, flags.cuda)
                records[number] |= {"measured_bytes": peak, "measurement": now}
            print(table(records[number : number + 1]).splitlines()[-1], flush=True)
        flags.output.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags.output.with_suffix(".md").write_text(table(records))


if __name__ == "__main__":
    main()
