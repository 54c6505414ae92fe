"""Write the files of a model in transformers' format, except its weights."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lowmem.adapters.lora import is_adapted_here, write_adapter_config
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import is_adapted, is_engine, original_class, unwrapped
from lowmem.errors import UsageError
from lowmem.model.build import rebuilt_on_meta
from lowmem.storage.files import FileRecord, record_file, sync, to_json, write_file
from lowmem.storage.hub import model_folder

Config = Mapping[str, object] | None

# The settings of a processor (of images, audio and video), which neither model nor tokenizer writes. A tokenizer writes
# its own chat template; chat_template.json is the older file of a processor.
_PROCESSOR_FILES = ("*processor_config.json", "audio_tokenizer_config.json", "chat_template.json")

# by model, because building its class takes a tenth of a second, and every save needs the names
_EXPECTED: WeakKeyDictionary[PreTrainedModel, Set[str] | None] = WeakKeyDictionary()


def check_loadable(model: nn.Module) -> None:
    """Raise UsageError if `from_pretrained` would not load exactly this model's weights, because names differ.

    Wrappers and adapters rename or add weights; those of `add_lora` are saved apart. Builds the model's class on the
    meta device to get its names.
    """
    base = unwrapped(model)
    if not isinstance(getattr(base, "config", None), PretrainedConfig):
        return
    if is_adapted(base):
        if not is_adapted_here(base):
            raise UsageError(f"{type(base).__name__} has adapters that peft has added: add them with add_lora")
        return
    inner = next((module for module in base.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return
    if inner not in _EXPECTED:
        rebuilt = rebuilt_on_meta(inner, torch.float32)
        _EXPECTED[inner] = None if rebuilt is None else frozenset(rebuilt.state_dict())
    if (expected := _EXPECTED[inner]) is None:
        return
    stages = stages_of(base)
    names = base.state_dict(keep_vars=True).keys() if stages is None else stages.names
    missing, unknown = sorted(expected - names), sorted(names - expected)
    if missing or unknown:
        does, names = ("initialize {} randomly", missing) if missing else ("ignore {}", unknown)
        does = does.format(f"{len(names)} weights ({names[0]}, ...)")
        found = f"from_pretrained would {does}, because {original_class(inner).__name__} names its weights otherwise"
        raise UsageError(f"{found}: add adapters with add_lora, and save the model without a wrapper")


def write_model_files(folder: Path, model: nn.Module, tokenizer, config: Config) -> dict[Path, FileRecord]:
    """Write all files of a model except its weights, which are already in `folder`."""
    base, tensors = unwrapped(model), set(folder.iterdir())
    if is_adapted(base):
        write_adapter_config(folder, base)
    elif hasattr(base, "config"):
        model_config = copy.deepcopy(base.config)
        model_config.architectures = [original_class(base).__name__]
        model_config.dtype = torch.float32 if is_engine(model) else base.dtype  # of an engine, master weights are saved
        if hasattr(model_config, "auto_map"):  # names code of the source's folder, which was not used
            del model_config.auto_map
        model_config.save_pretrained(folder)
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the `tokenizers` library gives the OS error number only as text
            if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    records = {}
    for path in sorted(set(filter(Path.is_file, folder.rglob("*"))) - tensors):  # the files that transformers wrote
        sync(path)
        records[path] = record_file(path)
    if getattr(base, "generation_config", None) is not None and not is_adapted(base):
        # written without GenerationConfig.save_pretrained, which raises for settings that some pretrained models have
        path = folder / "generation_config.json"
        records[path] = write_file(path, [base.generation_config.to_json_string().encode()])
    for name, content in _processor_files(getattr(base, "name_or_path", "")):
        if not (folder / name).exists():
            records[folder / name] = write_file(folder / name, [content])
    if config is not None:
        records[folder / "lowmem.json"] = write_file(folder / "lowmem.json", [to_json(dict(config))])
    return records


def _processor_files(source: str) -> Iterator[tuple[str, bytes]]:
    """Yield the processor's files in the folder, or cached snapshot of the hub, that a model was loaded from."""
    if (folder := model_folder(source)) is None:
        return
    for path in sorted(path for pattern in _PROCESSOR_FILES for path in folder.glob(pattern)):
        try:
            yield path.name, path.read_bytes()
        except OSError as error:  # the model is worth more than this file
            print(f"{path} cannot be read ({error.strerror}), so it is not saved with the model", flush=True)
