"""What trades time for memory: each saver is a context manager over (model, optimizer), and they combine."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from lowmem.config import UsageError
from lowmem.parallel.sharding import unwrapped


@contextmanager
def nothing(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Trade nothing."""
    yield


@contextmanager
def recompute(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Keep only each layer's input in forward and run the layer again in backward, with the same dropout masks.

    Raises UsageError for a model whose layers transformers cannot recompute.
    """
    base = unwrapped(model)
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UsageError(f"recompute was asked for, but {type(base).__name__} does not support it: set recompute off")
    # transformers 5.17 has only the older name, which later ones deprecate
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    # It also hooks the embeddings so that their output requires a gradient, which only reentrant recompute needs: a
    # frozen encoder would be differentiated for nothing, and the hooks would stay.
    base.disable_input_require_grads()
    try:
        yield
    finally:
        disable()
