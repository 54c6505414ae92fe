"""LoRA adapters train as they do with peft in a plain loop; they are saved, resumed, loaded and merged exactly."""

import json
import shutil

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import equal
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer

from lowmem import (
    TrainState,
    add_lora,
    check_model,
    chunked_loss,
    load_checkpoint,
    load_model,
    make_optimizer,
    save_checkpoint,
    save_model,
)
from lowmem.checkpoint.export import export
from lowmem.checkpoint.manifest import write_manifest
from lowmem.config.rules import conflicts
from lowmem.config.train_config import TrainConfig
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import UsageError
from lowmem.memory.savers import layered, offload_activations, recompute, recompute_cheap
from lowmem.storage.files import record_file
from tests import runs
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.processes import train
from tests.test_layered import ACCUMULATED, batches_of, trained

FAMILIES = ["llama", "qwen2", "t5"]
MIXTURE = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
MIXTURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
SAVERS = [[], [recompute], [recompute_cheap], [offload_activations], [layered]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a folder with rows and a saved model of each family."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_rows(60)))
    for family in FAMILIES:
        build(family).to(torch.bfloat16).save_pretrained(folder / family)
        ByT5Tokenizer().save_pretrained(folder / family)
    return folder


def adapted(family, **options):
    """Build a model whose adapters change its outputs: B, which is 0 at first, is random."""
    model = add_lora(build(family), **{"rank": 4, "alpha": 6.0} | options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients_of_peft(family, batches, **options):
    """Return the gradients of a plain loop over peft's own model, by the names of `adapted`."""
    source = adapted(family, **options)
    config = peft.LoraConfig(r=4, lora_alpha=6.0, **source_options(source, options))
    model = peft.get_peft_model(build(family), config)
    trainable = {name.removeprefix("base_model.model."): x for name, x in model.named_parameters() if x.requires_grad}
    ours = {name: x for name, x in source.named_parameters() if x.requires_grad}
    assert trainable.keys() == ours.keys()
    targets = sum(batch.num_targets for batch in batches)
    for name, parameter in trainable.items():
        parameter.data.copy_(ours[name])
    for batch in batches:
        inputs = dict(batch.inputs)
        labels = inputs["labels"]
        loss = model(**inputs).loss
        count = int((labels[:, 1:] != -100).sum()) if family != "t5" else int((labels != -100).sum())
        (loss * count / targets).backward()
    return {name: parameter.grad for name, parameter in trainable.items()}


def source_options(source, options):
    names = {"dropout": "lora_dropout"}
    shared = {names.get(name, name): value for name, value in options.items()}
    config = source.peft_config["default"]
    return {"target_modules": config.target_modules, "ensure_weight_tying": config.ensure_weight_tying} | shared


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": True}, {"target_modules": True}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_peft_in_a_plain_loop(family, options):
    if "modules_to_save" in options:
        options = {"modules_to_save": ["layer_norm"] if family == "t5" else ["embed_tokens"]}
    if "target_modules" in options:  # ends of names
        options = {"target_modules": ["q", "wo"] if family == "t5" else ["q_proj", "down_proj"]}
    batches = batches_of(family == "t5")
    expected = gradients_of_peft(family, batches, **options)
    before = {name: x.detach().clone() for name, x in adapted(family, **options).named_parameters()}
    _, _, after = trained(adapted(family, **options), [], batches, max_grad_norm=None)  # SGD at rate 1
    for name, parameter in after.items():
        if name in expected:
            torch.testing.assert_close(before[name] - parameter, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert equal(before[name], parameter), f"{name} is frozen"


@pytest.mark.parametrize("savers", SAVERS[1:], ids=lambda savers: savers[0].__name__)
@pytest.mark.parametrize("memory", ["off", "exact"])
def test_savers_change_no_bit_with_dropout_of_adapters(savers, memory):
    (losses, _, weights), (other_losses, _, others) = (
        trained(adapted("llama", dropout=0.1), each, batches_of(False), memory=memory, steps=2) for each in ([], savers)
    )
    assert losses == other_losses
    assert all(equal(weights[name], others[name]) for name in weights)


def test_packing_is_checked_with_adapters_of_embeddings():
    model = adapted("llama", target_modules=["q_proj", "embed_tokens"])
    assert check_model(model, chunked_loss, packing=True, max_seq_len=32) == 32


def train_on_a_rank(folder, strategy, savers):
    accelerator = init_distributed()
    model = parallelize(adapted("qwen2", modules_to_save=["embed_tokens"]), accelerator, sharding_strategy=strategy)
    count = ACCUMULATED // accelerator.num_processes
    batches = batches_of(False, count, first=count * accelerator.process_index)
    _, _, weights = trained(model, savers, batches, accelerator=accelerator, max_grad_norm=0.1)
    whole = {name: x.full_tensor() if strategy != "NO_SHARD" else x for name, x in weights.items()}
    if accelerator.is_main_process:
        torch.save(whole, folder / "weights.pt")
    accelerator.end_training()


@pytest.mark.parametrize(("strategy", "savers"), [("NO_SHARD", []), ("FULL_SHARD", []), ("FULL_SHARD", [layered])])
def test_two_processes_train_the_weights_of_one(strategy, savers, tmp_path):
    model = adapted("qwen2", modules_to_save=["embed_tokens"])
    _, _, expected = trained(model, [], batches_of(False), max_grad_norm=0.1)
    assert fork_ranks(2, train_on_a_rank, tmp_path, strategy, savers) == [0, 0]
    found = torch.load(tmp_path / "weights.pt")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-5, atol=1e-6, msg=name)


def flags(bases, family, output, **changes):
    settings = {"train_file": bases / "rows.jsonl", "model_name_or_path": bases / family, "output_dir": output}
    settings |= {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "max_steps": 6}
    settings |= {"lora_rank": 4, "lora_dropout": 0.1, "max_seq_len": 64}
    return [f"--{name}={value}" for name, value in (settings | changes).items() if value is not None]


def run(*words):
    result = train(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def finished(bases):
    """Return the folder of a finished run over the Llama in `bases`, in the tier exact."""
    run("train", *flags(bases, "llama", bases / "out", mixed_precision="bf16"))
    return bases / "out"


def adapters_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapters(folder, other):
    mine, theirs = adapters_in(folder), adapters_in(other)
    assert mine.keys() == theirs.keys()
    assert all(equal(mine[name], theirs[name]) for name in mine)


def test_a_resumed_run_has_the_same_bits_and_small_checkpoints(bases, finished, tmp_path):
    shutil.copytree(finished / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    output = run("train", *flags(bases, "llama", tmp_path, mixed_precision="bf16", resume="auto"))
    trained = sum(tensor.numel() for tensor in adapters_in(finished / "model").values())
    assert f"{trained:,} of them trained" in output
    assert_same_adapters(tmp_path / "model", finished / "model")
    names = adapters_in(finished / "model").keys()
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in names)
    saved = tmp_path / "checkpoints" / "step-00000006"
    assert_same_adapters(saved / "model", finished / "model")
    state = load_file(saved / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in state} == names
    assert run("verify", saved)


def test_a_checkpoint_over_another_model_is_refused(bases, finished, tmp_path):
    saved = finished / "checkpoints" / "step-00000003"

    def state_of(model):
        return TrainState(model, make_optimizer(model))

    def loaded(folder, **options):
        return add_lora(load_model(folder)[0], rank=4, **options)

    accelerator = Accelerator(cpu=True)
    load_checkpoint(state_of(loaded(bases / "llama")), saved, accelerator)
    with pytest.raises(UsageError, match="adapters with lora_alpha=8.*, but this model has 9"):
        load_checkpoint(state_of(loaded(bases / "llama", alpha=9)), saved, accelerator)
    other, tokenizer = load_model(bases / "llama")
    other.model.layers[1].mlp.up_proj.weight.data[-1] += 1
    save_model(other, tmp_path / "other", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="adapters of a model with other weights, or in other bits: restore"):
        load_checkpoint(state_of(loaded(tmp_path / "other")), saved, accelerator)
    shutil.copytree(saved, tmp_path / "moved")
    config = tmp_path / "moved" / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(bases / "llama"), str(tmp_path / "other")))
    manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())["manifest"]
    manifest["files"]["model/adapter_config.json"] = record_file(config)
    write_manifest(tmp_path / "moved", manifest["step"], manifest["files"])
    with pytest.raises(UsageError, match="other have changed since .* was saved: restore them"):
        export(tmp_path / "moved", tmp_path / "merged", dtype=None, max_shard_bytes=10**9, merge=True)
    with pytest.raises(UsageError, match="has adapters of a model, but this model has none"):
        load_checkpoint(state_of(other), saved, accelerator)
    save_checkpoint(state_of(other), tmp_path / "whole", accelerator)
    with pytest.raises(UsageError, match="has the weights of a model, but this model has adapters"):
        load_checkpoint(state_of(loaded(bases / "llama")), tmp_path / "whole" / "step-00000000", accelerator)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_the_adapters_and_generates_the_same_tokens(bases, finished):
    base = AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, finished / "model").eval()
    ours, tokenizer = load_model(finished / "model")
    inputs = tokenizer(["问题 1", "问题 22 aaa"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 12, "do_sample": False}
    assert equal(theirs.generate(**inputs, **options), ours.eval().generate(**inputs, **options))
    untrained = AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.float32).eval()
    assert not torch.allclose(untrained(**inputs).logits, ours(**inputs).logits, atol=1e-3)


def test_evaluate_and_further_training_take_an_adapter_folder(bases, finished, tmp_path):
    rows = bases / "rows.jsonl"
    flags_of_evaluate = [f"--model_name_or_path={finished / 'model'}", f"--test_file={rows}", "--max_predict_samples=0"]
    flags_of_evaluate.append("--batch_size=4")
    found = json.loads(run("evaluate", *flags_of_evaluate).splitlines()[-1])
    options = {"model_name_or_path": finished / "model", "lora_rank": None, "lora_dropout": None, "test_file": rows}
    options |= {"mixed_precision": "bf16", "learning_rate": 1e-12, "max_steps": 1, "max_predict_samples": 0}
    run("train", *flags(bases, "llama", tmp_path, **options))
    again = [record for record in runs.records(tmp_path.parent, tmp_path.name) if "test_loss" in record]
    assert again[0]["test_loss"] == found["test_loss"]
    assert_same_adapters(tmp_path / "model", finished / "model")
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / "llama")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_dora": True}),
        ("qwen2", {"modules_to_save": ["embed_tokens"], "use_rslora": True}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
)
def test_merged_weights_give_the_logits_of_the_adapted_model(family, options, bases, tmp_path):
    model, tokenizer = load_model(bases / family)
    add_lora(model, rank=4, **options)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    save_model(model, tmp_path / "adapters", tokenizer=tokenizer)
    options = {"dtype": torch.float32, "max_shard_bytes": 20_000, "merge": True}
    message = export(tmp_path / "adapters", tmp_path / "merged", **options)
    assert "files" in message and not (tmp_path / "merged" / "adapter_config.json").exists()
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    merged, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = {"input_ids": torch.arange(3, 20)[None]}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(9)[None]
    expected, base = model.eval()(**inputs).logits, load_model(bases / family)[0].eval()(**inputs).logits
    torch.testing.assert_close(merged.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert (base - expected).abs().max() > 1e-2


def test_a_quantized_run_resumes_evaluates_and_merges(bases, tmp_path, capsys):
    options = {"mixed_precision": "bf16", "quantization": "nf4", "test_file": bases / "rows.jsonl"}
    options |= {"max_predict_samples": 0, "max_steps": 4, "save_steps": 2, "save_total_limit": 0}
    run("train", *flags(bases, "llama", tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002")
    run("train", *flags(bases, "llama", tmp_path, **options, resume="auto"))
    assert_same_adapters(tmp_path / "model", tmp_path / "whole" / "model")
    (tested,) = (record for record in runs.records(tmp_path, "whole") if "test_loss" in record)
    words = [f"--model_name_or_path={tmp_path / 'model'}", f"--test_file={bases / 'rows.jsonl'}", "--batch_size=4"]
    found = json.loads(run("evaluate", *words, "--max_predict_samples=0").splitlines()[-1])
    assert found["test_loss"] == tested["test_loss"]
    export(tmp_path / "model", tmp_path / "merged", dtype=torch.float32, max_shard_bytes=10**9, merge=True)
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    adapted = load_model(tmp_path / "model", quantization="nf4", dtype=torch.bfloat16)[0].eval()
    for parameter in adapted.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()  # then layers compute in fp32
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = adapted(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    plain = load_model(tmp_path / "model")[0].eval()
    assert "were trained with quantization=nf4, but the model is not quantized" in capsys.readouterr().out
    assert (plain(**inputs).logits - expected).abs().max() > 5e-3, "over the model that was not quantized"
    assert json.loads((tmp_path / "merged" / "lowmem.json").read_text())["quantization"] is None


def test_the_fp32_master_is_merged_and_exported(finished, tmp_path):
    saved = finished / "checkpoints" / "step-00000006"
    message = export(saved, tmp_path / "adapters", dtype=torch.float32, max_shard_bytes=10**9)
    assert "28 of them from the fp32 master" in message
    exact, rounded = adapters_in(tmp_path / "adapters"), adapters_in(saved / "model")
    assert all(equal(exact[name].bfloat16(), rounded[name]) for name in rounded)
    assert any(not equal(exact[name], rounded[name].float()) for name in rounded)
    for source in (saved, tmp_path / "adapters"):
        export(source, tmp_path / "merged", dtype=torch.float32, max_shard_bytes=10**9, merge=True)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        shutil.rmtree(tmp_path / "merged")
        layer = "model.layers.0.self_attn.q_proj"
        a, b = (exact[f"base_model.model.{layer}.lora_{each}.weight"] for each in "AB")
        base = load_file(finished.parent / "llama" / "model.safetensors")[f"{layer}.weight"]
        torch.testing.assert_close(merged[f"{layer}.weight"], base.float() + 2 * b @ a, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_adapted_is_refused(bases, finished, tmp_path):
    for options, message in (
        ({"target_modules": ["q_proj", "nonsense"]}, "no layer whose name ends in nonsense: its layers are .*q_proj"),
        ({"modules_to_save": ["embed_token"]}, "ends in embed_token: did you mean embed_tokens"),
        ({"rank": 0}, "got rank=0"),
    ):
        with pytest.raises(UsageError, match=message):
            add_lora(build("llama"), **{"rank": 4} | options)
    with pytest.raises(UsageError, match="share weights, but peft would train only shared: "):
        add_lora(build("t5"), rank=4, modules_to_save=["shared"])
    with pytest.raises(UsageError, match="already has adapters"):
        add_lora(adapted("llama"), rank=4)
    mixture = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTURE))
    with pytest.raises(UsageError, match="gate.weight of MixtralForCausalLM, which are in no linear layer"):
        add_lora(mixture, rank=4, target_modules=["q_proj", "gate"])
    theirs = build("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), theirs)
    with pytest.raises(UsageError, match="adapters that peft has added: add them with add_lora"):
        save_model(theirs, tmp_path / "theirs")
    shutil.copytree(finished / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(UsageError, match="pickles, which are never opened"):
        load_model(tmp_path / "pickled")
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type=IA3, which is not supported"),
        ({"bias": "all"}, "bias=all, which is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which is not supported"),
        ({"of_next_year": 1}, "of_next_year=1, which is not supported"),
        ({"r": 5}, "does not fit the model"),
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "gone, which does not exist: set the model's folder"),
    ):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished / "model", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=message):
            load_model(folder)
    config = TrainConfig(model_name_or_path=str(finished / "model"), tp_size=2, freeze="embeddings")
    problems = " ".join(conflicts(config, ()))
    for found in ("/model does not support tensor parallelism: set --tp_size=1", "/model freezes the whole model"):
        assert found in problems
    with pytest.raises(UsageError, match="has no adapters to merge"):
        export(bases / "llama", tmp_path / "merged", dtype=None, max_shard_bytes=10**9, merge=True)
