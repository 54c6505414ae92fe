"""NEFTune (Jain et al., 2023, arXiv 2310.05914): train with uniform noise on the embeddings of the input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowmem.data.batch import Batch
from lowmem.distributed.placement import unwrapped
from lowmem.model.metrics import LossFunction, Metrics
from lowmem.model.replaced import replaced


def noisy_loss(
    model: nn.Module, batch: Batch, *, loss_fn: LossFunction, alpha: float
) -> Tensor | tuple[Tensor, Metrics]:
    """Return `loss_fn(model, batch)` with noise on the embeddings of the input, or without in evaluation mode.

    In a document of L tokens, each element gets noise between +-alpha / sqrt(L * embedding size), drawn from torch's
    generator of the device. As in the paper, L does not count padding; transformers' hook counts it. In packed rows, L
    is that of each document. Of an encoder-decoder, only the encoder's input gets noise.
    """
    if not model.training:
        return loss_fn(model, batch)
    base, is_noisy = unwrapped(model), False
    reader = base.get_encoder() if base.config.is_encoder_decoder else base

    def embed(original: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        nonlocal is_noisy
        embedded = original(tokens)
        if is_noisy:  # a decoder that shares the module with its encoder
            return embedded
        is_noisy = True
        scale = alpha / (document_lengths(batch) * embedded.shape[-1]).sqrt()
        noise = torch.empty_like(embedded).uniform_(-1.0, 1.0)
        return embedded + noise.mul_(scale.to(noise.dtype).unsqueeze(-1))

    with replaced(reader.get_input_embeddings(), "forward", embed):
        return loss_fn(model, batch)


def document_lengths(batch: Batch) -> Tensor:
    """Return the number of tokens in the document of each token, fp32, (rows, length) or (rows, 1)."""
    tokens = batch.inputs["input_ids"]
    if (positions := batch.inputs.get("position_ids")) is not None:
        documents = (positions == 0).cumsum(1)
        sizes = torch.zeros((len(tokens), tokens.shape[1] + 1), device=tokens.device)
        return sizes.scatter_add_(1, documents, torch.ones_like(sizes[:, 1:])).gather(1, documents)
    if batch.input_lengths is not None:
        return batch.input_lengths.float().unsqueeze(1)
    if (mask := batch.inputs.get("attention_mask")) is not None:
        return mask.sum(1, keepdim=True).float()
    return torch.full((len(tokens), 1), float(tokens.shape[1]), device=tokens.device)
