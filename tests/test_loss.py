import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import CausalLMOutput

from lowmem.cross_entropy import chunked_cross_entropy, vocabulary_slices
from lowmem.data.batch import collate
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import UsageError
from lowmem.loss import chunked_loss, plain_loss
from lowmem.model.checks import check_loss, check_model
from lowmem.plan.meter import MemoryMeter
from tests.forked import fork_ranks
from tests.models import FAMILIES, build


def batch_of(family, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 259, (length,), generator=generator).tolist()

    encoded = []
    for number in range(rows):
        prompt, response = ids(3, 20), ids(1, 12)
        if number == 2:
            response = [-100] * len(response)  # the third row has no targets
        if family == "t5":
            encoded.append({"input_ids": prompt, "labels": response})
        else:
            tokens = [max(token, 0) for token in response]
            encoded.append({"input_ids": prompt + tokens, "labels": [-100] * len(prompt) + response})
    return collate(encoded)


def gradients(model):
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: parameter.grad.clone() for name, parameter in trained}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("elements", [1, 1000, 10**7])  # a slice then has 1, about 30, or all vocabulary entries
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])  # output heads: tied and scaled, untied, tied
def test_chunked_loss_equals_plain_loss(family, elements, label_smoothing):
    model, batch = build(family), batch_of(family)
    results = []
    for loss_fn in (plain_loss, partial(chunked_loss, slice_elements=elements)):
        model.zero_grad()
        loss = loss_fn(model, batch, label_smoothing=label_smoothing)
        (loss / batch.num_targets).backward()
        results.append((loss.detach(), gradients(model)))
    (plain, plain_gradients), (chunked, chunked_gradients) = results
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_plain_loss_per_target_is_the_models_own_loss(family):
    model, batch = build(family), batch_of(family)
    mean = model(**batch.inputs, use_cache=False).loss
    torch.testing.assert_close(plain_loss(model, batch) / batch.num_targets, mean)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_head_with_bias_has_torchs_gradients(label_smoothing):
    targets = torch.tensor([0, 8, 4, 3, 3, 1])
    results = []
    for chunked in (True, False):
        torch.manual_seed(0)
        shapes = [(6, 4), (9, 4), (9,)]
        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        if chunked:
            loss = chunked_cross_entropy(*inputs, targets, label_smoothing=label_smoothing, slice_elements=2 * 9)
        else:
            logits = torch.nn.functional.linear(*inputs)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        (loss * 0.7).backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


class ProductFlags(TorchDispatchMode):
    """Record at each matrix product whether cuBLAS may round parts of its sums to bf16."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.found.append(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
        return function(*args, **(kwargs or {}))


def test_products_of_the_head_round_their_sums_once():
    hidden, weight = (torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with ProductFlags() as flags:
        chunked_cross_entropy(hidden, weight, None, torch.arange(6)).backward()
    assert flags.found and not any(flags.found)
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


VOCABULARY = 151_936  # the vocabulary size of Qwen2.5-0.5B


def head_gradients(states, weight, targets, label_smoothing, loss, slice_elements=None):
    """Return the summed loss, and the gradients of `states` and `weight` for the mean loss per target."""
    states, weight = states.clone().requires_grad_(), weight.clone().requires_grad_()
    counting = targets != -100
    if loss == "chunked":
        options = {"label_smoothing": label_smoothing, "slice_elements": slice_elements}
        total = chunked_cross_entropy(states[counting], weight, None, targets[counting], **options)
    else:
        logits = torch.nn.functional.linear(states, weight)
        total = torch.nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            targets,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
    (total / counting.sum()).backward()
    return total.detach(), states.grad, weight.grad


def head(rows=48, width=16):
    """Make hidden states, a head's weight and targets; every fifth target, and each in the middle third, is -100."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=generator)
    weight = torch.randn(VOCABULARY, width, generator=generator) * width**-0.5
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[::5] = -100
    targets[rows // 3 : 2 * rows // 3] = -100
    return states, weight, targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_of_a_large_vocabulary_in_fp32_and_bf16(label_smoothing):
    states, weight, targets = head()
    # the reference for bf16 also starts from the rounded inputs, so that their rounding does not count as an error
    rounded = states.bfloat16(), weight.bfloat16()
    exact = head_gradients(states.double(), weight.double(), targets, label_smoothing, "plain")
    exact_of_rounded = head_gradients(*(x.double() for x in rounded), targets, label_smoothing, "plain")
    plain = head_gradients(*rounded, targets, label_smoothing, "plain")
    num_targets = int((targets != -100).sum())
    for chunks in (1, 16, 256):
        elements = -(-VOCABULARY // chunks) * num_targets
        assert chunks <= len(vocabulary_slices(num_targets, VOCABULARY, elements, most=VOCABULARY)) <= 1.1 * chunks
        in_fp32 = head_gradients(states, weight, targets, label_smoothing, "chunked", elements)
        torch.testing.assert_close(in_fp32[0].double(), exact[0], rtol=1e-6, atol=0)
        for gradient, expected in zip(in_fp32[1:], exact[1:], strict=True):
            assert (gradient.double() - expected).norm() <= 1e-6 * expected.norm(), chunks

        chunked = head_gradients(*rounded, targets, label_smoothing, "chunked", elements)
        assert chunked[0].dtype == torch.float32 and chunked[2].dtype == torch.bfloat16
        for of_plain, of_chunked, expected in zip(plain, chunked, exact_of_rounded, strict=True):
            assert (of_chunked.double() - expected).norm() <= 1.5 * (of_plain.double() - expected).norm(), chunks


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_bf16_autocast_gives_an_fp32_loss_and_head_gradients_about_as_accurate_as_plain_loss(family):
    exact, model, batch = build(family).double(), build(family), batch_of(family, rows=40)
    plain_loss(exact, batch).backward()
    weight = model.get_output_embeddings().weight
    errors = []
    for loss_fn in (plain_loss, partial(chunked_loss, slice_elements=384)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model, batch)
        assert loss.dtype == torch.float32
        loss.backward()
        errors.append((weight.grad - exact.get_output_embeddings().weight.grad).norm())
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize(
    ("changes", "copies"),
    [([], 1), ([("mul", 0.5), ("add", torch.ones(VOCABULARY))], 1), ([("div", 2.0), ("tanh", None), ("mul", 2.0)], 2)],
    ids=["none", "scale and bias", "soft-capping"],
)
def test_memory_holds_one_slice_of_logits_and_backward_of_soft_capping_two(changes, copies):
    states, weight, targets = head(rows=480)
    states, weight = states.requires_grad_(), weight.requires_grad_()
    a_slice, small = 2**22 * 4, 2**20
    with MemoryMeter() as meter:
        loss = chunked_cross_entropy(states, weight, None, targets.clamp(min=0), label_smoothing=0.1, changes=changes)
        assert meter.peak_bytes < a_slice + small
        meter.reset_peak()
        loss.backward()
        assert meter.peak_bytes < copies * a_slice + weight.nbytes + small < 480 * VOCABULARY * 4


def test_num_targets_must_equal_the_number_of_labels_that_count():
    batch = dataclasses.replace(batch_of("t5"), num_targets=3)
    with pytest.raises(RuntimeError, match="num_targets must be the number of labels except -100"):
        chunked_loss(build("t5"), batch)


def test_gradients_scale_with_the_upstream_gradient():
    model, batch = build("llama"), batch_of("llama")
    loss = chunked_loss(model, batch)
    loss.backward(retain_graph=True)
    once = gradients(model)
    (3 * loss).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 4 * once[name], rtol=1e-5, atol=1e-6)


def test_evaluation_computes_no_gradient():
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


SHAPE = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BART = {"vocab_size": 384, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
BART |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
MAMBA = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
CHANGED = {
    "gemma2": SHAPE | {"final_logit_softcapping": 0.02},  # far below the usual 30, so that it matters here
    "cohere": SHAPE | {"logit_scale": 0.5},
    "granite": SHAPE | {"logits_scaling": 0.2},
    "recurrent_gemma": SHAPE | {"logits_soft_cap": 0.02, "lru_width": 32},
    "mamba": MAMBA,  # casts its logits to fp32
    "bart": BART,
    "marian": BART | {"decoder_vocab_size": 384, "pad_token_id": 0, "decoder_start_token_id": 0},
}


def changed_model(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CHANGED[model_type])
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model, batch_of("t5" if config.is_encoder_decoder else "llama")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("model_type", CHANGED)
def test_what_a_model_does_to_its_logits_is_done_to_each_slice(model_type, label_smoothing):
    model, batch = changed_model(model_type)
    check_loss(chunked_loss, model)
    model.eval()
    expected = plain_loss(model, batch, label_smoothing=label_smoothing)
    expected.backward()
    plain = gradients(model)
    model.zero_grad()
    loss = chunked_loss(model, batch, label_smoothing=label_smoothing, slice_elements=600)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        assert (gradient - plain[name]).norm() <= 1e-6 * plain[name].norm() + 1e-9, name


def test_constants_may_have_any_shape_and_dtype():
    scale, bias = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.arange(384).reshape(1, 1, -1) / 100
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 3)
    model = Stretched(build("llama"), lambda logits: (logits * scale).float() + bias)
    torch.testing.assert_close(chunked_loss(model, batch, slice_elements=600), plain_loss(model, batch))


@pytest.mark.parametrize("model_type", ["mamba", "gemma2"])
def test_a_cast_of_the_logits_is_no_change(model_type):
    model, batch = changed_model(model_type)
    model = model.to(torch.bfloat16).eval()
    expected, loss = plain_loss(model, batch), chunked_loss(model, batch)
    assert abs(loss - expected) < 0.01 * expected


class Stretched(nn.Module):
    """A model that changes its logits in a way that is not done element by element."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.config = model, change, model.config
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.softmax(-1),
        lambda logits: logits[..., :300],
        lambda logits: logits * torch.ones(3, 1, 1),
        lambda logits: logits * torch.ones(384, requires_grad=True),
        lambda logits: torch.add(logits, 1.0, alpha=2.0),
        lambda logits: logits.clamp_(-0.1, 0.1),
        lambda logits: logits.index_fill_(-1, torch.tensor([5]), -9.0),
        lambda logits: logits / logits.detach().std(),
    ],
    ids=["softmax", "cut", "per row", "trained", "keyword", "clamp_", "index_fill_", "by its own size"],
)
def test_other_changes_of_the_logits_are_refused(change):
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 3)
    with pytest.raises(UsageError, match="changes its logits after the head by more than .*: use plain_loss"):
        chunked_loss(Stretched(build("llama"), change), batch)


def test_hidden_states_may_be_used_again_after_the_head():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build("llama")
            self.config, self.get_output_embeddings = self.model.config, self.model.get_output_embeddings

        def forward(self, **inputs):
            hidden = self.model.model(**inputs).last_hidden_state
            logits = self.model.lm_head(hidden)
            hidden * 0.5 + 1  # such as for another head
            return CausalLMOutput(logits=logits)

    model, batch = Reuses(), batch_of("llama")
    torch.testing.assert_close(chunked_loss(model, batch), plain_loss(model, batch), rtol=1e-6, atol=0)


def test_a_causal_row_whose_first_label_counts_is_refused():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    for loss_fn in (plain_loss, chunked_loss):
        with pytest.raises(RuntimeError, match="first label of a causal row must be -100"):
            loss_fn(build("llama"), batch)


def test_the_head_is_restored_after_the_loss():
    model, batch = build("t5"), batch_of("t5")
    before = copy.deepcopy(model.state_dict())
    chunked_loss(model, batch)
    assert "forward" not in vars(model.lm_head)
    assert model(**batch.inputs).logits.shape[-1] == 384
    assert model.state_dict().keys() == before.keys()


def test_labels_of_another_length_than_the_hidden_states_are_refused():
    batch = collate([{"input_ids": [5] * 10, "labels": [-100, 3, 4]}])
    batch = dataclasses.replace(batch, inputs={**batch.inputs, "labels": torch.tensor([[-100, 3, 4]])}, num_targets=2)
    with pytest.raises(ValueError, match=r"shape \(1, 10\) but labels of shape \(1, 3\)"):
        chunked_loss(build("llama"), batch)


def bert(**fields):
    fields |= {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    # initialize large weights, so that the model attends to other tokens, as a trained model does
    fields |= {"intermediate_size": 32, "initializer_range": 0.5}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **fields))


def test_a_model_that_sees_its_targets_is_refused():
    with pytest.raises(UsageError, match="BertLMHeadModel sees the tokens that it must predict"):
        check_loss(plain_loss, bert())
    check_loss(plain_loss, bert(is_decoder=True))


def check_on_four_ranks():
    model = build("llama", num_hidden_layers=8, num_key_value_heads=4, hidden_size=64)
    check_loss(plain_loss, parallelize(model, init_distributed(), tp_size=4))


def test_four_tensor_parallel_ranks_accept_a_model_whose_sums_depend_on_the_row():
    assert fork_ranks(4, check_on_four_ranks) == [0] * 4


def test_a_mean_instead_of_a_sum_is_refused_before_the_run():
    def mean_loss(model, batch):
        return plain_loss(model, batch) / max(1, batch.num_targets)

    for family in ("t5", "llama"):
        with pytest.raises(UsageError, match="must be a sum over target tokens"):
            check_loss(mean_loss, build(family))


def test_a_causal_loss_that_does_not_shift_labels_is_refused():
    def unshifted(model, batch):
        logits = model(input_ids=batch.inputs["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.inputs["labels"].flatten(), reduction="sum")

    for family in ("llama", "qwen2"):
        with pytest.raises(UsageError, match="depends on the input token at the same position.* shift the labels"):
            check_loss(unshifted, build(family))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_not_finite_are_named(family, value):
    model = build(family)
    name, weight = [*model.named_parameters()][-2]
    with torch.no_grad():
        weight.view(-1)[1] = value
    with pytest.raises(UsageError, match=f"1 weights of the model have values that are not finite .{name}, "):
        check_model(model, chunked_loss, packing=False, max_seq_len=20)


def test_more_tokens_than_the_model_has_positions_are_refused():
    fields = {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **fields))
    assert check_model(model, chunked_loss, packing=False, max_seq_len=20) == 20
    message = r"GPT2LMHeadModel fails on a row of max_seq_len=512 tokens \(index .* of 20 embeddings\): lower .*, 20"
    with pytest.raises(UsageError, match=message):
        check_model(model, chunked_loss, packing=False, max_seq_len=512)
    assert check_model(model, chunked_loss, packing=False, max_seq_len=512, may_shorten=True) == 20


def test_out_of_memory_at_the_longest_row_is_not_reported_as_missing_positions():
    with pytest.raises(RuntimeError, match="allocate") as raised:
        check_model(build("llama"), plain_loss, packing=False, max_seq_len=2**46)
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize(
    ("name", "size"), [("num_hidden_layers", 0), ("num_hidden_layers", -1), ("intermediate_size", 0)]
)
def test_a_model_without_layers_is_refused(name, size):
    model = build("llama")
    setattr(model.config, name, size)
    with pytest.raises(UsageError, match=f"config.json has {name}={size}, but it must be at least 1"):
        check_model(model, chunked_loss, packing=False, max_seq_len=16)


def test_a_model_with_nan_in_its_config_is_refused():
    model = build("llama")
    model.config.attention_dropout = float("nan")
    with pytest.raises(UsageError, match="config.json has attention_dropout=NaN, but it must be a number"):
        check_model(model, chunked_loss, packing=False, max_seq_len=16)


def test_a_model_that_adds_its_own_loss_is_refused():
    model = build("llama")
    model.config.output_router_logits = True
    with pytest.raises(UsageError, match="with output_router_logits=True, .* adds a loss of its own.*set it to false"):
        check_model(model, plain_loss, packing=False, max_seq_len=8)
    fields = {"vocab_size": 99, "hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    fields |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    fields |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("prophetnet", **fields))
    with pytest.raises(UsageError, match="with disable_ngram_loss=False, .* set it to true"):
        check_model(model, plain_loss, packing=False, max_seq_len=8)
    model.config.disable_ngram_loss = True
    check_model(model, plain_loss, packing=False, max_seq_len=8)


def test_mbart_takes_a_row_whose_labels_are_all_padding():
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("mbart", **BART, pad_token_id=2, eos_token_id=2))
    batch = collate([{"input_ids": [5, 6], "labels": [2]}, {"input_ids": [5, 6], "labels": [7, 2]}])
    assert chunked_loss(model, batch).isfinite()


def test_an_encoder_decoder_whose_decoder_sees_its_targets_is_refused():
    model = build("t5", attn_implementation="eager")
    model.decoder.config.is_decoder = False  # then its mask hides no later token
    with pytest.raises(UsageError, match="T5ForConditionalGeneration sees the tokens that it must predict: update"):
        check_loss(plain_loss, model)
