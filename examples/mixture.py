"""A mixture of two sources by weight, interrupted and resumed.

A small source next to a large one is hardly ever seen. `weights` gives it its share of every step, and each source has
its own epochs. The position in a mixture is one integer too: the second half of this run starts in new objects, from a
checkpoint, and ends with the weights of a run without the interruption, bit for bit.

2,000 rows count up, 20 rows count down. Run it with `python examples/mixture.py`, or with
`torchrun --nproc_per_node=2 examples/mixture.py`, which takes the same rows.
"""

import tempfile
from functools import partial

import torch
from accelerate.utils import gather_object

import lowmem

SHAPE = {"model_type": "llama", "vocab_size": 27, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4}
NUMBERS = 24  # the tokens from 3 on, in a circle


def make_rows(count, *, step, seed):
    """Make rows that count in a circle from a random number, by `step`."""
    starts = torch.randint(NUMBERS, (count,), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": (3 + (start + step * torch.arange(12)) % NUMBERS).tolist()} for start in starts]


def encode(row):
    return {"input_ids": row["tokens"], "labels": row["tokens"]}


def train(accelerator, sources, weights, steps, checkpoint=None):
    """Train up to `steps` steps, from a checkpoint if one is given; return the state."""
    torch.manual_seed(0)
    model = lowmem.parallelize(lowmem.load_model(model_config=SHAPE)[0], accelerator)
    batching = {"batch_size": 16, "global_batch_size": 32, "collate": partial(lowmem.collate, causal=True)}
    stream = lowmem.open_stream(sources, encode, weights=weights, **batching, **lowmem.data_place(model).coordinates)
    state = lowmem.TrainState(model, lowmem.make_optimizer(model), stream)
    if checkpoint:
        lowmem.load_checkpoint(state, checkpoint, accelerator)
    for _, batches in zip(range(state.step, steps), stream, strict=False):
        lowmem.train_step(state, batches, lowmem.chunked_loss, accelerator, learning_rate=3e-3, max_grad_norm=1.0)
    stream.close()
    return state


def losses_of(state, held_out, accelerator):
    """Return the mean loss of each held-out source, in nats per token."""
    options = {"batch_size": 32, "collate": partial(lowmem.collate, causal=True)}
    options |= lowmem.data_place(state.model).coordinates
    batches = [lowmem.open_eval(rows, encode, **options) for rows in held_out]
    return [lowmem.evaluate(state.model, each, lowmem.chunked_loss, accelerator)["eval_loss"] for each in batches]


def main(folder, steps=60):
    accelerator = lowmem.init_distributed()
    folder = gather_object([folder])[0]  # one temporary folder for all ranks
    large, small = make_rows(2000, step=1, seed=0), make_rows(20, step=-1, seed=1)
    held_out = make_rows(64, step=1, seed=2), make_rows(64, step=-1, seed=3)
    joined = train(accelerator, large + small, None, steps)  # 1 row of 100 is from the small source
    mixed = train(accelerator, [large, small], [0.7, 0.3], steps)

    half = train(accelerator, [large, small], [0.7, 0.3], steps // 2)
    path = lowmem.save_checkpoint(half, folder, accelerator)
    resumed = train(accelerator, [large, small], [0.7, 0.3], steps, checkpoint=path)
    pairs = zip(resumed.model.parameters(), mixed.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "the resumed run differs"

    large_joined, small_joined = losses_of(joined, held_out, accelerator)
    large_mixed, small_mixed = losses_of(resumed, held_out, accelerator)
    accelerator.print(f"held-out loss of the small source: joined {small_joined:.3f}, mixed {small_mixed:.3f}")
    accelerator.print(f"held-out loss of the large source: joined {large_joined:.3f}, mixed {large_mixed:.3f}")
    from_large, from_small = resumed.stream.rows_of_sources
    accelerator.print(f"{from_large} rows of the large source, {from_small} of the small one; resumed bit for bit")
    accelerator.end_training()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
