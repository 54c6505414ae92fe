"""What `plan` predicts for small models, beside what real tensors take: twelve trainings, on one process and on two.

    python benchmarks/plan.py --output=benchmarks/results/plan.jsonl              # predictions, before anything is run
    python benchmarks/plan.py --output=benchmarks/results/plan.jsonl --measure    # the same file, with measured peaks

Writes a JSON line for each training and a table beside it. See README.md.
"""

import argparse
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

from lowmem import resolve
from lowmem.plan import Place, predicting, settings_of

SHAPES = {
    "t5": {"model_type": "t5", "vocab_size": 4096, "d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 512}
    | {"num_layers": 6, "decoder_start_token_id": 0, "tie_word_embeddings": True, "dropout_rate": 0.1},
    "llama": {"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
    | {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512}
    | {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
TIERS = {"fp32": {}, "exact": {"mixed_precision": "bf16"}, "lean": {"mixed_precision": "bf16", "memory": "lean"}}
DIVIDED = {1: "NO_SHARD", 2: "FULL_SHARD"}
# shape, tier, recompute, processes
COMBINATIONS = [
    ("t5", "fp32", "off", 1),
    ("t5", "exact", "full", 2),
    ("t5", "lean", "off", 2),
    ("t5", "lean", "full", 1),
    ("llama", "fp32", "full", 2),
    ("llama", "exact", "off", 1),
    ("llama", "exact", "full", 2),
    ("llama", "lean", "off", 1),
    ("qwen2", "fp32", "off", 2),
    ("qwen2", "fp32", "full", 1),
    ("qwen2", "exact", "full", 1),
    ("qwen2", "lean", "full", 2),
]


def config_for(shape: str, tier: str, recompute: str, processes: int, folder: Path):
    path = folder / f"{shape}.json"
    path.write_text(json.dumps(SHAPES[shape]))
    strategy = {"sharding_strategy": DIVIDED[processes]}
    sizes = {"max_seq_len": 128, "batch_size": 4, "gradient_accumulation_steps": 2, "recompute": recompute}
    return resolve({"model_config": path, **sizes, **TIERS[tier], **strategy})


def measure(rank: int, processes: int, port: int, config, on_gpu: bool, results) -> None:
    """Two optimizer steps by the functions that `train` calls; the most that tensors took, on this rank."""
    os.environ |= {"OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"ACCELERATE_USE_CPU": "true"})
    if processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import torch

    from lowmem import Batch, TrainState, chunked_loss, join, load_model, make_optimizer, parallelize, train_step
    from lowmem.memory.meter import MemoryMeter
    from lowmem.memory.savers import entered, recompute
    from lowmem.parallel.pieces import local_of

    torch.set_num_threads(1)
    accelerator = join(mixed_precision=config.autocast)
    torch.manual_seed(0)
    model, _ = load_model(model_config=config.model_config)
    model = parallelize(model, accelerator, sharding_strategy=config.sharding_strategy)
    state = TrainState(model, make_optimizer(model, memory=config.memory or "off"))
    is_causal = not model.config.is_encoder_decoder
    tokens = torch.randint(3, 300, (config.batch_size, config.max_seq_len), device=accelerator.device)
    labels = tokens.clone()
    inputs = {"input_ids": tokens, "labels": labels}
    if is_causal:
        labels[:, 0] = -100
    else:
        mask = torch.ones_like(tokens)
        mask[0, -1] = 0  # one row is shorter
        inputs["attention_mask"] = mask
    batch = Batch(inputs, num_targets=int((labels != -100).sum()), row_ids=[])
    savers = [recompute] if config.recompute == "full" else []
    with MemoryMeter() as meter, entered(savers, model, state.optimizer):
        kept = [tensor for tensors in state.optimizer.state.values() for tensor in tensors.values()]
        meter.count(map(local_of, [*model.parameters(), *kept, *inputs.values()]))
        for _ in range(2):
            meter.reset_peak()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            train_step(state, [batch] * 2, chunked_loss, accelerator, learning_rate=1e-4, max_grad_norm=1.0)
    results.put((rank, torch.cuda.max_memory_allocated() if on_gpu else meter.peak_bytes))
    accelerator.end_training()


def measured(config, processes: int, on_gpu: bool) -> int:
    """The peak of the first rank."""
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
            raise SystemExit(f"a rank ended with {rank.exitcode}")
    return dict(results.get() for _ in ranks)[0]


def table(records: list[dict[str, object]]) -> str:
    lines = [
        "# plan",
        "",
        "Generated by benchmarks/plan.py from plan.jsonl: peak bytes of a process's tensors, MiB.",
        "",
    ]
    lines += [
        "| shape | tier | recompute | processes | predicted | measured | error |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for record in records:
        predicted, real = record["predicted_bytes"], record.get("measured_bytes")
        cells = [f"{predicted / 2**20:.2f}", f"{real / 2**20:.2f}" if real else ""]
        cells.append(f"{predicted / real - 1:+.1%}" if real else "")
        words = [record["shape"], record["tier"], record["recompute"], f"{record['processes']}, {record['strategy']}"]
        lines.append("| " + " | ".join([*words, *cells]) + " |")
    if mended := [record for record in records if "first_measured_bytes" in record]:
        lines += ["", "Measured anew, as the meter had counted the whole of a divided tensor for one process:", ""]
        for record in mended:
            predicted, real = record["predicted_bytes"], record["first_measured_bytes"]
            words = f"{record['shape']}, {record['tier']}, {record['recompute']}, {record['processes']}"
            lines.append(f"- {words}: {real / 2**20:.2f} at first, error {predicted / real - 1:+.1%}")
    return "\n".join([*lines, ""])


def about() -> dict[str, object]:
    """When, by which command, where and with what something was found."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    told = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv])}
    return told | {"machine": machine(), "versions": versions}


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    path.with_suffix(".md").write_text(table(records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="NAME.jsonl; NAME.md is written beside it")
    parser.add_argument("--measure", action="store_true", help="run those without a peak yet, and add it")
    parser.add_argument("--cuda", action="store_true", help="predict for, and measure on, a GPU; one process only")
    flags = parser.parse_args()
    now = about()
    combinations = [each for each in COMBINATIONS if not flags.cuda or each[3] == 1]
    with tempfile.TemporaryDirectory() as folder:
        configs = [config_for(*each, Path(folder)) for each in combinations]
        if flags.measure:
            records = [json.loads(line) for line in flags.output.read_text().splitlines()]
            for record, config in zip(records, configs, strict=True):
                if "measured_bytes" in record:
                    continue
                record["measured_bytes"] = measured(config, record["processes"], flags.cuda)
                record["measurement"] = now
                print(table([record]).splitlines()[-1], flush=True)
                _write(flags.output, records)
        else:
            records = []
            for each, config in zip(combinations, configs, strict=True):
                place = Place(each[3], each[3], flags.cuda)
                with predicting(place, processes=1) as predict:
                    (prediction,) = predict([config])
                names = dict(zip(("shape", "tier", "recompute", "processes"), each, strict=True))
                parts = {name: size for name, size in prediction.device.items() if name != "context, fragments"}
                size = {"batch_size": settings_of(config, place).batch_size, "seq_len": config.max_seq_len}
                told = {"predicted_bytes": sum(parts.values()), "parts": parts, "on_gpu": flags.cuda} | now
                records.append(names | {"strategy": config.sharding_strategy} | size | told)
    _write(flags.output, records)
    print(table(records))


if __name__ == "__main__":
    main()
