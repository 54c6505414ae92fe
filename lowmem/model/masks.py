"""Let models choose their attention masks on the host: transformers reads masks and positions, which syncs the device.

Tested with transformers 5.17 and 5.24. This module replaces private functions of `transformers.masking_utils`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from lowmem.distributed.placement import original_class, unwrapped
from lowmem.model.replaced import replaced


def host_masks(model: nn.Module, inputs: Mapping[str, object]) -> AbstractContextManager[None]:
    """`chosen_on_host` for a model of transformers. A user's class may make its own masks from tokens: let it look."""
    base = unwrapped(model)
    if not original_class(base).__module__.startswith("transformers.models."):
        return nullcontext()
    return chosen_on_host(inputs, is_encoder_decoder=base.config.is_encoder_decoder)


@contextmanager
def chosen_on_host(inputs: Mapping[str, object], *, is_encoder_decoder: bool) -> Iterator[None]:
    """Within this block, a model that gets `inputs` chooses its attention masks by the names in them, not by values.

    Each mask in `inputs` must hide a token, and `position_ids` must separate documents. Then the model chooses as it
    would by values. For documents, all layers share one additive mask (rows, 1, length, length): of a boolean mask,
    SDPA makes an additive copy for each layer, which backward needs.
    """
    is_packed, is_masked = "position_ids" in inputs, "attention_mask" in inputs
    # where its decoder gets no mask, an encoder-decoder may make one that hides nothing
    is_causal_masked = "decoder_attention_mask" in inputs if is_encoder_decoder else is_masked

    def documents(_: Callable, position_ids: Tensor) -> Tensor | None:
        if not is_packed:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    def ignores_causal(original: Callable, padding_mask: Tensor | None, *sizes: int | None) -> bool:
        return not (is_causal_masked and padding_mask is not None) and original(None, *sizes)

    def ignores_bidirectional(original: Callable, padding_mask: Tensor | None, *sizes: int | None) -> bool:
        return not (is_masked and padding_mask is not None) and original(None, *sizes)

    def additive(
        boolean: Callable, *, device: torch.device, dtype: torch.dtype, config: PretrainedConfig, **options: object
    ) -> Tensor | None:
        # sparse attention (DeepSeek-V3.2) fills the mask with a number of `dtype`, in each layer at other positions
        if not hasattr(config, "index_topk"):
            dtype = dtype_of_scores(device, dtype)
        mask = boolean(device=device, dtype=dtype, config=config, **options)
        return mask if mask is None or mask.dtype != torch.bool else additive_mask(mask, dtype)

    functions = {
        "find_packed_sequence_indices": documents,
        "_ignore_causal_mask_sdpa": ignores_causal,
        "_ignore_bidirectional_mask_sdpa": ignores_bidirectional,
    }
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(replaced(masking_utils, name, function))
        # it reads the first and last tokens of all rows, and warns if there may be padding
        stack.enter_context(replaced(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None))
        if is_packed:
            stack.enter_context(replaced(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", additive))
        yield


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def dtype_of_scores(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of attention scores in a model of this `dtype`. Autocast would copy a mask of another in each layer."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
