"""Load a model and its tokenizer from files or the hub, or build them from a config."""

import copy
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowmem.adapters.lora import load_adapters, note_new_weights, source_of
from lowmem.config.groups import holds_adapters
from lowmem.config.presets import MODEL_SHAPES
from lowmem.data.encode import end_tokens
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.errors import UsageError
from lowmem.model.build import as_usage_error, building, config_from, loading, model_from
from lowmem.model.pretrained import check_counts, check_weights, from_pretrained, pretrained_on_meta
from lowmem.model.quantized import QUANTIZATIONS, load_quantized


def load_model(
    model_name_or_path: str | Path | None = None,
    *,
    model_config: PretrainedConfig | Mapping[str, object] | str | Path | None = None,
    tokenizer_name_or_path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    on_meta: bool = False,
    scratch_folder: str | Path | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | None = None,
    auto_class: type | None = None,
    config_changes: Mapping[str, object] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model or build it with random weights (by torch's generator); return it in training mode, and a tokenizer.

    `model_config` is a transformers config, a mapping of its fields, a path of a config.json or a name in MODEL_SHAPES.
    Weights have `dtype`. With `on_meta`, they stay on the meta device until `parallelize` shards them; if the files
    cannot be read tensor by tensor, a line is printed and all weights are loaded. With `scratch_folder`, random weights
    are drawn into a file there, and those of large parameters stay in it until `parallelize`. With `quantization`
    "nf4" or "int8", the model is frozen, and its linear layers are in 4 or 8 bits on `device` (None: the accelerator,
    or the CPU), where `parallelize` must find them. `attn_implementation` is transformers' (None: its own choice).
    `auto_class` is another kind of model than a causal or text-to-text one: an auto class of transformers, such as
    AutoModelForSequenceClassification, or the class of a model. If the files have no weights for its head or pooler, a
    line is printed and they are drawn at random. `config_changes` replace fields of a model's config, such as
    num_labels. A folder of adapters (of `save_model`, or peft's) is loaded over the model that it names, which is
    frozen. Without a tokenizer, text becomes bytes. Raises UsageError if something cannot be loaded, if weights are
    missing or do not fit the config, if a config file of a language model without a tokenizer has a vocabulary much
    larger than that of bytes, if the model does not support `attn_implementation`, or for quantization with
    `model_config`, `on_meta` or `auto_class`.
    """
    if (model_name_or_path is None) == (model_config is None):
        raise UsageError("load_model needs exactly one of model_name_or_path and model_config: set one of them")
    if quantization not in (None, *QUANTIZATIONS):
        raise UsageError(f"quantization={quantization} is unknown: use one of {', '.join(QUANTIZATIONS)}")
    if quantization and (model_config is not None or on_meta):
        found = "on_meta, which reads them later" if on_meta else "model_config, which draws random ones"
        raise UsageError(f"quantization={quantization} quantizes weights as it reads them, but got {found}: remove one")
    if quantization and auto_class is not None:
        raise UsageError(f"quantization={quantization} was set with auto_class={auto_class.__name__}: remove one")
    if model_config is not None and config_changes:
        raise UsageError("config_changes are for a model that is loaded: change model_config itself")
    adapters = Path(model_name_or_path) if holds_adapters(model_name_or_path) else None
    if adapters:
        tokenizer_name_or_path = tokenizer_name_or_path or (adapters if _has_tokenizer(adapters) else None)
        model_name_or_path = source_of(adapters)
    # first, because errors in config.json also keep transformers from loading the tokenizer
    pretrained = None if model_name_or_path is None else _pretrained_config(str(model_name_or_path), config_changes)
    tokenizer = _load_tokenizer(tokenizer_name_or_path or model_name_or_path)
    # another kind of model may have a vocabulary of its own, and then reads no bytes
    reads_text = auto_class is None or bool(tokenizer_name_or_path or model_name_or_path)
    if pretrained is not None:
        pretrained._attn_implementation = attn_implementation or pretrained._attn_implementation
        new = check_weights(pretrained, dtype, auto_class)
        if new and not adapters and rank_and_world_size()[0] == 0:
            print(f"{model_name_or_path} has no {', '.join(new)}: drawn at random", flush=True)
        if quantization:
            model = load_quantized(pretrained, dtype, quantization, device)
        else:
            model = pretrained_on_meta(pretrained, dtype, auto_class, new) if on_meta else None
            model = model or from_pretrained(pretrained, dtype, auto_class)
        _read_generation_config(model)
        note_new_weights(model, new)
        if adapters:
            load_adapters(model, adapters)
    else:
        config = config_from(model_config)
        config._attn_implementation = attn_implementation or config._attn_implementation
        is_named = isinstance(model_config, str | Path)
        with building(f"model_config {model_config}" if is_named else "model_config"):
            if is_named and str(model_config) not in MODEL_SHAPES and tokenizer_name_or_path is None and reads_text:
                _check_bytes(config, tokenizer)
            _adopt_special_tokens(config, tokenizer, replace=reads_text)
            model = model_from(config, dtype, on_meta=on_meta, scratch_folder=scratch_folder, kind=auto_class)
    _start_as_trained(model, tokenizer)
    if reads_text:
        _stop_at_end_tokens(model, tokenizer)
    return model.train(), tokenizer


def config_of(model: str) -> PretrainedConfig:
    """Load the config of a model (folder, hub name, config.json or name in MODEL_SHAPES), or of that under adapters."""
    model = source_of(Path(model)) if holds_adapters(model) else model
    return config_from(model) if model in MODEL_SHAPES or Path(model).is_file() else _pretrained_config(model)


def _pretrained_config(name: str, changes: Mapping[str, object] | None = None) -> PretrainedConfig:
    _check_exists(name, "config.json")
    with loading(name):
        check_counts(PretrainedConfig.get_config_dict(name)[0], name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **(changes or {}))
    if unknown := [field for field in changes or () if not hasattr(config, field)]:  # also arguments of from_pretrained
        raise UsageError(f"config_changes sets {', '.join(unknown)}, but {type(config).__name__} has no such field")
    return config


def _check_exists(name: str, file: str) -> None:
    """Raise UsageError if the folder `name` lacks `file`, or if `name` is not cached and the hub is unreachable."""
    if Path(name).is_dir():
        if not _is_config_of_model(Path(name) / file):
            inside = sorted(path.parent for path in Path(name).glob(f"*/{file}"))
            hint = f"did you mean {inside[0]}?" if inside else "use another folder"
            raise UsageError(f"{name} does not contain {file}, so it is not a model: {hint}")
        return
    with as_usage_error(f"{name} is neither a folder nor a name on the Hugging Face hub", "set an existing folder"):
        is_cached = isinstance(try_to_load_from_cache(name, file), str)
    if is_cached:
        return
    if constants.HF_HUB_OFFLINE:
        found = f"{name} is not a folder, nor among the files that the Hugging Face hub has cached"
        raise UsageError(f"{found}, and HF_HUB_OFFLINE is set: set an existing folder")
    address = urlsplit(constants.ENDPOINT)
    try:
        if not getproxies():
            socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError as error:
        found = f"{name} is not a folder, and the Hugging Face hub cannot be reached ({error})"
        raise UsageError(f"{found}: set a local folder") from error


def _is_config_of_model(path: Path) -> bool:
    """Whether `path` is a file, but not the config.json that a run writes next to its folder model/."""
    if not path.is_file() or path.name != "config.json" or not (path.parent / "model" / path.name).is_file():
        return path.is_file()
    with loading(str(path.parent)):
        return "model_type" in json.loads(path.read_text())


def _read_generation_config(model: PreTrainedModel) -> None:
    # transformers would do without a damaged file, and a model built on meta has read none
    folder = Path(model.name_or_path)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        with loading(str(folder)):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _load_tokenizer(name: str | Path | None) -> PreTrainedTokenizerBase:
    if name is None:
        return ByT5Tokenizer()  # works on bytes, so it needs no file
    is_bytes = _is_byte_tokenizer(Path(name))
    if not Path(name).is_dir():
        _check_exists(str(name), "tokenizer_config.json")
    advice = "check its files, update transformers and tokenizers, or set tokenizer_name_or_path"
    with as_usage_error(f"no tokenizer can be loaded from {name}", advice):
        kind, options = (ByT5Tokenizer, {}) if is_bytes else (AutoTokenizer, {"trust_remote_code": False})
        tokenizer = kind.from_pretrained(str(name), **options)
        makes_tokens = bool(tokenizer("a", add_special_tokens=False).input_ids)
    if not makes_tokens:
        raise UsageError(f"the tokenizer of {name} produces no tokens, so files are missing: use another tokenizer")
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _is_byte_tokenizer(folder: Path) -> bool:
    # AutoTokenizer may load a ByT5 folder as an empty tokenizer of the model's type, so check the saved class here
    try:
        return json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "ByT5Tokenizer"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_bytes(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print that text becomes bytes without a tokenizer. Raise UsageError if the vocabulary is much too large."""
    what = f"without tokenizer_name_or_path, text becomes bytes ({len(tokenizer)} tokens)"
    vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", 0)  # bark's config has none
    if vocabulary > 4 * len(tokenizer):
        found = f"model_config has a vocabulary of {vocabulary:,} tokens, so it is another tokenizer's"
        raise UsageError(f"{what}, but {found}: set tokenizer_name_or_path, or vocab_size={len(tokenizer)}")
    if rank_and_world_size()[0] == 0:
        print(f"{what}; set it to train on a tokenizer's tokens", flush=True)


def _adopt_special_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, replace: bool) -> None:
    """Give the config the tokenizer's special tokens; without `replace`, only those that it lacks."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": pad}
    if config.is_encoder_decoder:
        ids["decoder_start_token_id"] = pad
    for name, token in ids.items():
        if token is None and name in ("pad_token_id", "decoder_start_token_id"):
            continue  # an encoder-decoder model needs both, so keep its own
        if not replace and getattr(config, name, None) is not None:
            continue
        with suppress(StrictDataclassError):  # the configs of some models do not accept None
            setattr(config, name, token)


def _start_as_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` start with the token that mBART puts before the labels: their last one, such as the language."""
    settings = getattr(model, "generation_config", None)
    if not model.config.is_encoder_decoder or getattr(settings, "decoder_start_token_id", None) is not None:
        return
    if settings is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # suppress errors, because a tokenizer without languages and a model without a start token are refused later
        with suppress(KeyError, TypeError, ValueError):
            # by a copy, because this call would set a missing tgt_lang to src_lang
            labels = torch.tensor([copy.deepcopy(tokenizer)(text_target="a").input_ids])
            settings.decoder_start_token_id = int(model.prepare_decoder_input_ids_from_labels(labels=labels)[0, 0])


def _stop_at_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` stop at the tokens with which rows are trained to end, besides those of the model's settings."""
    settings = getattr(model, "generation_config", None)
    given = getattr(settings, "eos_token_id", None)
    given = given if isinstance(given, list) else [] if given is None else [given]
    if settings is not None and (added := [token for token in end_tokens(tokenizer) if token not in given]):
        settings.eos_token_id = added[0] if not given and len(added) == 1 else added + given
