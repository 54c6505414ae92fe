"""Load the weights of a model folder or a hub name. First check, without memory for them, that they fit the config."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PretrainedConfig, PreTrainedModel

from lowmem.distributed.fill import stored_weights
from lowmem.errors import UsageError, is_out_of_memory
from lowmem.model.build import attention_options, auto_class, loading, model_from, reason_of
from lowmem.storage.hub import model_folder
from lowmem.storage.tensor_files import bytes_of, open_shards

_ADVICE = "correct config.json, or use another model"
_BUFFER_BYTES = 2**30  # of a small model
_MAX_COUNT = 100_000  # of layers or labels
_MANY_TENSORS = 100_000  # more than in the files of any model


def check_counts(fields: Mapping[str, object], source: str) -> None:
    """Raise UsageError if a count in `fields`, of which transformers' configs make a list or dict, is too large."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            check_counts(value, source)
        elif name.endswith(("layer", "layers", "num_labels")) and type(value) is int and value > _MAX_COUNT:
            found = f"the config.json of {source} has {name}={value:,}"
            raise UsageError(f"{found}, but at most {_MAX_COUNT:,} are supported: {_ADVICE}")


def check_weights(config: PretrainedConfig, dtype: torch.dtype, kind: type | None = None) -> list[str]:
    """Raise UsageError unless the files of `config.name_or_path` have all weights, in the shapes that `config` sets.

    With `kind`, the files may lack what is not in its base model (the head), and a pooler, which only a head uses.
    Returns the names of the weights that they lack.
    transformers itself matches names and shapes, on the meta device, because it may rename, split and merge weights.
    """
    name, stored = config.name_or_path, {}
    folder = model_folder(name) or Path(name)
    with suppress(FileNotFoundError):  # not downloaded yet or, without an index, missing
        # checks the names in the index, because transformers follows ../, and headers, because it does not name files
        stored = open_shards(folder, "model")
    # report weights of another shape below, because transformers' error does not name them
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    limit = 1000 + 10 * (len(stored) or _MANY_TENSORS)
    with torch.device("meta"), _at_most(limit, name), _without_report():
        if stored and all(tensor.torch_dtype for tensor in stored.values()):
            # without the files: transformers would map them all, and mapped pages count as memory
            shapes = {key: torch.empty(x.shape, dtype=x.torch_dtype) for key, x in stored.items()}
            with loading(name):
                built = type(model_from(config, dtype, on_meta=True, kind=kind))
                model, info = built.from_pretrained(None, config=config, dtype=dtype, state_dict=shapes, **options)
        else:
            model, info = from_pretrained(config, dtype, kind, **options)
    if getattr(model, "hf_quantizer", None) is not None:
        found = f"the model {name} has quantized weights, which cannot be trained"
        raise UsageError(f"{found}: use an unquantized model (quantization=nf4 or int8 quantizes it while loading)")
    if differing := sorted(info["mismatched_keys"]):
        weight, stored, expected = differing[0]
        found = f"{len(differing)} weights of the model {name} do not have the shapes that its config.json sets"
        raise UsageError(f"{found} ({weight} has {[*stored]} instead of {[*expected]}, ...): {_ADVICE}")
    missing = sorted(info["missing_keys"])
    base = "" if kind is None or model.base_model is model else f"{model.base_model_prefix}."
    needed = [key for key in missing if key.startswith(base) and (kind is None or ".pooler." not in f".{key}")]
    if needed:
        found = f"the model {name} lacks {len(needed)} weights ({', '.join(needed[:3])}, ...)"
        raise UsageError(f"{found}; they would be initialized randomly: use a complete model")
    buffers, weights = (sum(map(bytes_of, tensors)) for tensors in (model.buffers(), model.parameters()))
    if buffers > weights + _BUFFER_BYTES:  # the files do not have most of them, such as those for positions
        found = f"the config.json of the model {name} sets buffers of {buffers:,} bytes"
        raise UsageError(f"{found}, more than the {weights:,} bytes of its weights: {_ADVICE}")
    return missing


def from_pretrained(
    config: PretrainedConfig, dtype: torch.dtype, kind: type | None = None, **options: object
) -> PreTrainedModel:
    """Load the model of `config.name_or_path`, as transformers does, or raise UsageError."""
    name = config.name_or_path
    safe = {"use_safetensors": True, "trust_remote_code": False}  # the other formats are pickles, which can run code
    with loading(name), _without_report():  # `check_weights` reports what a user should know
        options |= safe | attention_options(config)
        return (kind or auto_class(config)).from_pretrained(name, config=config, dtype=dtype, **options)


def pretrained_on_meta(
    config: PretrainedConfig, dtype: torch.dtype, kind: type | None = None, new: Sequence[str] = ()
) -> PreTrainedModel | None:
    """Build the model on the meta device, except the weights `new`, which are in no file and are drawn at random.

    Prints a line and returns None if its files cannot be read tensor by tensor.
    """
    name, random_state = config.name_or_path, torch.get_rng_state()
    with loading(name):
        folder = local_folder(name)
        model = model_from(config, dtype, on_meta=True, kind=kind)
        _draw(model, new)
    try:
        if hasattr(config, "quantization_config"):  # the files may have the model's names and shapes, but other values
            raise ValueError("the files are quantized")
        stored_weights(model, folder, but=new)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        torch.set_rng_state(random_state)  # so that the weights are those that this model has without on_meta
        print(f"each process loads all weights of {name}, as they cannot be read tensor by tensor: {reason_of(error)}")
        return None
    model.name_or_path = str(folder)
    return model


def _draw(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Give these weights of a model on meta random values, as the model's class initializes them."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = torch.empty_like(getattr(owner, attribute), device="cpu")
        setattr(owner, attribute, nn.Parameter(empty) if isinstance(getattr(owner, attribute), nn.Parameter) else empty)
    if names:
        with torch.no_grad():
            model.apply(model._init_weights)  # does nothing to weights on meta


def local_folder(name: str) -> Path:
    """Return the folder of a model, after downloading its weights if `name` is a name on the hub."""
    is_local = Path(name).is_dir()
    return Path(name if is_local else snapshot_download(name, allow_patterns=["*.safetensors*", "*.json"]))


@contextmanager
def _at_most(limit: int, name: str) -> Iterator[None]:
    """Raise UsageError if models are built of more modules, which take time and memory even on the meta device."""
    num_modules = count(1)

    def check(module: nn.Module, child_name: str, child: nn.Module | None) -> None:
        if next(num_modules) > limit:
            found = f"the config.json of the model {name} sets over {limit:,} modules"
            raise UsageError(f"{found}, more than the weights in its files can fill: {_ADVICE}")

    with register_module_module_registration_hook(check):
        yield


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppress the load report of transformers, which it logs as a warning."""
    logger = logging.getLogger(PreTrainedModel.__module__)

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
