"""Image captioning: a ViT encoder and a GPT-2 decoder learn to write captions such as "red circle above blue square".

python examples/caption.py [--memory=lean]
torchrun --nproc_per_node=2 examples/caption.py --sharding_strategy=FULL_SHARD
"""

from itertools import product

import fire
import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

import lowmem

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
SHAPES = ("circle", "square", "cross")
WORDS = ["<pad>", "<start>", "<end>", "above", *COLOURS, *SHAPES]
PAD, START, END = range(3)
SIZE = 16  # of a shape's square, in pixels: an image has two, one above the other
CAPTIONS = [" ".join((a, b, "above", c, d)) for a, b, c, d in product(COLOURS, SHAPES, COLOURS, SHAPES)]
# never seen in training: a model that only remembers captions gets none of them right
HELD_OUT = np.random.default_rng(0).permutation(CAPTIONS)[:24].tolist()


def draw(colour: str, shape: str, rng: np.random.Generator) -> torch.Tensor:
    """Draw a shape of random size at a random place, with noise: (3, SIZE, SIZE)."""
    radius = rng.uniform(4.5, 6.5)
    offsets = (torch.arange(SIZE) - torch.tensor(rng.uniform(6.5, 8.5, size=(2, 1)))).abs()
    y, x = torch.meshgrid(*offsets, indexing="ij")
    inside = {"circle": x**2 + y**2 < radius**2, "square": torch.maximum(x, y) < 0.8 * radius}
    inside["cross"] = (torch.minimum(x, y) < 1.2) & (torch.maximum(x, y) < radius)
    image = torch.tensor(COLOURS[colour])[:, None, None] * inside[shape]
    return image + torch.tensor(rng.normal(scale=0.1, size=image.shape))


def encode(row: dict[str, object], rng: np.random.Generator | None = None) -> dict[str, object]:
    """Draw the image of a caption: another one in each epoch, but the same after a resume and on any processes."""
    rng = rng or np.random.default_rng(row["seed"])  # an evaluation passes no generator
    colour, shape, _, lower_colour, lower_shape = words = row["caption"].split()
    image = torch.cat([draw(colour, shape, rng), draw(lower_colour, lower_shape, rng)], dim=1)
    return {"pixel_values": image.float(), "labels": [*map(WORDS.index, words), END]}


def collate(rows: list[dict[str, object]]) -> lowmem.Batch:
    labels = torch.tensor([row["labels"] for row in rows])  # all captions have the same number of words
    inputs = {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}
    return lowmem.Batch(inputs, num_targets=labels.numel(), row_ids=[])


def loss_fn(model, batch):
    """Return the summed loss, and how many captions greedy decoding would write exactly.

    Those are the captions whose every word is the most likely one after the words before it, so no decoding is needed.
    """
    labels = batch.inputs["labels"]
    # the model shifts the labels to get the decoder's inputs; its own loss is a mean, which no split may average again
    logits = model(batch.inputs["pixel_values"].to(model.dtype), labels=labels).logits.float()
    exact = (logits.argmax(-1) == labels).all(1).sum()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"), {"exact": (exact, len(labels))}


def build_model() -> VisionEncoderDecoderModel:
    encoder = ViTConfig(image_size=(2 * SIZE, SIZE), patch_size=8, hidden_size=64, num_hidden_layers=2)
    encoder.update({"num_attention_heads": 4, "intermediate_size": 128})
    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    decoder = GPT2Config(vocab_size=len(WORDS), n_positions=8, n_embd=64, n_layer=2, n_head=4, **dropout, **special)
    special["decoder_start_token_id"] = START
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **special)
    torch.manual_seed(0)
    return VisionEncoderDecoderModel(config).train()


def main(memory: str = "exact", sharding_strategy: str = "NO_SHARD", steps: int = 200) -> None:
    accelerator = lowmem.init_distributed()
    model = lowmem.parallelize(build_model(), accelerator, sharding_strategy=sharding_strategy)
    optimizer = lowmem.make_optimizer(model, memory=memory)
    rows = [{"caption": caption} for caption in CAPTIONS if caption not in HELD_OUT]
    options = {"collate": collate, **lowmem.data_place(model).coordinates}
    stream = lowmem.open_stream(rows, encode, takes_rng=True, global_batch_size=32, batch_size=32, **options)
    shown = [{"caption": caption, "seed": seed} for seed, caption in enumerate(HELD_OUT * 8)]
    held_out = lowmem.open_eval(shown, encode, batch_size=64, **options)
    lowmem.check_model(model, loss_fn, batch=next(iter(held_out)))

    state = lowmem.TrainState(model, optimizer, stream)
    for step, batches in zip(range(steps), stream, strict=False):
        rate = lowmem.learning_rate_at(step, total_steps=steps, peak=3e-3, warmup_steps=20)
        result = lowmem.train_step(state, batches, loss_fn, accelerator, learning_rate=rate, max_grad_norm=1.0)
        if state.step % 50 == 0:
            accelerator.print(f"step {state.step}: loss {result.loss:.3f}, exact {result.metrics['exact']:.3f}")
    exact = lowmem.evaluate(model, held_out, loss_fn, accelerator)["eval_exact"]
    accelerator.print(f"exact captions of {len(shown)} new images: {exact:.3f} (guessing: {1 / len(CAPTIONS):.3f})")
    stream.close()
    accelerator.end_training()


if __name__ == "__main__":
    fire.Fire(main)
