"""The tensors of a model that a checkpoint saves, by name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowmem.adapters.lora import adapter_tensors
from lowmem.distributed.collectives import gather_json, rank_and_world_size
from lowmem.distributed.dtensor import Piece, ShardedRecord, StagedTensor, pieces, sharded_like
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import is_adapted, is_engine, unwrapped
from lowmem.distributed.zero import ZeroTensor
from lowmem.storage.records import Record
from lowmem.storage.tensor_files import bytes_of


def model_tensors(model: nn.Module) -> dict[str, Tensor | Record | ShardedRecord | ZeroTensor]:
    """Return parameters and persistent buffers by name (if tied: the first); of an adapted model, what is trained.

    Of a model in DeepSpeed's engine, all are ZeroTensors. Returns the records of offloaded weights. Until the next
    forward, the model has no copies of these.
    """
    tensors = _named_once(model)
    if (offloaded := offloaded_of(model)) is not None:
        offloaded.let_go()
        records = {name: offloaded.record_of(x) for name, x in tensors.items()}
        return {name: sharded_like(x, records[name]) if records[name] else x for name, x in tensors.items()}
    return {name: ZeroTensor(model, x) for name, x in tensors.items()} if is_engine(model) else tensors


def _named_once(model: nn.Module) -> dict[str, Tensor]:
    base, seen = unwrapped(model), set()
    if is_adapted(base):
        return adapter_tensors(base)  # tied ones by each name, as peft needs them
    tensors = base.state_dict(keep_vars=True).items()
    return {name: x for name, x in tensors if id(x) not in seen and not seen.add(id(x))}


def named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter | ZeroTensor]:
    """Return {name in `model`: trained parameter}, in the order of `optimizer`; under DeepSpeed, in the model's."""
    if is_engine(model):
        return {name: x for name, x in model_tensors(model).items() if x.tensor.requires_grad}
    names = {id(tensor): name for name, tensor in _named_once(model).items()}
    return {names[id(x)]: x for group in optimizer.param_groups for x in group["params"]}


def of_all_stages(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | StagedTensor]:
    """Return the tensors of all stages by name, in the same order on every rank, if `model` is split into stages.

    `tensors` are those of this rank's stage. Runs a collective.
    """
    if (stages := stages_of(model)) is None:
        return tensors
    mine = {name: _described(tensor) for name, tensor in tensors.items()} if stages.is_first_of_stage else {}
    found: dict[str, StagedTensor] = {}
    for of_rank in gather_json(mine):
        for name, (shape, dtype, places) in of_rank.items():
            if name not in found:
                places = [Piece(*place) for place in places]
                found[name] = StagedTensor(tensors.get(name), torch.Size(shape), getattr(torch, dtype), places)
    return found


def _described(tensor: Tensor) -> tuple[list[int], str, list[Piece]]:
    rows = tensor.shape[0] if tensor.dim() else 1
    places = pieces(tensor) if isinstance(tensor, DTensor) else [Piece(rank_and_world_size()[0], 0, 0, rows)]
    return [*tensor.shape], str(tensor.dtype).removeprefix("torch."), places


def num_bytes(tensors: Mapping[str, Tensor | Record | ShardedRecord]) -> int:
    return sum(map(bytes_of, tensors.values()))
