"""What stands in for a device where tensors have no data: its attention, its sizes of slices, the host's copies."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from weakref import finalize

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem import loss
from lowmem.memory import offload
from lowmem.optim import tiers


class HostCopies:
    """Bytes of the activations that have left the device, now and at most."""

    def __init__(self):
        self.live_bytes = self.peak_bytes = 0

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def take(self, tensor: Tensor) -> "_Copy":
        """What `offload_activations` keeps of `tensor`; it counts until it is freed."""
        copy = _Copy(tensor)
        self._add(tensor.nbytes)
        finalize(copy, self._add, -tensor.nbytes)
        return copy

    def _add(self, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class _Copy:
    def __init__(self, tensor: Tensor):
        self._layout, self._dtype = (tensor.shape, tensor.stride()), tensor.dtype

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        return torch.empty_strided(*self._layout, dtype=self._dtype, device=device)


@contextmanager
def stand_ins(*, on_gpu: bool) -> Iterator[HostCopies]:
    """Within it offloaded activations go to no file, and of slices that are done in turn the first two are done:
    the second meets what the first has left, as all that follow would.

    With `on_gpu` slices of an update and of the logits are as large as on a GPU (a CPU's should fit its cache).
    """
    host = HostCopies()
    slices, vocabulary_slices = tiers.TieredOptimizer._slices, loss._vocabulary_slices
    stand_in = {
        (offload, "_in_a_file"): host.take,
        (tiers.TieredOptimizer, "_slices"): lambda *given: islice(slices(*given), 2),
        (loss, "_vocabulary_slices"): lambda *given: islice(vocabulary_slices(*given), 2),
    }
    if on_gpu:
        elements = tiers._slice_elements
        stand_in |= {
            (loss, "_SLICE_ELEMENTS"): loss._SLICE_ELEMENTS | {"cpu": loss._SLICE_ELEMENTS["cuda"]},
            (tiers, "_slice_elements"): lambda parameters: elements([x.to("meta") for x in parameters]),
        }
    before = {(owner, name): getattr(owner, name) for owner, name in stand_in}
    try:
        for (owner, name), value in stand_in.items():
            setattr(owner, name, value)
        yield host
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def attention_for(config: PretrainedConfig, *, on_gpu: bool, is_padded: bool) -> str:
    """The name of an attention for transformers that takes the bytes of its own, without looking at data.

    transformers looks at positions and masks to see that none is needed, and where they hold no data it makes one that
    no training has. A causal model gets none here. An encoder-decoder's hides padding if `is_padded`. On a GPU a
    learned bias (T5's) takes the memory-efficient kernel; on a CPU, which has none, attention is written out.
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
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **{**kwargs, **skips})


class _MemoryEfficient(TorchFunctionMode):
    """Attention with a bias takes the kernel of that name, which a CPU would not choose."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = dict(kwargs or {})
        if func is not scaled_dot_product_attention or options.get("attn_mask") is None:
            return func(*args, **options)
        tensors = (*args, options.pop("attn_mask"))
        if torch.is_autocast_enabled("cpu"):  # it does not know this kernel by its own name
            tensors = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
        query, key, value, bias = tensors
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, compute_log_sumexp=True, **options)[0]
