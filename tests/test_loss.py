import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lowmem.config import UsageError
from lowmem.data.stream import collate
from lowmem.memory import loss as loss_module
from lowmem.memory.loss import check_loss, chunked_loss, plain_loss
from tests.models import LLAMA, build


def batch_of(family, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    encoded = []
    for number in range(rows):
        prompt, response = ids(3, 20), ids(1, 12)
        if number == 2:
            response = [-100] * len(response)  # a row without a target
        if family == "t5":
            encoded.append({"input_ids": prompt, "labels": response})
        else:
            tokens = [max(token, 0) for token in response]
            encoded.append({"input_ids": prompt + tokens, "labels": [-100] * len(prompt) + response})
    return collate(encoded)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("elements", [1, 1000, 10**7])  # a token of the vocabulary a slice; some 30; all
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])  # tied and scaled, untied, tied
def test_chunked_loss_equals_plain_loss(family, elements, label_smoothing, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", elements)
    model, batch = build(family), batch_of(family)
    results = []
    for loss_fn in (plain_loss, chunked_loss):
        model.zero_grad()
        loss = loss_fn(model, batch, label_smoothing=label_smoothing)
        (loss / batch.num_targets).backward()
        results.append((loss.detach(), gradients(model)))
    (plain, plain_gradients), (chunked, chunked_gradients) = results
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_plain_loss_is_the_sum_of_the_models_own_mean(family):
    model, batch = build(family), batch_of(family)
    mean = model(**batch.inputs, use_cache=False).loss
    torch.testing.assert_close(plain_loss(model, batch) / batch.num_targets, mean)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_head_with_bias_has_torchs_gradients(label_smoothing, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 2 * 9)
    targets = torch.tensor([0, 8, 4, 3, 3, 1])
    results = []
    for chunked in (True, False):
        torch.manual_seed(0)
        shapes = [(6, 4), (9, 4), (9,)]
        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        if chunked:
            loss = loss_module._ChunkedCrossEntropy.apply(*inputs, targets, label_smoothing, torch.float64)
        else:
            logits = torch.nn.functional.linear(*inputs)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        (loss * 0.7).backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_bf16_autocast_sums_the_heads_gradient_in_fp32(family, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 384)  # one row a chunk: the most sums there can be
    exact, model, batch = build(family).double(), build(family), batch_of(family, rows=40)
    plain_loss(exact, batch).backward()
    head = model.get_output_embeddings().weight
    errors = {}
    for loss_fn in (plain_loss, chunked_loss):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model, batch)
        assert loss.dtype == torch.float32
        loss.backward()
        errors[loss_fn] = (head.grad - exact.get_output_embeddings().weight.grad).norm()
    assert errors[chunked_loss] <= 1.5 * errors[plain_loss]


def test_evaluation_takes_no_gradient():
    model, batch = build("llama"), batch_of("llama")
    with torch.no_grad():
        loss = chunked_loss(model, batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(model, batch).detach(), rtol=1e-6, atol=0)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    model, batch = build("llama"), batch_of("llama")
    model.lm_head.requires_grad_(False)
    chunked_loss(model, batch).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
def test_a_model_that_changes_its_logits_after_the_head_is_refused(model_type):
    changes = {"granite": {"logits_scaling": 2.0}, "cohere": {"logit_scale": 0.5}, "gemma2": {"head_dim": 8}}
    fields = LLAMA | changes[model_type]
    fields.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with pytest.raises(UsageError, match="changes its logits after the output head.*use plain_loss"):
        chunked_loss(model, batch_of("llama"))
    with pytest.raises(UsageError, match="changes its logits"):
        check_loss(chunked_loss, model)
    check_loss(plain_loss, model)
    assert plain_loss(model, batch_of("llama")).isfinite()


def test_a_bias_of_the_vocabularys_size_after_the_head_is_refused():
    fields = {"vocab_size": 384, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    config = AutoConfig.for_model("bart", **fields, decoder_ffn_dim=32)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UsageError, match="BartForConditionalGeneration changes its logits.*a bias"):
        check_loss(chunked_loss, model)
    check_loss(plain_loss, model)


def test_a_causal_row_whose_first_label_counts_is_refused():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    for loss_fn in (plain_loss, chunked_loss):
        with pytest.raises(RuntimeError, match="first label of a causal row must be -100"):
            loss_fn(build("llama"), batch)


def test_the_head_is_itself_again_after_the_loss():
    model, batch = build("t5"), batch_of("t5")
    before = copy.deepcopy(model.state_dict())
    chunked_loss(model, batch)
    assert "forward" not in vars(model.lm_head)
    assert model(**batch.inputs).logits.shape[-1] == 384
    assert model.state_dict().keys() == before.keys()
