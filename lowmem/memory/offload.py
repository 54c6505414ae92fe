"""Offload the activations that backward needs: from CUDA to host memory, on CPU to files."""

import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.placement import device_of
from lowmem.errors import StoreError
from lowmem.storage.records import Record, Space, Transfer

_LEAST_BYTES = 4096  # smaller activations are not worth a copy
_ALIGNMENT_BYTES = 512
IN_FLIGHT_BYTES, SLAB_BYTES = 2**26, 2**27  # `plan` counts both


class Host(Protocol):
    """Where activations go, and how. The events that it returns are only passed to `wait`."""

    window_bytes: int
    """Bytes on the device that may be in flight. 0 if copies are done when the methods return."""

    def to_host(self, tensor: Tensor) -> tuple[object, object]:
        """Copy `tensor`; return the copy, which takes no device memory, and an event."""

    def to_device(self, copy: object) -> tuple[Tensor, object]:
        """Return a tensor with the layout of the one that was copied, and an event after which it has its values."""

    def wait(self, event: object) -> None:
        """Let the device compute what follows only after `event`."""


class Offload:
    """The two hooks for `torch.autograd.graph.saved_tensors_hooks`, which copy activations to the host and back.

    Of the activations on their way to the host, and of those fetched before an operation takes them, at most
    `host.window_bytes` (or one larger activation) are on the device. In forward, the device waits for the oldest copy
    before it starts one that does not fit; the host never waits. Tensors in `kept`, which must not change before
    backward, are not copied. If autocast casts one of them, it is cast again in backward.
    """

    def __init__(self, kept: Iterable[Tensor], host: Host):
        self.host = host
        self.in_flight: weakref.WeakValueDictionary[int, OffloadedCopy] = weakref.WeakValueDictionary()
        self.bytes_in_flight = 0
        self._kept = {StorageWeakRef(tensor.untyped_storage()) for tensor in kept}
        self._by_source: weakref.WeakValueDictionary[tuple, OffloadedCopy] = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, OffloadedCopy] = weakref.WeakValueDictionary()
        self._count = self._ahead = 0  # the next number; all copies from _ahead on were fetched or taken

    def pack(self, tensor: Tensor) -> "Tensor | _Cast | OffloadedCopy":
        reference = StorageWeakRef(tensor.untyped_storage())
        if tensor.nbytes < _LEAST_BYTES or not _is_dense(tensor) or reference in self._kept:
            return tensor
        if (source := _source_of_cast(tensor)) is not None and StorageWeakRef(source.untyped_storage()) in self._kept:
            return _Cast(source, tensor.dtype)
        # Operations that save the same tensor (queries, keys and values save their input) share one copy. The weak
        # reference keeps the storage's address from being reused, but lets its memory be freed.
        key = (reference.cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        copy = self._by_source.get(key)
        if copy is None:
            while self.in_flight and not self._has_room(tensor.nbytes):
                next(iter(self.in_flight.values())).land()
            if not self._by_number:  # start again from 0, so that `unpack` never searches numbers of freed copies
                self._count = 0
            copy = OffloadedCopy(tensor, reference, self._count, self)
            self._by_source[key] = self._by_number[self._count] = copy
            self._count = self._ahead = self._count + 1
        return copy

    def unpack(self, packed: "Tensor | _Cast | OffloadedCopy") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        if isinstance(packed, OffloadedCopy) and self.host.window_bytes:
            self._ahead = min(self._ahead, packed.number)
            while self._ahead > 0:
                earlier = self._by_number.get(self._ahead - 1)
                if earlier is not None and not earlier.is_on_device():
                    if not self._has_room(earlier.nbytes):
                        break
                    earlier.fetch()
                self._ahead -= 1
        return tensor

    def _has_room(self, num_bytes: int) -> bool:
        return not self.bytes_in_flight or self.bytes_in_flight + num_bytes <= self.host.window_bytes


class OffloadedCopy:
    """An activation on the host. While a copy to or from the host may run, this object also holds the device's tensor.

    The device's tensor belongs to the stream that computes, which waits for the copy before this object lets go of the
    tensor. So the allocator may reuse the memory at once, and needs no `record_stream`.
    """

    _landing: Tensor | None = None
    _taken: weakref.ref[Tensor] | None = None

    def __init__(self, tensor: Tensor, source: StorageWeakRef, number: int, offload: Offload):
        self.number, self.nbytes = number, tensor.nbytes
        self._source, self._offload = source, offload
        self._host, event = offload.host.to_host(tensor)
        if offload.host.window_bytes:
            self._hold(tensor.detach(), event)  # detached, or a result would keep alive the graph that holds this copy

    def fetch(self) -> None:
        """Start to copy the activation to the device."""
        self._hold(*self._offload.host.to_device(self._host))

    def is_on_device(self) -> bool:
        return self._landing is not None or (self._taken is not None and self._taken() is not None)

    def take(self) -> Tensor:
        """Return the tensor, which stays on the device as long as an operation holds it."""
        tensor = self._taken and self._taken()
        if tensor is None:
            if self._landing is None:
                self.fetch()
            tensor = self.land()
            self._taken = weakref.ref(tensor)
        return tensor

    def land(self) -> Tensor | None:
        """Let the device wait for the copy. From then on, only the caller holds the tensor."""
        tensor, self._landing = self._landing, None
        if tensor is not None:
            self._offload.in_flight.pop(self.number, None)
            self._offload.bytes_in_flight -= self.nbytes
            self._offload.host.wait(self._event)  # may raise the error of a disk
        return tensor

    def __del__(self):  # a tensor that was fetched and not taken, or whose graph was dropped in forward
        with suppress(StoreError):  # Python would only print it; later transfers raise it again
            self.land()

    def _hold(self, tensor: Tensor, event: object) -> None:
        self._landing, self._event = tensor, event
        self._offload.in_flight[self.number] = self
        self._offload.bytes_in_flight += self.nbytes


class _Cast(NamedTuple):
    """A weight, perhaps transposed, and the dtype to which autocast has cast it for one operation."""

    source: Tensor
    dtype: torch.dtype

    def take(self) -> Tensor:
        return self.source.to(self.dtype)


class PinnedMemory:
    """Keeps the activations of a model on a GPU in pinned host memory. A stream of its own copies them."""

    def __init__(self, device: torch.device, window_bytes: int = IN_FLIGHT_BYTES):
        # 64 MiB take 1 to 3 ms over PCIe, so a layer that saves much in a short time does not wait, and are under 2 %
        # of a small GPU's memory
        self.window_bytes = window_bytes
        self._device, self._stream, self._slabs = device, torch.cuda.Stream(device), Slabs(pin_memory=True)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        copy = self._slabs.empty_like(tensor)
        return copy, self._copy(tensor, copy)

    def to_device(self, copy: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        tensor = torch.empty_like(copy, device=self._device)  # in memory of the stream that computes
        return tensor, self._copy(copy, tensor)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # for the values, and for memory in use
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


class ScratchSpace:
    """Keeps activations and gradients in a file, next to that of offloaded weights, by explicit reads and writes."""

    def __init__(self, space: Space):
        self.window_bytes = space.window_bytes
        self._space, self._size, self._stack = space, 0, _Stack()

    def to_host(self, tensor: Tensor) -> tuple["_InSpace", Transfer]:
        start = self._stack.top()
        end = start + -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if end > self._size:
            self._space.allocate([end - self._size], torch.uint8)  # the file grows at its end
            self._size = end
        copy = _InSpace(Record(self._space, start, torch.Size([tensor.numel()]), tensor.dtype), tensor)
        self._stack.push(end, copy)
        return copy, self._space.write(copy.record, _flat(tensor))

    def to_device(self, copy: "_InSpace") -> tuple[Tensor, Transfer]:
        tensor = torch.empty_strided(*copy.layout, dtype=copy.record.dtype, device=self._space.device)
        return tensor, self._space.read(copy.record, _flat(tensor))

    def wait(self, event: Transfer) -> None:
        event.wait()


class _InSpace:
    """An activation in a space, which is free when this object no longer exists."""

    def __init__(self, record: Record, tensor: Tensor):
        self.record, self.layout = record, (tensor.shape, tensor.stride())


class _Stack:
    """The ends of what is in use of some bytes, each as long as an object exists."""

    def __init__(self):
        self._used: list[tuple[int, weakref.ref]] = []

    def top(self) -> int:
        """Return where free bytes begin."""
        while self._used and self._used[-1][1]() is None:
            self._used.pop()
        return self._used[-1][0] if self._used else 0

    def push(self, end: int, owner: object) -> None:
        """Take the bytes up to `end` as long as `owner` exists."""
        self._used.append((end, weakref.ref(owner)))


class Slabs:
    """Host memory for activations, cut from slabs of `slab_bytes` and used again, for a single stream that copies.

    torch would round each pinned tensor up to a power of two. Backward frees activations roughly in reverse order, so
    each slab is a stack: memory is free above its last tensor in use. Slabs remain until this object is freed. A tensor
    that no longer exists may still have copies in the stream; they run before those of the next tensor in its memory.
    """

    def __init__(self, *, pin_memory: bool, slab_bytes: int = SLAB_BYTES):
        self._pin_memory, self._slab_bytes = pin_memory, slab_bytes
        self._slabs: list[tuple[Tensor, _Stack]] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor with the layout of `tensor`, which must be dense."""
        for memory, used in self._slabs:
            start = used.top()
            if start + tensor.nbytes <= len(memory):
                break
        else:
            size = max(self._slab_bytes, 1 << (tensor.nbytes - 1).bit_length())  # powers of two, as torch takes
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin_memory)
            start, used = 0, _Stack()
            self._slabs.append((memory, used))
        end = start + tensor.nbytes
        result = memory[start:end].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        used.push(-(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES, result)
        return result

    @property
    def num_bytes(self) -> int:
        return sum(len(memory) for memory, _ in self._slabs)


class Unmoved:
    """Keeps activations where they are: on a CPU, host memory is where they belong."""

    window_bytes = 0

    def to_host(self, tensor: Tensor) -> tuple[Tensor, None]:
        return tensor.detach(), None

    def to_device(self, copy: Tensor) -> tuple[Tensor, None]:
        return copy, None

    def wait(self, event: None) -> None:
        pass


class MappedFiles:
    """Keeps the activations of a model on a CPU in memory-mapped files, which the system can write to disk."""

    window_bytes = 0

    def to_host(self, tensor: Tensor) -> tuple[Tensor, None]:
        return mapped_file(tensor), None

    def to_device(self, copy: Tensor) -> tuple[Tensor, None]:
        return copy, None

    def wait(self, event: None) -> None:
        pass


def mapped_file(tensor: Tensor) -> Tensor:
    """Copy `tensor` into a memory-mapped temporary file. Raises OSError if the disk is full."""
    with tempfile.TemporaryFile() as file:  # it has no name, so a killed process leaves no file; the mapping keeps it
        try:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # or a full disk could later kill the process (SIGBUS)
        except OSError as error:
            needs = f"offload_activations needs {tensor.nbytes:,} more bytes in {tempfile.gettempdir()}"
            message = f"{needs}: {error.strerror}; set TMPDIR to a folder on a larger disk, or remove the flag"
            raise OSError(error.errno, message) from error
        storage = torch.UntypedStorage.from_file(f"/dev/fd/{file.fileno()}", shared=True, nbytes=tensor.nbytes)
    mapped = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
    return mapped.copy_(tensor)


def host_of(model: nn.Module) -> Host:
    """Return where activations of a model go: next to its weights if these are in a file, else as the device needs."""
    device, offloaded = device_of(model), offloaded_of(model)
    if offloaded is not None and (space := offloaded.new_scratch()) is not None:
        return ScratchSpace(space)
    if device.type == "cuda":
        return PinnedMemory(device)
    return MappedFiles() if offloaded is None else Unmoved()


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory."""
    return tensor.detach().as_strided([tensor.numel()], [1])


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill memory without gaps or overlaps, so that a copy can have the same layout."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.layout == torch.strided and last + 1 == tensor.numel() and 0 not in tensor.stride()


def _source_of_cast(tensor: Tensor) -> Tensor | None:
    """Return the leaf, perhaps transposed, that autocast has cast to `tensor` without a change of layout, or None."""
    node = tensor.grad_fn
    is_transposed = node is not None and node.name() == "TBackward0"
    if is_transposed:
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return None
    leaf = getattr(node.next_functions[0][0], "variable", None)  # only the node that sums a leaf's gradient has it
    if leaf is None or leaf.device != tensor.device:
        return None
    source = leaf.detach().t() if is_transposed else leaf.detach()
    return source if (source.shape, source.stride()) == (tensor.shape, tensor.stride()) else None
