"""Distillation: a small model learns from a teacher's probabilities, and beats the same model trained alone.

The rows are drawn from a random Markov chain. The teacher has 4,096 of them, but the student only 128, each with 15
targets. A label shows one next token of many; the teacher's probabilities show all of them (Hinton et al., 2015,
arXiv 1503.02531), so the same rows teach more. Run it with `python examples/distill.py`, or on several processes with
`torchrun --nproc_per_node=2 examples/distill.py`: the student's gradient is the same.
"""

from functools import partial

import torch
from torch.nn import functional as F

import lowmem

VOCABULARY, LENGTH = 32, 16


def distillation_loss(student, batch, *, teacher, temperature=2.0, weight=0.9):
    """Return `weight` of the divergence from the teacher plus the rest of the cross-entropy, summed over targets."""
    # Padding comes last in a causal row, so no target attends to it, and neither model needs a mask.
    input_ids, labels = batch.inputs["input_ids"], batch.inputs["labels"][:, 1:]
    logits = student(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    with torch.no_grad():  # the same tokens in the same micro-batch: no second pass over the data, no file of logits
        wanted = teacher(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    hard = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")  # ignores -100
    logs = [F.log_softmax(each / temperature, -1) for each in (logits, wanted)]
    divergence = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    soft = (divergence * (labels != -100)).sum()
    # Gradients of soft targets shrink with the square of the temperature, so multiply by it (section 2 of the paper).
    return weight * temperature**2 * soft + (1 - weight) * hard


def make_rows(count, *, seed):
    """Draw sequences of LENGTH tokens from one Markov chain, whose probabilities do not depend on `seed`."""
    chain = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (count,), generator=generator)]
    while len(tokens) < LENGTH:
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator)[:, 0])
    return [{"tokens": row} for row in torch.stack(tokens, 1).tolist()]


def encode(row):
    return {"input_ids": row["tokens"], "labels": row["tokens"]}


def make_model(*, width, layers, seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
    return lowmem.load_model(model_config={"model_type": "llama", **shape})[0]


def train(model, rows, loss_fn, accelerator, *, steps):
    """Train with batches of 64 rows; return the lowest cross-entropy of held-out rows, in nats per token."""
    model = lowmem.parallelize(model, accelerator)
    lowmem.check_model(model, loss_fn, packing=False, max_seq_len=LENGTH)
    batching = {"encode": encode, "collate": partial(lowmem.collate, causal=True)}
    batching |= lowmem.data_place(model).coordinates
    held_out = lowmem.open_eval(make_rows(128, seed=2), batch_size=128, **batching)
    stream = lowmem.open_stream(rows, batch_size=64, global_batch_size=64, **batching)
    state = lowmem.TrainState(model, lowmem.make_optimizer(model, weight_decay=0.01), stream)
    for step, batches in zip(range(steps), stream, strict=False):
        rate = lowmem.learning_rate_at(step, total_steps=steps, peak=1e-2, warmup_steps=10)
        lowmem.train_step(state, batches, loss_fn, accelerator, learning_rate=rate, max_grad_norm=1.0)
        if state.step % 10 == 0:  # few rows are soon overfitted, so compare both at their best
            state.note_best(lowmem.evaluate(model, held_out, lowmem.plain_loss, accelerator)["eval_loss"])
    stream.close()
    return state.best["eval_loss"]


def main():
    accelerator = lowmem.init_distributed()
    teacher = make_model(width=64, layers=2, seed=0)
    loss_of_teacher = train(teacher, make_rows(4096, seed=0), lowmem.plain_loss, accelerator, steps=80)
    teacher.eval().requires_grad_(False)
    rows = make_rows(128, seed=1)
    student = partial(make_model, width=32, layers=1, seed=1)
    alone = train(student(), rows, lowmem.plain_loss, accelerator, steps=60)
    distilled = train(student(), rows, partial(distillation_loss, teacher=teacher), accelerator, steps=60)
    losses = f"student alone {alone:.3f}, with the teacher {distilled:.3f} (the teacher's own: {loss_of_teacher:.3f})"
    accelerator.print(f"held-out loss: {losses}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
