"""Direct preference optimization (DPO; Rafailov et al., 2023, arXiv 2305.18290) without a reference model in memory.

The reference's log-probabilities never change: `add_reference` computes them once and keeps them in a file, so the peak
is that of supervised fine-tuning (SFT). A model learns to repeat two numbers: SFT in any order, DPO in the prompt's.
"""

import json
import tempfile
from itertools import permutations
from pathlib import Path

import torch
import xxhash
from accelerate.utils import gather_object
from torch.nn import functional as F

import lowmem

SHAPE = {"model_type": "llama", "vocab_size": 43, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def encode(row):
    """Return the chosen sequence and then the rejected one in one list of ids, which `collate` cuts."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    labels = [-100] * len(prompt) + chosen + [-100] * len(prompt) + rejected
    pair = {"input_ids": prompt + chosen + prompt + rejected, "labels": labels, "cut": len(prompt + chosen)}
    return pair | {"reference": row.get("reference", [0.0, 0.0])}


def collate(rows):
    """Return a batch of sequences 2i (chosen) and 2i + 1 (rejected). A pair counts as one target."""
    parts = [(row, part) for row in rows for part in (slice(row["cut"]), slice(row["cut"], None))]
    sequences = [{name: row[name][part] for name in ("input_ids", "labels")} for row, part in parts]
    inputs = lowmem.collate(sequences, causal=True).inputs
    inputs["reference"] = torch.tensor([row["reference"] for row in rows])
    return lowmem.Batch(inputs, num_targets=len(rows), row_ids=[])


def pair_logps(model, batch):
    """Return the log-probabilities of the chosen and the rejected answers: (pairs, 2), fp32."""
    input_ids, labels = batch.inputs["input_ids"], batch.inputs["labels"][:, 1:]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # padding comes last: no mask needed
    return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1).unflatten(0, (-1, 2))


def dpo_loss(model, batch, *, beta=0.1):
    logps = pair_logps(model, batch)
    chosen, rejected = (logps - batch.inputs["reference"]).unbind(1)
    loss = -F.logsigmoid(beta * (chosen - rejected)).sum()
    return loss, {"preferred": ((logps[:, 0] > logps[:, 1]).sum(), len(logps))}


@torch.no_grad()
def add_reference(rows, model, accelerator, folder):
    """Return the rows with the model's log-probabilities, without dropout, computed once and kept in `folder`."""
    hashed = xxhash.xxh3_64(json.dumps(rows).encode())
    for weight in model.parameters():
        hashed.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    path, found = Path(folder, f"reference-{hashed.hexdigest()}.json"), []  # another file for other rows or weights
    if all(gather_object([path.exists()])):  # the same answer on every rank
        content, _, digest = path.read_text().partition("\n")
        if digest != xxhash.xxh3_64_hexdigest(content.encode()):
            raise lowmem.UsageError(f"{path} has changed since it was written: delete it")
    else:
        ranks = lowmem.data_place(model).coordinates
        for batch in lowmem.open_eval(rows, encode, batch_size=64, collate=collate, **ranks):
            found += zip(batch.row_ids, pair_logps(model.eval(), batch.to(accelerator.device)).tolist(), strict=False)
        model.train()
        content = json.dumps([logps for _, logps in sorted(gather_object(found))])
        if accelerator.is_main_process:
            path.write_text(f"{content}\n{xxhash.xxh3_64_hexdigest(content.encode())}")
    return [row | {"reference": logps} for row, logps in zip(rows, json.loads(content), strict=True)]


def main(folder):
    accelerator = lowmem.init_distributed()
    torch.manual_seed(0)
    model = lowmem.parallelize(lowmem.load_model(model_config=SHAPE)[0], accelerator)
    options = {"encode": encode, "collate": collate, "batch_size": 32, **lowmem.data_place(model).coordinates}
    rows = [{"prompt": [a, b, 2], "chosen": [a, b], "rejected": [b, a]} for a, b in permutations(range(3, 43), 2)]
    held_out, rows = rows[::5], [row for at, row in enumerate(rows) if at % 5]

    def train(rows, loss_fn, steps):
        stream = lowmem.open_stream(rows, global_batch_size=32, **options)
        state = lowmem.TrainState(model, lowmem.make_optimizer(model), stream)
        for _, batches in zip(range(steps), stream, strict=False):
            lowmem.train_step(state, batches, loss_fn, accelerator, learning_rate=3e-3, max_grad_norm=1.0)
        stream.close()
        return lowmem.evaluate(model, lowmem.open_eval(held_out, **options), dpo_loss, accelerator)["eval_preferred"]

    sft = train(rows, lambda model, batch: -pair_logps(model, batch).sum(), steps=150)
    dpo = train(add_reference(rows, model, accelerator, folder), dpo_loss, steps=60)
    accelerator.print(f"held-out pairs in which the chosen answer is more probable: SFT {sft:.1%}, DPO {dpo:.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # your own folder keeps the file for the next run
        main(folder)
