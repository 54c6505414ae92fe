"""Count the launches, bytes, host syncs and peak of steps of full-size models on fake CUDA tensors, without a GPU.

    PYTHONPATH=. python benchmarks/fake_cuda.py

Needs the CUDA build of torch; prints a table. `tests/fake_cuda.py` says what is counted.
"""

from lowmem.config.presets import MODEL_SHAPES
from tests.fake_cuda import measured

QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
QWEN |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES = {"T5-base": MODEL_SHAPES["t5-base"], "Qwen-0.5B": QWEN, "Llama-8B": LLAMA}
KEYS = ("launches", "bytes")
STEPS = [
    *(("T5-base", memory, (2, 512)) for memory in ("exact", "lean")),
    *(("Qwen-0.5B", memory, (8, 2048)) for memory in ("exact", "lean")),
    *(("Llama-8B", memory, (1, 2048)) for memory in ("exact", "lean")),
    *(("T5-base", memory, (8, 512)) for memory in ("off", "exact", "lean")),
    *(("Qwen-0.5B", memory, (4, 2048)) for memory in ("off", "exact", "lean")),
]


def main() -> None:
    cases = {}
    for name, memory, (rows, length) in STEPS:
        # the rows of an encoder-decoder differ in length, so that they need the mask that `plan` counts
        lengths = [length, *[length - (name == "T5-base")] * (rows - 1)]
        case = {"shape": SHAPES[name], "memory": memory, "lengths": lengths}
        for micro_batches in (1, 2):
            step = {"micro_batches": micro_batches, "is_planned": micro_batches == 2}
            cases[f"{name} | {memory} | {rows} x {length}", micro_batches] = case | step
    names = {f"{name} {micro_batches}": (name, micro_batches) for name, micro_batches in cases}
    found = measured({key: cases[given] for key, given in names.items()}, timeout=7200)
    heads = ["model", "tier", "micro-batch", "forward and backward", "a sum", "norm", "update", "bytes a weight"]
    heads += ["syncs", "peak, MiB", "plan, MiB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * 3}{'---:|' * (len(heads) - 3)}")
    for name in dict.fromkeys(name for name, _ in cases):
        one, two = (found[f"{name} {micro_batches}"] for micro_batches in (1, 2))
        launches, weights = one["launches"], one["weights"]
        of_sum, sum_bytes = (two[key]["forward and backward"] - 2 * one[key]["forward and backward"] for key in KEYS)
        num_syncs = sum(sum(places.values()) for places in one["syncs"].values())
        cells = [launches["forward and backward"], f"{of_sum}, {sum_bytes / weights:.1f} bytes a weight"]
        cells += [launches["norm"], launches["update"], f"{one['bytes']['update'] / weights:.1f}", num_syncs]
        cells += [f"{step / 2**20:,.0f}" for step in (two["peak_bytes"], two["predicted_bytes"])]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
