"""Fake tensors, ranks, GPU and host memory. With them, a CPU can count the bytes of a training step of any size.

Tested with torch 2.11 and 2.13. This module uses private parts of torch and accelerate: `torch._subclasses`,
`torch.testing._internal`, the operator of memory-efficient attention, `AcceleratorState._reset_state`,
`_clear_sharding_prop_cache`.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from weakref import finalize

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowmem import cross_entropy
from lowmem.memory.savers import SAVERS, Saver
from lowmem.optim import formats, norms
from lowmem.optim.tiers import TieredOptimizer
from lowmem.plan.parts import Cluster
from lowmem.storage.records import HostMemory, Record, Space


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within this block, new tensors have shape, dtype and storage but no data, so a model of any size fits.

    `.item()` returns True or 1, so that checks for finite numbers pass. Enter a MemoryMeter only inside this block.
    """
    with _real_meshes(), _FakeOnes(allow_non_fake_inputs=True):  # real inputs come from process groups and meshes
        yield


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Within this block, the ranks of a mesh are real tensors, even of a part of a mesh, which computes them."""
    ranks = DeviceMesh.mesh

    def real_ranks(mesh: DeviceMesh) -> Tensor:
        with unset_fake_temporarily():
            return ranks.fget(mesh)

    DeviceMesh.mesh = property(real_ranks)
    try:
        yield
    finally:
        DeviceMesh.mesh = ranks


class _FakeOnes(FakeTensorMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_ranks(cluster: Cluster, *, rank: int = 0, mixed_precision: str, shards: bool) -> Iterator[Accelerator]:
    """Yield the Accelerator of `rank`, on a CPU. Other ranks do not exist, and collectives and messages do nothing.

    Call this in a separate process, because it changes the environment and accelerate's state. With `shards`, even a
    single process gets a process group.
    """
    launch = {"RANK": rank, "LOCAL_RANK": rank % cluster.local_world_size, "WORLD_SIZE": cluster.world_size}
    launch |= {"LOCAL_WORLD_SIZE": cluster.local_world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in launch]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # if it is not set, accelerate warns
    if cluster.world_size > 1:
        os.environ.update({name: str(value) for name, value in launch.items()})
    if cluster.world_size > 1 or shards:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cluster.world_size)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        # accelerate's default is cpu:0, which fake tensors treat as a different device from cpu
        PartialState(cpu=True).device = torch.device("cpu")
        yield Accelerator(cpu=True, mixed_precision=mixed_precision)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        _clear_sharding_prop_cache()  # which has the meshes, and so the groups, of these ranks


class MovedBytes:
    """Counts the bytes that are read from where tensors are offloaded, and written to it, by phase of a step."""

    def __init__(self):
        self.phase = "forward"
        self.by_phase: Counter[str] = Counter()
        self.written = 0

    def read(self, num_bytes: int) -> None:
        self.by_phase[self.phase] += num_bytes

    def write(self, num_bytes: int) -> None:
        self.by_phase[self.phase] += num_bytes
        self.written += num_bytes


class HostCopies:
    """A `Host` that only counts the bytes of the activations that `offload_activations` offloads: moved, live, peak."""

    window_bytes = 0

    def __init__(self):
        self.live_bytes = self.peak_bytes = 0
        self.moved = MovedBytes()

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    @property
    def savers(self) -> dict[str, Saver]:
        """Return SAVERS with savers that offload to this object, which counts the copies."""
        offloading = ("offload_activations", "layered_offloaded")
        return SAVERS | {name: partial(SAVERS[name], host=self) for name in offloading}

    def to_host(self, tensor: Tensor) -> tuple["_Copy", None]:
        copy = _Copy(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self._add(tensor.nbytes)
        self.moved.write(tensor.nbytes)
        finalize(copy, self._add, -tensor.nbytes)  # subtract the copy's bytes when it is freed
        return copy, None

    def to_device(self, copy: "_Copy") -> tuple[Tensor, None]:
        tensor = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype, device=copy.device)
        self.moved.read(tensor.nbytes)
        return tensor, None

    def wait(self, event: None) -> None:
        pass

    def _add(self, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class CountedSpace(Space):
    """A space on fake tensors, which only counts bytes: of its records, and of what is read and written."""

    def __init__(self):
        super().__init__(HostMemory(pin_memory=False), torch.device("cpu"))
        self.num_bytes = 0
        self.moved = MovedBytes()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Record:
        record = Record(self, self.num_bytes, torch.Size(shape), dtype)
        self.num_bytes += record.num_bytes
        return record

    def read(self, record: Record, target: Tensor) -> "_Done":
        self.moved.read(target.nbytes)
        return _Done()

    def write(self, record: Record, source: Tensor) -> "_Done":
        self.moved.write(source.nbytes)
        return _Done()

    def gather(self, record: Record, rows: Tensor) -> Tensor:
        self.moved.read(min(len(rows) * record.shape[1] * record.dtype.itemsize, record.num_bytes))  # if tokens differ
        return torch.empty((len(rows), *record.shape[1:]), dtype=record.dtype)

    def drain(self) -> None:
        pass


class _Done:
    """A transfer that has ended."""

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


@contextmanager
def messages_that_arrive() -> Iterator[None]:
    """Within this block, what is sent to a rank that does not exist arrives at once, and is kept no longer."""
    isend = dist.isend

    def arrived(*args, **options) -> _Done:
        isend(*args, **options)
        return _Done()

    dist.isend = arrived
    try:
        yield
    finally:
        dist.isend = isend


@dataclass
class _Copy:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@contextmanager
def few_slices(*, of_logits: bool = True) -> Iterator[None]:
    """Within this block, compute only the first two slices of each weight's update and, if `of_logits`, of the logits.

    Convert weights to a tier, and take norms, in one slice. All this saves up to nine tenths of the counting time. The
    peak is the same: what the first slice of an update leaves in memory is live during the second, and later slices add
    nothing; weights are converted before the counting starts; norms keep a number for each row, in one slice or many.
    """
    slices, vocabulary_slices = TieredOptimizer.slices, cross_entropy.vocabulary_slices
    split_elements, converted_elements = formats._SPLIT_ELEMENTS, norms._CONVERTED_ELEMENTS
    TieredOptimizer.slices = lambda *given: islice(slices(*given), 2)
    formats._SPLIT_ELEMENTS = norms._CONVERTED_ELEMENTS = 2**62
    if of_logits:
        cross_entropy.vocabulary_slices = lambda *given, **most: vocabulary_slices(*given, **most)[:2]
    try:
        yield
    finally:
        TieredOptimizer.slices, cross_entropy.vocabulary_slices = slices, vocabulary_slices
        formats._SPLIT_ELEMENTS, norms._CONVERTED_ELEMENTS = split_elements, converted_elements


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within this block, attention and dropout keep for backward what they keep on a GPU; CPU kernels keep more.

    Attention with a mask, a bias or dropout uses the memory-efficient kernel, and dropout keeps one byte per element.
    """
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention

    def gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if (attn_mask is None and not dropout_p) or enable_gqa:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return attention(query, key, value, attn_mask, **options)
        if torch.is_autocast_enabled("cpu"):  # cast here, because autocast does not cast for this operator
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    def gpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or inplace or not 0 < p < 1:
            return dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    F.scaled_dot_product_attention, F.dropout = gpu_attention, gpu_dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = attention, dropout
