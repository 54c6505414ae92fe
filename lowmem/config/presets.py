"""Model shapes by name, and presets: sets of flags by name. Imports no torch."""

# Models to train from scratch, as fields of transformers' config classes.
_T5 = {"model_type": "t5", "decoder_start_token_id": 0, "tie_word_embeddings": True}
MODEL_SHAPES: dict[str, dict[str, object]] = {
    "t5-tiny": _T5
    | {"vocab_size": 384, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    | {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0},
    "t5-small": _T5 | {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
    "t5-base": _T5 | {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12},
}

_LORA = {"lora_rank": 16, "lora_alpha": 32.0, "learning_rate": 2e-4, "warmup_ratio": 0.03}
_LORA |= {"mixed_precision": "bf16", "recompute": "full"}

# The flags that each preset sets. A run with neither a preset nor a model uses `tiny`.
PRESETS: dict[str, dict[str, object]] = {
    "tiny": {"model_config": "t5-tiny", "batch_size": 32, "epochs": 4, "learning_rate": 2e-3, "warmup_steps": 50}
    | {"logging_steps": 50, "eval_steps": 500, "save_steps": 500, "eval_on_start": True},
    "use_small_config": {"model_config": "t5-small", "max_seq_len": 256, "batch_size": 16, "learning_rate": 3e-4}
    | {"warmup_ratio": 0.03},
    "use_fast_config": {"model_config": "t5-small", "max_seq_len": 128, "batch_size": 32, "learning_rate": 3e-4}
    | {"warmup_ratio": 0.03, "mixed_precision": "bf16"},
    "use_large_config": {"model_config": "t5-base", "max_seq_len": 512, "batch_size": 2, "learning_rate": 2e-4}
    | {"gradient_accumulation_steps": 16, "warmup_ratio": 0.03, "mixed_precision": "bf16", "recompute": "full"},
    "use_lora": _LORA,
    "use_qlora": _LORA | {"quantization": "nf4"},
    "is_finetune": {"freeze": "embeddings,encoder", "learning_rate": 1e-4, "warmup_ratio": 0.03},
}
