"""Settings of other trainers: the error of an unknown flag says what they are here, and never guesses wrongly."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lowmem.config.advice import advice_of, flags_in
from lowmem.config.elsewhere import DEFAULTS, SAME_NAMES, SOURCES
from lowmem.config.parse import resolve
from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS, choices
from tests.processes import ROOT
from tests.test_flags import problems_of

# transformers' TrainingArguments: their defaults by name, read from the source, because an import takes seconds
TRAINERS = {
    field.target.id: next((each.value for each in getattr(field.value, "keywords", ()) if each.arg == "default"), None)
    for file in ("training_args.py", "training_args_seq2seq.py")
    for node in ast.parse((Path(find_spec("transformers").origin).parent / file).read_text()).body
    if isinstance(node, ast.ClassDef)
    for field in node.body
    if isinstance(field, ast.AnnAssign)
}
OTHERS = (
    "dpo_label_smoothing cls_model_config lr_warmup_steps adam_beta3 adam_epsilon2 generation_top_p eval_sequence_len "
    "cosine_constant_lr_ratio lora_alpha_pattern use_entropy use_llama_pro use_kt model_id num_samples vllm_config "
    "freeze_vision_tower freeze_mm_modules hub_revision_of_model save_first_step profiler_steps eval_max_new_tokens"
).split()
ROWS = [(names.split(), answer) for rows in SOURCES.values() for names, answer in rows.items()]
ANSWERS = [text for _, answer in ROWS for text in ([answer] if isinstance(answer, str) else answer.values())]


def test_every_flag_that_an_answer_names_exists():
    flags = {flag for text in ANSWERS for flag in re.findall(r"--(\w+)", text)}
    of_commands = {"help", "merge"}
    assert flags - of_commands <= FIELDS.keys() | PRESETS.keys()


@pytest.mark.parametrize("answer", sorted({text for text in ANSWERS if "{}" not in text and flags_in(f"use {text}")}))
def test_flags_that_an_answer_consists_of_are_accepted(answer):
    flags = flags_in(f"use {answer}")
    if "report_to" in flags:  # that tracker may not be installed
        assert "must be one of" not in str(advice_of("report_to", flags["report_to"]))
    elif "flash_attention" in flags.get("attn_implementation", ""):  # nor these kernels
        assert flags["attn_implementation"] in choices("attn_implementation")
    else:
        resolve({"model_name_or_path": "gpt2"} | flags)


def test_answers_say_what_to_do():
    kinds = re.compile(r"--\w|remove it \(|not needed, because |not here: ")
    assert [text for text in ANSWERS if not kinds.match(text) or ";" in text] == []


def test_a_name_has_one_answer_and_is_no_flag_unless_only_some_of_its_values_are():
    names = [name for names, _ in ROWS for name in names]
    assert len(names) == len(set(names))
    assert FIELDS.keys() & set(names) == SAME_NAMES.keys()
    for name in SAME_NAMES:
        own = [*choices(name), FIELDS[name].default, *(10, 1.0) * (FIELDS[name].type is int)]
        assert [value for value in own if advice_of(name, value)] == []


@pytest.mark.parametrize(
    ("flag", "value", "answer"),
    [
        ("save_strategy", "epoch", "use --save_steps=epoch"),
        ("save_strategy", "no", "use --save_steps=0"),
        ("evaluation_strategy", "steps", "remove it (--eval_steps counts steps)"),
        ("block_size", "1024", "use --max_seq_len=1024"),
        ("per_device_eval_batch_size", "8", "use --eval_batch_size=8"),
        ("eval_accumulation_steps", "4", "not needed, because evaluations sum the loss as they go"),
        ("remove_unused_columns", "False", "not needed, because only the columns that flags name are read: remove it"),
        ("adapter_name_or_path", "a/b", "use --model_name_or_path=a/b instead of the model, which the adapters"),
        ("mix_strategy", "concat", "remove it (several files of --train_file are read as one)"),
        ("mix_strategy", "interleave_over", "use --train_weights, one number for each file"),
        ("finetuning_type", "full", "remove it (all weights are trained by default)"),
        ("finetuning_type", "lora", "use --use_lora=True"),
        ("fp16", "True", "use --mixed_precision=fp16"),
        ("fp16", "False", "off by default: remove it"),
        ("bf16", True, "use --mixed_precision=bf16"),
        ("bf16", 1, "use --mixed_precision=bf16"),
        ("bf16", "maybe", "'maybe' is not a value that lowmem knows from another trainer"),
        ("optim", "adamw_8bit", "use --optimizer=adamw --memory=lean --mixed_precision=bf16"),
        ("optim", "galore_adamw_8bit", "not here: set --memory=lean"),
        ("optim", "lion_8bit", "not here: set one that --help lists"),
        ("optim", "adafactor", "use --optimizer=adafactor"),
        ("fsdp", ["full_shard", "auto_wrap"], "use --sharding_strategy=FULL_SHARD"),
        ("fsdp", "full_shard offload", "use --sharding_strategy=FULL_SHARD --cpu_offload=True"),
        ("fsdp", ["offload", "shard_grad_op"], "use --sharding_strategy=SHARD_GRAD_OP --cpu_offload=True"),
        ("fsdp", "no_shard", "remove it (nothing is sharded by default)"),
        ("torch_compile", "auto", "use --compile=True"),
        ("dataloader_num_workers", "4", "not needed, because a thread encodes the next steps' rows"),
        ("group_by_length", "True", "use --packing=True"),
        ("auto_find_batch_size", "True", "not needed, because a step that runs out of memory is repeated in smaller"),
        ("ddp_find_unused_parameters", "False", "not needed, because gradients are all-reduced once per step"),
        ("push_to_hub", "True", "not here: after the run, `hf upload NAME out/model`"),
        ("push_to_hub", "False", "off by default: remove it"),
        ("resume_from_checkpoint", None, "off by default: remove it"),
        ("resume_from_checkpoint", "True", "use --resume=auto"),
        ("source_prefix", "summarize: ", 'use --prompt_template="summarize: {prompt}"'),
        ("gradient_checkpointing", "false", "use --recompute=off"),
        ("val_size", 0.1, "use --validation_rows=N, a number of rows"),
        ("val_size", "500", "use --validation_rows=500"),
        ("evals_per_epoch", 0, "remove it (evaluations need --validation_file"),
        ("pipeline_model_parallel_size", 4, "use --pp_size=4"),
        ("evals_per_epoch", 4, "use --eval_steps=N, the steps of an epoch divided by 4"),
    ],
)
def test_a_setting_of_another_trainer_is_answered_by_its_value(flag, value, answer):
    assert f"unknown flag --{flag}: {answer}" in problems_of(**{flag: value})


@pytest.mark.parametrize(
    ("flag", "value", "answer"),
    [
        ("optimizer", "adamw_8bit", "use --optimizer=adamw --memory=lean --mixed_precision=bf16"),
        ("optimizer", "lion", "must be one of adamw"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "not here: the learning rate depends on the step only"),
        ("warmup_steps", "0.1", "use --warmup_ratio=0.1"),
        ("warmup_steps", "2.5", "is not an int"),
        ("eval_steps", 0.25, "not here: set a number of steps, or epoch"),
        ("max_steps", -1, "remove it (--epochs counts)"),
        ("save_total_limit", None, "use --save_total_limit=0, which keeps all"),
        ("lora_target_modules", "all", "use --lora_target_modules=all-linear"),
    ],
)
def test_a_value_that_only_another_trainer_knows_is_answered(flag, value, answer):
    message = problems_of(**{flag: value})
    assert message.startswith(f"--{flag}={value}") and answer in message


def test_names_of_other_trainers_are_not_taken_for_misspellings():
    message = problems_of(**dict.fromkeys([*TRAINERS.keys() - FIELDS.keys(), *OTHERS], "x"))
    assert "did you mean" not in message
    assert all(f"--{name}" in message for name in OTHERS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batchsize", "batch_size"),
        ("learnin_rate", "learning_rate"),
        ("wamup_steps", "warmup_steps"),
        ("eval_step", "eval_steps"),
        ("gradient_accumulation_step", "gradient_accumulation_steps"),
        ("mixed_precison", "mixed_precision"),
        ("outputdir", "output_dir"),
        ("epoch", "epochs"),
        ("is_finetuned", "is_finetune"),
    ],
)
def test_a_misspelling_is_recognized(typed, meant):
    assert f"unknown flag --{typed}: did you mean --{meant}?" in problems_of(**{typed: "x"})


def test_several_unknown_flags_are_in_one_message_and_the_others_are_checked_with_what_was_meant(tmp_path):
    (tmp_path / "sft.yaml").write_text(
        "model_name_or_path: gpt2\nlora_r: 8\nlora_alpha: 16\nbf16: true\nmemory: lean\nadapter:\nwandb_watch:\n"
        "micro_batch_size: 0\nzzz: 1\nxxx: 1\n"
    )
    assert problems_of(config=tmp_path / "sft.yaml").split("; ") == [
        "unknown flag --lora_r: use --lora_rank=8",
        "unknown flag --bf16: use --mixed_precision=bf16",
        "unknown flags --adapter, --wandb_watch: off by default: remove it",
        "unknown flag --micro_batch_size: use --batch_size=0",
        "unknown flags --zzz, --xxx: `--help` lists all flags",
        "--batch_size=0 must be at least 1",
    ]


def test_a_nested_setting_of_a_config_file_is_named_with_what_it_is_here(tmp_path):
    (tmp_path / "a.yml").write_text("base_model: gpt2\ndatasets:\n  - path: a\n    type: alpaca\nval_set_size: 0.1\n")
    (tmp_path / "b.yml").write_text("seed: 1\nthings: [a, [1]]\n")
    found = "must contain only `field: value` pairs, but the value of"
    assert f"{found} datasets is nested: use --train_file=FILES" in problems_of(config=tmp_path / "a.yml")
    assert f"{found} things is nested: rewrite it or remove --config" in problems_of(config=tmp_path / "b.yml")


def test_the_config_file_of_the_document_is_accepted(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "coming-from.md").read_text(), re.DOTALL)
    (tmp_path / "sft.yaml").write_text(block)
    config = resolve({"config": tmp_path / "sft.yaml"})
    assert (config.lora_rank, config.learning_rate, config.memory) == (8, 1e-4, "exact")


def test_the_defaults_of_trainer_are_as_documented():
    defaults = {name: ast.literal_eval(TRAINERS[name]) for name in DEFAULTS}
    assert {name: "all" if value is None else str(value) for name, value in defaults.items()} == DEFAULTS
