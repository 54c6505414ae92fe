"""Tensors in host memory or in a file, which a thread reads and writes while the device computes.

Each read, write, sync or growth of the file first raises the audit event "lowmem.store" (operation, folder).
"""

import ctypes
import os
import sys
import tempfile
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ctypes import c_int64
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowmem.errors import StoreError, UsageError
from lowmem.storage.files import free_bytes

_ALIGNMENT_BYTES = 4096  # a page
_PART_BYTES = 2**24  # copied at a time between a GPU and a file
_SLAB_BYTES = 2**30  # of pinned memory, of which torch takes powers of two. `plan` rounds up to it
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # of linux/falloc.h
_IN_FLIGHT_BYTES = {"cuda": 2**26, "cpu": 2**24}  # `plan` counts those of a GPU


class Storage(Protocol):
    """Bytes in host memory or in a file, at addresses."""

    is_memory: bool

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new bytes, all zero. Raises StoreError if there is no room."""

    def free(self, address: int, num_bytes: int) -> None:
        """Give bytes back to the system where it can take them. They must not be used any more."""

    def host_copy(self, address: int, num_bytes: int) -> Tensor:
        """Return the bytes as a uint8 tensor in host memory, pinned for a GPU. Of a file, valid until the next call."""

    def read(self, address: int, target: Tensor) -> None:
        """Fill `target`, contiguous bytes in host memory."""

    def write(self, address: int, source: Tensor) -> None:
        """Write `source`, contiguous bytes in host memory."""

    def sync(self) -> None:
        """Raise StoreError if the disk has failed after a write returned: what was read since may be out of date."""


class Record(NamedTuple):
    """A tensor in a `Space`: all of it but its data."""

    space: "Space"
    address: int
    shape: torch.Size
    dtype: torch.dtype

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def num_bytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    def rows(self, rows: slice) -> "Record":
        """Return the part from `rows.start` to `rows.stop` of the first dimension."""
        row_bytes = self.shape[1:].numel() * self.dtype.itemsize
        shape = torch.Size((rows.stop - rows.start, *self.shape[1:]))
        return Record(self.space, self.address + rows.start * row_bytes, shape, self.dtype)

    def split(self, most_bytes: int) -> list["Record"]:
        """Split the record into parts of at most `most_bytes`, but at least one row."""
        height = max(1, most_bytes * self.shape[0] // max(1, self.num_bytes))
        firsts = range(0, self.shape[0], height)
        return [self.rows(slice(first, min(first + height, self.shape[0]))) for first in firsts]

    def to_host(self) -> Tensor:
        """Return a copy in host memory."""
        return self.space.read_to_host(self)


class Transfer:
    """A read or a write, which a thread does. Holds its tensor until `wait`."""

    def __init__(self, future: "Future[torch.cuda.Event | None]", tensor: Tensor):
        self._future, self._tensor = future, tensor

    def wait(self) -> None:
        """Make the current stream (without a GPU: the caller) wait for the transfer. Raises its StoreError."""
        event, tensor = self._future.result(), self._tensor
        if event is not None and tensor is not None:
            torch.cuda.current_stream(tensor.device).wait_event(event)
        self._tensor = None

    def is_done(self) -> bool:
        if not self._future.done():
            return False
        event = self._future.exception() is None and self._future.result()
        return not event or event.query()


class Space:
    """Records that are read to `device` and written from it. One thread does all transfers, in order.

    So a read returns what was written before it, and a buffer can be read into while a write from it is pending. After
    a transfer fails, every later call raises its StoreError, because records may then be out of date.
    """

    def __init__(self, storage: Storage, device: torch.device):
        self.device, self.storage = device, storage
        self.window_bytes = _IN_FLIGHT_BYTES[device.type]
        """Bytes that pending writes may hold before a further write waits for the oldest."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._writes: deque[tuple[int, Transfer]] = deque()
        self._error: StoreError | None = None
        weakref.finalize(self, self._thread.shutdown, wait=False)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Record:
        """Return a record of zeros. Raises StoreError if there is no room."""
        shape = torch.Size(shape)
        return Record(self, self.storage.allocate(shape.numel() * dtype.itemsize), shape, dtype)

    def read(self, record: Record, target: Tensor) -> Transfer:
        """Start filling `target`, a contiguous tensor on the space's device or on the host."""
        return self._start(self._read, record, target)

    def write(self, record: Record, source: Tensor) -> Transfer:
        """Start writing `source` (contiguous). Do not modify it before the transfer ends."""
        while self._writes and (self._writes[0][1].is_done() or not self._has_room(source.nbytes)):
            self._writes.popleft()[1].wait()
        transfer = self._start(self._write, record, source)
        self._writes.append((source.nbytes, transfer))
        return transfer

    def read_to_host(self, record: Record) -> Tensor:
        copy = torch.empty(record.shape, dtype=record.dtype)
        self.read(record, copy).wait()
        return copy

    def take(self, record: Record) -> Tensor:
        """Return a copy in host memory and free the record."""
        copy = self.read_to_host(record)
        self.storage.free(record.address, record.num_bytes)
        return copy

    def gather(self, record: Record, rows: Tensor) -> Tensor:
        """Return some rows of a matrix, (len(rows), columns), on the space's device."""
        unique, inverse = rows.cpu().unique(return_inverse=True)
        found = torch.empty((len(unique), *record.shape[1:]), dtype=record.dtype)
        transfers = [
            self.read(record.rows(slice(row, row + 1)), target)
            for row, target in zip(unique.tolist(), found, strict=True)
        ]
        for transfer in transfers:
            transfer.wait()
        return found.to(self.device)[inverse.to(self.device)]

    def drain(self) -> None:
        """Wait until all writes are done."""
        while self._writes:
            self._writes.popleft()[1].wait()
        if self._error:
            raise self._error
        if self._stream:
            self._stream.synchronize()

    def sync(self) -> None:
        """Wait until all writes are done and, of a file, on disk. If this fails, earlier reads may have been wrong."""
        self.drain()
        try:
            self.storage.sync()
        except StoreError as error:  # the system reports it only once
            self._error = error
            raise

    def _has_room(self, num_bytes: int) -> bool:
        return sum(size for size, _ in self._writes) + num_bytes <= self.window_bytes

    def _start(self, move: Callable, record: Record, tensor: Tensor) -> Transfer:
        if self._error:
            raise self._error
        data = tensor.detach().view(-1).view(torch.uint8)
        ready = torch.cuda.current_stream(self.device).record_event() if data.is_cuda else None
        return Transfer(self._thread.submit(self._move, move, record.address, data, ready), data)

    def _move(self, move: Callable, address: int, data: Tensor, ready: "torch.cuda.Event | None"):
        try:
            if self._stream is None:
                return move(address, data)
            if ready is None:  # a tensor on the host: copies of earlier transfers must have ended
                self._stream.synchronize()
                return move(address, data)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                for start in range(0, len(data), _PART_BYTES):
                    move(address + start, data[start : start + _PART_BYTES])
                return self._stream.record_event()
        except StoreError as error:
            self._error = self._error or error
            raise

    def _read(self, address: int, target: Tensor) -> None:
        if target.is_cuda:
            # a blocking copy from the buffer of a file, which the next part needs
            host = self.storage.host_copy(address, len(target))
            target.copy_(host, non_blocking=self.storage.is_memory)
        else:
            self.storage.read(address, target)

    def _write(self, address: int, source: Tensor) -> None:
        if source.is_cuda and self.storage.is_memory:
            self.storage.host_copy(address, len(source)).copy_(source, non_blocking=True)
        else:
            self.storage.write(address, source.cpu())


class HostMemory:
    """Host memory, pinned for a GPU."""

    is_memory = True

    def __init__(self, *, pin_memory: bool):
        self._pin_memory = pin_memory
        self._slabs: list[Tensor] = []
        self._starts: list[int] = []  # addresses at which slabs begin
        self._used: list[int] = []

    def allocate(self, num_bytes: int) -> int:
        rounded = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        for index, slab in enumerate(self._slabs):
            if self._used[index] + rounded <= len(slab):
                break
        else:
            index, start = len(self._slabs), self._starts[-1] + len(self._slabs[-1]) if self._slabs else 0
            size = max(_SLAB_BYTES, 1 << (rounded - 1).bit_length()) if self._pin_memory else rounded
            try:
                self._slabs.append(torch.zeros(size, dtype=torch.uint8, pin_memory=self._pin_memory))
            except RuntimeError as error:  # torch's, if there is too little memory
                found = f"offloaded weights and state need {size:,} more bytes of host memory "
                raise StoreError(f"{found}: set offload_weights to a folder") from error
            self._starts.append(start)
            self._used.append(0)
        address = self._starts[index] + self._used[index]
        self._used[index] += rounded
        return address

    def free(self, address: int, num_bytes: int) -> None:
        """Do nothing."""

    def host_copy(self, address: int, num_bytes: int) -> Tensor:
        index = bisect(self._starts, address) - 1
        return self._slabs[index][address - self._starts[index] :][:num_bytes]

    def read(self, address: int, target: Tensor) -> None:
        target.copy_(self.host_copy(address, len(target)))

    def write(self, address: int, source: Tensor) -> None:
        self.host_copy(address, len(source)).copy_(source)

    def sync(self) -> None:
        pass


class ScratchFile:
    """A file without a name in `folder`, which the system deletes when the process ends, even if it is killed."""

    is_memory = False

    def __init__(self, folder: Path, *, pin_memory: bool):
        self._folder, self._pin_memory = folder, pin_memory
        try:
            sys.audit("lowmem.store", "make", str(folder))
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            found = f"no file for offloaded tensors can be made in {folder} ({error.strerror or error})"
            raise UsageError(f"{found}: set offload_weights to another folder, or to host") from error
        weakref.finalize(self, self._file.close)
        self._others: weakref.WeakSet[ScratchFile] = weakref.WeakSet()
        self._size = 0
        self._buffer: Tensor | None = None

    def in_same_folder(self) -> "ScratchFile":
        """Make another file, which `sync` of this one syncs too."""
        other = ScratchFile(self._folder, pin_memory=self._pin_memory)
        self._others.add(other)
        return other

    def allocate(self, num_bytes: int) -> int:
        address, size = self._size, -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if size:
            with self._errors(
                "grow", f"grow from {address:,} bytes by {size:,} ({free_bytes(self._folder):,} are free)"
            ):
                os.posix_fallocate(self._file.fileno(), address, size)
        self._size += size
        return address

    def free(self, address: int, num_bytes: int) -> None:
        with suppress(AttributeError):  # another C library
            mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE  # not all file systems can, which does no harm
            ctypes.CDLL(None).fallocate64(self._file.fileno(), mode, c_int64(address), c_int64(num_bytes))

    def host_copy(self, address: int, num_bytes: int) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(_PART_BYTES, dtype=torch.uint8, pin_memory=self._pin_memory)
        self.read(address, self._buffer[:num_bytes])
        return self._buffer[:num_bytes]

    def read(self, address: int, target: Tensor) -> None:
        left = target.numpy().data
        with self._errors("read", "be read"):
            while left:
                count = os.preadv(self._file.fileno(), [left], address)
                if not count:
                    raise OSError("it ends too early")
                left, address = left[count:], address + count

    def write(self, address: int, source: Tensor) -> None:
        left = source.numpy().data
        with self._errors("write", "be written"):
            while left:
                count = os.pwritev(self._file.fileno(), [left], address)
                left, address = left[count:], address + count

    def sync(self) -> None:
        # A write returns when its bytes are in memory. If the disk then fails, the system may drop them, so that a read
        # returns what was there before; only a sync reports this.
        for storage in (self, *self._others):
            with self._errors("sync", "be written"):
                os.fdatasync(storage._file.fileno())

    @contextmanager
    def _errors(self, operation: str, what: str) -> Iterator[None]:
        try:
            sys.audit("lowmem.store", operation, str(self._folder))
            yield
        except OSError as error:
            found = f"the file for offloaded tensors in {self._folder} cannot {what}: {error.strerror or error}"
            advice = "set offload_weights to a folder on a disk that works and has room"
            raise StoreError(f"{found}. Checkpoints are intact; {advice}") from error
