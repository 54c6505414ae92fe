"""Offload the activations that backward needs: from CUDA to host memory, on CPU to mapped files."""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_LEAST_BYTES = 4096  # smaller activations are not worth a copy
_AHEAD = 2  # activations to prefetch in backward

ToHost = Callable[[Tensor], Tensor]
"""Copies an activation that is on the CPU into a file; under `plan`, only counts its bytes."""


class Offload:
    """The two hooks for `torch.autograd.graph.saved_tensors_hooks`, which copy activations to the host and back.

    A separate CUDA stream copies activations to pinned host memory, and back before backward needs them. On CPU,
    `to_host` copies them into mapped files, which the system can write to disk. Tensors in `kept` are not copied.
    """

    def __init__(self, kept: Iterable[Tensor], to_host: ToHost):
        self._to_host = to_host
        self._kept = {StorageWeakRef(tensor.untyped_storage()) for tensor in kept}
        self._by_source: weakref.WeakValueDictionary[tuple, _Copy] = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, _Copy] = weakref.WeakValueDictionary()
        self._count = 0
        self._stream: torch.cuda.Stream | None = None

    def pack(self, tensor: Tensor) -> "Tensor | _Copy":
        reference = StorageWeakRef(tensor.untyped_storage())
        if tensor.nbytes < _LEAST_BYTES or not _is_dense(tensor) or reference in self._kept:
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        # Operations that save the same tensor (queries, keys and values save their input) share one copy. The weak
        # reference keeps the storage's address from being reused, but lets its memory be freed.
        key = (reference.cdata, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        copy = self._by_source.get(key)
        if copy is None:
            copy = _Copy(tensor, reference, self._count, self._stream, self._to_host)
            self._by_source[key] = self._by_number[self._count] = copy
            self._count += 1
        return copy

    def unpack(self, packed: "Tensor | _Copy") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        if self._stream is not None:
            for number in range(packed.number - 1, packed.number - 1 - _AHEAD, -1):
                if earlier := self._by_number.get(number):
                    earlier.fetch()
        return tensor


class _Copy:
    def __init__(
        self, tensor: Tensor, source: StorageWeakRef, number: int, stream: torch.cuda.Stream | None, to_host: ToHost
    ):
        self.number = number
        self._source, self._device, self._stream = source, tensor.device, stream
        self._fetched: Tensor | None = None
        self._taken: weakref.ref[Tensor] | None = None
        if stream is None:
            self._host = to_host(tensor)
        else:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # keeps the allocator from reusing the memory before the copy is done

    def fetch(self) -> None:
        if self._fetched is None and (self._taken is None or self._taken() is None):
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._fetched = self._host.to(self._device, non_blocking=True)
            if self._stream is not None:
                self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        """Return the tensor, which stays on the device as long as an operation holds it."""
        tensor = self._taken and self._taken()
        if tensor is None:
            self.fetch()
            tensor, self._fetched = self._fetched, None
            if self._stream is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(self._arrived)  # waits for this copy, but not for later ones
                tensor.record_stream(current)
            self._taken = weakref.ref(tensor)
        return tensor


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


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill memory without gaps or overlaps, so that a copy can have the same layout."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.layout == torch.strided and last + 1 == tensor.numel() and 0 not in tensor.stride()
