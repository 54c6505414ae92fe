"""Classification: is a review for or against the film? The model is built by AutoModelForSequenceClassification.

Each review praises one thing and criticizes another, and its verdict is in the clause that "but" or "although" marks,
so a classifier that ignores the order of words is right half of the time.

python examples/classify.py
"""

import random

import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import lowmem

PARTS = "acting plot music ending dialogue camera cast pace humour script".split()
GOOD = "great brilliant moving funny clever superb".split()
BAD = "dull awful weak clumsy boring flat".split()
WORDS = ["<pad>", *"the was but although".split(), *PARTS, *GOOD, *BAD]


def make_rows(count: int) -> list[dict[str, object]]:
    """Make reviews with their verdicts (1: good), a function of `count`."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        verdict = rng.randrange(2)
        mine, other = (GOOD, BAD) if verdict else (BAD, GOOD)
        this, that = (f"the {part} was" for part in rng.sample(PARTS, 2))
        this, that = f"{this} {rng.choice(mine)}", f"{that} {rng.choice(other)}"
        orders = (f"{that} but {this}", f"{this} although {that}", f"although {that} {this}")
        rows.append({"review": rng.choice(orders), "verdict": verdict})
    return rows


def encode(row: dict[str, object]) -> dict[str, list[int]]:
    """Return a row with a single label: `collate` pads it to a column, and counts one target."""
    return {"input_ids": [WORDS.index(word) for word in row["review"].split()], "labels": [row["verdict"]]}


def loss_fn(model, batch):
    """Return the summed cross-entropy, and the correct answers as a metric: `evaluate` and each step divide both."""
    inputs, classes = dict(batch.inputs), batch.inputs["labels"][:, 0]
    del inputs["labels"]  # given labels, the model would compute a mean loss
    logits = model(**inputs).logits.float()
    loss = F.cross_entropy(logits, classes, reduction="sum")  # skips rows with the label -100
    return loss, {"accuracy": ((logits.argmax(-1) == classes).sum(), batch.num_targets)}


def main(steps: int = 200) -> None:
    accelerator = lowmem.init_distributed()
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": 16, "num_labels": 2, **size}
    # to fine-tune a language model, give its folder instead of a config: only the head is then drawn at random
    model, _ = lowmem.load_model(model_config=config, auto_class=AutoModelForSequenceClassification)
    model = lowmem.parallelize(model, accelerator)
    optimizer = lowmem.make_optimizer(model, weight_decay=0.01)
    rows, ranks = make_rows(3000), lowmem.data_place(model).coordinates
    stream = lowmem.open_stream(rows[:2500], encode, global_batch_size=32, batch_size=32, **ranks)
    held_out = lowmem.open_eval(rows[2500:], encode, batch_size=100, **ranks)
    lowmem.check_model(model, loss_fn, batch=next(iter(held_out)))  # the loss must be a sum over rows

    state = lowmem.TrainState(model, optimizer, stream)
    for step, batches in zip(range(steps), stream, strict=False):
        rate = lowmem.learning_rate_at(step, total_steps=steps, peak=1e-3, warmup_steps=20)
        result = lowmem.train_step(state, batches, loss_fn, accelerator, learning_rate=rate, max_grad_norm=1.0)
        if state.step % 50 == 0:
            accelerator.print(f"step {state.step}: loss {result.loss:.3f}, accuracy {result.metrics['accuracy']:.3f}")
    stream.close()
    accuracy = lowmem.evaluate(model, held_out, loss_fn, accelerator)["eval_accuracy"]
    accelerator.print(f"accuracy on {len(rows[2500:])} new reviews: {accuracy:.3f} (ignoring word order: 0.5)")
    accelerator.end_training()


if __name__ == "__main__":
    main()
