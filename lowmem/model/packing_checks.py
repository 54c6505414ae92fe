"""Check before a run that packed documents do not affect each other, in the model or in the loss."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lowmem.data.batch import EncodedRow, collate
from lowmem.data.packing import pack
from lowmem.data.pair_packing import pack_pairs
from lowmem.distributed.fully_sharded import forward_only
from lowmem.distributed.pipeline import logits_on_all_stages
from lowmem.distributed.placement import device_of, unwrapped
from lowmem.errors import RankError, StoreError, UsageError, is_out_of_memory
from lowmem.model.build import num_embeddings, reason_of
from lowmem.model.documents import documents_apart
from lowmem.model.masks import host_masks
from lowmem.model.metrics import LossFunction, summed_loss


def check_windows(base: nn.Module, max_seq_len: int) -> None:
    """Raise UsageError if a sliding window of an encoder-decoder hides tokens of a row: packed rows have no window."""
    windows = (getattr(getattr(module, "config", None), "sliding_window", None) for module in base.modules())
    window = min(filter(None, windows), default=None)
    if window is None:
        return
    # An encoder with a window sees that many tokens on each side in T5Gemma, but half of them in others (T5Gemma 2).
    reach = window if base.config.model_type == "t5gemma" else window // 2
    if reach < max_seq_len:
        found = f"packed rows have no sliding window, but {type(base).__name__} has one of {window} tokens"
        raise UsageError(f"{found}: lower --max_seq_len to {reach}, or train it without packing")


def check_packing(model: nn.Module) -> None:
    """Raise UsageError if packed documents would affect each other in the model.

    Compares logits for packed and separate random documents, up to rounding. This rejects state-space models, ALiBi,
    encoder-decoders with absolute positions, and models that misread the masks of `host_masks` or `documents_apart`.
    """
    base, device = unwrapped(model), device_of(model)
    is_pairs, name = base.config.is_encoder_decoder, type(base).__name__
    generator = torch.Generator().manual_seed(0)  # separate, to leave the run's random numbers unchanged
    vocabulary = num_embeddings(base)
    lengths = {"": [(5, 7), (7, 5)], "decoder_": [(7, 5), (5, 7)]} if is_pairs else {"": [(5, 7), (7, 5)]}
    rows, positions, parts = {}, {}, [{}, {}, {}, {}]
    for side, pairs in lengths.items():
        tokens = torch.randint(vocabulary, (2, 12), generator=generator).to(device)
        starts = torch.tensor([[*range(first), *range(second)] for first, second in pairs], device=device)
        rows[f"{side}input_ids"], positions[f"{side}position_ids"] = tokens, starts
        documents = [part for row, pair in zip(tokens, pairs, strict=True) for part in row[None].split(pair, dim=1)]
        for part, document in zip(parts, documents, strict=True):
            part[f"{side}input_ids"] = document

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        with logits_on_all_stages(model):
            return base(use_cache=False, **inputs).logits.float()

    try:
        with forward_only(model):
            as_one, packed = logits(rows), []
            with host_masks(model, positions), documents_apart(model) if is_pairs else nullcontext():
                packed.append(logits(rows | positions))
            if not is_pairs:
                packed.append(logits(rows | positions))
            apart = torch.cat([logits(part) for part in parts], dim=1).view_as(as_one)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, StoreError | RankError | torch.AcceleratorError) or is_out_of_memory(error):
            raise  # not the model's fault
        if "position_ids" in str(error):
            found = f"packing needs a model that takes position_ids, {name} does not"
        elif is_pairs:
            found = f"{name} does not take the masks of packed rows ({reason_of(error)})"
        else:
            raise
        raise UsageError(f"{found}: train it without packing") from error
    seen, seen_as_one, size = (x.square().mean().sqrt() for x in (torch.stack(packed) - apart, as_one - apart, apart))
    # In tests, `seen` was 1e-6 of `seen_as_one` (rounding) if documents did not affect each other, else at least 28 %,
    # or 0.5 % in the models that only `check_packed_loss` refuses. The second term is for a new model in which no token
    # affects another yet: both values are then just rounding.
    if not seen <= 0.1 * seen_as_one + 1e-6 * size:
        attention = base.config._attn_implementation
        found = f"in {name} with attn_implementation={attention}, packed documents affect each other"
        if is_pairs:
            found = f"{found}, or have absolute positions"
        or_sdpa = ", or try sdpa attention" if base._supports_sdpa and attention != "sdpa" and not is_pairs else ""
        raise UsageError(f"{found}: train without packing{or_sdpa}")


def check_packed_loss(model: nn.Module, loss_fn: LossFunction) -> None:
    """Raise UsageError if packed documents affect each other's loss, mostly because `loss_fn` ignores their positions.

    Then the sum over two packed rows changes if they exchange a document. Unlike a sum over separate documents, that
    sum comes from tensors of the same shapes, so a correct loss gives the same bits in bf16 too. This also refuses some
    models that mix documents (OpenAI GPT, XGLM, OLMo Hybrid), but less than a tenth as much as positions change their
    logits, so that `check_packing` accepts them.
    """
    base, generator = unwrapped(model), torch.Generator().manual_seed(0)
    is_pairs, vocabulary = base.config.is_encoder_decoder, num_embeddings(base)

    def document(length: int, num_labels: int) -> EncodedRow:
        tokens = torch.randint(vocabulary, (length + num_labels,), generator=generator).tolist()
        return EncodedRow(input_ids=tokens[:length], labels=tokens[length:] if is_pairs else tokens[:length])

    first, second = [document(5, 7), document(5, 7)], [document(7, 5), document(7, 5)]

    def loss_of(seconds: list[EncodedRow], *, as_one: bool) -> Tensor:
        rows = []
        for documents in zip(first, seconds, strict=True):
            (packed,) = (pack_pairs if is_pairs else pack)(list(enumerate(documents)), max_seq_len=12, micro_batches=1)
            rows += packed
        if as_one:
            rows = [EncodedRow(input_ids=row["input_ids"], labels=row["labels"]) for row in rows]
        return summed_loss(loss_fn, model, collate(rows, causal=not is_pairs).to(device_of(model)))

    with forward_only(model):
        loss, other = loss_of(second, as_one=False), loss_of(second[::-1], as_one=False)
        seen_as_one = abs(loss_of(second, as_one=True) - loss_of(second[::-1], as_one=True))
    # In tests, a correct loss changed by 1e-7 of itself (the order of its sum), and one that gives a document the last
    # label of another as its first decoder input by 2.5 % of `seen_as_one`. The second term: see `check_packing`.
    if not abs(loss - other) <= 0.01 * seen_as_one + 1e-6 * abs(loss):
        found = f"it is {loss.item():.7g} for two packed rows, and {other.item():.7g} after they exchange a document"
        remedy = "pass position_ids to the model"
        if is_pairs:
            remedy = "call the model within documents_apart, and start each document's decoder inputs"
            remedy = f"{remedy} (decoder_position_ids are 0 there) with the start token"
        advice = f"train without packing or, in a loss of your own, {remedy}, or call plain_loss"
        raise UsageError(f"packed documents affect each other's loss: {found}: {advice}")
