"""Count launches, bytes and host syncs of steps of full-size models on fake CUDA tensors; compare peaks with `plan`.

    PYTHONPATH=. python benchmarks/fake_cuda.py

Needs the CUDA build of torch, and no GPU; prints two tables. `tests/fake_cuda.py` says what is counted.
"""

from lowmem.config.presets import MODEL_SHAPES
from tests.fake_cuda import measured

QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
QWEN |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES = {"T5-base": MODEL_SHAPES["t5-base"], "Qwen-0.5B": QWEN, "Llama-8B": LLAMA}
COUNTED = [("T5-base", 2, 512), ("Qwen-0.5B", 8, 2048), ("Llama-8B", 1, 2048)]
PLANNED = [("T5-base", 8, 512), ("Qwen-0.5B", 4, 2048)]


def cases() -> dict[str, dict[str, object]]:
    """Return the steps to count, with one and two micro-batches, and those whose peak `plan` predicts."""
    found = {}
    for name, rows, length in COUNTED:
        for memory in ("exact", "lean"):
            case = {"shape": SHAPES[name], "memory": memory, "lengths": [length] * rows}
            for micro_batches in (1, 2):
                found[f"{name} | {memory} | {rows} x {length} | {micro_batches}"] = case | {
                    "micro_batches": micro_batches
                }
    for name, rows, length in PLANNED:
        # rows of different lengths, because `plan` counts the mask that the encoder of T5 then needs
        lengths = [length, *[length - 8 * (name == "T5-base")] * (rows - 1)]
        for memory in ("exact", "lean", "off"):
            case = {"shape": SHAPES[name], "memory": memory, "lengths": lengths, "micro_batches": 2}
            found[f"{name} | {memory} | {rows} x {length}"] = case | {"is_planned": True}
    return found


def row(name: str, one: dict[str, dict], two: dict[str, dict]) -> str:
    """Return a row of the first table, from steps with one and two micro-batches."""
    weights, phase = one["weights"], "forward and backward"
    launches, bytes_of_weight = (
        {
            phase: one[key][phase] / unit,
            "a sum": (two[key][phase] - 2 * one[key][phase]) / unit,
            "norm and clipping": two[key]["norm"] / unit,
            "update": one[key]["update"] / unit,
        }
        for key, unit in (("launches", 1), ("bytes", weights))
    )
    cells = [f"{number:,.0f}, {bytes_of_weight[part]:,.1f}" for part, number in launches.items()]
    syncs = sum(number for places in one["syncs"].values() for number in places.values())
    return f"| {name} | {' | '.join(cells)} | {syncs} |"


def main() -> None:
    found = measured(cases(), timeout=7200)
    print("Launches, and bytes per weight:\n")
    print("| model | tier | micro-batch | forward and backward | a sum | norm and clipping | update | syncs |")
    print(f"|{'---|' * 3}{'---:|' * 5}")
    for name in found:
        if name.endswith("| 1"):
            print(row(name[:-4], found[name], found[name[:-1] + "2"]))
    print("\nPeak bytes of tensors with two micro-batches, MiB:\n")
    print("| model | tier | micro-batch | fake CUDA tensors | `plan` |\n|---|---|---|---:|---:|")
    for name, step in found.items():
        if step["predicted_bytes"]:
            print(f"| {name} | {step['peak_bytes'] / 2**20:,.0f} | {step['predicted_bytes'] / 2**20:,.0f} |")


if __name__ == "__main__":
    main()
