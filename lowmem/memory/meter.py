"""Count the bytes that tensors hold, now and at most: on any device, and for tensors without data alike."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA_BLOCK_BYTES = 512  # what CUDA's caching allocator rounds up to


class MemoryMeter(TorchDispatchMode):
    """Within it every storage that a torch operation makes is counted until it is freed, backward included.

    A storage counts once, however many tensors view it, for as long as anything holds it (autograd too); views and
    in-place operations make none. What was there before is left out, unless `count` takes it in; so is a file mapped
    into memory, which the system may drop. A storage that was resized has its new size from the next operation on it.
    Sizes are rounded up to `block_bytes`: 1 counts what was asked for, CUDA_BLOCK_BYTES what a GPU hands out.

    It sees operations, not kernels: what a kernel takes and frees inside itself is not counted, nor are fragmentation,
    libraries' workspaces and a device's context. Operations of other threads are not seen, except autograd's.
    """

    def __init__(self, *, block_bytes: int = 1):
        super().__init__()
        self.live_bytes = 0
        """Bytes of the counted storages that are alive."""
        self.peak_bytes = 0
        """The largest `live_bytes` since the start or `reset_peak`."""
        self._block_bytes = block_bytes
        self._storages: dict[int, tuple[ref, int]] = {}  # by address, which no other has while it lives

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count also the storages of `tensors`, which were made before: a model's parameters, an optimizer's state."""
        for tensor in tensors:
            self._update(tensor.untyped_storage())

    def reset_peak(self) -> None:
        """From here on `peak_bytes` is the largest of what follows, beginning with what is alive."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # torch.tensor makes its storage out of sight and shows it as this operation's input
        given = () if func is torch.ops.aten.lift_fresh.default else _storages_of((args, kwargs))
        not_ours = {storage._cdata for storage in given if storage._cdata not in self._storages}
        result = func(*args, **kwargs)
        for storage in (*given, *_storages_of(result)):
            if storage._cdata not in not_ours:
                self._update(storage)
        return result

    def _update(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._storages:
            reference, known_bytes = self._storages[address]
        elif storage.filename is None:
            reference, known_bytes = ref(storage, partial(self._forget, address)), 0
        else:
            return
        num_bytes = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        self._storages[address] = reference, num_bytes
        self.live_bytes += num_bytes - known_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int, _reference: ref) -> None:
        self.live_bytes -= self._storages.pop(address)[1]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it tensors have shapes, dtypes and storages, but no data: a model of any size is built and trained.

    `.item()` answers True or 1, so that a check for finite numbers passes. Enter a MemoryMeter inside of it.
    """
    with FakeTensorMode(), _OptimisticItems():
        yield


class _OptimisticItems(TorchDispatchMode):
    """Fake tensors have no values to read: every one read is True or 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def _storages_of(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
