"""Weights are filled one at a time, in the format of their tier: with the bits, but not the bytes, of a whole model."""

import pytest
import torch
from accelerate import Accelerator
from transformers import ByT5Tokenizer

from lowmem import check_model, chunked_loss, freeze, load_model, make_optimizer, parallelize
from lowmem.checkpoint.tensors import model_tensors, named_parameters
from lowmem.errors import UsageError
from lowmem.optim.state import optimizer_tensors
from lowmem.plan.meter import MemoryMeter
from tests.models import build


def saved(folder, dtype=torch.float32, **changes):
    build("qwen2", **changes).to(dtype).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def load(source, *, fill, **optimizer):
    """Return all tensors of a model and its optimizer, and the peak bytes of filling and converting the weights."""
    torch.manual_seed(1)
    model, _ = load_model(**source, on_meta="model_name_or_path" in source and not fill)
    freeze(model, parts=["embeddings"])
    with MemoryMeter() as meter:
        meter.count(parameter for parameter in model.parameters() if not parameter.is_meta)
        model = parallelize(model, Accelerator(cpu=True), fill=fill)
        optimizer = make_optimizer(model, **optimizer)
    tensors = model_tensors(model) | optimizer_tensors(named_parameters(model, optimizer), optimizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return tensors, meter.peak_bytes


@pytest.mark.parametrize(
    ("memory", "dtype"), [("exact", torch.float32), ("exact", torch.bfloat16), ("lean", torch.float32), ("off", None)]
)
def test_weights_filled_one_at_a_time_have_the_bits_of_weights_filled_at_once(memory, dtype, tmp_path):
    folder = saved(tmp_path, dtype)
    source = {"model_name_or_path": folder} if dtype else {"model_config": folder / "config.json"}
    (expected, _), (found, _) = (load(source, fill=fill, memory=memory) for fill in (True, False))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_the_model_is_never_whole_in_fp32(tmp_path):
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 8}
    source = {"model_name_or_path": saved(tmp_path, **shape)}
    tensors, peak_bytes = load(source, fill=False, name="adafactor", memory="lean")
    largest, whole = (of(4 * x.numel() for x in build("qwen2", **shape).parameters()) for of in (max, sum))
    # the largest weight in fp32, and temporaries of its conversion
    assert peak_bytes < sum(tensor.nbytes for tensor in tensors.values()) + 4 * largest < 0.8 * whole


def test_a_model_without_weights_cannot_be_checked_yet(tmp_path):
    model, _ = load_model(saved(tmp_path), on_meta=True)
    model = parallelize(model, Accelerator(cpu=True), fill=False)
    with pytest.raises(UsageError, match=r"Qwen2ForCausalLM has no weights yet \(fill=False\): call make_optimizer"):
        check_model(model, chunked_loss, packing=False, max_seq_len=8)
    make_optimizer(model)
    assert check_model(model, chunked_loss, packing=False, max_seq_len=8) == 8
