"""`verify` checks every byte. `export` converts a model; for fp32 and fp16, it reads any fp32 master weights."""

import json
import os
import shutil
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import equal
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer

from lowmem import TrainState, load_model, make_optimizer, save_checkpoint
from lowmem.checkpoint.export import export
from lowmem.cli import main
from lowmem.errors import SaveError, UsageError
from lowmem.optim.formats import merge_halves
from tests.models import build
from tests.processes import run, train


def saved(folder, family, memory="exact"):
    """Save a checkpoint after one step; return its path, its weights, and (of exact) the weights in fp32."""
    model, twin = build(family), build(family)
    optimizer = make_optimizer(model, memory=memory)
    reference = make_optimizer(twin, memory="off")
    for group in (*optimizer.param_groups, *reference.param_groups):
        group["lr"] = 1e-3
    generator = torch.Generator().manual_seed(1)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        other.grad = parameter.grad.float()
    optimizer.step()
    reference.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True) if memory == "exact" else ():
        master = merge_halves(parameter.detach(), optimizer.state[parameter]["weight_low"])
        torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=1e-6)
        other.data = master
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    path = save_checkpoint(
        TrainState(model, optimizer, step=7), folder, Accelerator(cpu=True), tokenizer=tokenizer, config={"seed": 3}
    )
    return path, dict(model.state_dict()), dict(twin.state_dict())


def command(*words):
    return main(arguments=[str(word) for word in words])


def loaded(folder, family, **options):
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def assert_equal(model, tensors):
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        # transformers loads some of T5's weights in fp32, although the file stores fp16
        assert found[name].dtype in (tensor.dtype, torch.float32) and equal(found[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_model_is_exported_in_each_dtype(family, max_shard_size, tmp_path, capsys):
    path, weights, master = saved(tmp_path / "run", family)
    for dtype, expected in {
        "float32": master,  # the fp32 master weights are bit-identical to weights trained in fp32
        "float16": {name: tensor.half() for name, tensor in master.items()},
        "bfloat16": weights,
        "None": weights,
    }.items():
        out = tmp_path / dtype
        assert command("export", path, out, f"--dtype={dtype}", f"--max_shard_size={max_shard_size}") == 0
        output = capsys.readouterr().out
        assert ("of them from the fp32 master" in output) == (dtype in ("float32", "float16"))
        assert (len(list(out.glob("*.safetensors"))) > 2) == (max_shard_size == "20KB")
        model = loaded(out, family)
        assert_equal(model, expected)
        stored = {name: x for file in out.glob("*.safetensors") for name, x in load_file(file).items()}
        assert {tensor.dtype for tensor in stored.values()} == {next(iter(expected.values())).dtype}
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_tied == (family != "llama")
    names = {name for name in os.listdir(tmp_path / "float32") if "safetensors" not in name}
    assert names == {file for file in os.listdir(path / "model") if "safetensors" not in file}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "lowmem.json"} < names
    assert load_model(tmp_path / "float32")[1].chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "float16" / "config.json").read_text())["dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_lean_has_master_weights_only_for_small_parameters(tmp_path):
    path, weights, _ = saved(tmp_path / "run", "llama", memory="lean")
    message = export(path, tmp_path / "out", dtype=torch.float32, max_shard_bytes=10**9)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    with safe_open(path / "optimizer.safetensors", "pt") as moments:
        small = {name.removesuffix(".weight_low") for name in moments.keys() if name.endswith(".weight_low")}
    assert 0 < len(small) < len(weights) and f"{len(small)} of them from the fp32 master" in message
    for name, weight in weights.items():
        assert equal(exported[name].bfloat16(), weight) or name in small, name
        assert name in small or equal(exported[name], weight.float()), name


def test_export_leaves_out_only_pickled_weights_and_checkpoints(tmp_path):
    model = build("llama", vocab_size=140_001)  # so many tokens that the embedding is converted in two pieces
    model.save_pretrained(tmp_path / "in")
    ByT5Tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"\x80\x04malicious")
    (tmp_path / "in" / "checkpoint-5").mkdir()
    export(tmp_path / "in", tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=10**9)
    assert_equal(loaded(tmp_path / "out", "llama"), {name: x.bfloat16() for name, x in model.state_dict().items()})
    assert set(os.listdir(tmp_path / "in")) - set(os.listdir(tmp_path / "out")) == {"pytorch_model.bin", "checkpoint-5"}
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_what_cannot_be_exported_is_reported_and_leaves_nothing(tmp_path, capsys):
    path, _, _ = saved(tmp_path / "run", "llama", memory="off")
    shutil.copytree(path / "model", tmp_path / "large")
    weights = load_file(path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, tmp_path / "large" / "model.safetensors")
    (tmp_path / "pickled").mkdir()
    shutil.copy(path / "model" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04malicious")
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    for words, message in [
        ([tmp_path / "large", out, "--dtype=float16"], "tensor model.norm.weight holds 100000, too large for float16"),
        ([tmp_path / "pickled", out], "which are never opened"),
        ([tmp_path / "nowhere", out], "does not exist"),
        ([path, tmp_path / "there"], "there exists: export to a new folder"),
        ([path, path.parent / "out"], "is in a folder of checkpoints"),
        ([path], "`export` needs OUT"),
        ([path, out, "--dtype=int8"], "--dtype=int8 must be one of float32, bfloat16, float16, None"),
        ([path, out, "--max_shard_size=many"], "is not valid: use a number of bytes"),
        ([path, out, "--shards=3"], "--shards: `export` has no such flag"),
    ]:
        assert command("export", *words) == 2
        assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["large", "pickled", "run", "there"]
    assert command("export", f"--path={path}", f"--out={out}", "--dtype", "bfloat16") == 0


def test_a_tilde_in_the_paths_of_commands_is_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    path, _, _ = saved(tmp_path / "run, a", "llama")
    assert command("verify", f"~/run, a/{path.name}") == 0
    assert command("export", f"~/run, a/{path.name}", "~/out, b") == 0
    assert (tmp_path / "out, b" / "config.json").is_file()
    capsys.readouterr()
    assert command("plot", "~/no run") == 2
    assert f"{tmp_path}/no run" in capsys.readouterr().err


def test_an_export_that_cannot_be_written_is_reported(tmp_path):
    path, _, _ = saved(tmp_path / "run", "llama")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="could not be written"):
        export(path, tmp_path / "file" / "out", dtype=None, max_shard_bytes=10**9)


def test_verify_reports_one_checkpoint_or_all_of_a_run_and_any_damage(tmp_path, capsys):
    first, _, _ = saved(tmp_path / "checkpoints", "llama")
    second = tmp_path / "checkpoints" / "step-00000009"
    shutil.copytree(first, second)
    files = [file for file in first.rglob("*") if file.is_file()]
    line = f"intact: step 7, {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes\n"
    assert command("verify", first) == command("verify", f"--path={first}") == 0
    assert capsys.readouterr().out == line * 2
    assert command("verify", tmp_path) == 0
    assert capsys.readouterr().out == f"step-00000009: {line}step-00000007: {line}"

    with open(second / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert command("verify", second) == 2
    assert capsys.readouterr().err.startswith(f"error: {second}/model/model.safetensors changed since it was saved")
    assert command("verify", tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.out == f"step-00000007: {line}" and "1 of 2 checkpoints are damaged" in captured.err
    with pytest.raises(UsageError, match="changed since"):
        export(second, tmp_path / "out", dtype=None, max_shard_bytes=10**9)
    for words, message in [
        ([], "`verify` needs PATH"),
        ([tmp_path / "no"], "does not exist"),
        (["a", "--x=1"], "--x"),
    ]:
        assert command("verify", *words) == 2
        assert message in capsys.readouterr().err


def test_verify_imports_no_torch_and_help_lists_verify_and_export(tmp_path):
    path, _, _ = saved(tmp_path, "llama")
    code = "import sys, lowmem.cli as cli; assert cli.main(arguments=sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    result = run(sys.executable, "-c", code, "verify", path)
    assert result.returncode == 0, result.stderr
    output = train("--help").stdout
    assert "  verify PATH" in output and "  export PATH OUT --dtype=float32" in output
