"""Build small real models with random weights, and rows to train them on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

T5 = {
    "model_type": "t5",
    "vocab_size": 384,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
FAMILIES = {"t5": T5, "llama": LLAMA, "qwen2": QWEN2}


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Build a model in training mode; T5's dropout is 0 unless `dropout_rate` is given."""
    fields = {**FAMILIES[family], **({"dropout_rate": 0.0} if family == "t5" else {}), **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).train()


def qa_rows(count: int) -> list[dict[str, str]]:
    """Make `count` different rows, whose prompts and responses vary widely in length."""
    return [{"prompt": f"问题 {i} " + "a" * (i * 7 % 23), "response": f"{i}" * (1 + i * 5 % 9)} for i in range(count)]
