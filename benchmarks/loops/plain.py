"""Train with a loop like torchtune's recipes: bf16 weights, fused AdamW, logits converted to fp32 in chunks."""

from types import SimpleNamespace

import torch
from loops.around import load
from systems import OPTIMIZER, SCHEDULE, Run, System, encoded_rows
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from lowmem import collate, learning_rate_at


def train(settings: SimpleNamespace, system: System, run: Run) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    model = load(settings.folder, dtype=dtype).to(device).train()
    if settings.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = dict(model.named_parameters())
    kept = [name for name in parameters if "bias" in name or "norm" in name]
    groups = [{"params": [parameters[name] for name in kept], "weight_decay": 0.0}]
    groups += [{"params": [parameters[name] for name in parameters.keys() - {*kept}]}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMIZER)
    is_causal = not model.config.is_encoder_decoder
    rows, size = encoded_rows(settings.folder), settings.batch_size
    micro_batches = (rows[start : start + size] for start in range(0, len(rows), size))
    for step in range(settings.steps):
        total, num_targets = torch.zeros((), device=device), 0
        for _ in range(settings.gradient_accumulation_steps):
            batch = collate(next(micro_batches), causal=is_causal).to(device)
            inputs = dict(batch.inputs)
            labels = inputs.pop("labels")
            if is_causal:
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            else:
                inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
            pieces = zip(logits.chunk(8), labels.flatten().chunk(8), strict=True)
            loss = sum(F.cross_entropy(piece.float(), targets, reduction="sum") for piece, targets in pieces)
            del logits
            loss.backward()
            total += loss.detach()
            num_targets += batch.num_targets
        for parameter in parameters.values():
            parameter.grad /= num_targets
        if settings.max_grad_norm:
            clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, total_steps=settings.steps, **SCHEDULE)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append((total / num_targets).item())
        run.mark()
