"""One folder written by all ranks at the same time, each its share of the bytes, whole or absent for all of them."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowmem.distributed.collectives import (
    collective,
    gather_bytes,
    host_group,
    on_main_rank,
    raise_on_all_ranks,
    rank_and_world_size,
)
from lowmem.distributed.dtensor import Piece, pieces
from lowmem.distributed.zero import Divided
from lowmem.errors import SaveError
from lowmem.storage.atomic_folder import abandon, begin, finish, unfinished_folder
from lowmem.storage.files import FileRecord, free_bytes, make_folder, write_file
from lowmem.storage.tensor_files import Shard, host_parts, write_index


class TensorFiles(NamedTuple):
    """Those that become STEM.safetensors, or shards of it with an index, in one folder of what is saved."""

    folder: str
    stem: str
    shards: list[Shard]


def write_together(
    path: Path,
    tensors: Sequence[TensorFiles],
    write_rest: Callable[[Path, dict[str, FileRecord]], None],
    *,
    may_replace: Callable[[Path], bool],
) -> None:
    """Every rank writes its share of the shards, rank 0 the rest (told what was written), and `path` is whole."""
    needed = sum(shard.num_bytes for group in tensors for shard in group.shards)
    unfinished, (rank, world_size) = unfinished_folder(path), rank_and_world_size()

    def start() -> None:
        with _as_save_error(path, needed):
            begin(path, may_replace=may_replace)
            if needed > free_bytes(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for folder in {group.folder for group in tensors if group.folder}:
                make_folder(unfinished / folder)

    def end(records: dict[str, FileRecord]) -> None:
        with _as_save_error(path, needed):
            for group in tensors:
                records |= within(group.folder, write_index(group.shards, unfinished / group.folder, group.stem))
            write_rest(unfinished, records)
            finish(path)

    try:
        on_main_rank(start)
        with raise_on_all_ranks(), _as_save_error(path, needed):
            written = _write_share(_shares(tensors, world_size), unfinished, rank)
        everyone = [json.loads(records) for records in gather_bytes(json.dumps(written).encode())]
        on_main_rank(lambda: end({name: record for records in everyone for name, record in records.items()}))
    except BaseException:
        if rank == 0:
            abandon(path)
        raise


def _shares(tensors: Sequence[TensorFiles], world_size: int) -> list[list[tuple[str, Shard]]]:
    """What each rank writes, (folder, shard): the largest files first, each to the rank that has the fewest bytes."""
    shares: list[list[tuple[str, Shard]]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    every = [(group.folder, shard) for group in tensors for shard in group.shards]
    for folder, shard in sorted(every, key=lambda item: -item[1].num_bytes):
        rank = load.index(min(load))
        shares[rank].append((folder, shard))
        load[rank] += shard.num_bytes
    return shares


def _write_share(shares: list[list[tuple[str, Shard]]], unfinished: Path, rank: int) -> dict[str, FileRecord]:
    records = {}
    queues = [[tensor for _, shard in share for tensor in shard.tensors.values()] for share in shares]
    parts = whole_parts(queues, rank)
    try:
        for folder, shard in shares[rank]:
            written = write_file(unfinished / folder / shard.name, chain([shard.header], _take(parts, shard.num_bytes)))
            records |= within(folder, {shard.name: written})
    finally:
        for _ in parts:  # others count on this rank's pieces of their tensors, even if its own disk failed
            pass
    return records


def whole_parts(queues: Sequence[Sequence[Tensor | Divided]], rank: int) -> Iterator[memoryview]:
    """The bytes of the tensors in this rank's queue, one tensor after the other, as `host_parts` gives them.

    `queues` are the same on all ranks, one for each of them. Every rank must take all that this gives, as it sends its
    pieces of the others' tensors in between. One tensor of each queue is under way at a time, in host memory at most
    as many bytes as the largest has.
    """
    for turn in zip_longest(*queues):
        for owner, tensor in enumerate(turn):
            if isinstance(tensor, Divided):
                whole = tensor.whole()
                if owner == rank:
                    yield from host_parts(whole)
        turn = [None if isinstance(tensor, Divided) else tensor for tensor in turn]
        sent = [_send(tensor, owner) for owner, tensor in enumerate(turn) if owner != rank]
        if turn[rank] is not None:
            yield from _parts(turn[rank], rank)
        with collective("sending pieces of a checkpoint's tensors"):
            for work in filter(None, sent):
                work.wait()


def _send(tensor: Tensor | None, owner: int) -> dist.Work | None:
    if not isinstance(tensor, DTensor):
        return None  # the owner has it
    rank = dist.get_rank()
    mine = [piece for piece in pieces(tensor) if piece.rank == rank and piece.start < piece.stop]
    if not mine:
        return None
    data = tensor.to_local().detach().cpu().contiguous().view(-1).view(torch.uint8)
    return dist.isend(data, owner, group=host_group())


def _parts(tensor: Tensor, rank: int) -> Iterator[memoryview]:
    if not isinstance(tensor, DTensor):
        yield from host_parts(tensor)
        return
    every = pieces(tensor)
    if every[0].dim == 0:
        for piece in every:
            yield from host_parts(_received(tensor, piece, rank))
        return
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)  # columns of all ranks alternate in its bytes
    for piece in every:
        whole[:, piece.start : piece.stop] = _received(tensor, piece, rank)
    yield from host_parts(whole)


def _received(tensor: DTensor, piece: Piece, rank: int) -> Tensor:
    if piece.rank == rank:
        return tensor.to_local().detach()
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


def within(folder: str, records: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Records of files in `folder`, by their names from where that folder is."""
    return {(PurePosixPath(folder) / name).as_posix(): record for name, record in records.items()}


@contextmanager
def _as_save_error(path: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        try:
            free = f"{free_bytes(path):,}"
        except OSError:  # nor can the disk be asked
            free = "an unknown number"
        raise SaveError(
            f"{path} could not be saved: {error.strerror or error}{place}; it takes {needed:,} bytes, {free} are free. "
            "The checkpoints before it stand: make room or mend the disk, and go on from there"
        ) from error
