"""Write a folder from all ranks in parallel: each writes some of the files. It ends up complete or unchanged."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowmem.distributed.collectives import (
    collective,
    gather_json,
    host_group,
    on_main_rank,
    raise_on_all_ranks,
    rank_and_world_size,
)
from lowmem.distributed.dtensor import Piece, ShardedRecord, StagedTensor, local_of, pieces
from lowmem.distributed.zero import ZeroTensor
from lowmem.errors import SaveError, StoreError
from lowmem.storage.atomic_folder import atomic_folder, unfinished_folder
from lowmem.storage.files import FileRecord, free_bytes, make_folder, write_file
from lowmem.storage.records import Record
from lowmem.storage.tensor_files import PART_BYTES, Shard, host_parts, write_index

Divided = DTensor | ShardedRecord | StagedTensor
Saved = Tensor | Record | ShardedRecord | StagedTensor | ZeroTensor
WriteRest = Callable[[Path, dict[str, FileRecord]], None]


def write_together(
    path: Path, groups: Mapping[str, list[Shard]], write_rest: WriteRest, *, may_replace: Callable[[Path], bool]
) -> None:
    """Write the shards of `groups` ({stem: shards}) into `path`, each on one rank. Shard names are relative paths.

    Rank 0 then calls `write_rest(temporary folder, records so far)`. If a write fails, every rank raises SaveError;
    StoreError if records cannot be read, or a sync shows that they may be out of date.
    """
    shards = [shard for group in groups.values() for shard in group]
    needed = sum(shard.num_bytes for shard in shards)
    unfinished, (rank, world_size) = unfinished_folder(path), rank_and_world_size()
    with ExitStack() as stack:  # only rank 0 enters contexts in this stack

        def start() -> None:
            with _as_save_error(path, needed):
                stack.enter_context(atomic_folder(path, may_replace=may_replace))
                if needed > free_bytes(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                for folder in {*map(os.path.dirname, groups)} - {""}:
                    make_folder(unfinished / folder)

        def end(records: dict[str, FileRecord]) -> None:
            with _as_save_error(path, needed):
                for stem, group in groups.items():
                    records |= write_index(group, unfinished, stem)
                write_rest(unfinished, records)
                stack.close()  # renames the folder. `end` runs in on_main_rank, so if this fails, all ranks raise

        on_main_rank(start)
        with raise_on_all_ranks(), _as_save_error(path, needed):
            written = _write_share(assign_shards(shards, world_size), unfinished, rank)
            parts = [local_of(tensor) for shard in shards for tensor in shard.tensors.values()]
            for space in {part.space for part in parts if isinstance(part, Record)}:
                space.sync()  # after the last read. Raises the errors of reads and writes, too
        records = {name: record for of_rank in gather_json(written) for name, record in of_rank.items()}
        on_main_rank(lambda: end(records))


def assign_shards(shards: Sequence[Shard], world_size: int) -> list[list[Shard]]:
    """Return the shards for each rank. Assigns the largest shards first, each to the rank with the fewest bytes."""
    shares: list[list[Shard]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for shard in sorted(shards, key=lambda shard: -shard.num_bytes):
        rank = load.index(min(load))
        shares[rank].append(shard)
        load[rank] += shard.num_bytes
    return shares


def _write_share(shares: list[list[Shard]], unfinished: Path, rank: int) -> dict[str, FileRecord]:
    parts = host_parts(_wholes([[x for shard in share for x in shard.tensors.values()] for share in shares], rank))
    try:
        return {
            shard.name: write_file(unfinished / shard.name, chain([shard.header], _take(parts, shard.num_bytes)))
            for shard in shares[rank]
        }
    finally:
        for _ in parts:  # even if this rank's disk failed, send its pieces, because other ranks wait for them
            pass


def _wholes(queues: Sequence[Sequence[Saved]], rank: int) -> Iterator[Tensor]:
    """Gather the whole tensors of `queues[rank]` from all ranks, and yield them in order, some in several pieces.

    All ranks pass the same `queues` and must exhaust the iterator, because it also sends this rank's pieces to others.
    """
    for tensors in zip_longest(*queues):
        for owner, tensor in enumerate(tensors):
            if isinstance(tensor, ZeroTensor):
                whole = tensor.gather_to_host()
                if owner == rank:
                    yield whole
                del whole
        sent = [_send(tensor, owner) for owner, tensor in enumerate(tensors) if owner != rank]
        if isinstance(tensors[rank], Tensor | Record | Divided):
            yield from _pieces(tensors[rank], rank)
        with collective("sending pieces of a checkpoint's tensors"):
            for work in filter(None, sent):
                work.wait()


def _send(tensor: Saved | None, owner: int) -> dist.Work | None:
    """Start sending this rank's piece of a tensor to `owner`. Returns None if there is nothing to send."""
    if not isinstance(tensor, Divided):
        return None
    rank = dist.get_rank()
    if not any(piece.rank == rank and piece.start < piece.stop for piece in pieces(tensor)):
        return None
    data = _local_data(tensor).cpu().contiguous().view(-1).view(torch.uint8)
    return dist.isend(data, owner, group=host_group())


def _local_data(tensor: Divided) -> Tensor:
    local = local_of(tensor)
    if not isinstance(local, Record):
        return local.detach()
    try:
        return local.to_host()
    except StoreError:  # other ranks wait for this piece; `sync` raises the error again, after the last one
        return torch.zeros(local.shape, dtype=local.dtype)


def _pieces(tensor: Tensor | Record | Divided, rank: int) -> Iterator[Tensor]:
    if isinstance(tensor, Record):
        yield from (part.to_host() for part in tensor.split(PART_BYTES))
    elif not isinstance(tensor, Divided):
        yield tensor
    elif (every := pieces(tensor))[0].dim == 0:
        for piece in every:
            yield _received(tensor, piece, rank)
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)  # pieces are columns: no row is complete before the end
        for piece in every:
            whole[:, piece.start : piece.stop] = _received(tensor, piece, rank)
        yield whole


def _received(tensor: Divided, piece: Piece, rank: int) -> Tensor:
    if piece.rank == rank:
        return _local_data(tensor)
    received = torch.empty(piece.shape(tensor.shape), dtype=tensor.dtype)
    if piece.start < piece.stop:
        with collective(f"waiting for a piece of a checkpoint's tensor from rank {piece.rank}"):
            dist.recv(received.view(-1).view(torch.uint8), piece.rank, group=host_group())
    return received


def _take(parts: Iterator[memoryview], num_bytes: int) -> Iterator[memoryview]:
    while num_bytes:
        part = next(parts)
        num_bytes -= len(part)
        yield part


@contextmanager
def _as_save_error(path: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        try:
            free = f"{free_bytes(path):,}"
        except OSError:  # the disk cannot be queried
            free = "an unknown number"
        why = f"{error.strerror or error}{where}; it takes {needed:,} bytes, {free} are free"
        raise SaveError(f"{path} could not be saved: {why}. Earlier checkpoints are intact: free disk space") from error
