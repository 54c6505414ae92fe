"""Build a model from a config, with random weights or on the meta device; freeze parts of it."""

import copy
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    dynamic_module_utils,
)

from lowmem.config.presets import MODEL_SHAPES
from lowmem.distributed.placement import original_class, unwrapped
from lowmem.errors import StoreError, UsageError, is_out_of_memory
from lowmem.model.spilled import built_in_file

# transformers builds the parts of some models without our trust_remote_code=False. With no time for an answer, it then
# raises ValueError instead of asking on stdin whether to run their code.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model can embed."""
    return model.get_input_embeddings().weight.shape[0]


def counts_of(model: PreTrainedModel) -> str:
    """Say how many weights the model has, and how many of them are trained, if not all are."""
    every, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    return f"{every:,} weights{f', {trained:,} of them trained' * (trained < every)}"


def freeze(model: PreTrainedModel, *, parts: list[str]) -> None:
    """Freeze `parts`: "embeddings" (and a tied output head), "encoder" (not embeddings), or patterns of names.

    A pattern is matched with parameter names by `fnmatch`. Raises UsageError if one matches none, or if none is left.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # of a tied weight, all names
    embeddings = set(model.get_input_embeddings().parameters())
    frozen = embeddings if "embeddings" in parts else set()
    if "encoder" in parts:
        if not model.config.is_encoder_decoder:
            raise UsageError(f"freeze=encoder needs an encoder, but {type(model).__name__} has none: freeze embeddings")
        frozen = frozen | set(model.get_encoder().parameters()) - embeddings
    for pattern in [part for part in parts if part not in ("embeddings", "encoder")]:
        if not (matching := fnmatch.filter(named, pattern)):
            found = f"freeze={pattern} is neither embeddings nor encoder, and matches no parameter"
            raise UsageError(f"{found} of {type(model).__name__}: its parameters are {some_of(named)}")
        frozen = frozen | {named[name] for name in matching}
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"freeze={','.join(parts)} freezes all weights, so nothing is trained: freeze fewer")


def some_of(names: Iterable[str]) -> str:
    """Return four or five of the names, for a message."""
    names = [*names]
    return f"{', '.join(names[:: max(1, len(names) // 4)])}, ..."


def build_model(
    config: PretrainedConfig, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a model with random weights, in training mode. Without `attn_implementation`, transformers chooses."""
    with building(f"the config of {config.name_or_path or config.model_type}"):
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": False}
        return auto_class(config).from_config(config, **options).train()


def config_from(model_config: PretrainedConfig | Mapping[str, object] | str | Path) -> PretrainedConfig:
    """Return a copy of a config, or make one from its fields, a config.json or a name in MODEL_SHAPES.

    It has no `name_or_path`, because the new model takes nothing from the folder of another.
    """
    if isinstance(model_config, PretrainedConfig):
        config = copy.deepcopy(model_config)
        config.name_or_path = ""
        return config
    fields = model_config
    if isinstance(model_config, str | Path):
        with as_usage_error(f"model_config {model_config} cannot be read", "use a config.json of transformers"):
            fields = MODEL_SHAPES.get(str(model_config)) or dict(json.loads(Path(model_config).read_text()))
    fields = {name: value for name, value in dict(fields).items() if name != "_name_or_path"}
    if "model_type" not in fields:
        raise UsageError("model_config has no model_type: add it (llama, t5, ...), as in transformers' config.json")
    with as_usage_error("transformers does not accept model_config", "correct its fields"):
        return AutoConfig.for_model(fields.pop("model_type"), **fields)


def model_from(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    on_meta: bool,
    scratch_folder: str | Path | None = None,
    kind: type | None = None,
) -> PreTrainedModel:
    """Build a model: on the meta device, or with random weights (with `scratch_folder`, large ones in a file there).

    `kind` is an auto class, or the class of a model; None: `auto_class(config)`.
    """

    def build() -> PreTrainedModel:
        options = {"dtype": dtype} | attention_options(config)
        if kind is not None and issubclass(kind, PreTrainedModel):
            return kind._from_config(config, **options)
        return (kind or auto_class(config)).from_config(config, trust_remote_code=False, **options)

    if on_meta:
        with init_empty_weights():
            model = build()
        model.tie_weights()  # because init_empty_weights has untied the weights
        return model
    return built_in_file(build, Path(scratch_folder)) if scratch_folder else build()


def auto_class(config: PretrainedConfig) -> type:
    """Return transformers' auto class for this config, or raise UsageError if the model cannot be trained here."""
    kinds = [(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)]
    kinds += [(AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)]
    for kind, mapping in reversed(kinds) if config.is_encoder_decoder else kinds:  # some configs are in both
        if type(config) in mapping:
            return kind
    for kind in (getattr(transformers, name, None) for name in config.architectures or ()):
        # the text model of one for images too, which transformers maps only from the config of the whole
        if getattr(kind, "config_class", None) is type(config) and kind.__name__.endswith("ForCausalLM"):
            AutoModelForCausalLM.register(type(config), kind, exist_ok=True)
            return AutoModelForCausalLM
    found = f"transformers has no causal or text-to-text model for {type(config).__name__}"
    raise UsageError(f"{found}: use a model of another type")


def attention_options(config: PretrainedConfig, *, on_gpu: bool | None = None) -> dict[str, str]:
    """Return the keyword arguments that choose the attention implementation; none leaves the choice to transformers.

    A choice in the config itself stays. With `on_gpu=None`, the model runs on a GPU if this machine has one.
    """
    if config._attn_implementation is not None:
        return {}
    on_gpu = torch.accelerator.is_available() if on_gpu is None else on_gpu
    # torch's fused attention has no CPU backward kernel for a learned bias (T5), so it makes a step 1/8 slower
    has_learned_bias = hasattr(config, "relative_attention_num_buckets")
    return {"attn_implementation": "eager"} if has_learned_bias and not on_gpu else {}


def convert_buffers(model: nn.Module) -> None:
    """Convert float buffers to bf16 where transformers does so in a model that it builds in bf16.

    Sinusoidal positions, for instance, must have the dtype of the hidden states, but rotary frequencies stay fp32.
    """
    base = unwrapped(model)
    buffers = {name: buffer for name, buffer in base.named_buffers() if buffer.dtype == torch.float32}
    if not isinstance(base, PreTrainedModel) or all(name.endswith("inv_freq") for name in buffers):
        return
    if (in_bf16 := rebuilt_on_meta(base, torch.bfloat16)) is None:
        return
    # BART's bias is added to logits, which are fp32 in the loss
    kept = re.compile("|".join(["final_logits_bias", *(base._keep_in_fp32_modules_strict or ())]))
    for name, buffer in in_bf16.named_buffers():
        if buffer.dtype == torch.bfloat16 and name in buffers and not kept.search(name):
            buffers[name].data = buffers[name].data.to(torch.bfloat16)


def rebuilt_on_meta(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel | None:
    """Build the model's class again, on the meta device; return None if a user's class needs more than a config."""
    try:
        with torch.device("meta"):
            return original_class(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    except TypeError:
        return None


def building(config: str) -> AbstractContextManager[None]:
    """Raise UsageError for any error while a model is built from `config`, a description of the config."""
    what = f"transformers cannot build a language model from {config}"
    return as_usage_error(what, "correct its fields or use another")


def loading(name: str) -> AbstractContextManager[None]:
    """Raise UsageError for any error while files of the model `name` are loaded."""
    return as_usage_error(f"the model {name} cannot be loaded", "check its files, or use another model")


@contextmanager
def as_usage_error(what: str, advice: str) -> Iterator[None]:
    """Raise UsageError for any error of the block, except running out of memory or of room for scratch files.

    Other libraries raise errors of many types for a damaged file, a field that does not fit or a missing package.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError | StoreError) or is_out_of_memory(error):
            raise
        if isinstance(error, ImportError):
            advice = "install the missing package, or use another model"
        elif "custom code" in str(error):  # transformers' words with trust_remote_code=False
            advice = "lowmem never runs the code of a model's files, so use a model that transformers supports itself"
        reason = reason_of(error)
        if unsupported := re.match(r"ValueError: (\w+ does not support (Flash|an attention).*?) yet\.", reason):
            reason, advice = unsupported[1], "set another attn_implementation, or remove it"
        raise UsageError(f"{what} ({reason}): {advice}") from error


def reason_of(error: Exception) -> str:
    """Return the type and the first line of an error, with the second if the first only introduces it."""
    first, *rest = str(error).strip().splitlines() or [""]
    line = f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
    return f"{type(error).__name__}: {line}".removesuffix(": ").rstrip(" .")
