"""`train` has the results of a loop written by hand with torch and transformers, with the same settings."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import ByT5Tokenizer, get_scheduler

from lowmem.config.parse import resolve
from lowmem.data.order import Groups, rows_at
from lowmem.data.rows import RowSets
from lowmem.distributed.signals import Signals
from lowmem.train import train as train_here
from tests.models import T5, build, qa_rows
from tests.processes import train

ROWS = qa_rows(20)
STEPS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "t5.json").write_text(json.dumps(T5 | {"dropout_rate": 0.0}))
    return [f"--train_file={folder}/rows.jsonl", f"--model_config={folder}/t5.json"]


def by_hand(optimizer, precision):
    """Train with plain torch in lowmem's row order, 6 rows per step; return losses, gradient norms, learning rates."""
    tokenizer, model = ByT5Tokenizer(), build("t5", seed=3)
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "layer_norm" not in name]
    others = [p for name, p in model.named_parameters() if "bias" in name or "layer_norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if optimizer == "adamw":
        stepper = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    else:
        stepper = torch.optim.SGD(groups, lr=1e-2)
    scheduler = get_scheduler("linear", stepper, num_warmup_steps=2, num_training_steps=STEPS)
    curve = []
    for step in range(STEPS):
        rows = [ROWS[i] for i in rows_at(6 * step, 6 * step + 6, Groups.of([20]), seed=3)]
        prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
        labels = tokenizer([row["response"] for row in rows], return_tensors="pt", padding=True).input_ids
        labels[labels == tokenizer.pad_token_id] = -100
        with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            logits = model(**prompts, decoder_input_ids=model._shift_right(labels)).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        curve.append((loss.item(), norm.item(), scheduler.get_last_lr()[0]))
        stepper.step()
        scheduler.step()
        stepper.zero_grad()
    return curve


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "no"), ("sgd", "no"), ("adamw", "bf16")])
def test_optimizer_schedule_loss_and_precision_flags_reach_the_run(files, optimizer, precision, tmp_path):
    adam = ["--adam_beta1=0.8", "--adam_beta2=0.95", "--adam_epsilon=1e-6"] if optimizer == "adamw" else []
    flags = ["--batch_size=3", "--gradient_accumulation_steps=2", f"--max_steps={STEPS}", "--learning_rate=1e-2"]
    flags += ["--lr_scheduler_type=linear", "--warmup_steps=2", "--weight_decay=0.1", "--max_grad_norm=0.5"]
    flags += ["--label_smoothing=0.1", "--seed=3", "--logging_steps=1", f"--optimizer={optimizer}", *adam]
    result = train("train", *files, *flags, f"--mixed_precision={precision}", f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    mine = [(r["loss"], r["grad_norm"], r["learning_rate"]) for r in records if "loss" in r]
    expected = by_hand(optimizer, precision)
    assert mine[0][2] == 0 and mine[2][2] == 1e-2  # warm-up starts at learning rate 0
    for step, (found, wanted) in enumerate(zip(mine, expected, strict=True)):
        assert found == pytest.approx(wanted, rel=1e-5 if precision == "no" else 2e-2), step
    if precision == "bf16":
        in_fp32 = by_hand(optimizer, "no")
        assert any(abs(a[0] - b[0]) > 1e-4 for a, b in zip(mine, in_fp32, strict=True))


def test_recompute_reaches_the_run(files, tmp_path):
    """Compare how many bytes autograd saves for backward with recompute=full and recompute=off."""

    def kept_bytes(recompute):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        values = dict(flag.removeprefix("--").split("=", 1) for flag in files)
        settings = {"max_steps": 1, "recompute": recompute, "output_dir": tmp_path / recompute}
        config = resolve(values | settings)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train_here(config, RowSets(ROWS), signals=Signals())
        return kept

    assert kept_bytes("full") < 0.6 * kept_bytes("off")


def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped_and_reported(files, tmp_path):
    flags = [*files, "--optimizer=sgd", "--learning_rate=1e30", "--max_grad_norm=0", "--max_steps=4", "--save_steps=1"]
    stopped = train("train", *flags, f"--output_dir={tmp_path}/stop")
    assert stopped.returncode == 1 and stopped.stderr.count("\n") == 1
    record = json.loads((tmp_path / "stop" / "exit.json").read_text())
    assert (record["cause"], record["code"]) == ("failed", 1) and f"error: {record['message']}\n" == stopped.stderr
    assert "rank 0 with rows [" in stopped.stderr and "Nothing was updated: lower the learning rate" in stopped.stderr
    skipped = train("train", *flags, f"--output_dir={tmp_path}/skip", "--nonfinite=skip", "--logging_steps=1")
    assert skipped.returncode == 0, skipped.stderr
    assert "step 4: no update, loss" in skipped.stdout
    records = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert records[3]["grad_norm"] is None and records[-1]["skipped"] == 3
