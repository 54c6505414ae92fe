"""Fill a model with weights, one parameter at a time: each rank reads its part from files, or rank 0 broadcasts it."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import swap_tensors

from lowmem.distributed.collectives import (
    collective,
    gather_json,
    host_group,
    raise_on_all_ranks,
    rank_and_world_size,
    report_failure,
)
from lowmem.distributed.dtensor import ShardedRecord, local_part, set_local_
from lowmem.distributed.fully_sharded import notice_new_parameters
from lowmem.distributed.placement import is_adapted, is_sharded, pipeline_mesh
from lowmem.distributed.zero import ZeroTensor
from lowmem.errors import UsageError
from lowmem.storage.records import Record
from lowmem.storage.tensor_files import PART_BYTES, StoredTensor, open_shards

# what peft puts into the names of an adapted model's weights, and of layers that are trained whole
_OF_PEFT = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
_PART_ROWS = 2**10  # rows read at a time to compare two stored tensors


class Unfilled:
    """The parameters of a model that are not yet on its device. Rank 0's model has their values, or files have them."""

    def __init__(self, model: nn.Module, *, is_split: bool):
        """Take a model before it is sharded. With `is_split`, move its parameters to meta (rank 0 keeps the values).

        All ranks read the parameters that rank 0 has on meta without a record (`fill_from`) from the files in
        `model.name_or_path`.
        """
        parameters = dict(model.named_parameters())
        self._whole: dict[str, Tensor | Record] = dict(_records.pop(model, {}))  # of rank 0, if not in the model
        have_data = {name: x for name, x in parameters.items() if not x.is_meta}
        self._are_broadcast = gather_json([*have_data, *self._whole])[0]
        self._is_broadcast = {*self._are_broadcast} == parameters.keys()
        self._outlines = {name: (x.shape, x.dtype) for name, x in parameters.items()}
        if is_split:
            if rank_and_world_size()[0] == 0:
                self._whole = {name: parameter.data for name, parameter in have_data.items()} | self._whole
            for parameter in have_data.values():
                set_local_(parameter, torch.empty_like(parameter, device="meta"))

    def place(self, model: nn.Module, device: torch.device, *, on_host: bool) -> None:
        """Bring buffers to `device`. `fill` will bring parameters there, or to host memory with `on_host`.

        From now on, `filler_of(model)` is `fill`. Buffers that are in no file keep their values. All ranks raise
        UsageError if the files lack a weight.
        """
        self._device = torch.device("cpu") if on_host else device
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        with raise_on_all_ranks():
            self._stored = {} if self._is_broadcast else _open_files(model, but=self._are_broadcast)
            for name, buffer in model.named_buffers():
                if not buffer.is_meta:
                    buffer.data = buffer.to(device)
                elif self._is_broadcast or name in self._stored:
                    swap_tensors(buffer, torch.empty_like(buffer, device=device))
                else:
                    raise UsageError(f"the buffer {name} is on meta and in no file: build it with data")
                if name in self._stored:
                    self._stored.pop(name).copy_part(buffer)
        _broadcast(model.buffers())
        self._is_staged = pipeline_mesh(model) is not None
        if self._is_staged:  # now, because stages fill different weights later
            held = {name: parameter for parameter, name in self._names.items()}
            for name in self._are_broadcast:
                self._fill_from_rank_0(name, held.get(name))
        _unfilled[model] = self

    def fill(self, parameter: nn.Parameter) -> None:
        """Bring a parameter (or this rank's part of it) to its device, in its dtype. A second call does nothing.

        All ranks must fill the parameters in the same order.
        """
        if parameter not in self._names:
            return
        name = self._names.pop(parameter)
        local, first, column = local_part(parameter.data)
        whole, stored = self._taken(name), self._stored.pop(name, None)
        # except with stages, all ranks get rank 0's whole weights, even if their files differ
        if not (isinstance(parameter, DTensor) or self._is_staged):
            local = local if whole is None else whole
            filled = torch.empty_like(local, device=self._device) if local.is_meta else local.to(self._device)
            if stored is not None and rank_and_world_size()[0] == 0:
                with report_failure():
                    stored.copy_part(filled)
            _broadcast([filled])
        else:
            filled = torch.empty_like(local, device=self._device)
            if stored is None:
                _broadcast_rows(filled, first, column, parameter.shape, whole)
            else:
                with report_failure():
                    stored.copy_part(filled, first, column)
        set_local_(parameter, filled)

    def _fill_from_rank_0(self, name: str, parameter: nn.Parameter | None) -> None:
        """Fill a parameter from rank 0's value. All ranks must call this; those that do not hold it, with None."""
        (shape, dtype), first, column = self._outlines[name], 0, 0
        if parameter is None:
            filled = torch.empty((0, *shape[1:]), dtype=dtype, device=self._device)
        else:
            local, first, column = local_part(parameter.data)
            filled = torch.empty_like(local, device=self._device)
            del self._names[parameter]
        _broadcast_rows(filled, first, column, shape, self._taken(name))
        if parameter is not None:
            set_local_(parameter, filled)

    def _taken(self, name: str) -> Tensor | None:
        """Return rank 0's value of a parameter, and keep it no more; None on other ranks, or if files have it."""
        whole = self._whole.pop(name, None)
        if isinstance(whole, Record):
            with report_failure():
                whole = whole.space.take(whole)
        return whole


_unfilled: WeakKeyDictionary[nn.Module, Unfilled] = WeakKeyDictionary()


_records: WeakKeyDictionary[nn.Module, Mapping[str, Record]] = WeakKeyDictionary()


def fill_from(model: nn.Module, records: Mapping[str, Record]) -> None:
    """Let `parallelize` fill the parameters of these names, which are on meta, from records. It frees the records."""
    _records[model] = records


def filler_of(model: nn.Module) -> Callable[[nn.Parameter], None]:
    """Return a function that brings a parameter to its device (`Unfilled.fill`). If all are there, it does nothing."""
    weights = _unfilled.get(model)
    return (lambda parameter: None) if weights is None else weights.fill


def fill_weights(model: nn.Module) -> None:
    """Bring all parameters that are not yet on the model's device there, one at a time. Call this on every rank."""
    if (weights := _unfilled.pop(model, None)) is None:
        return
    for parameter in model.parameters():
        weights.fill(parameter)
    if is_sharded(model):
        notice_new_parameters(model)


def _open_files(model: nn.Module, *, but: Collection[str]) -> dict[str, StoredTensor]:
    if not model.name_or_path:
        raise UsageError("the model has neither data nor files: build it with data (on_meta=False) on rank 0")
    try:
        return stored_weights(model, Path(model.name_or_path), but=but)
    except ValueError as error:
        raise UsageError(f"{error}: set on_meta=False") from error


def read_local(tensor: Tensor | Record | ShardedRecord | ZeroTensor, stored: StoredTensor) -> None:
    """Fill the local part of `tensor` from `stored`, in place."""
    if isinstance(tensor, ZeroTensor):
        tensor.read_part(stored)
        return
    local, row, column = local_part(tensor)
    if not isinstance(local, Record):
        stored.copy_part(local, row, column)
        return
    for part in local.split(PART_BYTES):
        part.space.write(part, stored.read(slice(row, row + part.shape[0])))
        row += part.shape[0]


def stored_weights(model: nn.Module, folder: Path, *, but: Collection[str] = ()) -> dict[str, StoredTensor]:
    """Return each parameter and persistent buffer as stored in `folder`, by name (tied weights: by their first name).

    Leaves out those in `but`, and adapters, which are in no file of their model. Files of a base model, without a head,
    have names without its prefix. Raises ValueError if the files lack a tensor, or have it in another shape, or if tied
    weights differ in them, because transformers would then untie them.
    """
    files = open_shards(folder, "model")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not (is_adapted(model) and ".lora_" in name):
            aliases.setdefault(tensor, []).append(name)
    found = {}
    for tensor, names in aliases.items():
        if names[0] in but:
            continue
        in_files = [_OF_PEFT.sub("", name) for name in names] if is_adapted(model) else names
        stored = [files[name] for name in in_files if name in files]
        stored = stored or [files[name] for name in (x.removeprefix(prefix) for x in in_files) if name in files]
        what = f"{folder} cannot fill {names[0]}"
        if not stored:
            raise ValueError(f"{what}, which is not in its files")
        if stored[0].shape != [*tensor.shape]:
            raise ValueError(f"{what} {[*tensor.shape]}, which its files have as {stored[0].shape}")
        if not all(_are_equal(stored[0], other) for other in stored[1:]):
            raise ValueError(f"{what}, which is tied to {stored[-1].name}, but differs from it in its files")
        found[names[0]] = stored[0]
    return found


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    parts = [slice(first, first + _PART_ROWS) for first in range(0, one.shape[0], _PART_ROWS)] if one.shape else [()]
    return all(torch.equal(one.read(rows), other.read(rows)) for rows in parts)


def _broadcast(tensors: Iterable[Tensor]) -> None:
    if rank_and_world_size()[1] > 1:
        with collective("broadcasting the weights of rank 0"):
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def _broadcast_rows(local: Tensor, first: int, column: int, shape: torch.Size, whole: Tensor | None) -> None:
    """Fill `local`, which begins at row `first` and `column` of rank 0's `whole` (elsewhere None), in place.

    Broadcasts 16 MiB or one row at a time, through host memory.
    """
    columns = [slice(column, column + width) for width in local.shape[1:2]]
    height = max(1, PART_BYTES // max(1, shape[1:].numel() * local.dtype.itemsize))
    for start in range(0, shape[0], height):
        rows = slice(start, min(start + height, shape[0]))
        if whole is not None:
            part = whole[rows].to("cpu", local.dtype).contiguous()
        else:
            part = torch.empty(rows.stop - start, *shape[1:], dtype=local.dtype)
        if rank_and_world_size()[1] > 1:
            with collective("broadcasting the weights of rank 0"):
                dist.broadcast(part, src=0, group=host_group())
        mine = slice(max(rows.start, first), min(rows.stop, first + len(local)))
        if mine.start < mine.stop:
            local[mine.start - first : mine.stop - first] = part[mine.start - start : mine.stop - start, *columns]
