import io
import json
import os
import re
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    ByT5Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
)

from lowmem.checkpoint.save import save_model
from lowmem.config.presets import MODEL_SHAPES
from lowmem.errors import UsageError
from lowmem.model.build import freeze
from lowmem.model.load import load_model
from tests.models import FAMILIES, LLAMA, T5, build
from tests.processes import finish, started_function


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded_in_training_mode(family, tmp_path):
    saved = build(family)
    saved.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert type(model) is type(saved) and model.training
    assert tokenizer("a").input_ids == ByT5Tokenizer()("a").input_ids
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("start", [None, 5])
@pytest.mark.parametrize("language", ["ro_RO", None])
def test_answers_start_with_the_token_with_which_training_starts(language, start, tmp_path):
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁b", -2.0)]
    tokenizer = MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang=language)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    config = MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=start, **layers)
    MBartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert tokenizer.tgt_lang == language
    expected = start or tokenizer.convert_tokens_to_ids(language or "en_XX")
    answer = model.generate(torch.tensor([[4, 2]]), max_new_tokens=1, do_sample=False)
    assert answer[0, 0] == model.generation_config.decoder_start_token_id == expected


def test_a_folder_in_bf16_is_loaded_in_fp32(tmp_path):
    build("llama").bfloat16().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, tokenizer_name_or_path=saved_tokenizer(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def saved_tokenizer(folder):
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.mark.parametrize("form", ["name", "file", "fields", "config"])
def test_a_config_may_be_a_name_a_file_fields_or_an_object(form, tmp_path):
    fields = LLAMA | {"_name_or_path": "another model"}  # as transformers 4 wrote it
    (tmp_path / "config.json").write_text(json.dumps(fields))
    forms = {
        "name": "t5-tiny",
        "file": tmp_path / "config.json",
        "fields": fields,
        "config": AutoConfig.for_model(**fields),
    }
    model, tokenizer = load_model(model_config=forms[form])
    assert not model.name_or_path
    assert model.training and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_same_seed_builds_the_same_model():
    def first_weight(seed):
        torch.manual_seed(seed)
        return next(load_model(model_config="t5-tiny")[0].parameters())

    assert torch.equal(first_weight(0), first_weight(0)) and not torch.equal(first_weight(0), first_weight(1))


def test_t5_base_has_the_published_number_of_parameters():
    config = AutoConfig.for_model(**MODEL_SHAPES["t5-base"])
    with torch.device("meta"):
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_config(config)
    assert model.num_parameters() == 222_903_552  # as in google-t5/t5-base


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_freezing_embeddings_freezes_a_tied_head(family):
    model = build(family)
    freeze(model, parts=["embeddings"])
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad == (family == "llama")


def test_freezing_the_encoder_leaves_decoder_and_shared_embeddings_trainable():
    model = build("t5")
    freeze(model, parts=["encoder"])
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"shared", "decoder"}
    with pytest.raises(UsageError, match="LlamaForCausalLM has none"):
        freeze(build("llama"), parts=["encoder"])


def test_patterns_freeze_the_parameters_whose_names_they_match():
    model = build("llama")
    freeze(model, parts=["*.layers.0.*", "lm_head.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if ".layers.0." not in name and not name.startswith("lm_head")
    }
    tied = build("qwen2")
    freeze(tied, parts=["lm_head.weight"])  # the other name of the embeddings
    assert not tied.get_input_embeddings().weight.requires_grad
    with pytest.raises(
        UsageError, match="freeze=decoder is neither embeddings nor encoder, and matches no parameter of"
    ):
        freeze(model, parts=["decoder"])
    with pytest.raises(UsageError, match=r"its parameters are model\.embed_tokens\.weight, .*, \.\.\."):
        freeze(model, parts=["embeddings", "layers.0.*"])
    with pytest.raises(UsageError, match="freezes all weights, so nothing is trained: freeze fewer"):
        freeze(model, parts=["*"])


def test_the_chosen_attention_is_used_or_refused(tmp_path):
    build("t5").save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    for source in (
        {"model_name_or_path": tmp_path},
        {"model_name_or_path": tmp_path, "on_meta": True},
        {"model_config": T5},
    ):
        found = [load_model(**source, attn_implementation=name)[0] for name in ("sdpa", "eager")]
        assert [model.config._attn_implementation for model in found] == ["sdpa", "eager"]
        with pytest.raises(UsageError, match=r"T5\w+ does not support Flash Attention 2\): set another attn_impl"):
            load_model(**source, attn_implementation="flash_attention_2")


def test_a_tokenizer_without_its_files_is_refused(tmp_path):
    build("qwen2").save_pretrained(tmp_path)  # without its files, AutoTokenizer silently makes an empty tokenizer
    with pytest.raises(UsageError, match="produces no tokens"):
        load_model(tmp_path)


def write_config(folder, **fields):
    (folder / "llama.json").write_text(json.dumps(LLAMA | fields))
    return folder / "llama.json"


def test_without_a_tokenizer_a_message_says_that_text_becomes_bytes(tmp_path, capsys):
    load_model(model_config=write_config(tmp_path))
    assert "text becomes bytes (384 tokens); set it to train on a tokenizer's tokens" in capsys.readouterr().out


def test_user_errors_are_reported(tmp_path):
    with pytest.raises(UsageError, match="set one of them"):
        load_model()
    with pytest.raises(UsageError, match="does not contain config.json, so it is not a model: use another folder"):
        load_model(tmp_path)
    build("llama").save_pretrained(tmp_path / "inside" / "model")
    with pytest.raises(UsageError, match="did you mean .*inside/model"):
        load_model(tmp_path / "inside")
    with pytest.raises(UsageError, match="no tokenizer can be loaded|produces no tokens"):
        load_model(tmp_path / "inside" / "model")
    saved_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="has no model_type"):
        load_model(model_config={"vocab_size": 9})
    with pytest.raises(
        UsageError, match="text becomes bytes .384 tokens., but model_config has a vocabulary of 32,000"
    ):
        load_model(model_config=write_config(tmp_path, vocab_size=32_000))
    with pytest.raises(UsageError, match="transformers does not accept model_config"):
        load_model(model_config={"model_type": "t6"})
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(model_config=tmp_path / "missing.json")


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def move_weights(folder):
    """Let the index name a file outside the folder."""
    file = (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(file), "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_weights_by_a_fifo(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def break_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "BPEv9"}}')


def add_code(folder, file, **fields):
    edit_json(folder / file, **fields)
    (folder / "code.py").write_text(f"open({str(folder / 'it_ran')!r}, 'w')")


FAULTS = {
    "a pointer of git lfs": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"/model.safetensors is not a valid safetensors file \(.*\): copy or download it again",
    ),
    "cut weights": (
        cut_weights,
        "/model.safetensors is not a valid .*not fully covered.: copy or download it again",
    ),
    "weights outside the folder": (
        move_weights,
        "/model.safetensors.index.json: weight_map.* is '../other.safetensors', not a file in the same folder: copy",
    ),
    "a FIFO": (replace_weights_by_a_fifo, "/model.safetensors is a FIFO: copy or download it again"),
    "a larger vocabulary": (
        lambda folder: edit_json(folder / "config.json", vocab_size=400),
        r"2 weights of the model .*model do not have .*lm_head.weight has \[384, 32\] instead of \[400, 32\], ...\): "
        "correct config.json",
    ),
    "a missing package": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "vptq"}),
        "model .*model cannot be loaded .*vptq`.: install the missing package, or use another model",
    ),
    "quantized weights": (
        lambda folder: edit_json(
            folder / "config.json",
            quantization_config={
                "quant_method": "bitnet",
                "quantization_mode": "online",
                "linear_class": "autobitlinear",
            },
        ),
        "model .*model has quantized weights, which cannot be trained: use an unquantized model",
    ),
    "a damaged config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", '),
        "model .*model cannot be loaded .*not a valid JSON file.*: check its files",
    ),
    "a damaged generation config": (
        lambda folder: (folder / "generation_config.json").write_text('{"max_length": '),
        "model .*model cannot be loaded .*not a valid JSON file.*: check its files",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "adapter_config.json has no peft_type: save the adapters again",
    ),
    "a model with its own code": (
        lambda folder: add_code(folder, "config.json", model_type="new", auto_map={"AutoConfig": "code.C"}),
        "model .*model cannot be loaded .*contains custom code .*: lowmem never runs the code of a model's files",
    ),
    "a tokenizer with its own code": (
        lambda folder: add_code(
            folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["code.T", None]}
        ),
        "no tokenizer can be loaded from .*contains custom code .*: lowmem never runs the code of a model's files",
    ),
    "a part with its own code": (
        lambda folder: add_code(
            folder,
            "config.json",
            model_type="encoder-decoder",
            encoder={"model_type": "bert", "num_hidden_layers": 1},
            decoder={"model_type": "vit", "auto_map": {"AutoModelForCausalLM": f"{folder}--code.M"}},
        ),
        "model .*model cannot be loaded .*custom code .*: lowmem never runs the code of a model's files",
    ),
    "a newer tokenizer": (
        break_tokenizer,
        r"no tokenizer can be loaded from .*model \(Exception: data did not match .*update transformers and tokenizers",
    ),
}


@pytest.mark.parametrize("on_meta", [False, True], ids=["whole", "on_meta"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(fault, on_meta, tmp_path, monkeypatch):
    model, tokenizer = load_model(model_config=LLAMA)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    damage, message = FAULTS[fault]
    damage(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # "yes, run the code", if anything asks
    with pytest.raises(UsageError, match=message) as caught:
        load_model(tmp_path / "model", on_meta=on_meta)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model" / "it_ran").exists()


MiB = 2**20
UNFIT = {
    "llama": [
        ({"vocab_size": 10**12}, r"lm_head.weight has \[384, 32\] instead of \[1000000000000, 32\], ...\): correct"),
        ({"vocab_size": 10**18}, "cannot be loaded .*overflow"),
        ({"hidden_size": 10**9}, "21 weights of the model .* do not have the shapes that its config.json sets"),
        ({"intermediate_size": 10**12}, "6 weights of the model .* do not have the shapes"),
        ({"head_dim": 10**9}, "8 weights of the model .* do not have the shapes"),
        ({"num_hidden_layers": 3}, "lacks 9 weights"),
        ({"num_hidden_layers": 10**5}, "config.json of the model .* sets over 1,210 modules, .*: correct config.json"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1,000,000,000,000, but at most 100,000 .*: correct"),
        ({"num_labels": 10**12}, "num_labels=1,000,000,000,000, but at most 100,000 are supported: correct"),
    ],
    "t5": [
        ({"d_model": 10**9}, "45 weights of the model .* do not have the shapes"),
        ({"num_heads": 10**9}, "26 weights of the model .* do not have the shapes"),
        ({"num_decoder_layers": 10**5}, "config.json of the model .* sets over 1,470 modules"),
    ],
    "gptj": [
        ({"n_positions": 10**12}, "sets buffers of .*, more than the .* bytes of its weights: correct config.json")
    ],
}


def load_each_with_little_memory(folder, changes):
    """Print the error of each change of config.json; a change that loads prints nothing."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 500 * MiB, resource.RLIM_INFINITY))
    config = (folder / "config.json").read_text()
    for fields in changes:
        for on_meta in (False, True):
            (folder / "config.json").write_text(json.dumps(json.loads(config) | fields))
            try:
                load_model(folder, on_meta=on_meta)
            except UsageError as error:
                print(error)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's address space")
@pytest.mark.parametrize("family", UNFIT)
def test_sizes_that_do_not_fit_the_weights_are_refused_without_memory_for_them(family, tmp_path):
    fields = FAMILIES.get(family) or {"model_type": family, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    model, tokenizer = load_model(model_config=fields | {"vocab_size": 384})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    changes, messages = zip(*UNFIT[family], strict=True)
    with started_function(load_each_with_little_memory, tmp_path, changes) as process:
        result = finish(process)
    assert result.returncode == 0, result.stderr
    assert "LOAD REPORT" not in result.stderr
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) in line]
    assert len(lines) == 2 * len(changes)
    for number, line in enumerate(lines):
        assert re.search(messages[number // 2], line)


def test_code_that_a_config_names_is_neither_run_nor_named_in_the_saved_model(tmp_path):
    model, tokenizer = load_model(model_config=LLAMA)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    add_code(tmp_path / "model", "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    saved = save_model(load_model(tmp_path / "model")[0], tmp_path / "saved")
    assert not (tmp_path / "model" / "it_ran").exists()
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "reformer"}, "AssertionError: If you want to use"),
        ({"model_type": "llama", "vocab_size": -5}, "RuntimeError: .*negative dimension"),
        ({"model_type": "llama", "num_attention_heads": 0}, "ZeroDivisionError: "),
        (
            {"model_type": "llama", "hidden_size": "x"},
            "Validation error for field 'hidden_size': TypeError: .* expected int",
        ),
    ],
)
def test_a_config_that_transformers_cannot_build_is_refused_in_one_line(fields, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=rf"transformers .* model_config.*\(.*{reason}.*\): correct its fields"):
        load_model(model_config=tmp_path / "config.json")


def test_running_out_of_memory_is_not_a_user_error():
    with pytest.raises(RuntimeError, match="allocate"):
        load_model(model_config=LLAMA | {"vocab_size": 2**45})


def test_a_path_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="/no/such/model is neither a folder nor a name on the Hugging Face hub"):
        load_model("/no/such/model")


def test_the_folder_of_a_run_is_refused_with_a_hint_at_its_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text('{"seed": 0}')  # the settings of the run
    with pytest.raises(UsageError, match=f"did you mean {tmp_path}/model"):
        load_model(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks 1 weights.*layers.1.mlp.up_proj"):
        load_model(tmp_path, tokenizer_name_or_path=saved_tokenizer(tmp_path))


def test_a_model_with_learned_position_biases_uses_fused_attention_only_on_a_gpu(tmp_path):
    for fields, attention in ((T5, "sdpa" if torch.accelerator.is_available() else "eager"), (LLAMA, "sdpa")):
        model, tokenizer = load_model(model_config=fields)
        assert model.config._attn_implementation == attention
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert "attn" not in (tmp_path / "config.json").read_text()  # not saved, because `load_model` chooses it
        assert load_model(tmp_path)[0].config._attn_implementation == attention


def test_a_model_stops_at_the_end_token_that_rows_are_trained_to_end_with(tmp_path):
    model, tokenizer = load_model(model_config=LLAMA)
    model.generation_config.eos_token_id = 7  # such as a base model whose tokenizer got the end token of chats
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].generation_config.eos_token_id == [tokenizer.eos_token_id, 7]


def test_a_tokenizer_without_a_pad_token_is_saved_as_it_was(tmp_path):
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    given = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    given.save_pretrained(tmp_path / "given")
    model, tokenizer = load_model(model_config=LLAMA, tokenizer_name_or_path=tmp_path / "given")
    assert tokenizer.pad_token is None
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    given, saved = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("given", "model"))
    assert saved.get("pad_token") is given.get("pad_token") is None


def test_a_model_that_is_neither_causal_nor_text_to_text_is_refused():
    with pytest.raises(UsageError, match="no causal or text-to-text model for BarkConfig: use a model of another type"):
        load_model(model_config={"model_type": "bark"})
