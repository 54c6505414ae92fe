"""An exponential moving average (EMA) of the weights, which removes the noise of a constant learning rate.

Each checkpoint also holds the average: kill the program at any time and start it again, and it ends with the same bits.
Started again after its end, it only evaluates.

python examples/ema.py [--out=FOLDER]
"""

from functools import partial

import fire
import numpy as np
import torch

import lowmem

VOCABULARY, LENGTH, DECAY = 32, 32, 0.98
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **SIZE}


def make_rows(count: int) -> list[dict[str, list[int]]]:
    """Draw rows of tokens from a random Markov chain, a function of `count`. A causal model's labels are its inputs."""
    rng = np.random.default_rng(0)
    cumulative = rng.dirichlet(np.full(VOCABULARY, 0.3), size=VOCABULARY).cumsum(1)
    tokens = [rng.integers(VOCABULARY, size=count)]
    for _ in range(LENGTH - 1):
        after_last = cumulative[tokens[-1]]  # (rows, vocabulary): the distribution of the next token
        tokens.append((rng.random((count, 1)) > after_last[:, :-1]).sum(1))
    return [{"input_ids": row, "labels": row} for row in np.stack(tokens, 1).tolist()]


def main(out: str = "out-ema", steps: int = 200, save_steps: int = 50) -> None:
    accelerator = lowmem.init_distributed()
    torch.manual_seed(0)
    model, _ = lowmem.load_model(model_config=MODEL)
    model = lowmem.parallelize(model, accelerator)
    optimizer = lowmem.make_optimizer(model)  # memory="exact": the model's own weights are bf16 from here on
    rows, loss_fn = make_rows(3000), lowmem.plain_loss
    options = {"encode": dict, "collate": partial(lowmem.collate, causal=True)}  # the rows are encoded already
    options |= lowmem.data_place(model).coordinates
    stream = lowmem.open_stream(rows[:2500], global_batch_size=8, batch_size=8, **options)
    held_out = lowmem.open_eval(rows[2500:], batch_size=100, **options)

    state = lowmem.TrainState(model, optimizer, stream)
    ema = dict(lowmem.master_weights(model, optimizer))  # fp32 copies: a bf16 average would round most updates away
    if checkpoint := lowmem.latest_checkpoint(out):
        lowmem.load_checkpoint(state, checkpoint, accelerator)
        lowmem.load_extra(checkpoint, "ema", into=ema)
        accelerator.print(f"continue from step {state.step}")
    for _, batches in zip(range(state.step, steps), stream, strict=False):
        result = lowmem.train_step(state, batches, loss_fn, accelerator, learning_rate=1e-2, max_grad_norm=1.0)
        for name, weight in lowmem.master_weights(model, optimizer):
            ema[name].lerp_(weight, 1 - min(DECAY, state.step / (state.step + 10)))  # forgets the first weights sooner
        if state.step % save_steps == 0:
            lowmem.save_checkpoint(state, out, accelerator, extra={"ema": ema}, keep=2)
            accelerator.print(f"step {state.step}: loss {result.loss:.3f}")
    stream.close()

    losses = {}
    evaluated = lowmem.parallelize(lowmem.load_model(model_config=MODEL)[0], accelerator)  # in fp32
    for name, weights in {"last": dict(lowmem.master_weights(model, optimizer)), "average": ema}.items():
        evaluated.load_state_dict(weights)
        losses[name] = lowmem.evaluate(evaluated, held_out, loss_fn, accelerator)["eval_loss"]
    accelerator.print(f"held-out loss of averaged weights: {losses['average']:.4f} (the last: {losses['last']:.4f})")
    accelerator.end_training()


if __name__ == "__main__":
    fire.Fire(main)
