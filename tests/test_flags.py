import dataclasses
import json
import os
import pwd
from importlib.util import find_spec

import pytest

from lowmem.config.parse import resolve
from lowmem.config.presets import PRESETS
from lowmem.config.row_formats import ROW_FORMATS
from lowmem.config.rules import NEEDS, NEEDS_WITHOUT_LAYERED
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import ALTERNATIVES, FIELDS, TrainConfig, fields_where
from lowmem.errors import UsageError


def problems_of(**flags):
    with pytest.raises(UsageError) as caught:
        resolve(flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flag", "typed", "value"),
    [
        ("resume", "false", "never"),
        ("resume", "true", "auto"),
        ("resume", "False", "never"),
        ("epochs", "1e3", 1000.0),
        ("batch_size", "1e3", 1000),
        ("batch_size", "16", 16),
        ("output_dir", "2024", "2024"),
        ("output_dir", "1e3", "1e3"),
        ("output_dir", "None", "None"),
        ("deterministic", "false", False),
        ("deterministic", "True", True),
        ("deterministic", "0", False),
        ("learning_rate", "3e-4", 3e-4),
        ("max_steps", "none", None),
        ("train_file", ["a.parquet", "b.parquet"], "a.parquet,b.parquet"),
        ("seed", "1234567890123456789", 1234567890123456789),
        ("freeze", "encoder, embeddings", "encoder,embeddings"),
        ("freeze", ["encoder", " embeddings"], "encoder,embeddings"),
        ("report_to", "none", ""),
        ("report_to", "all", "all"),
        ("eval_steps", "epoch", "epoch"),
        ("lr_scheduler_kwargs", {}, "{}"),
        ("lr_scheduler_kwargs", None, ""),
        ("lr_scheduler_kwargs", "null", ""),
        ("save_steps", "7", 7),
        ("report_to", None, ""),
        ("report_to", ["none"], ""),
        ("output_dir", "o, p ", "o, p "),
        ("prompt_column", " a , b", " a , b"),
        ("test_file", " a, b.jsonl", " a, b.jsonl"),
        ("test_file", ["a, b", "c"], r"a\, b,c"),
    ],
)
def test_a_value_is_converted_to_the_type_of_its_field(flag, typed, value):
    resolved = getattr(resolve({flag: typed}), flag)
    assert resolved == value and type(resolved) is type(value)


def test_a_tilde_in_a_path_is_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model, a").mkdir()
    (tmp_path / "model.json").touch()
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    names = {"model_config": "model.json", "deepspeed": "zero.json"}
    for name in fields_where(holds="path") - ({"deepspeed"} if not find_spec("deepspeed") else set()):
        path = names.get(name, "model, a")
        needed = {"mixed_precision": "bf16"} if name == "offload_weights" else {}
        assert getattr(resolve({name: f"~/{path}", **needed}), name) == f"{tmp_path}/{path}"
    (tmp_path / "run.yaml").write_text("output_dir: ~/out")
    assert resolve({"config": "~/run.yaml"}).output_dir == f"{tmp_path}/out"
    user = pwd.getpwuid(os.getuid())
    assert resolve({"output_dir": f"~{user.pw_name}/out"}).output_dir == f"{user.pw_dir}/out"


@pytest.mark.parametrize("release", [False, True])
def test_an_invalid_number_is_reported_with_or_without_other_flags(release):
    others = RELEASE if release else {}
    for name, field in FIELDS.items():
        if field.type in (int, float, int | None, float | None):
            assert f"--{name}=x is not a" in problems_of(**others | {name: "x"})


@pytest.mark.parametrize("typed", ["ten", "2.5", "nan", "inf", "", "True"])
def test_a_value_that_is_not_an_integer_is_refused(typed):
    assert f"--batch_size={typed} is not an int" in problems_of(batch_size=typed)


def test_flags_override_the_file_which_overrides_presets_which_override_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("use_large_config: true\nlearning_rate: 1.0e-3\nbatch_size: 4\nmixed_precision: no\n")
    config = resolve({"config": str(file), "batch_size": "3"})
    assert config.batch_size == 3  # the flag overrides the file
    assert config.learning_rate == 1e-3 and config.mixed_precision == "no"  # the file overrides the preset
    assert config.recompute == "full" and config.model_config == "t5-base"  # the preset overrides the default
    assert config.optimizer == "adamw"  # the default


def test_the_large_preset_is_t5_base_as_documented():
    config = resolve({"use_large_config": "True"})
    shape = (config.model_config, config.max_seq_len, config.mixed_precision, config.recompute)
    assert shape == ("t5-base", 512, "bf16", "full")
    assert (config.batch_size, config.gradient_accumulation_steps) == (2, 16)


@pytest.mark.parametrize(("one", "other"), ALTERNATIVES)
def test_a_flag_unsets_its_alternative_in_the_config_file(one, other, tmp_path):
    values = {name: "0.5" if name in ("epochs", "warmup_ratio") else "3" for name in (one, other)}
    known = {"model_config": "t5-small", "prompt_template": "{a}", "row_format": "alpaca"}
    values |= {name: value for name, value in known.items() if name in values}
    named = {} if "model_config" in values else {"model_name_or_path": "gpt2"}
    (tmp_path / "low.json").write_text(json.dumps({other: values[other]} | named))
    config = resolve({"config": str(tmp_path / "low.json"), one: values[one]})
    if one == "row_format":  # which sets other flags
        assert (config.prompt_template, config.text_column) == (ROW_FORMATS["alpaca"]["prompt_template"], None)
    else:
        assert getattr(config, one) is not None and getattr(config, other) is None
    assert f"--{one} and --{other} were both set" in problems_of(**values)


def test_a_resolved_config_resolves_to_itself(tmp_path):
    for flags in ({}, {"use_large_config": True, "max_steps": 5}, {"model_name_or_path": "gpt2", "text_column": "t"}):
        config = resolve(flags)
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        assert resolve({"config": tmp_path / "config.json"}) == config


def test_with_bf16_the_default_tier_is_exact_if_the_optimizer_supports_it():
    assert resolve({}).memory is None
    assert resolve(BF16).memory == resolve({"use_large_config": True}).memory == "exact"
    assert resolve(BF16 | {"optimizer": "adafactor"}).memory == "exact"
    assert resolve(BF16 | {"optimizer": "sgd"}).memory == "off"
    assert resolve(BF16 | {"memory": "off"}).memory == "off"
    assert resolve(BF16 | RELEASE | {"memory": "lean"}).release


def test_unknown_flags_are_refused_with_the_nearest_name_if_any():
    assert "unknown flag --batchsize: did you mean --batch_size?" in problems_of(batchsize="3")
    assert "unknown flag --zzz: `--help` lists all flags" in problems_of(zzz="3")


def test_all_problems_are_reported_in_one_error():
    message = problems_of(batch_size="-1", max_seq_len="x", learnin_rate="1", use_small_config="1", use_fast_config="1")
    for part in ("--batch_size=-1", "--max_seq_len=x", "did you mean --learning_rate", "choose one preset"):
        assert part in message
    assert "\n" not in message


POLYNOMIAL = {"lr_scheduler_type": "polynomial"}
UNEVALUATED = {"validation_rows": "0"}
BF16 = {"mixed_precision": "bf16"}
RELEASE = {"model_config": "t5-small", "release": "true", "max_grad_norm": "0"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_seq_len": "-3"}, "--max_seq_len=-3 must be at least 1"),
        ({"learning_rate": "nan"}, "--learning_rate=nan must be above 0"),
        ({"learning_rate": "0"}, "must be above 0"),
        ({"epochs": "inf"}, "--epochs=inf must be above 0"),
        ({"label_smoothing": "1"}, "must be below 1"),
        ({"weight_decay": "-0.1"}, "must be 0 or more"),
        ({"optimizer": "lion"}, "must be one of adamw"),
        ({"mixed_precision": "fp8"}, "must be one of no, bf16, fp16"),
        ({"mixed_precision": "fp16", "memory": "exact"}, "--memory=exact keeps weights in bf16: set --mixed_precision"),
        (
            {"mixed_precision": "fp16", "release": "true", "max_grad_norm": "0"},
            "all gradients are finite",
        ),
        (
            {"mixed_precision": "fp16", "deepspeed": "zero.json"},
            "is not supported under DeepSpeed: remove",
        ),
        ({"is_finetune": "true"}, "--is_finetune freezes pretrained parts: set --model_name_or_path too"),
        ({"model_config": "t5-huge"}, "neither a file nor one of t5-tiny"),
        ({"model_name_or_path": "./nowhere"}, "neither a folder nor the name of a model"),
        ({"eval_steps": "never"}, "--eval_steps=never is not an int"),
        ({"eval_steps": None}, "--eval_steps is empty: give it a value"),
        ({"save_steps": "null"}, "--save_steps=null is not an int"),
        ({"lr_scheduler_type": "sine"}, "--lr_scheduler_type=sine must be one of cosine, linear, constant"),
        ({"lr_scheduler_kwargs": "power=2"}, "--lr_scheduler_type=cosine has no options: remove power"),
        ({"lr_scheduler_kwargs": "power"}, "--lr_scheduler_kwargs=power cannot be read: write name=value"),
        ({"lr_scheduler_kwargs": '{"power"'}, "cannot be read: Expecting ':' delimiter"),
        ({"lr_scheduler_kwargs": "[1]"}, "--lr_scheduler_kwargs=[1] cannot be read: write name=value"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs one of num_decay_steps: set --lr_scheduler_kwargs=num_"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr, min_lr_rate: set --lr_scheduler_kwargs="),
        ({**POLYNOMIAL, "lr_scheduler_kwargs": "power=0"}, "=power=0: power must be a number above 0"),
        ({**POLYNOMIAL, "lr_scheduler_kwargs": "power=true"}, "power must be a number above 0"),
        ({**POLYNOMIAL, "lr_scheduler_kwargs": "lr_end=1"}, "lr_end must be below --learning_rate="),
        ({**POLYNOMIAL, "lr_scheduler_kwargs": "timescale=1"}, "has lr_end, power: remove timescale"),
        ({**UNEVALUATED, "early_stopping_patience": "2"}, "=2 needs evaluations during the run: set --validation_file"),
        ({**UNEVALUATED, "load_best_model_at_end": "1"}, "=True needs evaluations during the run: set --validation_"),
        ({"load_best_model_at_end": "1", "save_steps": "0"}, "needs checkpoints, but --save_steps=0 saves none"),
        ({"load_best_model_at_end": "1", "save_model": "0"}, "chooses the model that a run saves: set --save_model=T"),
        (
            {"load_best_model_at_end": "1", "on_save_error": "continue"},
            "of the best evaluation: set --on_save_error",
        ),
        ({"early_stopping_patience": "0"}, "--early_stopping_patience=0 must be at least 1"),
        ({"neftune_noise_alpha": "-5"}, "--neftune_noise_alpha=-5.0 must be above 0"),
        ({"attn_implementation": "fast"}, "--attn_implementation=fast must be one of eager, sdpa"),
        ({"attn_implementation": "flash_attention_2"}, "needs the package flash_attn, which is not installed"),
        ({"text_column": "t", "max_predict_samples": "9"}, "because only prompts and chats are answered: remove it"),
        ({"optimizer": "sgd", "adam_beta1": "0.8"}, "does nothing with --optimizer=sgd"),
        ({"max_shard_size": "5 apples"}, "is not valid: use a number of bytes"),
        ({"report_to": "printer"}, "--report_to=printer must be one of tensorboard"),
        ({"is_keep_training": "true", "resume": "never"}, "remove one"),
        ({"config": "/nowhere.yaml"}, "cannot be read"),
        ({"output_dir": ""}, "--output_dir is empty"),
        ({"output_dir": " "}, "--output_dir is empty"),
        ({"output_dir": ["a", "b"]}, "--output_dir must be a single value, not a list"),
        ({"report_to": "none,printer"}, "--report_to=none must be one of tensorboard"),
        ({"train_file": ""}, "--train_file is empty"),
        ({"prompt_template": "{a} {}"}, "--prompt_template='{a} {}' cannot be used: braces must hold the name"),
        ({"row_format": "xml"}, "--row_format=xml must be one of alpaca, sharegpt"),
        ({"weight_column": "w"}, "--weight_column names a column of --train_file: set --train_file too"),
        ({"train_weights": "1,2"}, "--train_weights mixes the files of --train_file: set --train_file too"),
        (
            {"train_file": "a", "train_weights": "1,x"},
            "=1,x cannot be used: write positive numbers, separated by",
        ),
        ({"train_file": "a", "train_weights": "1e308,1e308"}, "their sum is more than 1.8e308: divide all by"),
        ({"train_file": "a", "train_weights": "1,-2"}, "-2 is not a positive number: correct it, or remove the source"),
        ({"packing": "maybe"}, "--packing=maybe must be True or False"),
        ({"row_format": "sharegpt", "model_config": "t5-tiny"}, "(--row_format=sharegpt sets --messages_column=conv"),
        (
            {"train_file": "a,b", "train_weights": [1, 2], "validation_rows": 5},
            "--train_weights=1,2 holds out no rows for an evaluation (--validation_file does): set --validation_rows=0",
        ),
        ({"output_dir": "True"}, "--output_dir needs a value"),
        ({"seed": "1e30"}, "must be below 2**63"),
        ({"max_steps": "1e30"}, "must be below 2**63"),
        ({"epochs": "1e30"}, "must be below 2**63"),
        ({"batch_size": "1e18"}, f"must be below {2**24}"),
        ({"prefetch_steps": "1e18"}, "must be below 10000"),
        ({"heartbeat_timeout": "1e18"}, f"must be below {2**31}"),
        ({"seed": "9" * 5000}, "is not an int"),
        ({"max_shard_size": "9" * 400}, "is not between one byte and 2**63 bytes: set a smaller size"),
        ({"host_memory": "9" * 5000 + "GB"}, "is not between one byte and 2**63 bytes: set a smaller size"),
        ({"max_shard_size": "0.1"}, "is not between one byte and 2**63 bytes: set a larger size"),
        ({"model_config": "9" * 400}, "is neither a file nor one of t5-tiny"),
        ({"model_name_or_path": "a/" * 3000}, "is neither a folder nor the name of a model"),
        ({"output_dir": "a" * 300}, "cannot be written: File name too long"),
        ({"resume": "a/" * 3000}, "cannot be read: File name too long"),
        ({"output_dir": "a\0b"}, "--output_dir contains a null byte: remove it"),
        ({"model_config": "~\0"}, "--model_config contains a null byte: remove it"),
        ({"freeze": "a\0b"}, "--freeze contains a null byte: remove it"),
        ({"config": "a" * 300}, "cannot be read: File name too long"),
        ({"config": "."}, "is a folder: name a YAML or JSON file"),
        ({"heartbeat_timeout": "0"}, "--heartbeat_timeout=0 must be at least 1"),
        ({"on_save_error": "skip"}, "--on_save_error=skip must be one of stop, continue"),
        ({"lr": "3"}, "unknown flag --lr: use --learning_rate"),
        ({"memory": "small"}, "must be one of exact, lean, off"),
        ({"memory": "lean"}, "--memory=lean keeps weights in bf16: set --mixed_precision=bf16 too"),
        (
            {**BF16, "memory": "exact", "optimizer": "sgd"},
            "does not support --optimizer=sgd: use one of adamw, adamw_bf16, adafactor for --optimizer (got sgd)",
        ),
        ({"optimizer": "adamw_bf16"}, "needs weights in bf16: set --mixed_precision=bf16"),
        ({**BF16, "optimizer": "adamw_bf16", "memory": "off"}, "needs weights in bf16"),
        ({"release": "true"}, "--release frees gradients before their global norm is known: set --max_grad_norm=0"),
        (
            {**RELEASE, "gradient_accumulation_steps": "2"},
            "set --layered=True, or without it: set --gradient_accumulation_steps=1",
        ),
        ({**RELEASE, "global_batch_size": "64"}, "set --global_batch_size to at most --batch_size=8"),
        ({**RELEASE, "nonfinite": "skip"}, "set --nonfinite=stop"),
        ({**RELEASE, "num_processes": "2"}, "set --num_processes=1"),
        ({**RELEASE, "sharding_strategy": "FULL_SHARD"}, "set --sharding_strategy=NO_SHARD"),
        ({**RELEASE, "model_config": None, "model_name_or_path": "gpt2", "tp_size": "2"}, "set --tp_size=1"),
        ({"sharding_strategy": "HYBRID_SHARD", "shard_size": "2", "num_processes": "3"}, "multiple of --shard_size=2"),
    ],
)
def test_an_invalid_value_or_combination_of_flags_is_reported(flags, message):
    assert message in problems_of(**flags)


# what each flag that pipelines exclude may not be
WITHOUT_STAGES = {
    "sharding_strategy": "HYBRID_SHARD",
    "layered": "true",
    "release": "true",
    "recompute": "cheap",
    "offload_weights": "host",
    "quantization": "nf4",
    "deepspeed": "zero.json",
}


def test_pipelines_refuse_each_flag_that_they_exclude():
    excluded = {other: why for flag, _, other, _, why in NEEDS if flag == "pp_size"}
    assert excluded.keys() == WITHOUT_STAGES.keys()
    for name, value in WITHOUT_STAGES.items():
        assert f"--pp_size=2 {excluded[name]}" in problems_of(pp_size="2", **{name: value})
        assert "pp_size" not in problems_of(**{name: value, "seed": "x"})


@pytest.mark.parametrize("flags", [{"num_processes": "6", "tp_size": "2"}, {"num_processes": "2"}])
def test_processes_must_be_a_multiple_of_stages(flags):
    width = flags.get("tp_size", "1")
    message = f"--num_processes={flags['num_processes']} is not a multiple of --pp_size=4 x --tp_size={width}"
    assert message in problems_of(pp_size="4", **flags)


def test_a_preset_of_the_file_is_switched_off_by_a_flag(tmp_path):
    (tmp_path / "run.yaml").write_text("use_large_config: true\n")
    assert resolve({"config": tmp_path / "run.yaml", "use_large_config": "False"}) == resolve({})
    config = resolve({"config": tmp_path / "run.yaml", "use_large_config": "False", "use_small_config": "True"})
    assert config == resolve({"use_small_config": "True"})


def test_launcher_settings_override_defaults_but_not_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\n")
    assert resolve({}, given={"mixed_precision": "bf16"}).mixed_precision == "bf16"
    assert resolve({"config": tmp_path / "run.yaml"}, given={"mixed_precision": "bf16"}).mixed_precision == "no"


def test_keep_training_means_resume_auto():
    assert resolve({"is_keep_training": "True"}).resume == "auto"
    assert resolve({"is_keep_training": "False"}).resume == "never"


def test_an_invalid_config_file_is_refused(tmp_path):
    wrong_tags = ("seed: !!int ''", "seed: !!bool x", "seed: !!timestamp x", "seed: !!python/object:os.system x")
    nested = ("a: " + "[" * 10**5, "{a: " * 5000, "batch_size: {a: [1]}", "train_file: [[a.jsonl]]")
    others = ("- a\n- b\n", "a: [", "\xff", "\0", "seed: 2026-13-45", "seed: " + "9" * 5000)
    for content in (*others, *wrong_tags, *nested):
        (tmp_path / "c.yaml").write_text(content, encoding="latin-1")
        assert "c.yaml" in problems_of(config=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed:", "--seed is empty: give it a value"),
        ("output_dir:", "--output_dir is empty: give it a value"),
        ("use_large_config:", "--use_large_config is empty: give it a value"),
        ("seed: abc", "--seed=abc is not an int"),
        ("batch_size: [1]", "--batch_size must be a single value, not a list"),
        ("seed: {a: 1}", "--seed must be a single value, not a dict"),
        ("train_file: !!set {a, b}", "--train_file must be a value or a flat list, not a set"),
        ('output_dir: "a\\0b"', "--output_dir contains a null byte"),
    ],
)
def test_a_field_of_the_file_that_has_a_wrong_value_is_named(content, message, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    assert message in problems_of(config=tmp_path / "c.yaml")


@pytest.mark.parametrize("kind", ["lists", "merged mappings"])
def test_aliases_that_expand_without_limit_are_refused(kind, tmp_path):
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"[{aliases}]" if kind == "lists" else f"{{<<: [{aliases}]}}"))
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "batch_size: *a11"]))
    assert "must contain only `field: value` pairs" in problems_of(config=tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("eval_steps: &steps 50\nsave_steps: *steps\n")
    assert resolve({"config": tmp_path / "c.yaml"}).save_steps == 50


def test_a_config_that_is_not_a_file_is_described(tmp_path):
    (tmp_path / "link").symlink_to("gone.yaml")
    os.mkfifo(tmp_path / "fifo")
    found = {"link": "broken link to gone.yaml", "fifo": "FIFO", ".": "folder", "/dev/zero": "device"}
    for path, what in ((tmp_path / name, what) for name, what in found.items()):
        assert f"--config={path} is a {what}: name a YAML or JSON file" in problems_of(config=path)
        assert f"(it is a {what})" in problems_of(model_config=path)


def test_sizes_are_read_as_people_write_them():
    assert [parse_bytes(size) for size in ("5GB", "2GiB", "500MB", "1.5kb", 77, "77")] == [
        5 * 10**9,
        2 * 2**30,
        500 * 10**6,
        1500,
        77,
        77,
    ]


def test_every_name_in_alternatives_needs_and_presets_is_a_field():
    named = {name for pair in ALTERNATIVES for name in pair}
    named |= {name for flag, _, needed, *_ in [*NEEDS, *NEEDS_WITHOUT_LAYERED] for name in (flag, needed)}
    named |= {name for preset in PRESETS.values() for name in preset}
    assert named <= FIELDS.keys()
    assert TrainConfig.__dataclass_params__.frozen
