"""Load a frozen model in 4 bits (nf4) or 8 bits (int8) with bitsandbytes, and compute with it.

Forward and backward dequantize each weight when they need it, and keep only the quantized one. So training and
evaluation compute the same function, which `dequantized` returns for one weight. bitsandbytes' own layers do not: in
evaluation they repack 4-bit weights in place with rounded scales (on CPUs with AVX512-BF16), and round the activations
of 8-bit layers to 8 bits. Its 8-bit layers also keep their inputs where activation checkpointing cannot free them.
"""

import copy
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.offloaded import trim_heap
from lowmem.distributed.placement import is_large, is_quantized
from lowmem.errors import UsageError
from lowmem.model.build import attention_options, loading, model_from
from lowmem.model.pretrained import local_folder
from lowmem.storage.tensor_files import StoredTensor, open_shards

# on some CPUs it warns that it lacks a kernel for repacked weights, which are not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Options of `BitsAndBytesConfig`. nf4 has a scale for each 64 weights, itself in 8 bits; int8 has one for each row."""


def load_quantized(
    config: PretrainedConfig, dtype: torch.dtype, quantization: str, device: torch.device | None
) -> PreTrainedModel:
    """Load the model of `config.name_or_path` with frozen, quantized linear layers; other weights have `dtype`.

    One weight after another is read, brought to `device` (None: the accelerator, or the CPU) and quantized. Embeddings,
    the output head and what transformers leaves out (such as T5's `wo`) stay as they are; a line is printed if these
    include large weights of layers. Raises UsageError without bitsandbytes, or for a model without linear layers.
    """
    name, device = config.name_or_path, device or torch.accelerator.current_accelerator() or torch.device("cpu")
    layers = _import_bitsandbytes(quantization).nn
    quantizing = {"quantization_config": BitsAndBytesConfig(**QUANTIZATIONS[quantization]), "device_map": {"": device}}
    with loading(name):
        folder = local_folder(name)
        kind = type(model_from(config, dtype, on_meta=True))
        weights = {key: _Unread(stored) for key, stored in open_shards(folder, "model").items()}
        options = {"config": config, "dtype": dtype, "state_dict": weights} | attention_options(config)
        model = kind.from_pretrained(None, **options, **quantizing)
    trim_heap()
    model.config.name_or_path, model.name_or_path = name, str(folder)
    quantized = [x for x in model.modules() if isinstance(x, layers.Linear4bit | layers.Linear8bitLt)]
    if not quantized:
        found = f"{type(model).__name__} has no linear layers"
        raise UsageError(f"quantization={quantization} quantizes linear layers, but {found}: remove quantization")
    for module in quantized:
        module.__class__ = _quantized_class(type(module))
    _report_rest(model)
    return model.requires_grad_(False)


def dequantized(weight: Tensor, quantization: str) -> Tensor:
    """Return the fp32 matrix with which a quantized layer computes, on the device of `weight`.

    `weight` is the matrix (outputs, inputs) that was quantized, in the dtype with which its model was loaded. For the
    bits of the loaded layer, it must be on the same kind of device.
    """
    layers = _import_bitsandbytes(quantization).nn
    if quantization == "int8":  # from the host, as transformers does, because `to` then quantizes
        parameter = layers.Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    else:
        parameter = layers.Params4bit(weight, compress_statistics=True, quant_type=quantization).to(weight.device)
    return dequantize(parameter, torch.float32)


def replace_linear(model: PreTrainedModel, quantization: str) -> list[nn.Module]:
    """Replace the linear layers of a model on meta by those that `load_quantized` would have, and return these.

    Their weights are still whole.
    """
    layers = _import_bitsandbytes(quantization).nn
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**QUANTIZATIONS[quantization]), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    replaced = [x for x in model.modules() if isinstance(x, layers.Linear4bit | layers.Linear8bitLt)]
    for module in replaced:
        module.__class__ = _quantized_class(type(module))
    return replaced


def quantized_outline(weight: Tensor, quantization: str) -> nn.Parameter:
    """Return a parameter without values, of the bytes that the matrix `weight` takes in 4 or 8 bits."""
    if quantization == "int8":
        parameter = nn.Parameter(torch.empty(weight.shape, dtype=torch.int8), requires_grad=False)
        parameter.SCB = torch.empty(len(weight))
        return parameter
    from bitsandbytes.functional import QuantState

    size, block, outer = weight.numel(), 64, 256
    absmax = torch.empty(-(-size // block), dtype=torch.uint8)
    of_absmax = QuantState(torch.empty(-(-len(absmax) // outer)), code=torch.empty(256), blocksize=outer)
    of_absmax.dtype = torch.float32
    parameter = nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
    parameter.quant_state = QuantState(
        absmax,
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=block,
        quant_type=quantization,
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=of_absmax,
    )
    return parameter


def scales_of(parameter: Tensor) -> list[Tensor]:
    """Return the scales of a quantized parameter."""
    if parameter.dtype == torch.int8:
        return [parameter.SCB]
    return [parameter.quant_state.absmax, parameter.quant_state.state2.absmax]


def dequantize(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix (outputs, inputs) of a quantized parameter. Each element is computed in fp32, then rounded."""
    if parameter.dtype == torch.int8:
        return parameter.data.to(dtype).mul_((parameter.SCB / 127)[:, None])
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(parameter.quant_state)
    shape, size = state.shape, state.shape.numel()
    # a row for each scale: bitsandbytes' CPU kernel takes wrong scales if some are for the end of a row and the next
    width = size if size % state.blocksize else state.blocksize
    state.dtype, state.shape = dtype, torch.Size([size // width, width])
    return dequantize_4bit(parameter.data, state).view(shape)


class _Product(torch.autograd.Function):
    """`F.linear` with a quantized weight. It saves nothing, so savers neither copy the weight nor lose the input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dequantize(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        for_x, _, for_bias = ctx.needs_input_grad
        of_x = gradient @ dequantize(ctx.weight, gradient.dtype) if for_x else None
        return of_x, None, gradient.flatten(0, -2).sum(0) if for_bias else None


class _Quantized:
    """The forward of a quantized layer. It computes in the dtype of its input or, within autocast, in that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return _Product.apply(x, self.weight, self.bias)


def _import_bitsandbytes(quantization: str) -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        what = f"quantization={quantization} needs bitsandbytes, which cannot be imported ({error})"
        raise UsageError(f"{what}: pip install 'lowmem[lora]'") from error
    return bitsandbytes


@cache
def _quantized_class(kind: type) -> type:
    """Derive a class from one of bitsandbytes, so that peft recognizes its layers."""
    return type(f"Quantized{kind.__name__}", (_Quantized, kind), {})


class _Unread:
    """A stored tensor as transformers' loader takes it: it asks for `tensor[...]`, and quantizes that before the next.

    The loader itself would map the files, whose pages then count as memory.
    """

    def __init__(self, stored: StoredTensor):
        self._stored = stored

    def __getitem__(self, all_of_it: object) -> Tensor:
        trim_heap()  # of what it took to quantize the tensor before, or the heap would grow up to the unquantized size
        tensor = torch.empty(self._stored.shape, dtype=self._stored.torch_dtype)
        self._stored.copy_part(tensor)
        return tensor


def _report_rest(model: PreTrainedModel) -> None:
    """Print which large weights of layers are not quantized."""
    outside = [x for x in model.modules() if isinstance(x, nn.Embedding) or x is model.get_output_embeddings()]
    known = {x for module in outside for x in module.parameters()}
    rest = {name: x for name, x in model.named_parameters() if is_large(x) and x not in known and not is_quantized(x)}
    if rest and rank_and_world_size()[0] == 0:
        share = sum(x.numel() for x in rest.values()) / model.num_parameters()
        names = ", ".join([*rest][:3])
        print(f"{share:.0%} of the weights are in layers, but not quantized ({names}, ...)", flush=True)
