"""Fake tensors, ranks, GPU and host memory. With them, a CPU can count the bytes of a training step of any size.

Tested with torch 2.11 and 2.13. This module uses private parts of torch and accelerate: `torch._subclasses`,
`torch.testing._internal`, the operator of memory-efficient attention, `AcceleratorState._reset_state`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem import cross_entropy
from lowmem.memory.savers import SAVERS, Saver
from lowmem.optim.tiers import TieredOptimizer
from lowmem.plan.parts import Cluster


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within this block, new tensors have shape, dtype and storage but no data, so a model of any size fits.

    `.item()` returns True or 1, so that checks for finite numbers pass. Enter a MemoryMeter only inside this block.
    """
    with _FakeOnes(allow_non_fake_inputs=True):  # real inputs come from process groups and meshes
        yield


class _FakeOnes(FakeTensorMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_ranks(cluster: Cluster, *, mixed_precision: str, shards: bool) -> Iterator[Accelerator]:
    """Yield the Accelerator of rank 0, on a CPU. Other ranks do not exist, and collectives do nothing.

    Call this in a separate process, because it changes the environment and accelerate's state. With `shards`, even a
    single process gets a process group.
    """
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": cluster.world_size}
    launch |= {"LOCAL_WORLD_SIZE": cluster.local_world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in launch]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # if it is not set, accelerate warns
    if cluster.world_size > 1:
        os.environ.update({name: str(value) for name, value in launch.items()})
    if cluster.world_size > 1 or shards:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=cluster.world_size)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        # accelerate's default is cpu:0, which fake tensors treat as a different device from cpu
        PartialState(cpu=True).device = torch.device("cpu")
        yield Accelerator(cpu=True, mixed_precision=mixed_precision)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()


class HostCopies:
    """A `Host` that only counts the live and peak bytes of the activations that `offload_activations` offloads."""

    window_bytes = 0

    def __init__(self):
        self.live_bytes = self.peak_bytes = 0

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    @property
    def savers(self) -> dict[str, Saver]:
        """Return SAVERS with an `offload_activations` whose copies this object counts."""
        return SAVERS | {"offload_activations": partial(SAVERS["offload_activations"], host=self)}

    def to_host(self, tensor: Tensor) -> tuple["_Copy", None]:
        copy = _Copy(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self._add(tensor.nbytes)
        finalize(copy, self._add, -tensor.nbytes)  # subtract the copy's bytes when it is freed
        return copy, None

    def to_device(self, copy: "_Copy") -> tuple[Tensor, None]:
        return torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype, device=copy.device), None

    def wait(self, event: None) -> None:
        pass

    def _add(self, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@dataclass
class _Copy:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@contextmanager
def few_slices() -> Iterator[None]:
    """Within this block, compute only the first two slices of each weight's update and of the logits.

    This saves up to two thirds of the counting time. The peak is the same, because what the first slice leaves in
    memory is live during the second, and later slices add nothing.
    """
    slices, vocabulary_slices = TieredOptimizer.slices, cross_entropy.vocabulary_slices
    TieredOptimizer.slices = lambda *given: islice(slices(*given), 2)
    cross_entropy.vocabulary_slices = lambda *given: vocabulary_slices(*given)[:2]
    try:
        yield
    finally:
        TieredOptimizer.slices, cross_entropy.vocabulary_slices = slices, vocabulary_slices


def attention_for(config: PretrainedConfig, *, on_gpu: bool, is_padded: bool) -> str:
    """Register an attention in transformers that uses as many bytes as the real one but reads no data. Return its name.

    transformers decides from the values of positions and masks if attention needs a mask. Fake tensors have no values,
    so by itself it would add needless masks. Here only encoder-decoders get a mask, for padding, if `is_padded`.
    For a learned bias (as in T5), a GPU has the memory-efficient kernel. A CPU lacks it and uses eager attention.
    """
    if not on_gpu and hasattr(config, "relative_attention_num_buckets"):
        return "eager"
    name = "lowmem_padded" if is_padded and config.is_encoder_decoder else "lowmem_without_mask"

    def attention(*args, **kwargs):
        with _MemoryEfficient() if on_gpu else nullcontext():
            return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(name, attention)
    if name == "lowmem_padded":
        AttentionMaskInterface.register(name, _never_skipped)
    return name


def _never_skipped(*args, **kwargs) -> Tensor:
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


class _MemoryEfficient(TorchFunctionMode):
    """Use the memory-efficient kernel for attention with a bias, as on a GPU. On a CPU, torch would not choose it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = dict(kwargs or {})
        if func is not scaled_dot_product_attention or options.get("attn_mask") is None:
            return func(*args, **options)
        tensors = (*args, options.pop("attn_mask"))
        if torch.is_autocast_enabled("cpu"):  # cast here, because autocast does not cast for this operator
            tensors = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
        query, key, value, bias = tensors
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, compute_log_sumexp=True, **options)[0]
