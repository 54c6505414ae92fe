"""A frozen base model in 4 or 8 bits: what its layers compute, in training and evaluation, with savers and on ranks."""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from lowmem import (
    add_lora,
    check_model,
    chunked_loss,
    evaluate,
    init_distributed,
    load_model,
    make_optimizer,
    offload_weights,
    parallelize,
    plain_loss,
    save_model,
    train_step,
)
from lowmem.checkpoint.export import export
from lowmem.data.batch import collate
from lowmem.data.encode import encode_causal
from lowmem.distributed.consistency import check_same_model
from lowmem.distributed.placement import is_quantized
from lowmem.errors import UsageError
from lowmem.memory.savers import entered, layered, layered_offloaded, offload_activations, recompute, recompute_cheap
from lowmem.model.quantized import dequantize, dequantized
from lowmem.plan.meter import MemoryMeter
from lowmem.step import TrainState
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.processes import finish, started_function

SHAPES = {  # multiples of the 64 weights that share a scale, and others
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "qwen2": {"hidden_size": 64, "intermediate_size": 96},
    "t5": {"d_model": 64, "d_ff": 96},
    "gpt2": {},
}
KINDS = ["nf4", "int8"]
INTEGERS = {"nf4": torch.uint8, "int8": torch.int8}


def saved(folder, family="llama", **options):
    if family == "gpt2":  # its layers are transposed
        fields = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **fields))
    else:
        model = build(family, **SHAPES[family] | options)
    model.save_pretrained(folder, max_shard_size="100KB")
    ByT5Tokenizer().save_pretrained(folder)
    return folder, model


def add_adapters(model, **options):
    torch.manual_seed(1)
    options |= {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    inject_adapter_in_model(LoraConfig(**options), model)


def with_adapters(folder, quantization, memory="off", dropout=0.0):
    """Load a quantized model, add adapters, and make their optimizer: SGD, or AdamW in a memory tier."""
    model, _ = load_model(folder, quantization=quantization)
    add_adapters(model, lora_dropout=dropout)
    return model, make_optimizer(model, name="sgd" if memory == "off" else "adamw", memory=memory)


def batches_of(rows):
    encode = encode_causal(ByT5Tokenizer(), max_seq_len=64)
    return [collate([encode(row) for row in rows[start : start + 3]], causal=True) for start in range(0, len(rows), 3)]


def adapters_of(model):
    return {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}


def base_of(model):
    return {name: x.clone() for name, x in model.state_dict().items() if "lora" not in name}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("qwen2", torch.bfloat16), ("t5", torch.float32), ("gpt2", torch.bfloat16)],
)
def test_a_layer_computes_with_the_weight_that_dequantized_returns(family, dtype, quantization, tmp_path, capsys):
    folder, original = saved(tmp_path, family)
    model, _ = load_model(folder, quantization=quantization, dtype=dtype)
    assert model.training and not any(x.requires_grad for x in model.parameters())
    assert model.num_parameters() == original.num_parameters()
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id
    weights, count = original.state_dict(), 0
    for name, parameter in model.named_parameters():
        if not is_quantized(parameter):
            assert torch.equal(parameter, weights[name].to(dtype)), name
            continue
        layer, count = model.get_submodule(name.removesuffix(".weight")), count + 1
        weight = weights[name].T if family == "gpt2" else weights[name]
        expected = dequantized(weight.to(dtype), quantization)
        assert parameter.dtype == INTEGERS[quantization] and expected.dtype == torch.float32
        assert 1e-3 < (expected - weight).norm() / weight.norm() < (0.1 if quantization == "nf4" else 0.02)
        x = torch.randn(2, 3, layer.in_features, dtype=dtype)
        assert torch.equal(layer(x), F.linear(x, expected.to(dtype), layer.bias)), name
    assert count == {"t5": 2 * 4 + 2 * 8 + 2 * 2, "gpt2": 2 * 4}.get(family, 2 * 7)
    assert ("% of the weights are in layers, but not quantized (enc" in capsys.readouterr().out) == (family == "t5")


@pytest.mark.parametrize("memory", ["off", "exact"])
@pytest.mark.parametrize("quantization", KINDS)
def test_a_run_that_evaluates_equals_one_that_does_not(quantization, memory, tmp_path):
    folder, _ = saved(tmp_path)
    accelerator, batches = Accelerator(cpu=True), batches_of(qa_rows(6))
    runs = []
    for evaluates in (False, True):
        model, optimizer = with_adapters(folder, quantization, memory)
        state, before = TrainState(model, optimizer), base_of(model)
        for _ in range(2):
            if evaluates:
                found = evaluate(model, batches, chunked_loss, accelerator)["eval_loss"]
                assert model.training
            result = train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-3)
            if evaluates:  # before the update, the same function in both modes
                assert found == pytest.approx(result.loss.item(), rel=1e-6)
        assert_same(base_of(model), before)
        runs.append(adapters_of(model))
    assert_same(*runs)


@pytest.mark.parametrize("quantization", KINDS)
def test_savers_keep_the_bits_of_loss_and_gradients_and_save_bytes(quantization, tmp_path):
    folder, _ = saved(tmp_path, num_hidden_layers=3)
    batches = batches_of(qa_rows(4))

    def step(loss_fn, *savers):
        """Return the loss, the gradient's norm and the new adapters of a step with dropout, and its peak bytes."""
        model, optimizer = with_adapters(folder, quantization, dropout=0.1)
        state, accelerator = TrainState(model, optimizer), Accelerator(cpu=True)
        with entered(savers, model, optimizer), MemoryMeter() as meter:
            result = train_step(state, batches, loss_fn, accelerator, learning_rate=1.0, max_grad_norm=1.0)
        return {"loss": result.loss, "norm": result.grad_norm} | adapters_of(model), meter.peak_bytes

    plain, _ = step(plain_loss)
    assert_same(step(plain_loss, recompute)[0], plain)
    expected, whole_bytes = step(chunked_loss)
    # bitsandbytes' own 8-bit layers keep their inputs: then, the first two need 62 % and 37 %
    most = {(recompute,): 0.5, (offload_activations,): 0.3}
    for savers in [*most, (recompute_cheap,), (recompute, offload_activations), (layered,), (layered_offloaded,)]:
        found, peak_bytes = step(chunked_loss, *savers)
        assert_same(found, expected)
        assert peak_bytes < most.get(savers, 1.0) * whole_bytes, (savers, peak_bytes / whole_bytes)


def test_two_ranks_train_like_one(tmp_path):
    saved(tmp_path)
    expected = train_on_a_rank(tmp_path, Accelerator(cpu=True))
    assert fork_ranks(2, train_on_two_ranks, tmp_path) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def train_on_two_ranks(folder):
    accelerator = init_distributed()
    torch.save(train_on_a_rank(folder, accelerator), f"{folder}/rank-{accelerator.process_index}")
    accelerator.end_training()


def train_on_a_rank(folder, accelerator):
    """Return the losses and new adapters of a step for each quantization, of which each rank runs every second row."""
    results = {}
    for quantization, fill in ("nf4", True), ("int8", False):
        model, tokenizer = load_model(folder, quantization=quantization, device=accelerator.device)
        add_adapters(model)
        before = base_of(model)
        check_same_model(model, tokenizer, weights=True)
        with pytest.raises(UsageError, match="quantized weights cannot be sharded: set NO_SHARD"):
            parallelize(model, accelerator, sharding_strategy="FULL_SHARD")
        model = parallelize(model, accelerator, fill=fill)
        optimizer = make_optimizer(model, name="sgd", memory="off")
        assert_same(base_of(model), before)
        rows = qa_rows(6)[accelerator.process_index :: accelerator.num_processes]
        result = train_step(
            TrainState(model, optimizer), batches_of(rows), chunked_loss, accelerator, learning_rate=1.0
        )
        results |= {f"{quantization} {name}": x for name, x in adapters_of(model).items()}
        results[f"{quantization} loss"] = result.loss
    return results


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_loading_never_holds_the_unquantized_model(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_key_value_heads": 4}
    folder, model = saved(tmp_path / "large", **shape)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    saved(tmp_path / "small")
    with started_function(print_growth, tmp_path) as process:
        result = finish(process)
    assert result.returncode == 0, result.stderr
    growth, quantized_bytes = map(int, result.stdout.split())
    whole, largest = 2 * model.num_parameters(), 512 * 1024
    assert len(list(folder.glob("*.safetensors"))) > 4
    assert growth < quantized_bytes + 16 * largest + 12 * 2**20 < whole, (growth, quantized_bytes, whole)


def print_growth(folder):
    def memory(name):
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024

    load_model(folder / "small", quantization="int8")  # imports what loading needs
    before = memory("VmRSS")
    model, _ = load_model(folder / "large", quantization="int8")
    print(memory("VmHWM") - before, sum(parameter.nbytes for parameter in model.parameters()))


def test_what_cannot_be_quantized_is_refused(tmp_path, monkeypatch):
    folder, model = saved(tmp_path)
    for options, message in [
        ({"quantization": "fp4"}, "quantization=fp4 is unknown: use one of nf4, int8"),
        ({"quantization": "nf4", "on_meta": True}, "but got on_meta, which reads them later: remove one"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_model(folder, **options)
    with pytest.raises(UsageError, match="but got model_config, which draws random ones: remove one"):
        load_model(model_config="t5-tiny", quantization="int8")
    quantized, _ = load_model(folder, quantization="int8")
    with pytest.raises(UsageError, match="offload_weights does not support quantized weights"):
        offload_weights(quantized, "host", torch.device("cpu"))
    with pytest.raises(UsageError, match="modules_to_save=down_proj trains .*, which is quantized: leave it out"):
        add_lora(quantized, rank=4, modules_to_save=["down_proj"])
    with pytest.raises(UsageError, match="quantized weights are on cpu, and their scales cannot be moved to meta"):
        accelerator = Accelerator(cpu=True)
        accelerator.state.device = torch.device("meta")
        parallelize(quantized, accelerator)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes, .*: pip install 'lowmem\[lora\]'"):
        load_model(folder, quantization="nf4")


@pytest.mark.parametrize("quantization", KINDS)
def test_quantized_weights_that_are_not_finite_are_refused(quantization, tmp_path):
    folder, model = saved(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(folder)
    for name in os.listdir(folder):
        if name.startswith("model-") or name.endswith(".index.json"):
            os.remove(folder / name)
    quantized, _ = load_model(folder, quantization=quantization)
    found = r"1 weights of the model .*not finite \(model.layers.1.mlp.up_proj.weight, ...\)"
    with pytest.raises(UsageError, match=found):
        check_model(quantized, plain_loss, packing=False, max_seq_len=8)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # by peft, which sets it to True
@pytest.mark.parametrize("quantization", KINDS)
def test_transposed_layers_are_merged_as_they_were_quantized(quantization, tmp_path):
    saved(tmp_path / "gpt2", "gpt2")
    model, _ = load_model(tmp_path / "gpt2", quantization=quantization)
    add_lora(model, rank=4)
    save_model(model, tmp_path / "adapters", config={"quantization": quantization})
    export(tmp_path / "adapters", tmp_path / "merged", dtype=None, max_shard_bytes=10**9, merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, parameter in model.named_parameters():
        if is_quantized(parameter):  # B is zero
            expected = dequantize(parameter, torch.float32).T
            assert torch.equal(merged[name.replace(".base_layer", "")], expected), name
