"""Merge adapters into their model, one weight at a time, so that the model is never whole in memory."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem.distributed.fill import stored_weights
from lowmem.errors import UsageError
from lowmem.storage.tensor_files import StoredTensor


def merged_weights(
    model: PreTrainedModel, folder: Path, rounded: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, StoredTensor], dict[str, Callable[[], Tensor]]]:
    """Return the tensors of a model's files, and for those that change, a function that returns them in fp32.

    `model` is on meta, but its adapters have data; `folder` has its files. If the model was quantized in training,
    `rounded` maps the name of each quantized weight to a function that returns its values there. Raises UsageError if
    the files cannot be read tensor by tensor.
    """
    try:
        stored = stored_weights(model, folder)
    except ValueError as error:
        raise UsageError(f"{error}: merge the adapters with peft (merge_and_unload)") from error
    tensors = model.state_dict(keep_vars=True)
    of = {id(tensors[name]): tensor for name, tensor in stored.items()}
    read = {tensor.name: partial(_read, tensor, rounded.get(tensor.name)) for tensor in stored.values()}
    changed: dict[str, Callable[[], Tensor]] = {name: read[name] for name in rounded}
    for module in model.modules():
        if isinstance(module, LoraLayer) and (weight := of.get(id(module.get_base_layer().weight))):
            changed[weight.name] = partial(_merged, module, read[weight.name])
        elif isinstance(module, ModulesToSaveWrapper):
            (trained,) = module.modules_to_save.values()
            for name, tensor in module.original_module.state_dict(keep_vars=True).items():
                if weight := of.get(id(tensor)):  # else tied to another weight
                    changed[weight.name] = partial(trained.state_dict().get, name)
    return {tensor.name: tensor for tensor in stored.values()}, changed


def _read(stored: StoredTensor, rounded: Callable[[Tensor], Tensor] | None) -> Tensor:
    values = stored.read().clone()
    return values.float() if rounded is None else rounded(values)


@torch.no_grad()
def _merged(layer: LoraLayer, read: Callable[[], Tensor]) -> Tensor:
    base = layer.get_base_layer()
    on_meta, base.weight = base.weight, nn.Parameter(read())
    layer.merge()
    merged, base.weight = base.weight.detach(), on_meta
    layer.merged_adapters.clear()
    return merged
