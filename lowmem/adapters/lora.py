"""Add LoRA adapters to a model, load and describe them. peft, which builds them, is imported on first use."""

import copy
import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lowmem.config.groups import settings_of
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.consistency import files_digest, model_digest
from lowmem.distributed.dtensor import set_local_
from lowmem.distributed.placement import is_adapted, is_quantized
from lowmem.errors import UsageError
from lowmem.storage.files import read_json
from lowmem.storage.hub import model_folder
from lowmem.storage.tensor_files import open_shards, tensor_differences

_NAME = "default"  # peft's name for an adapter, of which a model has one here
_PREFIX = "base_model.model."  # of tensors in peft's files
_EMBEDDINGS = {"embed_tokens", "lm_head"}  # layers that peft can keep tied
_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")

# Fields of adapter_config.json. Others train other weights, or change what a layer or the model computes.
_SUPPORTED = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "inference_mode",
    "r",
}
_SUPPORTED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_SUPPORTED |= {"rank_pattern", "lora_dropout", "fan_in_fan_out", "use_dora", "ensure_weight_tying", *_SCALES}
_SUPPORTED |= {"init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"}
_INITIAL = (True, "gaussian", "orthogonal", "eva")  # other initial values come with a change of the model's weights

_bases: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_new_weights: WeakKeyDictionary[nn.Module, Sequence[str]] = WeakKeyDictionary()


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PreTrainedModel:
    """Freeze the model and add LoRA adapters, in place, before `parallelize`. Returns the model.

    A layer with the weight W (out, in) then computes (W + alpha / rank * B A) x, with A (rank, in) drawn by torch's
    generator and B (out, rank) zero, both fp32. With `use_rslora`, the factor is alpha / sqrt(rank); `use_dora` also
    trains the norm of each row. `alpha=None` is twice the rank. `target_modules` has the ends of layers' names;
    "all-linear" adapts every linear layer but the output head. `modules_to_save` are trained whole, in fp32.
    Raises UsageError if the model has no such layers, already has adapters, or has weights drawn at random (a new head)
    that are not in `modules_to_save`.
    """
    if use_dora and any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("use_dora needs the norms of the model's weights, which are on meta: set on_meta=False")
    config = lora_config(
        model,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    _bases[model] = _digest(model)
    inject(model, config)
    for layer in model.modules():
        if isinstance(layer, _peft().tuners.lora.LoraLayer):
            layer.reset_lora_parameters(_NAME, True)  # which gives values to those that were on meta
    return model


def lora_config(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str],
    use_dora: bool,
    use_rslora: bool,
):
    """Return peft's LoraConfig for the arguments of `add_lora`, or raise UsageError for impossible ones."""
    if not (rank >= 1 and (alpha is None or alpha > 0) and 0 <= dropout < 1):
        found = f"rank={rank}, alpha={alpha}, dropout={dropout}"
        raise UsageError(f"add_lora got {found}: use rank >= 1, alpha > 0 and 0 <= dropout < 1")
    targets = [target_modules] if isinstance(target_modules, str) else [*target_modules]
    layers = [f".{name}" for name, _ in model.named_modules()]
    for name in [*(targets if targets != ["all-linear"] else ()), *modules_to_save]:
        if not any(layer.endswith(f".{name}") for layer in layers):
            ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer[-1:].isdigit()} - {""})
            near = get_close_matches(name, ends, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its layers are {', '.join(ends)}"
            raise UsageError(f"{type(model).__name__} has no layer whose name ends in {name}: {hint}")
    return _peft().LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=[*modules_to_save] or None,
        use_dora=use_dora,
        use_rslora=use_rslora,
        task_type=_task(model),
        base_model_name_or_path=_source(model),
        ensure_weight_tying=bool(_ties(model)) and not _EMBEDDINGS.isdisjoint([*targets, *modules_to_save]),
    )


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Freeze the model and add the adapters that `save_model`, or peft, has saved in `folder`, in fp32.

    Raises UsageError if they are not LoRA adapters of this model, or in no safetensors file.
    """
    _bases[model] = _digest(model)
    inject(model, read_config(folder))
    try:
        stored = open_shards(folder, "adapter_model")
    except FileNotFoundError as error:
        found = f"no adapter_model.safetensors, and .bin files are pickles, which are never opened ({error})"
        raise UsageError(f"{folder} has {found}: save the adapters as safetensors") from error
    tensors = adapter_tensors(model)
    if differences := tensor_differences(stored, tensors, any_dtype=True):
        raise UsageError(f"{folder} does not fit the model {_source(model)}: {'; '.join(differences[:3])}, ...")
    for name, tensor in tensors.items():
        set_local_(tensor, stored[name].read().to(torch.float32, copy=True))
    trained_with = settings_of(folder).get("quantization")
    if trained_with and not _quantized_dtypes(model) and rank_and_world_size()[0] == 0:
        found = f"the adapters in {folder} were trained with quantization={trained_with}"
        print(f"{found}, but the model is not quantized: set it too", flush=True)


def inject(model: PreTrainedModel, config) -> None:
    """Freeze the model and add the adapters of a LoraConfig, in fp32. Those of a model on meta have no values yet."""
    if is_adapted(model):
        raise UsageError(f"{type(model).__name__} already has adapters: add them once, to the model without them")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UsageError(f"{type(model).__name__} is already sharded: call add_lora before parallelize")
    saved = tuple(f".{whole}." for whole in config.modules_to_save or ())
    if frozen := [x for x in _new_weights.get(model, ()) if not any(whole in f".{x}" for whole in saved)]:
        found = f"the model's files have no {', '.join(frozen)}, and adapters would neither train nor save them"
        raise UsageError(f"{found}: add {sorted({x.rpartition('.')[0] for x in frozen})} to modules_to_save")
    for whole in config.modules_to_save or ():
        for name, parameter in model.named_parameters():
            if f".{whole}." in f".{name}" and is_quantized(parameter):
                raise UsageError(f"modules_to_save={whole} trains {name}, which is quantized: leave it out")
    ties = _ties(model)
    try:
        # on meta, because all devices shall draw the same values; DoRA computes with them at once
        _peft().inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=not config.use_dora)
    except ValueError as error:
        reason = str(error).partition("\n")[0].rstrip(" .")
        advice = f"choose other layers, or correct adapter_config.json if it is of another model than {_source(model)}"
        raise UsageError(f"peft cannot adapt {type(model).__name__} ({reason}): {advice}") from error
    if in_no_layer := model.peft_config[_NAME].target_parameters:  # peft adds them for fused experts
        found = f"{', '.join(sorted(in_no_layer))} of {type(model).__name__}, which are in no linear layer"
        raise UsageError(f"peft would adapt {found}: set target_modules to other layers, such as q_proj and v_proj")
    for tied in ties:
        new = {name: model.get_submodule(name) for name in tied if model.get_submodule(name) is not tied[name]}
        has_copies = len({id(module.weight) for module in new.values()}) > 1
        if new and (len(new) < len(tied) or has_copies or any(hasattr(x, "base_layer") for x in new.values())):
            found = f"{', '.join(tied)} of {type(model).__name__} share weights"
            raise UsageError(f"{found}, but peft would train only {' and '.join(new)}: adapt or train other layers")
    model._hf_peft_config_loaded = True  # save_pretrained then saves the adapters
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                # copies of whole layers remain on meta, because the model's files have their values
                is_empty = parameter.is_meta and ".lora_" in f"{name}.{key}"
                value = torch.empty_like(parameter, device="cpu") if is_empty else parameter.detach()
                setattr(module, key, made.setdefault(parameter, nn.Parameter(value.float())))


def read_config(folder: Path):
    """Read adapter_config.json into a LoraConfig. Raises UsageError for fields that are not supported."""
    file, kind = folder / "adapter_config.json", _peft().LoraConfig
    fields = read_json(file, advice="save the adapters again")
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise UsageError(f"{file} has no peft_type: save the adapters again")
    allowed = {"peft_type": ("LORA",), "init_lora_weights": _INITIAL}
    for name, value in fields.items():
        is_set = value not in (None, False, "none", [], {})
        if is_set and (name not in _SUPPORTED or value not in allowed.get(name, (value,))):
            raise UsageError(f"{file} has {name}={value}, which is not supported: train LoRA adapters without it")
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        return kind(**{name: value for name, value in fields.items() if name in known} | {"inference_mode": False})
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} is not valid ({str(error).rstrip(' .')}): save the adapters again") from error


def source_of(folder: Path) -> str:
    """Return the folder or hub name of the model that the adapters in `folder` belong to."""
    source, file = read_config(folder).base_model_name_or_path, folder / "adapter_config.json"
    if not source:
        raise UsageError(f"{file} has no base_model_name_or_path: add the model's folder")
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise UsageError(f"{file} has base_model_name_or_path={source}, which does not exist: set the model's folder")
    return source


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trained tensors of an adapted model, by the names that they have in peft's files."""
    options = {"adapter_name": _NAME, "save_embedding_layers": False}
    found = _peft().get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True), **options)
    return {_PREFIX + name: tensor for name, tensor in found.items()}


def is_adapted_here(model: PreTrainedModel) -> bool:
    """Whether the model's adapters were added here, and not by peft itself, so that they can be saved."""
    return model in _bases


def check_scales(model: PreTrainedModel, folder: Path) -> None:
    """Raise UsageError if the adapters in `folder` are scaled otherwise than those of the model."""
    saved, present = read_config(folder), model.peft_config[_NAME]
    for name in _SCALES:
        if (then := getattr(saved, name)) != (now := getattr(present, name)):
            raise UsageError(f"{folder} has adapters with {name}={then}, but this model has {now}: add them as saved")


def base_digest(model: PreTrainedModel) -> str | None:
    """Return a hash of the weights to which adapters were added; None if the model has none."""
    return _bases.get(model)


def note_new_weights(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Note the weights that are in none of the model's files: adapters must train them whole, to save them."""
    _new_weights[model] = names


def write_adapter_config(folder: Path, model: PreTrainedModel) -> None:
    """Write adapter_config.json, with which peft loads the adapters in `folder`."""
    config = copy.copy(model.peft_config[_NAME])
    config.inference_mode = True  # as peft saves it
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))  # the order of a set differs between processes
    config.save_pretrained(str(folder))


def _task(model: PreTrainedModel) -> str | None:
    """Return peft's name for what the model does. None: neither of the two that are trained on text."""
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _source(model: PreTrainedModel) -> str | None:
    """Return the folder (absolute) or hub name that the model was loaded from."""
    name = model.config.name_or_path
    return str(Path(name).absolute()) if Path(name).is_dir() and name else name or None


def _digest(model: PreTrainedModel) -> str | None:
    """Hash the weights in the model's files or, if it has none, in memory; name the dtypes of quantized ones.

    None: this rank has none of the weights.
    """
    folder = model_folder(model.name_or_path)
    if folder is None and any(x.is_meta for x in model.parameters()):
        return None
    digest = files_digest(folder) if folder else model_digest(model, weights=True)
    return " ".join([digest, *sorted(_quantized_dtypes(model))])


def _quantized_dtypes(model: nn.Module) -> set[str]:
    return {str(x.dtype) for x in model.parameters() if is_quantized(x)}


def _ties(model: PreTrainedModel) -> list[dict[str, nn.Module]]:
    """Return the modules that share weights, by name: a dict for each weight."""
    users: dict[nn.Parameter, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, {})[name] = module
    return [modules for modules in users.values() if len(modules) > 1]


def _peft() -> ModuleType:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise UsageError(f"adapters need peft ({error}): pip install 'lowmem[lora]'") from error
    return peft
