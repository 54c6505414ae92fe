"""Optimizers by name, and the learning rate as a function of the step."""

import inspect
import math
import re

import torch
from torch import nn
from torch.optim import Optimizer

# those that step without a closure, on dense gradients and parameters of any shape
_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}

# names of biases and norms, which transformers' Trainer leaves without decay
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """A torch optimizer over the parameters of `model` that require a gradient; biases and norms get no decay.

    Its learning rate is set at each step, from `learning_rate_at`. `betas` and `eps` go to the optimizers of Adam's
    family. Raises ValueError for an unknown name and for a model without a trainable parameter.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} was asked for, there are {', '.join(_OPTIMIZERS)}: choose one")
    trainable = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("an optimizer was asked for, but every parameter is frozen: leave a part trainable")
    kind = _OPTIMIZERS[name]
    accepted = inspect.signature(kind).parameters
    options: dict[str, object] = {"lr": 0.0}
    if "betas" in accepted:
        options |= {"betas": betas, "eps": eps}
    if "fused" in accepted:
        options["fused"] = True  # one pass over each parameter, and no temporaries of the model's size
    else:
        options["foreach"] = False
    decayed = [parameter for path, parameter in trainable if not _is_bias_or_norm(path, model)]
    others = [parameter for path, parameter in trainable if _is_bias_or_norm(path, model)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return kind([group for group in groups if group["params"]], **options)


def _is_bias_or_norm(path: str, model: nn.Module) -> bool:
    owner = model.get_submodule(path.rpartition(".")[0])
    return isinstance(owner, nn.LayerNorm) or _NO_DECAY.search(path) is not None


def learning_rate_at(
    step: int, *, total_steps: int, peak: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of the update after `step` finished ones, as transformers' schedules of the same name.

    Linear from 0 to `peak` over `warmup_steps`; then "cosine" or "linear" to 0 at `total_steps`, or "constant".
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    remaining = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining)))
    if schedule == "linear":
        return peak * remaining
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule {schedule!r} was asked for, there are cosine, linear and constant: choose one")
