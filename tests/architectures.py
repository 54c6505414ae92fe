"""Train a tiny model of every architecture in transformers' two auto mappings: `python -m tests.architectures` lists
what is trained, and what is refused and why.
"""

import gc
import json
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CONFIG_MAPPING, ByT5Tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lowmem import (
    TrainState,
    UsageError,
    check_model,
    chunked_loss,
    collate,
    data_place,
    load_model,
    make_encoder,
    make_optimizer,
    open_rows,
    open_stream,
    parallelize,
    save_model,
    train_step,
)
from lowmem.evaluation import Evaluation

NAMES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})
VOCABULARY = 384  # of ByT5
COLORS = ["red", "blue", "green", "gold"]
ROWS = [{"prompt": f"say {i % 4} =", "response": f" {COLORS[i % 4]}"} for i in range(8)]

# A config field takes the smaller of its default and the value of the first pattern that matches its name.
_SIZES: list[tuple[str, int | None]] = [
    (".*(image_size|patch_size|_version|chunk_size|conv_kernel|kernel_size|stride)", None),
    (".*vocab(_size)?(_.*)?", VOCABULARY),
    ("(num_|n_)?(.*_)?(key_value|kv)_heads|.*num_key_heads", 2),
    ("(.*_)?(num_|n_)?(.*_)?heads?(_per_layer)?", 4),
    ("qk_head_dim", 16),  # the sum of two of the next
    (".*(head_dim|dim_head|d_kv|kv_channels|rotary_dim|d_head)", 8),
    (".*_rank|d_rel", 8),
    ("num_filters", 4),
    ("(num_|n_)?(.*_)?layers?|num_layers_per_stack|.*layer_period", 2),
    (".*layer_offset", 1),
    (".*(experts_per_tok|top_k|topk|experts_per_token|n_group|num_selected|moe_k).*", 1),
    ("(num_|n_)?(.*_)?experts|.*expert_num", 4),
    (".*(intermediate_size|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|n_inner).*", 64),
    (".*hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|hidden_dim|embed_dim|emb_dim|dim|lru_width", 32),
]
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention needs as many as heads
_FIELDS: dict[str, Mapping[str, object]] = {
    **dict.fromkeys(
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear minicpm3 "
        "hy_v4 longcat_flash sarvam_mla youtu".split(),
        _LATENT,
    ),
    **dict.fromkeys("hunyuan_v1_dense hunyuan_v1_moe ministral".split(), {"head_dim": 8}),
    "bamba": {"mamba_d_head": 16, "mamba_n_heads": 4, "attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "led": {"attention_window": [8, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "pegasus_x": {"block_size": 16},
    "prophetnet": {"disable_ngram_loss": True},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "max_position_embeddings": 512},
    "xlnet": {"d_head": 8},
}


def tiny_fields(name: str) -> dict[str, object]:
    """Return the fields of this architecture's default config, with nested ones, at a tiny size."""
    config = CONFIG_MAPPING[name]().to_dict()
    return _tiny(config) | _FIELDS.get(name, {}) | {"model_type": name}


def _tiny(fields: Mapping[str, object]) -> dict[str, object]:
    depth = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if fields.get(name)), None)
    small = {}
    for name, value in fields.items():
        if name == "per_layer_config" and value:
            value = {layer: each for layer, each in value.items() if int(layer) < 2}
        if isinstance(value, dict):
            small[name] = _tiny(value)
        elif isinstance(value, list) and value and len(value) == depth:  # one value per layer: keep two kinds of layers
            other = next((each for each in value if each != value[0]), value[-1])
            small[name] = [_small(name, value[0]), _small(name, other)]
        else:
            small[name] = [_small(name, each) for each in value] if isinstance(value, list) else _small(name, value)
    return small


def _small(name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(".*(token_id|token_index|padding_idx)", name):
        return min(value, VOCABULARY - 1)
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    return value if size is None else min(value, size)


def outcomes(
    names: Iterable[str], folder: Path, accelerator: Accelerator, *, saved: Path | None = None, **sharding: str
) -> Iterator[dict[str, object]]:
    """Train each architecture for four steps in fp32 and in the exact tier, evaluate it, let it answer and save it.

    Models are saved to `saved` (None: in `folder`), which all ranks share. `folder` is of this rank alone.
    Yields records with `name`, `memory` and one of `losses`, `refused` (a line) and `failed` (a traceback).
    """
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in names:
        path = folder / f"{name}.json"
        try:
            path.write_text(json.dumps(tiny_fields(name), default=str))
        except Exception as error:  # the default config itself cannot be built
            yield {"name": name, "memory": "", "refused": f"no default config: {type(error).__name__}"}
            continue
        for memory in ("off", "exact"):
            try:
                yield {
                    "name": name,
                    "memory": memory,
                    "losses": _losses(path, memory, accelerator, sharding, saved or folder),
                }
            except UsageError as error:
                yield {"name": name, "memory": memory, "refused": str(error)}
            except Exception:  # an error that a user would see as a traceback
                yield {"name": name, "memory": memory, "failed": traceback.format_exc()}
            gc.collect()  # models have reference cycles


def _losses(
    config: Path, memory: str, accelerator: Accelerator, sharding: Mapping[str, str], saved: Path
) -> list[float]:
    torch.manual_seed(0)
    model, tokenizer = load_model(model_config=config, tokenizer_name_or_path=config.parent / "tokenizer")
    is_causal = not model.config.is_encoder_decoder
    model = parallelize(model, accelerator, **sharding)
    optimizer = make_optimizer(model, memory=memory)
    check_model(model, chunked_loss, packing=False, max_seq_len=32)
    encode = make_encoder(tokenizer, is_encoder_decoder=not is_causal, max_seq_len=32)
    rows, ranks = open_rows(config.parent / "rows.jsonl"), data_place(model).coordinates
    options = {"batch_size": 16 // ranks["world_size"], "collate": partial(collate, causal=is_causal, max_seq_len=32)}
    answers = {"num_answers": 4, "max_new_tokens": 2}
    measure = Evaluation(model, tokenizer, encode, chunked_loss, accelerator, batch_size=4, max_seq_len=32, **answers)
    measure.check(rows, "validation")
    with closing(open_stream(rows, encode, prefetch=0, **options, **ranks)) as stream:
        state = TrainState(model, optimizer, stream)
        results = [
            train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2)
            for _, batches in zip(range(4), stream, strict=False)
        ]
    measure(rows)
    load_model(save_model(model, saved / "model", tokenizer=tokenizer))  # refuses missing weights and other shapes
    return [result.loss.item() for result in results]


def table(records: Iterable[Mapping[str, object]]) -> str:
    """Format records as a table in Markdown: a row for each architecture."""
    lines = ["| architecture | fp32 | exact |", "|---|---|---|"]
    found: dict[str, dict[str, str]] = {}
    for record in records:
        losses = record.get("losses")
        cell = f"{losses[0]:.2f} → {losses[-1]:.2f}" if losses else record.get("refused") or record["failed"][-300:]
        cells = found.setdefault(str(record["name"]), {})
        cells[str(record["memory"])] = str(cell).replace("|", " ").replace("\n", " ")
    for name, cells in found.items():
        first = cells.get("off", cells.get(""))
        lines.append(f"| {name} | {first} | {cells.get('exact', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        print(table(outcomes(sys.argv[1:] or NAMES, Path(work), Accelerator(cpu=True))))
