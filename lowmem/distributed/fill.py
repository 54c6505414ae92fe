"""Fill a sharded model with weights: each rank gets its own part, read from files or broadcast from rank 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem.distributed.collectives import collective, gather_json, host_group, raise_on_all_ranks, rank_and_world_size
from lowmem.distributed.dtensor import local_part
from lowmem.errors import UsageError
from lowmem.storage.tensor_files import StoredTensor, bytes_of, open_shards

_PART_BYTES = 2**24  # rank 0 broadcasts at most this at a time, or one row if a row is larger
_PART_ROWS = 2**10  # rows read at a time to compare two stored tensors


@contextmanager
def filled(model: nn.Module, device: torch.device, *, on_host: bool) -> Iterator[None]:
    """After this block, which shards the model, fill its parameters (on host if `on_host`) and buffers.

    If rank 0's model has data, rank 0 broadcasts it. If that model is on meta, each rank reads its own part from files
    in `model.name_or_path`; buffers not in a file keep their values. All ranks raise UsageError if a weight is missing.
    """
    has_data = not any(parameter.is_meta for parameter in model.parameters())
    is_source = has_data and rank_and_world_size()[0] == 0
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    whole = {name: parameter.data for name, parameter in model.named_parameters()} | buffers if is_source else {}
    yield
    if has_data and not on_host:
        model.to(device)
    elif not has_data:
        model.to_empty(device="cpu" if on_host else device)
        if isinstance(model, PreTrainedModel):
            model.tie_weights()  # to_empty unties tied weights that are not sharded
    for name, buffer in model.named_buffers():
        built = buffers[name]  # the value from before to_empty, which clears buffers too
        buffer.data = torch.empty_like(built, device=device) if built.is_meta else built.to(device)
    if gather_json(has_data)[0]:
        _broadcast(model, whole)
    else:
        with raise_on_all_ranks():
            if not model.name_or_path:
                raise UsageError("the model has neither data nor files: build it with data (on_meta=False) on rank 0")
            try:
                stored, tensors = stored_weights(model, Path(model.name_or_path)), model.state_dict(keep_vars=True)
            except ValueError as error:
                raise UsageError(f"{error}: set on_meta=False") from error
            for name, source in stored.items():
                read_local(tensors[name].data, source)
            if empty := sorted(name for name, built in buffers.items() if built.is_meta and name not in stored):
                raise UsageError(f"buffers {', '.join(empty)} are on meta and in no file: build them with data")


def read_local(tensor: Tensor, stored: StoredTensor) -> None:
    """Fill the local part of `tensor` from `stored`, in place."""
    local, row, column = local_part(tensor)
    stored.copy_part(local, row, column)


def stored_weights(model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """Return each parameter and persistent buffer as stored in `folder`, by name (tied weights: by their first name).

    Raises ValueError if the files lack one, or have it in another shape, or if tied weights differ in them, because
    transformers would then untie them.
    """
    files = open_shards(folder, "model")
    aliases: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(tensor, []).append(name)
    found = {}
    for tensor, names in aliases.items():
        stored = [files[name] for name in names if name in files]
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


def _broadcast(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Fill every rank's parameters and buffers from rank 0's `whole` (elsewhere empty), 16 MiB or one row at a time."""
    with collective("broadcasting the weights of rank 0"), torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            source = whole.pop(name, None)
            local, first, column = local_part(tensor.data)
            shape, local = (tensor.shape, local) if tensor.dim() else ((1,), local.view(1))
            height = max(1, _PART_BYTES * shape[0] // max(1, bytes_of(tensor)))
            for start in range(0, shape[0], height):
                rows = slice(start, min(start + height, shape[0]))
                if source is not None:
                    part = source.view(shape)[rows].to("cpu", tensor.dtype).contiguous()
                else:
                    part = torch.empty(rows.stop - start, *shape[1:], dtype=tensor.dtype)
                if dist.get_world_size() > 1:
                    dist.broadcast(part, src=0, group=host_group())
                mine = slice(max(rows.start, first), min(rows.stop, first + len(local)))
                if mine.start < mine.stop:
                    columns = [slice(column, column + width) for width in local.shape[1:2]]
                    own = part[mine.start - start : mine.stop - start, *columns]
                    local[mine.start - first : mine.stop - first] = own
