"""Losses: functions `(model, batch) -> sum of token losses`, an fp32 scalar, which the caller divides.

If the batch has weights, they multiply the token losses, and the caller divides by the sum of the targets' weights.
An encoder-decoder model shifts labels itself; position i of a causal one predicts label i + 1. Label -100: no target.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem.cross_entropy import Change, chunked_cross_entropy
from lowmem.data.batch import IGNORED, Batch
from lowmem.distributed.offloaded import rows_of
from lowmem.distributed.placement import is_engine, unwrapped, uses_zero3
from lowmem.errors import UsageError, is_out_of_memory
from lowmem.model.documents import documents_apart
from lowmem.model.masks import host_masks
from lowmem.model.noise import noisy_loss
from lowmem.model.replaced import replaced


def plain_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy, an fp32 scalar, from all logits (rows, length, vocabulary) at once."""
    inputs, targets, weights = _inputs_and_targets(model, batch)
    with _masks(model, batch):
        logits = model(**inputs).logits
    options = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
    loss_of = partial(F.cross_entropy, logits.flatten(0, 1).float(), targets.flatten(), **options)
    return loss_of(reduction="sum") if weights is None else (loss_of(reduction="none") * weights.flatten()).sum()


def chunked_loss(
    model: nn.Module,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    slice_elements: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Compute `plain_loss`, but hold only about `slice_elements` (None: SLICE_ELEMENTS) logits, also in backward.

    Calls the whole model, so that its wrapper's hooks run, but replaces the output head's forward, so that only
    positions with a target get logits. If the model scales, caps or shifts its logits, each slice is changed likewise.
    See `chunked_cross_entropy` for `fused`.
    Raises UsageError if the head is not linear or if the model changes its logits in another way, and RuntimeError if
    `batch.num_targets` is not the number of targets.
    """
    inputs, targets, weights = _inputs_and_targets(model, batch)
    head = unwrapped(model).get_output_embeddings()
    if isinstance(copies := getattr(head, "modules_to_save", None), nn.ModuleDict):  # peft trains a copy of the head
        (head,) = copies.values()
    if not isinstance(head, nn.Linear):
        found = f"{type(unwrapped(model)).__name__} has {type(head).__name__}"
        found += " with adapters" * hasattr(head, "base_layer")
        raise UsageError(f"chunked loss needs a linear output head, {found}: set --loss=plain")
    rows = rows_of(model, head.weight)
    options = {"label_smoothing": label_smoothing, "slice_elements": slice_elements, "fused": fused, "rows": rows}
    options |= {"targets": targets, "weights": weights, "num_targets": batch.num_targets}
    loss_of = partial(_loss_of, head=head, **options)
    # DeepSpeed gathers the head's weight only for the head's forward and backward
    in_head = uses_zero3(model)
    with _masks(model, batch):
        result, changes = _call_with_head(loss_of if in_head else _pass_through, model, head, inputs)
    if in_head and changes:  # they are known only after the loss is computed
        raise _unsupported(model, "changes its logits after the head, under ZeRO stage 3")
    return result if in_head else loss_of(result, changes=changes)


class _AfterHead(TorchFunctionMode):
    """Skip operations that change the head's output, and record them, so that the loss can apply them to slices.

    This works for elementwise operations whose other arguments are numbers, or tensors that are not trained, of one
    element or one per token of the vocabulary. Casts are skipped without a record: the loss uses fp32 or wider. Any
    other operation on the output, also in place, would see hidden states instead of logits, and sets `is_misused`.
    """

    _NAMES = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "true_divide": "div", "tanh": "tanh"}
    _CASTS = frozenset(("float", "to", "type_as", "contiguous"))

    def __init__(self, vocabulary: int, *, has_hooks: bool):
        super().__init__()
        self._vocabulary, self._has_hooks = vocabulary, has_hooks
        self.output: Tensor | None = None
        self.is_misused = False
        self.changes: list[Change] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        name, is_attribute = name.removesuffix("_"), name == "__get__"
        others = [arg for arg in args if arg is not self.output]
        if len(others) == len(args) or self.output is None:
            return function(*args, **(kwargs or {}))
        if name in self._CASTS:
            return self.output
        if not kwargs and self._is_change(name, args, others):
            self.changes.append((self._NAMES[name], *(others or [None])))
            return self.output
        version = self.output._version
        result = function(*args, **(kwargs or {}))
        # fully_shard's hooks read attributes of the output that are tensors; DeepSpeed's hooks make views of it
        is_other = isinstance(result, Tensor) and not is_attribute and not self._has_hooks
        self.is_misused |= is_other or self.output._version != version
        return result

    def _is_change(self, name: str, args: Sequence[object], others: Sequence[object]) -> bool:
        if len(args) != 2 or len(others) != 1:
            return name == "tanh" and len(args) == 1
        is_first = args[0] is self.output or name in ("add", "mul")
        return name in self._NAMES and is_first and self._is_constant(others[0])

    def _is_constant(self, value: object) -> bool:
        if not isinstance(value, Tensor):
            return True
        return not value.requires_grad and (value.numel() == 1 or value.numel() == value.shape[-1] == self._vocabulary)


def _call_with_head(
    function: Callable[[Tensor], Tensor], model: nn.Module, head: nn.Linear, inputs: dict[str, object]
) -> tuple[Tensor, list[Change]]:
    """Call the model with `function` as its head's forward; return what that returns, and the changes to logits."""
    after = _AfterHead(head.out_features, has_hooks=is_engine(model))

    def forward(_: Callable, hidden: Tensor) -> Tensor:
        if after.output is not None:
            raise _unsupported(model, "calls its output head twice")
        after.output = function(hidden)
        stack.enter_context(after)
        return after.output

    changes_more = _unsupported(model, "changes its logits after the head by more than scaling, soft-capping or a bias")
    with ExitStack() as stack:
        stack.enter_context(replaced(head, "forward", forward))
        try:
            logits = model(**inputs).logits
        except RuntimeError as error:
            if after.output is None or is_out_of_memory(error):
                raise
            raise changes_more from error  # such as an operation on hidden states that only fits logits
    output = after.output
    # after DeepSpeed's hooks, the output is another tensor that shares the memory
    is_output = logits is output or (uses_zero3(model) and logits.data_ptr() == output.data_ptr())
    if after.is_misused or not is_output:
        raise changes_more
    return logits, after.changes


def _unsupported(model: nn.Module, what: str) -> UsageError:
    name = type(unwrapped(model)).__name__
    return UsageError(f"{name} {what}, which chunked_loss does not support: use plain_loss (--loss=plain)")


def _pass_through(hidden: Tensor) -> Tensor:
    hidden = hidden.view_as(hidden)  # another object than the model's hidden states, which it may use again
    if torch.is_grad_enabled() and not hidden.requires_grad:
        # needed after frozen layers, because fully_shard reduces gradients only if backward reaches this output
        hidden = hidden.detach().requires_grad_()
    return hidden


def _loss_of(
    hidden: Tensor,
    *,
    head: nn.Linear,
    targets: Tensor,
    weights: Tensor | None,
    num_targets: int,
    **options: object,
) -> Tensor:
    if hidden.shape[:-1] != targets.shape:
        found = f"hidden states of shape {tuple(hidden.shape[:-1])} but labels of shape {tuple(targets.shape)}"
        raise ValueError(f"{found}: give every position a label, -100 for a position to ignore")
    is_target, targets = (targets != IGNORED).flatten(), targets.flatten()
    # to avoid a device sync, take the number of targets from the host; the device checks it and finds their positions
    torch._assert_async(is_target.sum() == num_targets, "batch.num_targets must be the number of labels except -100")
    positions = is_target.to(torch.uint8).argsort(descending=True, stable=True)[:num_targets]
    hidden, targets = hidden.flatten(0, 1).index_select(0, positions), targets[positions]
    factors = None if weights is None else weights.flatten()[positions]
    weight, bias = head.weight, head.bias  # full tensors, because a sharded model keeps them gathered after its forward
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = bias if bias is None else bias.detach()
    kind = hidden.device.type
    compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return chunked_cross_entropy(hidden, weight, bias, targets, compute_dtype=compute_dtype, factors=factors, **options)


LOSSES = {"chunked": chunked_loss, "plain": plain_loss}


def make_loss(
    name: str, *, label_smoothing: float = 0.0, neftune_noise_alpha: float | None = None, **options: object
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the loss `name` of LOSSES with its `options`; in training mode, also with the noise of NEFTune."""
    loss_fn = partial(LOSSES[name], label_smoothing=label_smoothing, **options)
    return partial(noisy_loss, loss_fn=loss_fn, alpha=neftune_noise_alpha) if neftune_noise_alpha else loss_fn


def _inputs_and_targets(model: nn.Module, batch: Batch) -> tuple[dict[str, object], Tensor, Tensor | None]:
    """Return the model's inputs, and each position's target and weight (None: all are 1).

    Without labels as input, the model computes no loss.
    """
    base, inputs, weights = unwrapped(model), dict(batch.inputs), batch.weights
    labels = inputs.pop("labels")
    if base.config.is_encoder_decoder:
        if "decoder_input_ids" not in inputs:
            decoder_input_ids = _decoder_input_ids(base, labels)
            if "decoder_position_ids" in inputs:  # each document of a packed row starts with the start token
                starts = inputs["decoder_position_ids"] == 0
                decoder_input_ids = torch.where(starts, decoder_input_ids[:, :1], decoder_input_ids)
            inputs["decoder_input_ids"] = decoder_input_ids
        targets = labels
    else:
        # no position predicts the first label, but num_targets would count it; this check needs no device sync
        torch._assert_async(
            (labels[:, 0] == IGNORED).all(), "the first label of a causal row must be -100: use collate(causal=True)"
        )
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        weights = None if weights is None else F.pad(weights[:, 1:], (0, 1))
    return inputs | {"use_cache": False}, targets, weights


@contextmanager
def _masks(model: nn.Module, batch: Batch) -> Iterator[None]:
    with ExitStack() as stack:
        if batch.needs_its_masks:
            stack.enter_context(host_masks(model, batch.inputs))
        if "decoder_position_ids" in batch.inputs:
            stack.enter_context(documents_apart(model))
        yield


def _decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    """Shift labels (rows, length) right, as the model's own method does or, if it has none, after its start token."""
    pad = getattr(model.config, "pad_token_id", None) or 0
    start = getattr(model.config, "decoder_start_token_id", None)
    # mBART looks for a row's last token that is no padding, so give any to rows that have none
    other = 1 if pad == 0 else 0
    labels = labels.masked_fill(((labels == IGNORED) | (labels == pad)).all(1, keepdim=True), other)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        try:
            return model.prepare_decoder_input_ids_from_labels(labels=labels)
        except (TypeError, ValueError) as error:
            raise _no_start_token(model) from error
    if start is None:
        raise _no_start_token(model)
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad)


def _no_start_token(model: nn.Module) -> UsageError:
    what = f"{type(model).__name__} needs the token with which its decoder starts"
    return UsageError(f"{what}: set decoder_start_token_id and pad_token_id in the model's config.json")
