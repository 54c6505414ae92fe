"""Make an optimizer by name and memory tier."""

import fnmatch
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowmem.config.train_config import TIERED_OPTIMIZERS
from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.dtensor import is_in_columns, local_of, set_local_
from lowmem.distributed.fill import fill_weights, filler_of
from lowmem.distributed.fully_sharded import has_gathered, notice_new_parameters
from lowmem.distributed.offloaded import offloaded_of
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import is_large, is_quantized, is_sharded, unwrapped
from lowmem.errors import UsageError
from lowmem.model.build import convert_buffers, some_of
from lowmem.optim.adafactor import TieredAdafactor
from lowmem.optim.philox import BLOCK
from lowmem.optim.tiers import TieredAdamW

# for memory="off": optimizers of torch.optim that need no closure and accept dense gradients and any shape
OPTIMIZERS = {"adamw": optim.AdamW, "adam": optim.Adam, "nadam": optim.NAdam, "radam": optim.RAdam}
OPTIMIZERS |= {"adamax": optim.Adamax, "adafactor": optim.Adafactor, "adagrad": optim.Adagrad}
OPTIMIZERS |= {"adadelta": optim.Adadelta, "rmsprop": optim.RMSprop, "sgd": optim.SGD}

_FUSED_SHARDED = ("adamw", "adam")  # optimizers whose fused kernels accept DTensors

_ADVICE = {"cpu": "install a C++ compiler, then lowmem again", "cuda": "install triton and a C compiler"}

# names of biases and norms, which get no weight decay, as in transformers' Trainer
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)

_OF_GROUP = {"lr_scale", "weight_decay"}


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    memory: str = "exact",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    slice_elements: int | None = None,
    fused: bool = True,
    groups: Sequence[Mapping[str, object]] = (),
) -> Optimizer:
    """Make an optimizer for the trainable parameters of `model`; biases and norms get no weight decay.

    The tiers "exact" and "lean" support adamw, adamw_bf16 (moments in bf16) and adafactor. They convert all weights to
    bf16 in place: call `parallelize` first, and use an Accelerator without mixed precision. `memory="off"` makes an
    optimizer of torch.optim. Set the learning rate at each step; `betas` and `eps` are for Adam's family. A tier
    updates with a kernel if there is one for the device and `fused` is set, otherwise with tensor operations on
    `slice_elements` elements at a time (None: depends on device and size). A tier on a CPU without bf16 instructions
    lets torch compute bf16 products in fp32, in the whole process. Raises ValueError for unsupported combinations.

    `groups` gives parameters other options: {"params": pattern, "lr_scale": 0.1, "weight_decay": 0.0}. A pattern is
    matched with parameter names by `fnmatch`; the first group that matches counts, and its `weight_decay` is also that
    of biases and norms. A step multiplies its learning rate by `lr_scale`. Raises UsageError for an entry without
    effect, or with other keys.
    """
    if memory not in ("exact", "lean", "off"):
        raise ValueError(f"memory={memory!r} is unknown: use exact, lean or off")
    names = list(OPTIMIZERS) if memory == "off" else TIERED_OPTIMIZERS
    if name not in names:
        raise ValueError(f"optimizer {name!r} is unknown with memory={memory}: use one of {', '.join(names)}")
    is_wrapped = isinstance(model, DistributedDataParallel)
    if memory != "off" and (is_wrapped or has_gathered(model)):  # in both cases, the old dtypes remain
        found = "DDP has wrapped the model" if is_wrapped else "the sharded model has already run"
        raise ValueError(f"memory={memory} changes dtypes, but {found}: make the optimizer first")
    base = unwrapped(model)
    trainable = [(path, parameter) for path, parameter in base.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen, so there is nothing to optimize: unfreeze a part")
    if memory == "off" and offloaded_of(model) is not None:
        raise ValueError("offload_weights needs a memory tier, got memory=off: use exact or lean")
    is_divided = any(isinstance(parameter, DTensor) for _, parameter in trainable)
    if name == "adafactor" and is_divided:
        raise ValueError("adafactor needs whole matrices, but this model is sharded: use adamw or NO_SHARD")
    group_of = _group_of(model, groups)
    kinds = defaultdict(list)  # split by type too, because torch's kernels cannot mix DTensors and plain tensors
    for path, parameter in trainable:
        owner = base.get_submodule(path.rpartition(".")[0])
        is_bias_or_norm = isinstance(owner, nn.LayerNorm) or _NO_DECAY.search(path) is not None
        kinds[group_of.get(parameter, -1), is_bias_or_norm, not isinstance(parameter, DTensor)].append(
            (path, parameter)
        )
    every = []
    for index, is_bias_or_norm, is_plain in sorted(kinds):
        options = {"weight_decay": 0.0 if is_bias_or_norm else weight_decay} | (
            dict(groups[index]) if index >= 0 else {}
        )
        every.append(options | {"params": kinds[index, is_bias_or_norm, is_plain]})
    if memory == "off":
        fill_weights(model)
        return _of_torch(OPTIMIZERS[name], every, betas, eps, is_fused=not is_divided or name in _FUSED_SHARDED)
    for path, parameter in trainable if memory == "lean" else ():
        columns = local_of(parameter).shape[1] if is_large(parameter) and is_in_columns(parameter) else 0
        if columns % BLOCK:
            found = f"{path} has {columns} per rank"
            raise ValueError(f"memory=lean needs blocks of {BLOCK} columns, but {found}: use exact or another tp_size")
    convert_frozen(model)
    tier = {"memory": memory, "slice_elements": slice_elements, "fused": fused}
    tier |= {"fill": filler_of(model), "offloaded": offloaded_of(model)}
    if name == "adafactor":
        return TieredAdafactor(every, **tier)
    moments = "bf16" if name == "adamw_bf16" else "tier"
    optimizer = TieredAdamW(every, betas=betas, eps=eps, moments=moments, **tier)
    if fused and optimizer.kernels is None and rank_and_world_size()[0] == 0:
        advice = _ADVICE.get(trainable[0][1].device.type, "use a CPU or a CUDA GPU")
        print(f"updates use tensor operations, several times slower than lowmem's kernels: {advice}", flush=True)
    if is_sharded(model):
        notice_new_parameters(model)
    return optimizer


def _group_of(model: nn.Module, groups: Sequence[Mapping[str, object]]) -> dict[nn.Parameter, int]:
    """Return the index of the group of each trained parameter that one matches. Raises UsageError for a bad group."""
    every = unwrapped(model).named_parameters(remove_duplicate=False)  # of a tied weight, all names
    named = {name: parameter for name, parameter in every if parameter.requires_grad}
    found: dict[nn.Parameter, int] = {}
    for index, group in enumerate(groups):
        pattern, numbers = group.get("params"), {name: value for name, value in group.items() if name != "params"}
        is_valid = all(isinstance(x, Real) and math.isfinite(x) and x >= 0 for x in numbers.values())
        if not isinstance(pattern, str) or not is_valid or not set() < numbers.keys() <= _OF_GROUP:
            wanted = '{"params": "pattern", "lr_scale": 0.1, "weight_decay": 0.0}, with numbers of 0 or more'
            raise UsageError(f"groups[{index}] is {dict(group)}: write it as {wanted}")
        matching = [named[name] for name in fnmatch.filter(named, pattern) if named[name] not in found]
        if not matching:
            what = f"groups[{index}] has params={pattern!r}, which matches no trained parameter outside earlier groups"
            raise UsageError(f"{what}: the trained parameters are {some_of(named)}")
        found |= dict.fromkeys(matching, index)
    return found


def convert_frozen(model: nn.Module) -> None:
    """Bring frozen weights to their device, in bf16, or to where `offload_weights` says; convert all buffers.

    Quantized weights, which are integers, stay as they are. Placeholders of other stages' weights are converted too.
    """
    fill, offloaded = filler_of(model), offloaded_of(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            fill(parameter)
            if not is_quantized(parameter):
                set_local_(parameter, local_of(parameter.data).to(torch.bfloat16))
            if offloaded:
                offloaded.take_weight(parameter, row_wise=True, sum_dtype=torch.bfloat16)
    convert_buffers(model)
    if stages := stages_of(model):
        stages.convert_placeholders(torch.bfloat16)


def _of_torch(
    kind: type, groups: list[dict[str, object]], betas: tuple[float, float], eps: float, *, is_fused: bool
) -> Optimizer:
    accepted = inspect.signature(kind).parameters
    options: dict[str, object] = {"lr": 0.0}
    if "betas" in accepted:
        options |= {"betas": betas, "eps": eps}
    if "fused" in accepted and is_fused:
        options["fused"] = True  # updates in one pass, without temporaries of the model's size
    else:
        options["foreach"] = False
    return kind([group | {"params": [parameter for _, parameter in group["params"]]} for group in groups], **options)
