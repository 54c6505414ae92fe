"""Save memory or time. Each saver is a function (model, optimizer) -> context manager; most can be combined."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lowmem.distributed.fully_sharded import unsharded_parameters
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import device_of, training_layers, unwrapped
from lowmem.distributed.trace import replaced_forwards
from lowmem.errors import UsageError
from lowmem.kernels.compilers import has_triton
from lowmem.memory.layered import layered
from lowmem.memory.offload import Host, Offload, host_of
from lowmem.memory.release import release

_ATEN = torch.ops.aten
# recompute_cheap keeps the results of these operations: matrix products and attention
_COSTLY = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default),
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
_RECOMPILE_LIMIT = 64  # compiled variants of all layers together; after this many, torch runs layers uncompiled

Saver = Callable[[nn.Module, Optimizer], AbstractContextManager[None]]


@contextmanager
def entered(savers: Iterable[Saver], model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    with ExitStack() as stack:
        for saver in savers:
            stack.enter_context(saver(model, optimizer))
        yield


def recompute(model: nn.Module, optimizer: Optimizer | None = None) -> AbstractContextManager[None]:
    """Keep only each layer's input in forward and run the layer again in backward, with the same dropout masks."""
    return _checkpointing(model, optimizer, {"use_reentrant": False})


def recompute_cheap(model: nn.Module, optimizer: Optimizer | None = None) -> AbstractContextManager[None]:
    """Keep each layer's input, matrix products and attention without dropout; compute the rest again in backward."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_costly)
    return _checkpointing(model, optimizer, {"use_reentrant": False, "context_fn": contexts})


@contextmanager
def offload_activations(
    model: nn.Module, optimizer: Optimizer | None = None, *, host: Host | None = None
) -> Iterator[None]:
    """Offload the activations that backward needs: from CUDA to pinned host memory, on CPU to mapped files.

    With `recompute` or `recompute_cheap`, copies only the input of each layer. Set `host` to copy them elsewhere.
    """
    if hasattr(optimizer, "layered"):
        raise UsageError(
            "within layered, offload_activations would copy what backward computes again: enter layered_offloaded alone"
        )
    offload = Offload(unsharded_parameters(model), host or host_of(model))
    with saved_tensors_hooks(offload.pack, offload.unpack):
        yield


def layered_offloaded(
    model: nn.Module, optimizer: Optimizer, *, host: Host | None = None
) -> AbstractContextManager[None]:
    """Enter `layered`, with the inputs of all layers offloaded as in `offload_activations`."""
    return layered(model, optimizer, offload=Offload((), host or host_of(model)))


@contextmanager
def compiled(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Train each layer with torch.compile, which changes rounding. Raises UsageError without layers or a compiler."""
    layers = training_layers(model, "compile")
    on_cuda = device_of(model).type == "cuda"
    if not (has_triton() if on_cuda else shutil.which("g++") or shutil.which("clang++")):
        needed = "triton and a C compiler" if on_cuda else "g++ or clang++"
        raise UsageError(f"compile needs {needed}: install it or remove compile")
    for layer in layers:
        layer.forward = _when_training(torch.compile(layer.forward, dynamic=True), layer.forward, layer)
    # The limit covers all variants: layers of encoder and decoder, first and later layers, with and without a mask.
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _when_training(compiled_forward: Callable, forward: Callable, layer: nn.Module) -> Callable:
    # evaluation and generation run uncompiled, because torch would compile again for each length
    return lambda *args, **kwargs: (compiled_forward if layer.training else forward)(*args, **kwargs)


@contextmanager
def _checkpointing(model: nn.Module, optimizer: Optimizer | None, options: dict[str, object]) -> Iterator[None]:
    base = unwrapped(model)
    if hasattr(optimizer, "layered"):
        raise UsageError("layered computes each layer again in backward by itself: remove recompute")
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UsageError(f"{type(base).__name__} does not support activation checkpointing: set recompute=off")
    if stages := stages_of(base):  # a micro-batch pauses at a layer's forward, which must not be inside a checkpoint
        with replaced_forwards(stages.own_layers, lambda layer: partial(checkpoint, layer.forward, **options)):
            yield
        return
    # transformers 5.17 has only the older method names (gradient_...), which later versions deprecate
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    enable(options)
    # Only reentrant checkpointing needs gradients of the embeddings' output. Disable them, or backward would run
    # through a frozen encoder, and the hooks for them would remain after this block.
    base.disable_input_require_grads()
    try:
        yield
    finally:
        disable()


def _keep_costly(context: object, operation: torch._ops.OpOverload, *arguments, **options) -> CheckpointPolicy:
    # Recompute attention that has dropout: if it did not draw its mask again in backward, later masks would change.
    if operation not in _COSTLY:
        return CheckpointPolicy.PREFER_RECOMPUTE
    names = (argument.name for argument in operation._schema.arguments)
    dropout = dict(zip(names, arguments, strict=False)).get("dropout_p", options.get("dropout_p", 0.0))
    return CheckpointPolicy.PREFER_RECOMPUTE if dropout > 0 else CheckpointPolicy.MUST_SAVE


SAVERS: dict[str, Saver] = {"recompute": recompute, "recompute_cheap": recompute_cheap}
SAVERS |= {"offload_activations": offload_activations, "release": release, "compiled": compiled}
SAVERS |= {"layered": layered, "layered_offloaded": layered_offloaded}
