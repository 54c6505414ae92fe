"""Find how a model's forward uses its layers and weights, and replace the forwards of layers.

The forward is traced once, on two tokens, with weights that take no memory.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from lowmem.distributed.graph import Graph
from lowmem.distributed.placement import original_class, training_layers
from lowmem.errors import UsageError

_MESSAGES = {"hidden_states", "encoder_hidden_states"}
"""Arguments of layers that come from other layers, and so perhaps from another stage."""

_BIASES = {"position_bias", "encoder_decoder_position_bias"}
"""Arguments of T5's layers that each stage computes again."""


class Trace(NamedTuple):
    """How a model's forward uses its layers and weights."""

    layers: list[nn.Module]
    """In the order in which the forward calls them, once each: of an encoder-decoder, the encoder's first."""
    num_outputs: list[int | None]
    """Of each layer, the length of the tuple that it returns, of which the first is its output; None: the output."""
    num_encoder_layers: int
    """0 for a model that is no encoder-decoder."""
    uses: dict[nn.Parameter, set[int]]
    """For each weight outside layers that is used: after how many calls of layers."""


def trace(model: PreTrainedModel) -> Trace:
    """Trace the forward of a model. Raises UsageError for one that a pipeline does not support."""
    layers = training_layers(model, "pp_size")
    kind = original_class(model).__name__
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(model.config.get_text_config(), name, False):
            found = f"a stage computes what {name} returns for its own layers only"
            raise UsageError(f"{found}: set it to false in the model's config, or pp_size=1")
    encoder = set(model.get_encoder().modules()) if model.config.is_encoder_decoder else set()
    order: list[nn.Module] = []
    num_outputs: list[int | None] = []
    made: list[Tensor] = []  # other outputs of layers than hidden states
    returned: list[Tensor] = []  # hidden states
    computed: set[Node] = set()  # between layers
    with _placeholders(model) as original, _Uses(original, order) as uses:

        def computed_from(tensor: Tensor, index: int) -> Graph:
            """Raise UsageError if `tensor` needs more than weights and the output of the layer of this index."""
            graph = Graph.of([tensor])
            if not graph.nodes.isdisjoint(computed) or any(
                output in graph.leaves for at, output in enumerate(returned) if at != index
            ):
                what = f"{kind} uses the input of a layer after that layer, too"
                raise UsageError(f"pp_size sends only outputs of layers from stage to stage, but {what}: set pp_size=1")
            return graph

        def replacement(layer: nn.Module) -> Callable:
            def skip(*args, **kwargs):
                if layer in order:
                    raise UsageError(f"pp_size needs layers that a forward calls once, but {kind} calls some again")
                hidden = hidden_of(args, kwargs)
                computed.update(computed_from(hidden, len(order) - 1).nodes)
                arguments = signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
                if (of_encoder := arguments.get("encoder_hidden_states")) is not None:
                    graph = computed_from(of_encoder, sum(other in encoder for other in order) - 1)
                    for weight in graph.leaves & original.keys():  # such as of the encoder's last norm
                        uses[original[weight]].add(len(order))
                known = _MESSAGES | _BIASES if any(map(is_of_t5, layer.modules())) else _MESSAGES
                others = {name: tree_leaves(value) for name, value in arguments.items() if name not in known}
                if found := [name for name, leaves in others.items() if any(map(is_of_layer, leaves))]:
                    what = f"layers of {kind} take {', '.join(found)} from other parts of the model"
                    raise UsageError(f"pp_size sends only hidden states from stage to stage, but {what}: set pp_size=1")
                del layer.forward  # else it would call itself
                outputs = _on_meta(layer, args, kwargs, kind)
                layer.forward = skip
                order.append(layer)
                num_outputs.append(len(outputs) if isinstance(outputs, tuple) else None)
                hidden = hidden.detach().requires_grad_()
                returned.append(hidden)
                if not isinstance(outputs, tuple):
                    return hidden
                others = tree_map_only(Tensor, placeholder, outputs[1:])
                made.extend(x for x in tree_leaves(others) if isinstance(x, Tensor))
                return hidden, *others

            return skip

        def is_of_layer(value: object) -> bool:
            return isinstance(value, Tensor) and (value.requires_grad or any(value is other for other in made))

        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "use_cache": False}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with replaced_forwards(layers, replacement), torch.enable_grad():
            try:
                computed_from(model(**inputs)[0], len(order) - 1)
            except UsageError:
                raise
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise UsageError(f"pp_size needs a model of text, but {kind} fails on two tokens ({reason})") from error
    if len(order) < len(layers):
        raise UsageError(f"pp_size needs layers that a forward calls once, but {kind} leaves some out: set pp_size=1")
    within = {parameter for layer in layers for parameter in layer.parameters()}
    outside = {parameter: gaps for parameter, gaps in uses.items() if parameter not in within}
    return Trace(order, num_outputs, sum(layer in encoder for layer in order), outside)


def is_of_t5(module: nn.Module) -> bool:
    """Whether a module is T5's attention, of which the first of a stack computes the position bias of all layers."""
    return hasattr(module, "has_relative_attention_bias")


def hidden_of(args: Sequence[object], kwargs: dict[str, object]) -> Tensor:
    """Return the hidden states that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def replaced_forwards(layers: Iterable[nn.Module], replacement: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Within this block, `layer.forward` is `replacement(layer)`."""
    layers = list(layers)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = replacement(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            with suppress(AttributeError):
                del layer.forward
            if forward is not None:
                layer.forward = forward


def placeholder(tensor: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros of the same shape that take the memory of one element."""
    return torch.zeros((), dtype=dtype or tensor.dtype, device=device).expand(tensor.shape)


def _on_meta(layer: nn.Module, args: Sequence[object], kwargs: dict[str, object], kind: str) -> object:
    """Call a layer on the meta device; return what it returns. Raises UsageError if it returns no hidden states."""
    state = {name: x.detach() for name, x in (*layer.named_parameters(), *layer.named_buffers())}

    def call(dtype: torch.dtype | None) -> tuple[Tensor, object]:
        def on_meta(x: Tensor | MutableMapping) -> Tensor | MutableMapping:
            if isinstance(x, MutableMapping):  # such as KVSharingDict: fails if the layer needs what others put there
                return type(x)()
            return x.detach().to("meta", dtype if x.is_floating_point() else None)

        outline, inputs, named = tree_map_only((Tensor, MutableMapping), on_meta, (state, args, kwargs))
        return hidden_of(inputs, named), functional_call(layer, outline, inputs, named)

    try:
        try:
            hidden, outputs = call(None)
        except Exception:  # some products of experts are only in bf16 on meta
            hidden, outputs = call(torch.bfloat16)
    except Exception as error:
        name, reason = type(layer).__name__, str(error).partition("\n")[0]
        raise UsageError(f"pp_size cannot find out what {name} of {kind} returns ({reason}): set pp_size=1") from error
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(output, Tensor) or (output.shape, output.dtype) != (hidden.shape, hidden.dtype):
        found = f"{type(layer).__name__} of {kind} returns other shapes or dtypes than it takes"
        raise UsageError(f"pp_size sends hidden states of one shape from stage to stage, but {found}: set pp_size=1")
    return outputs


@contextmanager
def _placeholders(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Within this block, all parameters, and buffers on devices, are placeholders. Yields {placeholder: parameter}."""
    made: dict[Tensor, Tensor] = {}
    before: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    if x is None or (tensors is module._buffers and x.device.type == "cpu"):
                        continue
                    if x not in made:
                        made[x] = nn.Parameter(placeholder(x)) if isinstance(x, nn.Parameter) else placeholder(x)
                    before.append((tensors, name, x))
        for tensors, name, x in before:
            tensors[name] = made[x]
        yield {replaced: x for x, replaced in made.items() if isinstance(x, nn.Parameter)}
    finally:
        for tensors, name, x in before:
            tensors[name] = x


class _Uses(TorchFunctionMode):
    """Within this block, note after how many entries of `order` each placeholder is used."""

    def __init__(self, original: dict[nn.Parameter, nn.Parameter], order: Sequence[nn.Module]):
        super().__init__()
        self._original, self._order = original, order
        self._uses: dict[nn.Parameter, set[int]] = defaultdict(set)

    def __enter__(self) -> dict[nn.Parameter, set[int]]:
        super().__enter__()
        return self._uses

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_attribute = getattr(function, "__name__", "") == "__get__"
        if not is_attribute or isinstance(result, Tensor):  # weight.T, but not weight.dtype
            for x in tree_leaves((args, kwargs or {})):
                if isinstance(x, nn.Parameter) and x in self._original:
                    self._uses[self._original[x]].add(len(self._order))
        return result
