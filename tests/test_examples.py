"""Each example beats its baseline; gradients do not depend on the split."""

import math
import re
import runpy
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from lowmem import (
    TrainState,
    UsageError,
    collate,
    data_place,
    init_distributed,
    load_model,
    make_optimizer,
    open_stream,
    parallelize,
    train_step,
)
from lowmem.plan.meter import MemoryMeter
from tests.forked import fork_ranks
from tests.processes import ROOT, train

EXAMPLES = ROOT / "examples"


def example(name):
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def figures(name, *flags):
    """Run an example in a process of its own; return the numbers with a decimal point that it prints."""
    result = train(*flags, program=EXAMPLES / f"{name}.py")
    assert result.returncode == 0, result.stderr
    return [float(number) for number in re.findall(r"\d+\.\d+", result.stdout)]


def test_an_example_has_at_most_100_lines():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path


def test_a_student_with_a_teacher_has_a_lower_loss_than_alone():
    alone, distilled, of_teacher = figures("distill")
    assert of_teacher < distilled < alone - 0.1


def test_dpo_prefers_chosen_answers_where_sft_has_no_preference():
    sft, dpo = figures("dpo")
    assert 30 < sft < 70 and dpo > 95


def test_sampled_answers_get_a_much_higher_reward_than_guesses_also_after_a_break(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    guessing, first, last = figures("reinforce", f"--out={whole}")
    assert abs(first - guessing) < 0.05 and last > 0.6
    shutil.copytree(whole / "step-00000080", again / "step-00000080")
    assert figures("reinforce", f"--out={again}")[2] == last
    saved = [(out / "step-00000120" / "optimizer.safetensors").read_bytes() for out in (whole, again)]
    assert saved[0] == saved[1]


def test_a_mixture_learns_the_small_source_and_keeps_the_large_one():
    small_joined, small_mixed, large_joined, large_mixed = figures("mixture")
    assert small_mixed < small_joined / 2 and large_mixed < large_joined + 0.2


# --- gradients


def distillation():
    """Return the model, the loss, and the stream's rows, encoder and collate function."""
    distill = example("distill")
    teacher = distill.make_model(width=32, layers=1, seed=3).eval().requires_grad_(False)
    loss_fn = partial(distill.distillation_loss, teacher=teacher)
    rows = [{"tokens": row["tokens"][: 5 + i * 7 % 23]} for i, row in enumerate(distill.make_rows(12, seed=1))]
    return distill.make_model(width=32, layers=2, seed=4), loss_fn, rows, distill.encode, partial(collate, causal=True)


def preferences():
    dpo = example("dpo")
    torch.manual_seed(0)
    rows = [{"prompt": [3 + i] * (1 + i % 4), "chosen": [5] * (1 + i % 3), "rejected": [6, 7 + i]} for i in range(12)]
    for i, row in enumerate(rows):
        row["reference"] = [-1.0 - i, -2.0]
    return load_model(model_config=dpo.SHAPE)[0], dpo.dpo_loss, rows, dpo.encode, dpo.collate


def captions():
    caption = example("caption")
    rows = [{"caption": text, "seed": seed} for seed, text in enumerate(caption.CAPTIONS[:12])]
    return caption.build_model(), caption.loss_fn, rows, caption.encode, caption.collate


def reviews():
    classify = example("classify")
    shape = {"model_type": "bert", "vocab_size": len(classify.WORDS), "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16, "num_labels": 2}
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model, _ = load_model(model_config=shape, auto_class=AutoModelForSequenceClassification)
    return model, classify.loss_fn, classify.make_rows(12), classify.encode, collate


def gradients_of(make, batch_size, accelerator):
    """Return the gradients of the 12 rows, split into micro-batches of `batch_size` rows on each rank."""
    model, loss_fn, rows, encode, collate_rows = make()
    model = parallelize(model, accelerator)
    options = {"collate": collate_rows, "global_batch_size": 12, **data_place(model).coordinates}
    stream = open_stream(rows, encode, batch_size=batch_size, prefetch=0, **options)
    state, seen = TrainState(model, make_optimizer(model, memory="off"), stream), {}

    def note(gradients):
        seen.update({name: gradient.clone() for name, gradient in gradients.items()})

    train_step(state, next(iter(stream)), loss_fn, accelerator, learning_rate=0.0, before_update=note)
    stream.close()
    return seen


def save_gradients(make, path):
    accelerator = init_distributed()
    torch.save(gradients_of(make, 3, accelerator), f"{path}-{accelerator.process_index}")
    accelerator.end_training()


@pytest.mark.parametrize("make", [distillation, preferences, captions, reviews])
def test_gradients_do_not_depend_on_micro_batches_and_ranks(make, tmp_path):
    whole = gradients_of(make, 12, Accelerator(cpu=True))
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-2
    for batch_size in (5, 3, 1):
        split = gradients_of(make, batch_size, Accelerator(cpu=True))
        torch.testing.assert_close(split, whole, atol=1e-6, rtol=0)
    assert fork_ranks(2, save_gradients, make, tmp_path / "gradients") == [0, 0]
    for rank in range(2):
        of_rank = torch.load(tmp_path / f"gradients-{rank}")
        torch.testing.assert_close(of_rank, whole, atol=1e-6, rtol=0)


def test_dpo_has_the_peak_of_sft():
    model, dpo_loss, rows, encode, collate_pairs = preferences()
    batch, peaks = collate_pairs([encode(row) for row in rows]), []
    pair_logps = example("dpo").pair_logps
    for loss_fn in (lambda: -pair_logps(model, batch).sum(), lambda: dpo_loss(model, batch)[0]):
        model.zero_grad()
        with MemoryMeter() as meter:
            loss_fn().backward()
        peaks.append(meter.peak_bytes)
    sft, dpo = peaks
    assert abs(dpo - sft) < 0.01 * sft


# --- the file of reference log-probabilities


def referenced(folder):
    """Add the reference to rows; save them."""
    accelerator = init_distributed()
    model, _, rows, _, _ = preferences()
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    rows = example("dpo").add_reference(rows, parallelize(model, accelerator), accelerator, folder)
    torch.save([row["reference"] for row in rows], folder / f"rows-{accelerator.process_index}")
    accelerator.end_training()


def test_the_reference_is_computed_once_by_all_ranks_and_a_changed_file_is_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, ranks in ((one, 1), (two, 2)):
        folder.mkdir()
        assert fork_ranks(ranks, referenced, folder) == [0] * ranks
    expected = torch.tensor(torch.load(one / "rows-0"))
    assert len(expected) == 12 and (expected < -1).all()
    for rank in range(2):
        torch.testing.assert_close(torch.tensor(torch.load(two / f"rows-{rank}")), expected, atol=1e-5, rtol=0)
    (file,) = one.glob("reference-*.json")
    (other,) = two.glob("reference-*.json")
    assert file.name == other.name

    dpo, (model, _, rows, _, _) = example("dpo"), preferences()
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    again = dpo.add_reference(rows, model, Accelerator(cpu=True), one)
    assert not forwards and [row["reference"] for row in again] == expected.tolist()
    loss, _ = dpo.dpo_loss(model, dpo.collate([dpo.encode(row) for row in again]))
    assert loss.item() == pytest.approx(12 * math.log(2), abs=1e-4)  # the policy is still the reference
    forwards.clear()
    file.write_text(file.read_text().replace("-", "-1", 1))
    with pytest.raises(UsageError, match=f"{file} has changed since it was written: delete it"):
        dpo.add_reference(rows, model, Accelerator(cpu=True), one)
    dpo.add_reference(rows[1:], model, Accelerator(cpu=True), one)
    assert forwards and len([*one.glob("reference-*.json")]) == 2
