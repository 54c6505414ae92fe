"""A checkpoint is complete or absent, and its files hold whole tensors that any safetensors reader can load."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
import xxhash
from accelerate import Accelerator
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lowmem.checkpoint.load import latest_checkpoint, load_checkpoint
from lowmem.checkpoint.manifest import checkpoints, step_of, verify_checkpoint
from lowmem.checkpoint.resume import check_same_tokenizer, checkpoint_to_resume
from lowmem.checkpoint.save import check_space, save_checkpoint, save_model
from lowmem.checkpoint.saved import read_manifest
from lowmem.checkpoint.tensors import named_parameters
from lowmem.config.train_config import TIERED_OPTIMIZERS
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.stream import open_stream
from lowmem.distributed.consistency import tokenizer_digest
from lowmem.errors import SaveError, UsageError
from lowmem.loss import chunked_loss
from lowmem.model.load import load_model
from lowmem.optim.formats import read
from lowmem.optim.make import OPTIMIZERS, make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.step import TrainState, train_step
from lowmem.storage.files import record_file, write_file
from lowmem.storage.tensor_files import host_parts, split_shards
from tests.models import build, qa_rows

ACCELERATOR = Accelerator(cpu=True)


def new_state(family="t5", seed=0, optimizer="adamw", memory="off"):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)
    model = build(family, seed=seed)
    stream = open_stream(qa_rows(30), encode, batch_size=4)
    return TrainState(model, make_optimizer(model, name=optimizer, memory=memory), stream)


def train(state, steps):
    for _ in range(steps):
        train_step(state, next(iter(state.stream)), chunked_loss, ACCELERATOR, learning_rate=1e-2, max_grad_norm=1.0)
    return state


def assert_same_weights(model, other):
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_loaded_state_continues_bit_for_bit(family, max_shard_size, tmp_path):
    state = train(new_state(family), 3)
    state.best = {"step": 2, "eval_loss": 1.25}
    path = save_checkpoint(state, tmp_path, ACCELERATOR, max_shard_size=max_shard_size)
    assert path == tmp_path / "step-00000003"
    loaded = new_state(family, seed=5)
    loaded.seed = 7
    load_checkpoint(loaded, path, ACCELERATOR)
    assert (loaded.step, loaded.best, loaded.seed) == (3, state.best, 0)
    assert loaded.stream.position == 12
    assert_same_weights(train(state, 3).model, train(loaded, 3).model)


IN_TIERS = [(optimizer, memory) for optimizer in TIERED_OPTIMIZERS for memory in ("exact", "lean")]


@pytest.mark.parametrize(("optimizer", "memory"), [*((name, "off") for name in OPTIMIZERS), *IN_TIERS])
def test_every_optimizer_continues_bit_for_bit(optimizer, memory, tmp_path):
    state = train(new_state(optimizer=optimizer, memory=memory), 2)
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    loaded = new_state(seed=5, optimizer=optimizer, memory=memory)
    load_checkpoint(loaded, path, ACCELERATOR)
    assert_same_weights(train(state, 2).model, train(loaded, 2).model)
    mine, theirs = (
        optimizer_tensors(named_parameters(each.model, each.optimizer), each.optimizer) for each in (state, loaded)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def values_of(state):
    """Return the weights and AdamW's state in fp32, for any memory tier."""
    values = {}
    for name, parameter in named_parameters(state.model, state.optimizer).items():
        kept = {"weight": parameter.data, **state.optimizer.state[parameter]}
        for value in ("weight", "exp_avg", "exp_avg_sq"):
            values[f"{name}.{value}"] = read(kept, value, slice(None)).clone()
        values[f"{name}.step"] = kept["step"].clone()
    return values


@pytest.mark.parametrize(("then", "now"), [("off", "exact"), ("off", "lean"), ("exact", "lean")])
def test_a_state_loads_into_a_smaller_tier(then, now, tmp_path):
    state = train(new_state(memory=then), 3)
    loaded = new_state(seed=5, memory=now)
    load_checkpoint(loaded, save_checkpoint(state, tmp_path, ACCELERATOR), ACCELERATOR)
    before, after = values_of(state), values_of(loaded)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if now == "exact" or name.endswith("step"):
            assert torch.equal(after[name], value), name
        else:
            assert torch.allclose(after[name], value, rtol=0.13, atol=1e-8 + 0.13 * value.abs().max().item() / 15), name
    if now == "lean":  # rounding to lean's formats changes values, but hardly their mean
        error = after["shared.weight.weight"] - before["shared.weight.weight"]
        assert 0 < error.abs().max() and error.mean().abs() < error.abs().mean() / 20
    train(loaded, 1)
    assert (loaded.step, loaded.stream.position) == (4, 16)


@pytest.mark.parametrize(
    ("then", "now"), [("lean", "exact"), ("lean", "off"), ("exact", "off")], ids=lambda memory: memory
)
def test_a_state_does_not_load_into_a_larger_tier(then, now, tmp_path):
    path = save_checkpoint(train(new_state(memory=then), 1), tmp_path, ACCELERATOR)
    state, untouched = new_state(memory=now), new_state(memory=now)
    with pytest.raises(
        UsageError, match=f"TieredAdamW with memory={then}, but the optimizer is .*AdamW with memory={now}"
    ):
        load_checkpoint(state, path, ACCELERATOR)
    assert_same_weights(state.model, untouched.model)
    assert state.stream.position == 0


def test_the_model_folder_of_the_exact_tier_is_in_bf16(tmp_path):
    state = train(new_state(memory="exact"), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    model = AutoModelForSeq2SeqLM.from_pretrained(path / "model")
    assert model.dtype == torch.bfloat16
    assert_same_weights(state.model, model)


@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_from_pretrained_loads_the_model_folder_as_it_is(family, max_shard_size, tmp_path):
    state = train(new_state(family), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR, tokenizer=ByT5Tokenizer(), max_shard_size=max_shard_size)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model, info = auto.from_pretrained(path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is type(state.model) and model.dtype == torch.float32
    assert_same_weights(state.model, model)
    if family != "qwen2":  # for qwen2, AutoTokenizer makes an empty Qwen2Tokenizer; load_model loads ByT5Tokenizer
        assert AutoTokenizer.from_pretrained(path / "model")("é").input_ids == ByT5Tokenizer()("é").input_ids
    assert load_model(path / "model")[1]("é").input_ids == ByT5Tokenizer()("é").input_ids
    sharded = (path / "model" / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_size == "20KB")
    assert max(file.stat().st_size for file in path.rglob("*.safetensors")) < (60_000 if sharded else 10**7)


def write_tensors(tensors, path):
    (shard,) = split_shards(tensors, path.stem, 10**9)
    return write_file(path, [shard.header, *host_parts(shard.tensors.values())])


def test_safetensors_reads_the_tensors_that_were_written(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).T,
        "low": torch.arange(7, dtype=torch.int16),
        "flags": torch.tensor([True, False]),
        "long": torch.arange(3),
    }
    record = write_tensors(tensors, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert record == record_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tensor z cannot be saved .*torch.complex64"):
        write_tensors({"z": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "y.safetensors")


def test_files_that_are_not_part_of_a_checkpoint_are_ignored(tmp_path):
    state = train(new_state(), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR, max_shard_size="20KB")
    for stale in ("model/model-00001-of-00099.safetensors", "optimizer.safetensors"):
        (path / stale).write_bytes(b"of another save")
    loaded = new_state(seed=5)
    load_checkpoint(loaded, path, ACCELERATOR)
    assert_same_weights(train(state, 1).model, train(loaded, 1).model)


def test_an_optimizer_of_named_parameters_is_saved_and_loaded(tmp_path):
    states = new_state(), new_state(seed=5)
    for state in states:
        state.optimizer = torch.optim.AdamW(state.model.named_parameters())
        check_space(state, tmp_path, saves=1, keep=None)
    path = save_checkpoint(train(states[0], 1), tmp_path, ACCELERATOR)
    load_checkpoint(states[1], path, ACCELERATOR)
    assert_same_weights(*(train(state, 1).model for state in states))
    states[1].optimizer = torch.optim.AdamW(states[1].model.parameters(), capturable=True)
    load_checkpoint(states[1], path, ACCELERATOR)


def test_lack_of_space_is_reported_before_anything_is_written(tmp_path):
    with torch.device("meta"):
        model = torch.nn.Linear(10**7, 10**7, bias=False)  # 400 TB of weights
    for optimizer, per_weight in [("adamw", 3), ("adafactor", 1), ("sgd", 1)]:
        state = TrainState(model, make_optimizer(model, name=optimizer, memory="off"), step=1)
        size = 4 * 10**14
        needed = (
            f"{3 * per_weight * size + size:,} bytes for 3 more checkpoints .{per_weight * size:,} each. and the model"
        )
        with pytest.raises(UsageError, match=rf"run needs {needed}, but only [0-9,]+ are free: free disk space"):
            check_space(state, tmp_path / "run", saves=10, keep=2)
    ema = {"weight": torch.zeros(()).expand(model.weight.shape)}
    with pytest.raises(UsageError, match=rf"for 1 more checkpoints .{2 * size:,} each"):
        check_space(state, tmp_path / "run", saves=1, keep=None, extra={"ema": ema})
    with pytest.raises(SaveError, match="No space left on device; it takes 400,000,000,000,000 bytes"):
        save_checkpoint(state, tmp_path / "run", ACCELERATOR)
    assert not any((tmp_path / "run").iterdir())
    small = new_state()
    check_space(small, tmp_path / "run", saves=10**6, keep=2)
    with pytest.raises(UsageError, match="for 1000000000 more checkpoints"):
        check_space(small, tmp_path / "run", saves=10**9, keep=None)
    assert not small.optimizer.state and len(small.optimizer.param_groups) == 2


def test_the_best_checkpoint_is_kept_with_the_newest(tmp_path):
    state = new_state()
    for step, eval_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5), (5, 0.5)]:
        train(state, 1)
        if state.best is None or eval_loss < state.best["eval_loss"]:
            state.best = {"step": step, "eval_loss": eval_loss}
        save_checkpoint(state, tmp_path / "two", ACCELERATOR, keep=2)
        save_checkpoint(state, tmp_path / "one", ACCELERATOR, keep=1)
        expected = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 4], 5: [4, 5]}[step]
        assert [step_of(path) for path in checkpoints(tmp_path / "two")] == expected
        assert [step_of(path) for path in checkpoints(tmp_path / "one")] == sorted({state.best["step"], step})


FILES = ["manifest.json", "state.json", "optimizer.safetensors", "model/model.safetensors", "model/config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["a bit flipped", "cut", "grown", "missing"])
def test_a_damaged_file_is_found_and_named(name, damage, tmp_path):
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    file = path / name
    data = bytearray(file.read_bytes())
    for offset in (0, len(data) // 3, len(data) - 2) if damage == "a bit flipped" else (0,):
        damaged = bytearray(data)
        if damage == "a bit flipped":
            damaged[offset] ^= 1
            file.write_bytes(damaged)
        elif damage == "missing":
            file.unlink()
        elif name == "manifest.json":
            file.write_bytes(data[:-9] if damage == "cut" else data + b"}")
        else:
            file.write_bytes(data[:-1] if damage == "cut" else data + b"\0")
        with pytest.raises(UsageError, match="use another") as caught:
            verify_checkpoint(path)
        assert name in str(caught.value)


def test_the_newest_valid_checkpoint_is_chosen_and_faults_of_newer_ones_are_printed(tmp_path, capsys):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    state = new_state()
    paths = [save_checkpoint(train(state, 1), tmp_path, ACCELERATOR) for _ in range(3)]
    assert latest_checkpoint(tmp_path) == paths[2]
    (paths[2] / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == paths[1]
    assert "step-00000003/state.json is missing" in capsys.readouterr().out


def test_loading_a_damaged_checkpoint_changes_nothing(tmp_path):
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)
    state, untouched = new_state(seed=3), new_state(seed=3)
    with pytest.raises(UsageError, match="optimizer.safetensors changed since it was saved"):
        load_checkpoint(state, path, ACCELERATOR)
    assert_same_weights(state.model, untouched.model)
    assert state.step == state.stream.position == 0 and not state.optimizer.state


def test_a_checkpoint_of_another_model_is_refused_with_a_list_of_differences(tmp_path):
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    model = build("t5", d_model=16)
    state = TrainState(model, make_optimizer(model, memory="off"))
    with pytest.raises(UsageError) as caught:
        load_checkpoint(state, path, ACCELERATOR)
    message = str(caught.value)
    assert "decoder.block.0.layer.0.SelfAttention.k.weight was F32[32, 32] and is F32[32, 16]" in message
    assert "more. Build the model that was saved, with its optimizer in the same memory tier" in message
    assert message.count(";") == 9
    deeper = build("t5", num_layers=3)
    with pytest.raises(UsageError, match="decoder.block.2.layer.0.SelfAttention.k.weight is not in the checkpoint"):
        load_checkpoint(TrainState(deeper, make_optimizer(deeper, memory="off")), path, ACCELERATOR)
    with pytest.raises(
        UsageError, match="has the state of AdamW with memory=off, but the optimizer is SGD with memory=off"
    ):
        load_checkpoint(new_state(optimizer="sgd"), path, ACCELERATOR)


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    manifest = json.loads((path / "manifest.json").read_text())["manifest"] | {"format": 2}
    seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({"manifest": manifest, "xxh3_128": seal}))
    with pytest.raises(UsageError, match="upgrade lowmem"):
        verify_checkpoint(path)


def reseal(path, manifest):
    """Write a manifest with a valid hash."""
    seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({"manifest": manifest, "xxh3_128": seal}))


def rewrite(path, name, content):
    """Replace a file of a checkpoint, and write its new size and hash to the manifest."""
    (path / name).write_bytes(content)
    manifest = read_manifest(path)
    reseal(path, manifest | {"files": manifest["files"] | {name: record_file(path / name)}})


def with_field(content, field, value):
    """Return a copy of nested dicts with `field`, such as "stream.position", set to `value` (MISSING: removed)."""
    copied = json.loads(json.dumps(content))
    *outer, name = field.split(".")
    inner = copied
    for key in outer:
        inner = inner[key]
    if value is MISSING:
        del inner[name]
    else:
        inner[name] = value
    return copied


MISSING = object()
NOT_COUNTS = [MISSING, None, True, -1, 2**63, 1.0, "1", [], {}]
NOT_TEXTS = [None, 1, [], {}]
STATE_FIELDS = {
    "step": NOT_COUNTS,
    "updates": NOT_COUNTS[1:],
    "best": [1, "x", [], {}, {"step": -1, "eval_loss": 1.0}, {"step": 1, "eval_loss": float("nan")}],
    "seed": [MISSING, None, True, 2**64, 1.0, "1", [], {}],
    "stream": [MISSING, 1, "x", []],
    "stream.position": NOT_COUNTS,
    "stream.num_rows": [0, *NOT_COUNTS],
    "stream.row_groups": NOT_TEXTS,
    "stream.shuffle": [None, 1, "true"],
    "stream.seed": [MISSING, None, 1.0, "1"],
    "stream.global_batch_size": [0, *NOT_COUNTS],
    "stream.files": [None, 1, "x", [1], {}],
    "tokenizer": [1, [], {}],
    "optimizer": [MISSING, *NOT_TEXTS],
    "memory": [None, 1, "small", []],
    "parameters": [None, 1, "x", [1], {}],
}
MANIFEST_FIELDS = {
    "format": [0, *NOT_COUNTS],
    "step": [2, *NOT_COUNTS],
    "files": [MISSING, None, 1, "x", [], {}],
    "files.notes": [
        None,
        1,
        "x",
        [],
        {},
        {"bytes": -1, "xxh3_128": "0" * 32},
        {"bytes": 1},
        {"bytes": 1, "xxh3_128": 1},
    ],
}


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    state = train(new_state(), 1)
    files = {"tokenizer": ByT5Tokenizer(), "config": {"memory": "off", "template_time": None}}
    return save_checkpoint(state, tmp_path_factory.mktemp("saved"), ACCELERATOR, **files)


def assert_refused(path, *named):
    with pytest.raises(UsageError, match=": use another checkpoint|upgrade lowmem") as caught:
        verify_checkpoint(path)
    message = str(caught.value)
    assert all(name in message for name in named) and "\n" not in message, message
    assert latest_checkpoint(path.parent) is None


@pytest.mark.parametrize("field", STATE_FIELDS)
def test_a_wrong_field_of_the_state_is_named_although_all_hashes_are_right(field, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    state = json.loads((path / "state.json").read_text())
    for value in STATE_FIELDS[field]:
        rewrite(path, "state.json", json.dumps(with_field(state, field, value)).encode())
        assert_refused(path, "state.json", field)


@pytest.mark.parametrize("field", MANIFEST_FIELDS)
def test_a_wrong_field_of_the_manifest_is_named_although_its_hash_is_right(field, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    manifest = read_manifest(path)
    for value in MANIFEST_FIELDS[field]:
        reseal(path, with_field(manifest, field, value))
        assert_refused(path, field)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a//b", "./state.json", "model/../x", "", ".", "..", "a\0b"])
def test_a_name_outside_the_checkpoint_is_refused(name, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    manifest = read_manifest(path)
    reseal(path, manifest | {"files": manifest["files"] | {name: manifest["files"]["state.json"]}})
    assert_refused(path, "manifest.json: files has")


@pytest.mark.parametrize("name", ["state.json", "model/model.safetensors", "optimizer.safetensors"])
def test_a_required_file_is_required(name, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    manifest = read_manifest(path)
    del manifest["files"][name]
    reseal(path, manifest)
    assert_refused(path, f"manifest.json: files does not list {name}")


@pytest.mark.parametrize(
    "name", ["state.json", "model/lowmem.json", "optimizer.safetensors", "model/model.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10**5, b"9" * 5000, b"\xff" * 8, b"\x02" + bytes(7) + b"{]"])
def test_a_file_with_a_valid_hash_that_cannot_be_read_is_named(content, name, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    rewrite(path, name, content)
    with pytest.raises(UsageError) as caught:
        verify_checkpoint(path)
    assert f"{path / name}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=name):
        load_checkpoint(new_state(), path, ACCELERATOR)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": "../model.safetensors"}, {"a": 1}, {"a": "other.safetensors"}, {"a": ".."}]
)
def test_an_index_may_name_only_files_of_the_checkpoint(weight_map, one_step, tmp_path):
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    (path / "model" / "other.safetensors").touch()
    rewrite(path, "model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json.* weight_map"):
        verify_checkpoint(path)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("change", ["renamed", "cut", "missing", "unknown"])
def test_optimizer_state_with_wrong_tensors_is_refused(change, optimizer, tmp_path):
    path = save_checkpoint(train(new_state(optimizer=optimizer), 1), tmp_path, ACCELERATOR)
    tensors = load_file(path / "optimizer.safetensors")
    name = next((name for name in tensors if name.endswith((".exp_avg", ".row_var"))), None)
    if change == "unknown" or name is None:
        tensors["other.weight.exp_avg"] = torch.zeros(2)
    else:
        tensor = tensors.pop(name)
        tensors |= {} if change == "missing" else {f"{name}_x" if change == "renamed" else name: tensor.flatten()[:3]}
    rewrite(path, "optimizer.safetensors", to_safetensors(tensors))
    with pytest.raises(UsageError, match="does not match the model: .*state"):
        load_checkpoint(new_state(optimizer=optimizer), path, ACCELERATOR)


def test_a_fifo_in_a_checkpoint_is_not_opened(one_step, tmp_path):
    for name in ("manifest.json", "state.json"):
        path = shutil.copytree(one_step, tmp_path / name / one_step.name)
        (path / name).unlink()
        os.mkfifo(path / name)
        assert latest_checkpoint(path.parent) is None


class OwnStream:
    """A user's stream, with a state of its own."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_checkpoint_may_have_any_settings_and_the_state_of_any_stream(tmp_path):
    state, loaded = new_state(), new_state()
    state.stream, loaded.stream = OwnStream({"position": [3, 1], "seed": "a"}), OwnStream({})
    path = save_checkpoint(state, tmp_path, ACCELERATOR, config={"memory": "24GB", "template_time": 5})
    load_checkpoint(loaded, path, ACCELERATOR)
    assert loaded.stream.state == {"position": [3, 1], "seed": "a"}
    with pytest.raises(UsageError, match="lowmem.json: memory is '24GB', not null or one of"):
        checkpoint_to_resume(str(path), tmp_path)
    path = save_checkpoint(state, tmp_path / "other", ACCELERATOR)
    with pytest.raises(UsageError, match=r"state.json: stream.position is \[3, 1\], not an integer"):
        checkpoint_to_resume(str(path), tmp_path)


def test_the_state_of_an_early_stream_is_valid(one_step, tmp_path):
    """The first version saved neither the row groups, the shuffling, nor the files."""
    path = shutil.copytree(one_step, tmp_path / one_step.name)
    state = json.loads((path / "state.json").read_text())
    for name in ("row_groups", "shuffle", "files"):
        state["stream"].pop(name, None)
    rewrite(path, "state.json", json.dumps(state).encode())
    assert checkpoint_to_resume(str(path), tmp_path) == path


def test_a_run_resumes_only_at_the_position_of_its_step(one_step, tmp_path, capsys):
    checkpoints = tmp_path / "checkpoints"
    good = shutil.copytree(one_step, checkpoints / "step-00000001")
    bad = shutil.copytree(one_step, checkpoints / "step-00000002")
    state = json.loads((bad / "state.json").read_text()) | {"step": 2}
    rewrite(bad, "state.json", json.dumps(state).encode())
    reseal(bad, read_manifest(bad) | {"step": 2})
    assert checkpoint_to_resume("auto", tmp_path) == good
    found = f"{bad}/state.json: stream.position is 4, but step is 2 with 4 rows per step: use another checkpoint\n"
    assert capsys.readouterr().out == f"skipped a checkpoint: {found}"
    with pytest.raises(UsageError, match="stream.position is 4"):
        checkpoint_to_resume(str(bad), tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    state = new_state()
    for _ in range(4):
        save_checkpoint(train(state, 1), tmp_path, ACCELERATOR, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_pruning_touches_neither_later_checkpoints_nor_other_folders(tmp_path):
    """Checkpoints 3 and 4 are damaged, so a run resumes from step 2 and saves a new step 3, which pruning must keep."""
    state = new_state()
    paths = [save_checkpoint(train(state, 1), tmp_path, ACCELERATOR) for _ in range(4)]
    shutil.copytree(paths[0], tmp_path / "step-00000001-good")
    for damaged in paths[2:]:
        (damaged / "manifest.json").unlink()
    resumed = new_state()
    load_checkpoint(resumed, latest_checkpoint(tmp_path), ACCELERATOR)
    third = save_checkpoint(train(resumed, 1), tmp_path, ACCELERATOR, keep=1)
    assert latest_checkpoint(tmp_path) == third == paths[2]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001-good", "step-00000003", "step-00000004"]


def test_tied_weights_are_written_once(tmp_path):
    state = train(new_state("t5"), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    names = load_file(path / "model" / "model.safetensors").keys()
    assert names == {name for name, _ in state.model.named_parameters()}
    assert "lm_head.weight" not in names and "shared.weight" in names


def test_a_changed_manifest_is_refused_even_if_it_is_valid_json(tmp_path):
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    sealed = json.loads((path / "manifest.json").read_text())
    sealed["manifest"]["step"] = 2
    (path / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(UsageError, match="manifest.json changed since it was saved"):
        verify_checkpoint(path)


def test_a_generation_config_that_transformers_refuses_to_save_is_saved(tmp_path):
    state = train(new_state("llama"), 1)
    state.model.generation_config.temperature = 0.6  # transformers refuses to save this with do_sample=False
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    assert AutoModelForCausalLM.from_pretrained(path / "model").generation_config.temperature == 0.6


def test_a_failed_save_leaves_the_older_checkpoints(tmp_path):
    state = train(new_state(), 1)
    first = save_checkpoint(state, tmp_path, ACCELERATOR, keep=1)
    train(state, 1)
    # this process may write only small files, so the save fails, as it would on a full disk
    run_with_small_files(lambda: save_checkpoint(state, tmp_path, ACCELERATOR, keep=1))
    assert latest_checkpoint(tmp_path) == first
    assert os.listdir(tmp_path) == [first.name]  # the failed save has left no file
    second = save_checkpoint(state, tmp_path, ACCELERATOR, keep=1)
    assert os.listdir(tmp_path) == [second.name]


def test_the_files_of_a_killed_save_are_removed_by_the_next_save(tmp_path):
    (tmp_path / ".unfinished-step-00000009" / "model").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(train(new_state(), 1), tmp_path, ACCELERATOR)
    assert os.listdir(tmp_path) == [path.name]


def run_with_small_files(action, step=2):
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            SaveError, match=f"step-{step:08d} could not be saved: File too large; it takes .* bytes, .* are free"
        ):
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_checkpoint_is_overwritten_only_if_it_is_damaged(tmp_path):
    state = train(new_state(), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    with pytest.raises(FileExistsError, match="already exists"):
        save_checkpoint(state, tmp_path, ACCELERATOR)
    verify_checkpoint(path)
    (path / "manifest.json").unlink()
    verify_checkpoint(save_checkpoint(state, tmp_path, ACCELERATOR))


def test_the_model_folder_is_replaced_as_a_whole(tmp_path):
    model = build("llama")
    save_model(model, tmp_path / "model", config={"prompt_column": "q"})
    (tmp_path / "model" / "stale.safetensors").write_bytes(b"")
    save_model(model, tmp_path / "model", config={"prompt_column": "q"})
    assert not (tmp_path / "model" / "stale.safetensors").exists()
    assert json.loads((tmp_path / "model" / "lowmem.json").read_text()) == {"prompt_column": "q"}
    assert os.listdir(tmp_path) == ["model"]
    shutil.rmtree(tmp_path / "model")


class Branches(torch.nn.Module):
    """A model with an unused layer, a frozen layer, a scalar parameter and a three-dimensional parameter."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = (torch.nn.Linear(80, 80) for _ in range(3))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.filters = torch.nn.Parameter(torch.randn(4, 40, 40))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return (self.used(x) * self.scale).sum() + self.filters.square().sum()


def branches(memory="off", optimizer=None):
    torch.manual_seed(0)
    model = Branches()
    return TrainState(model, optimizer(model.parameters()) if optimizer else make_optimizer(model, memory=memory))


def step_branches(state):
    state.model(torch.ones(2, 80, dtype=state.model.used.weight.dtype)).backward()
    for group in state.optimizer.param_groups:
        group["lr"] = 0.01
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


@pytest.mark.parametrize("now", ["off", "exact", "lean"])
def test_parameters_that_never_had_a_gradient_are_loaded_like_others(now, tmp_path):
    state, loaded = branches(), branches(memory=now)
    step_branches(state)
    load_checkpoint(loaded, save_checkpoint(state, tmp_path, ACCELERATOR), ACCELERATOR)
    rounding = {"off": 0, "exact": 2**-8, "lean": 2**-7}[now]
    assert torch.allclose(loaded.model.unused.weight.float(), state.model.unused.weight, rtol=rounding, atol=0)
    if now != "off":
        values = values_of(loaded)
        for name, expected in [("scale", state.model.scale), ("filters", state.model.filters)]:
            tolerance = 0 if now == "exact" else rounding
            assert torch.allclose(values[f"{name}.weight"].view_as(expected), expected, rtol=tolerance, atol=0), name
    step_branches(loaded)
    if now == "off":
        step_branches(state)
        assert_same_weights(state.model, loaded.model)


def test_an_optimizer_with_frozen_parameters_continues(tmp_path):
    state, loaded = branches(optimizer=torch.optim.AdamW), branches(optimizer=torch.optim.AdamW)
    step_branches(state)
    load_checkpoint(loaded, save_checkpoint(state, tmp_path, ACCELERATOR), ACCELERATOR)
    step_branches(state)
    step_branches(loaded)
    assert_same_weights(state.model, loaded.model)


def test_optimizer_state_of_bf16_weights_keeps_its_dtypes(tmp_path):
    models = (build("llama").bfloat16() for _ in range(2))
    state, loaded = (TrainState(model, make_optimizer(model, name="nadam", memory="off")) for model in models)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    load_checkpoint(loaded, save_checkpoint(state, tmp_path, ACCELERATOR), ACCELERATOR)
    mine, theirs = (
        optimizer_tensors(named_parameters(each.model, each.optimizer), each.optimizer) for each in (state, loaded)
    )
    assert {x.dtype for x in mine.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


def test_an_index_file_that_the_save_did_not_write_is_ignored(tmp_path):
    state = train(new_state(), 1)
    path = save_checkpoint(state, tmp_path, ACCELERATOR)
    write_tensors({"shared.weight": torch.zeros(384, 32)}, path / "model" / "evil.safetensors")
    index = {"weight_map": {"shared.weight": "evil.safetensors"}}
    (path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = new_state(seed=5)
    load_checkpoint(loaded, path, ACCELERATOR)
    assert_same_weights(state.model, loaded.model)


def test_links_and_unusual_names_do_not_break_a_save(tmp_path, capsys):
    state = new_state()
    (tmp_path / "other disk").mkdir()
    first = save_checkpoint(train(state, 1), tmp_path / "run[1]", ACCELERATOR)
    moved = first.rename(tmp_path / "other disk" / "step")
    first.symlink_to(moved)
    for _ in range(2):
        last = save_checkpoint(train(state, 1), tmp_path / "run[1]", ACCELERATOR, keep=1)
    assert os.listdir(tmp_path / "run[1]") == [last.name] and (moved / "manifest.json").exists()
    (tmp_path / "link").symlink_to(tmp_path / "other disk")
    for name in ("o*", "[x]", "link/model"):
        left = tmp_path / name
        (left.parent / f".unfinished-{left.name}").mkdir()
        (left.parent / f".unfinished-replaced-{left.name}").mkdir()
        (left.parent / ".unfinished-other").mkdir(exist_ok=True)
        for _ in range(2):
            save_model(state.model, left)
        hidden = {path.name for path in left.parent.iterdir() if path.name.startswith(".")}
        assert hidden == {".unfinished-other"} and (left / "config.json").exists(), name
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file: save to another folder"):
        save_model(state.model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_error_is_raised_if_only_the_tokenizer_cannot_be_written(tmp_path):
    tokenizer = Tokenizer(WordLevel({f"word{i}": i for i in range(9000)}, unk_token="word0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    state = TrainState(torch.nn.Linear(2, 2), None)
    state.optimizer = make_optimizer(state.model, memory="off")
    run_with_small_files(lambda: save_checkpoint(state, tmp_path, ACCELERATOR, tokenizer=tokenizer), step=0)
    assert not os.listdir(tmp_path)


def test_a_tensor_that_cannot_be_saved_is_reported_at_the_start(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("freqs", torch.zeros(2, dtype=torch.complex64))
    state = TrainState(model, make_optimizer(model, memory="off"))
    with pytest.raises(UsageError, match="tensor freqs cannot be saved .*complex64.*: give it another dtype"):
        check_space(state, tmp_path, saves=1, keep=None)


class Adapter(torch.nn.Module):
    """A low-rank adapter of a linear layer, with PEFT's names: the layer's weight becomes base_layer.weight."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = torch.nn.Linear(layer.in_features, 2), torch.nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Wrapper(torch.nn.Module):
    """A model within another, with the model's config, like PEFT's PeftModel."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


def with_added_weights():
    """Like loralib, which keeps the weight's name and adds two more."""
    model = build("llama")
    model.model.layers[1].self_attn.q_proj.lora_A = torch.nn.Parameter(torch.zeros(2, 32))
    return model


def with_adapter():
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    return model


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (with_adapter, r"initialize 1 weights .model.layers.1.self_attn.q_proj.weight, .... randomly"),
        (lambda: Wrapper(build("llama")), r"initialize 21 weights .lm_head.weight, .... randomly"),
        (with_added_weights, r"ignore 1 weights .model.layers.1.self_attn.q_proj.lora_A, ...."),
    ],
    ids=["adapter", "wrapper", "added weights"],
)
def test_a_model_that_from_pretrained_would_not_load_as_it_is_is_not_saved(make, found, tmp_path):
    model = make()
    state = TrainState(model, make_optimizer(model, memory="off"))
    why = "because LlamaForCausalLM names its weights otherwise: add adapters with add_lora"
    message = f"from_pretrained would {found}, {why}"
    for save in (
        lambda: check_space(state, tmp_path, saves=1, keep=None),
        lambda: save_checkpoint(state, tmp_path, ACCELERATOR),
        lambda: save_model(model, tmp_path / "model"),
    ):
        with pytest.raises(UsageError, match=message):
            save()
    assert not os.listdir(tmp_path)


class WithValue(LlamaForCausalLM):
    """A model with one more head, whose constructor takes more than a config."""

    def __init__(self, config, num_values):
        super().__init__(config)
        self.value = torch.nn.Linear(config.hidden_size, num_values)


def test_a_class_of_the_users_own_is_saved(tmp_path):
    model = WithValue(build("llama").config, 3)
    save_model(model, tmp_path / "model")
    assert_same_weights(model, WithValue.from_pretrained(tmp_path / "model", num_values=3))


PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
}


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_the_files_of_a_processor_are_saved_with_the_model(source, tmp_path, monkeypatch):
    folder = tmp_path / "models--org--name" / "snapshots" / "1234"  # the layout of the hub's cache
    build("llama").save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    for name, content in PROCESSOR.items() | {("modeling_other.py", "print()"), ("other.json", "{}")}:
        (folder / name).write_text(content)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(folder.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, tokenizer = load_model(folder)
    model.name_or_path = "org/name" if source == "hub" else str(folder)
    state = TrainState(model, make_optimizer(model, memory="off"))
    path = save_checkpoint(state, tmp_path, ACCELERATOR, tokenizer=tokenizer)
    verify_checkpoint(path)
    shutil.rmtree(folder)
    again, _ = load_model(path / "model")  # as a run that continues from the checkpoint's model
    save_model(again, tmp_path / "model")
    for saved in (path / "model", tmp_path / "model"):
        assert {name: (saved / name).read_text() for name in PROCESSOR} == PROCESSOR
        assert not (saved / "modeling_other.py").exists() and not (saved / "other.json").exists()
    assert "model/processor_config.json" in read_manifest(path)["files"]
    save_model(model, tmp_path / "after")  # whose source no longer exists
    assert (tmp_path / "after" / "config.json").exists()


def test_a_checkpoint_of_a_version_that_padded_with_the_end_token_resumes(tmp_path):
    def tokenizer(**special):
        words = Tokenizer(WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)

    hashed = tokenizer_digest(tokenizer(eos_token="</s>", pad_token="</s>"))
    path = save_checkpoint(new_state(), tmp_path, ACCELERATOR, tokenizer_hash=hashed)
    given = tokenizer(eos_token="</s>")
    assert check_same_tokenizer(path, given, accept=False) == [] and given.pad_token is None
    with pytest.raises(UsageError, match="trained with another tokenizer"):
        check_same_tokenizer(path, tokenizer(), accept=False)
    assert check_same_tokenizer(path, tokenizer(), accept=True) == ["another tokenizer or chat template"]
