"""Count the live and peak bytes of tensors, real or fake, on any device.

Tested with torch 2.11 and 2.13. The meter uses torch's internals: it replaces `UntypedStorage.resize_`, and reads
`_cdata`, the address of a storage.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.distributed.dtensor import local_of
from lowmem.plan.parts import Kind

# By operator: which multiple of its input each of n ranks sends.
_SHARES: dict[str, Callable[[int], float]] = {
    **dict.fromkeys(("send", "broadcast_", "broadcast"), lambda n: 1),
    **dict.fromkeys(("allreduce_", "all_reduce", "all_reduce_"), lambda n: 2 * (n - 1) / n),
    **dict.fromkeys(("_allgather_base_", "all_gather_into_tensor"), lambda n: n - 1),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_tensor"), lambda n: (n - 1) / n),
}

CUDA_BLOCK_BYTES = 512  # torch's allocator for CUDA rounds sizes up to a multiple of this


class MemoryMeter(TorchDispatchMode):
    """Count each storage that torch operations create in this context, backward included, until it is freed.

    A storage counts once, even if many tensors view it, for as long as anything (such as autograd) holds it. Its size
    is rounded up to a multiple of `block_bytes`; CUDA_BLOCK_BYTES gives the bytes that a GPU allocates. Storages
    created earlier count only if passed to `count`, memory-mapped files never. Set `kind` to label new storages.
    Not counted: memory that a kernel allocates and frees internally, fragmentation, workspaces of libraries, the
    device's context, and storages created by threads other than this one and autograd's.
    """

    def __init__(self, *, block_bytes: int = 1):
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        """The largest `live_bytes` since creation or `reset_peak`."""
        self.kind = ""
        self.peak_by_kind: dict[str, int] = {}
        """The live bytes of each kind at the peak; their sum is `peak_bytes`."""
        self.sent_bytes = 0
        """Bytes that this rank has sent to others."""
        self._block_bytes = block_bytes
        self._live_by_kind: dict[str, int] = {}
        self._storages: dict[int, tuple[ref, int, str]] = {}  # by address, which is unique while the storage is live

    def count(self, tensors: Iterable[Tensor], kind: str | None = None) -> None:
        """Count the storages of `tensors` as `kind` (None: storages that are already counted keep their kind)."""
        for tensor in tensors:
            self._update(local_of(tensor).untyped_storage(), kind)

    def rename(self, kind: str, new_kind: str) -> None:
        """Relabel all live bytes of `kind` as `new_kind`."""
        for address, (reference, num_bytes, its_kind) in self._storages.items():
            if its_kind == kind:
                self._storages[address] = reference, num_bytes, new_kind
        moved = self._live_by_kind.pop(kind, 0)
        self._live_by_kind[new_kind] = self._live_by_kind.get(new_kind, 0) + moved

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are live now."""
        self.peak_bytes, self.peak_by_kind = self.live_bytes, dict(self._live_by_kind)

    def __enter__(self):
        # fully_shard frees all-gathered weights by resizing their storage, which no dispatch mode sees
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
            resize(storage, num_bytes)
            if storage._cdata in self._storages:
                self._update(storage, Kind.COMMUNICATION)
            return storage

        torch.UntypedStorage.resize_ = resize_and_count
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # torch.tensor makes its storage without an operation, so the storage first appears here as input of lift_fresh
        is_literal = func is torch.ops.aten.lift_fresh.default
        given = [] if is_literal else [*_storages_of(args), *_storages_of(kwargs.values())]
        not_ours = {storage._cdata for storage in given} - self._storages.keys()
        result = func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sent_bytes += sent_bytes(func.overloadpacket.__name__, args)
        made_for = Kind.COMMUNICATION if func.namespace in ("c10d", "fsdp") else None
        for storage in [*given, *_storages_of([result])]:
            if storage._cdata not in not_ours:
                self._update(storage, None if storage._cdata in self._storages else made_for)
        if func.namespace == "fsdp":  # `out` is the tensor that fully_shard gathers into; it is created empty
            for storage in _storages_of([kwargs.get("out")]):
                if storage._cdata not in not_ours:
                    self._update(storage, Kind.COMMUNICATION)
        return result

    def _update(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        address = storage._cdata
        if address in self._storages:
            reference, known_bytes, known_kind = self._storages[address]
        elif storage.filename is None:
            reference, known_bytes, known_kind = ref(storage, partial(self._forget, address)), 0, kind or self.kind
        else:
            return
        num_bytes = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        kind = kind or known_kind
        self._storages[address] = reference, num_bytes, kind
        self._add(known_kind, -known_bytes)
        self._add(kind, num_bytes)
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _add(self, kind: str, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self._live_by_kind[kind] = self._live_by_kind.get(kind, 0) + num_bytes

    def _forget(self, address: int, _reference: ref) -> None:
        _, num_bytes, kind = self._storages.pop(address)
        self._add(kind, -num_bytes)


def sent_bytes(name: str, args: Sequence[object]) -> int:
    """Return the bytes that each rank of a group sends in the collective `name`, an operator of torch, or a message.

    Collectives run in a ring, as NCCL's do with many bytes: in an all-gather or a reduce-scatter, each rank sends all
    parts but one; an all-reduce is both.
    """
    if name not in _SHARES:
        return 0
    group = next(group for group in map(_group_of, reversed(args)) if group is not None)
    sent = args[1] if name.endswith("_base_") else args[0]  # the result is the first argument of these
    return int(_SHARES[name](group.size()) * sum(x.nbytes for x in (sent if isinstance(sent, list) else [sent])))


def _group_of(argument: object) -> dist.ProcessGroup | None:
    """Return the process group that an argument of an operator is, if it is one."""
    if isinstance(argument, str):
        with suppress(ValueError, RuntimeError):  # such as "sum"
            return _resolve_process_group(argument)
    with suppress(RuntimeError):  # such as a tensor, or a ReduceOp
        return dist.ProcessGroup.unbox(argument) if isinstance(argument, torch.ScriptObject) else None


def _storages_of(values: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in `values` and in nested lists. (torch's pytree utilities are too slow.)"""
    for value in values:
        if isinstance(value, Tensor):
            yield local_of(value).untyped_storage()  # a DTensor's own storage has the size of the whole tensor
        elif isinstance(value, list | tuple):
            yield from _storages_of(value)
