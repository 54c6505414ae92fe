"""Mask the packed rows of encoder-decoders, so that no document attends to another.

A causal model needs only positions: transformers makes the masks. It makes none for an encoder and cross-attention.
Tested with transformers 5.17 and 5.24. This module replaces a function of `transformers.integrations.sdpa_attention`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from lowmem.distributed.placement import unwrapped
from lowmem.model.masks import additive_mask, dtype_of_scores
from lowmem.model.replaced import replaced


@contextmanager
def documents_apart(model: nn.Module) -> Iterator[None]:
    """Within this block, an encoder-decoder's inputs include `position_ids` and `decoder_position_ids`.

    These are int64, shaped like `input_ids` and `decoder_input_ids`, and restart at 0 in each document. A token of the
    encoder attends to its own document. One of the decoder attends to its own document up to itself, and to the
    encoder's document of the same number. The masks are additive, (rows, 1, queries, keys), and all layers share them;
    with SDPA, which keeps what it adds to scores, they also share the sums of T5's position bias and the masks, unless
    they run again in backward. The encoder gets another mask than cross-attention, so it is called first, but inside
    the model's forward: a sharded model cannot run its encoder alone.
    """
    base, sums = unwrapped(model), {}

    def forward(original: Callable, *, input_ids: Tensor, position_ids: Tensor, **inputs: Tensor) -> object:
        encoder, keys = base.get_encoder(), _documents(position_ids)
        queries = _documents(inputs["decoder_position_ids"])
        dtype = dtype_of_scores(keys.device, base.get_input_embeddings().weight.dtype)
        own = {"attention_mask": additive_mask(_are_same(keys, keys), dtype)}
        inputs["attention_mask"] = additive_mask(_are_same(queries, keys), dtype)
        inputs["decoder_attention_mask"] = additive_mask(_are_same(queries, queries).tril(), dtype)
        if "position_ids" in inspect.signature(encoder.forward).parameters:  # such as T5Gemma
            own["position_ids"] = position_ids
        if "decoder_position_ids" not in inspect.signature(original).parameters:
            del inputs["decoder_position_ids"]
        return original(encoder_outputs=encoder(input_ids=input_ids, **own), **inputs)

    def biased(
        add: Callable, position_bias: Tensor, attention_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
    ) -> Tensor:
        if attention_mask is None or attention_mask.dim() != 4:
            return add(position_bias, attention_mask, is_causal, query, key)
        _, bias, total = sums.get(id(attention_mask), (None, None, None))  # the last bias: each layer may have its own
        if bias is not position_bias:
            total = (position_bias.detach() + attention_mask).to(key.dtype).contiguous()
            sums[id(attention_mask)] = attention_mask, position_bias, total
        return _Sum.apply(position_bias, total)

    with ExitStack() as stack:
        stack.enter_context(replaced(base, "forward", forward))
        # a layer that runs again in backward must run the same operations, and keeps no sum until then
        if not any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            stack.enter_context(replaced(sdpa_attention, "create_position_bias_mask", biased))
        yield


class _Sum(torch.autograd.Function):
    """Return `total`, the sum of a bias and a mask, without a copy. The backward is that of the addition."""

    @staticmethod
    def forward(ctx, bias: Tensor, total: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = bias.shape, bias.dtype
        return total.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).sum_to_size(ctx.shape), None


def _documents(position_ids: Tensor) -> Tensor:
    """Number the documents of each row, from 1."""
    return (position_ids == 0).cumsum(1)


def _are_same(queries: Tensor, keys: Tensor) -> Tensor:
    return queries[:, None, :, None] == keys[:, None, None]
