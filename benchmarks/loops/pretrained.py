"""The model in a folder, as transformers loads it."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel


def load(folder: str, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
