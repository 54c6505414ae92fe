"""Divided weights get their values: each rank its own part, from the model's files or from rank 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem.config import UsageError
from lowmem.parallel.agree import failing_together, gather_bytes, host_group, rank_and_world_size, waiting
from lowmem.parallel.pieces import local_part
from lowmem.weights import StoredTensor, bytes_of, open_shards

_PART_BYTES = 2**24  # of rank 0's weights that travel at a time


@contextmanager
def filled(model: nn.Module, device: torch.device, *, on_host: bool) -> Iterator[None]:
    """Within it the model is divided; at its end its parameters, on `device` or the host, have their values.

    A model without data on all ranks (on meta) gets it from the files of `model.name_or_path`, of which each rank reads
    its own part; else from rank 0, which then needs to have it. So no other rank ever has a whole copy. Raises
    UsageError, on all ranks, where neither has all weights.
    """
    has_data = not any(parameter.is_meta for parameter in model.parameters())
    is_source = has_data and rank_and_world_size()[0] == 0
    whole = {name: parameter.data for name, parameter in model.named_parameters()} if is_source else {}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    if has_data and not on_host:
        model.to(device)
    elif not has_data:
        model.to_empty(device="cpu" if on_host else device)
        if isinstance(model, PreTrainedModel):
            model.tie_weights()  # each of tied weights that are not sharded has become one of its own
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].to(device)  # to_empty has emptied these too
    rank_0_has_data, *_ = gather_bytes(b"1" if has_data else b"")
    if rank_0_has_data:
        _spread(model, whole)
    else:
        with failing_together():
            _read_own_parts(model, Path(model.name_or_path))


def _read_own_parts(model: nn.Module, folder: Path) -> None:
    stored = stored_weights(model, folder)
    if stored is None:
        raise UsageError(f"the files in {folder} do not hold all weights of this model: load it with its data")
    for name, parameter in model.named_parameters():
        local, row, column = local_part(parameter.data)
        stored[name].copy_part(local, row, column)


def stored_weights(model: nn.Module, folder: Path) -> dict[str, StoredTensor] | None:
    """Each parameter, by its name, as the files in `folder` hold it; None if they do not hold all by these names."""
    files = open_shards(folder, "model")
    aliases: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    found = {}
    for parameter, names in aliases.items():
        stored = [files[name] for name in names if name in files and files[name].shape == [*parameter.shape]]
        if not stored:
            return None
        found[names[0]] = stored[0]
    return found


def _spread(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Put rank 0's `whole` tensors, none elsewhere, into every rank's parameters, 16 MiB at a time."""
    with waiting("spreading the weights of rank 0"), torch.no_grad():
        for name, parameter in model.named_parameters():
            source = whole.pop(name, None)
            local, first, column = local_part(parameter.data)
            shape = (1, *parameter.shape) if parameter.dim() == 0 else parameter.shape
            local = local.view(-1, *local.shape[1:])
            height = max(1, _PART_BYTES * shape[0] // max(1, bytes_of(parameter)))
            for start in range(0, shape[0], height):
                rows = slice(start, min(start + height, shape[0]))
                if source is not None:
                    part = source.view(shape)[rows].to("cpu", parameter.dtype).contiguous()
                else:
                    part = torch.empty(rows.stop - start, *shape[1:], dtype=parameter.dtype)
                if dist.get_world_size() > 1:
                    dist.broadcast(part, src=0, group=host_group())
                mine = slice(max(rows.start, first), min(rows.stop, first + len(local)))
                if mine.start < mine.stop:
                    columns = [slice(column, column + width) for width in local.shape[1:2]]
                    own = part[mine.start - start : mine.stop - start, *columns]
                    local[mine.start - first : mine.stop - first] = own
