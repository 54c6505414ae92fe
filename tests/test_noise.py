"""NEFTune: the noise is that of transformers without padding, and depends on neither padding, packing nor savers."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from lowmem.data.batch import collate
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.packing import pack
from lowmem.loss import make_loss, plain_loss
from lowmem.memory.savers import SAVERS, entered
from lowmem.model.noise import document_lengths
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.models import build, qa_rows
from tests.test_evaluate import TOKENIZER

NOISY = make_loss("plain", neftune_noise_alpha=5.0)


def batches(family, *sizes):
    kind = encode_seq2seq if family == "t5" else encode_causal
    rows = [kind(TOKENIZER, max_seq_len=64)(row) for row in qa_rows(sum(sizes))]
    pad = partial(collate, causal=family != "t5")
    return [pad(rows[sum(sizes[:at]) : sum(sizes[: at + 1])]) for at in range(len(sizes))]


def test_without_padding_the_noise_is_that_of_transformers():
    model, (batch,) = build("llama"), batches("llama", 1)
    torch.manual_seed(3)
    mine = NOISY(model, batch)
    hook = activate_neftune(model, 5.0)
    torch.manual_seed(3)
    theirs = plain_loss(model, batch)
    deactivate_neftune(model, hook)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert mine.item() != pytest.approx(plain_loss(model, batch).item(), rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_evaluation_has_no_noise(family):
    model, (batch,) = build(family), batches(family, 4)
    assert NOISY(model.eval(), batch) == plain_loss(model, batch)
    assert NOISY(model.train(), batch) != plain_loss(model, batch)


def test_the_length_is_that_of_a_document_without_padding():
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 7, 11)]
    for causal in (True, False):
        assert document_lengths(collate(rows, causal=causal)).tolist() == [[3.0], [7.0], [11.0]]
    (packed,) = pack(list(enumerate(rows)), max_seq_len=12, micro_batches=1)
    lengths = document_lengths(collate(packed, causal=True)).int().tolist()  # the last document of a row is padding
    assert sorted(lengths) == [[7] * 7 + [3] * 3 + [6] * 6, [11] * 11 + [5] * 5]


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("saver", ["recompute", "layered"])
def test_savers_keep_the_bits_of_a_noisy_step(family, saver):
    def trained(*savers):
        model = build(family, **({"dropout_rate": 0.1, "attn_implementation": "eager"} if family == "t5" else {}))
        optimizer = make_optimizer(model, memory="off")
        state = TrainState(model, optimizer, seed=4)
        loss_fn = make_loss("chunked", neftune_noise_alpha=5.0)
        with entered([SAVERS[name] for name in savers], model, optimizer):
            result = train_step(state, batches(family, 3, 2), loss_fn, Accelerator(cpu=True), learning_rate=1e-2)
        return result.loss, {
            name: x for name, x in model.named_parameters() if x is not model.get_input_embeddings().weight
        }

    (loss, plain), (same_loss, saved) = trained(), trained(saver)
    assert loss == same_loss
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
