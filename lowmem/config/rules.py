"""Find values that are out of range or contradict each other. Imports no torch."""

import math
import operator
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec

from lowmem.config.fields import fields_of
from lowmem.config.groups import holds_adapters, problem_of_weights
from lowmem.config.lr_options import lr_problems
from lowmem.config.presets import MODEL_SHAPES
from lowmem.config.prompt_template import parse_template
from lowmem.config.row_formats import ROW_FORMATS
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import TIERED_OPTIMIZERS, TrainConfig
from lowmem.config.zero import zero_problems
from lowmem.errors import UsageError
from lowmem.storage.files import describe

TRACKERS = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio".split()

_WITH_BETAS = "adamw adamw_bf16 adam nadam radam adamax".split()
# DeepSpeed's ZeRO flattens and splits all weights, so the update of an element must not depend on other elements.
_ELEMENTWISE = "adamw adam nadam radam adamax adadelta rmsprop sgd".split()
_SHARDED = ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"]
_TIERS = ["exact", "lean"]
_OF_MODELS = ["config.json", "adapter_config.json"]
# transformers would download kernels from the hub instead, which are code
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_OF_ADAPTERS = ["lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_dora", "use_rslora"]

# Each row: flag A, some of its values (None: all but the default), flag B, the values of B that these allow, and why
NEEDS: list[tuple[str, Sequence[object] | None, str, Sequence[object], str]] = [
    (
        "train_weights",
        None,
        "validation_rows",
        [0, None],
        "holds out no rows for an evaluation (--validation_file does)",
    ),
    ("lora_rank", None, "freeze", [""], "freezes the whole model"),
    ("lora_rank", None, "tp_size", [1], "does not support tensor parallelism"),
    ("lora_rank", None, "deepspeed", [None], "does not support DeepSpeed"),
    ("quantization", None, "sharding_strategy", ["NO_SHARD"], "keeps weights that cannot be sharded"),
    ("quantization", None, "tp_size", [1], "keeps weights that cannot be split"),
    ("quantization", None, "offload_weights", [None], "keeps weights that cannot be offloaded"),
    ("quantization", None, "compile", [False], "uses layers that torch.compile cannot compile"),
    ("memory", _TIERS, "mixed_precision", ["bf16"], "keeps weights in bf16"),
    ("memory", _TIERS, "optimizer", TIERED_OPTIMIZERS, "does not support --optimizer={optimizer}"),
    ("mixed_precision", ["fp16"], "release", [False], "must know that all gradients are finite before an update"),
    ("mixed_precision", ["fp16"], "deepspeed", [None], "is not supported under DeepSpeed"),
    ("optimizer", ["adamw_bf16"], "mixed_precision", ["bf16"], "needs weights in bf16"),
    ("optimizer", ["adamw_bf16"], "memory", [*_TIERS, None], "needs weights in bf16, not --memory={memory}"),
    ("optimizer", ["adafactor"], "sharding_strategy", ["NO_SHARD"], "needs whole matrices"),
    ("optimizer", ["adafactor"], "tp_size", [1], "needs whole matrices"),
    ("adam_beta1", None, "optimizer", _WITH_BETAS, "does nothing with --optimizer={optimizer}"),
    ("adam_beta2", None, "optimizer", _WITH_BETAS, "does nothing with --optimizer={optimizer}"),
    ("adam_epsilon", None, "optimizer", _WITH_BETAS, "does nothing with --optimizer={optimizer}"),
    ("release", None, "max_grad_norm", [0], "frees gradients before their global norm is known"),
    ("release", None, "nonfinite", ["stop"], "cannot undo an update"),
    ("release", None, "tp_size", [1], "frees gradients before they can be all-reduced"),
    ("layered", None, "recompute", ["off", "full"], "computes each layer again in backward"),
    ("layered", None, "tp_size", [1], "does not support tensor parallelism"),
    ("offload_weights", None, "mixed_precision", ["bf16"], "keeps weights in bf16"),
    ("offload_weights", None, "optimizer", TIERED_OPTIMIZERS, "does not support --optimizer={optimizer}"),
    ("offload_weights", None, "memory", [*_TIERS, None], "needs weights in bf16, not --memory={memory}"),
    ("offload_weights", None, "layered", [True], "runs one layer at a time"),
    ("offload_weights", None, "sharding_strategy", ["NO_SHARD", "FULL_SHARD"], "keeps one layer at a time"),
    ("offload_weights", None, "cpu_offload", [False], "takes the place of --cpu_offload"),
    ("offload_weights", None, "compile", [False], "replaces the weights of compiled layers"),
    ("offload_weights", None, "deepspeed", [None], "does not support DeepSpeed"),
    ("cpu_offload", None, "sharding_strategy", _SHARDED, "needs sharded weights, not {sharding_strategy}"),
    ("shard_size", None, "sharding_strategy", ["HYBRID_SHARD"], "applies only to HYBRID_SHARD"),
    ("tp_size", None, "sharding_strategy", ["NO_SHARD"], "already shards weights"),
    ("tp_size", None, "compile", [False], "uses layers that torch.compile cannot compile"),
    (
        "pp_size",
        None,
        "sharding_strategy",
        ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"],
        "shards a stage over all its data-parallel ranks",
    ),
    ("pp_size", None, "layered", [False], "runs each micro-batch through all layers of a stage before the next one"),
    ("pp_size", None, "release", [False], "sums the gradients of all layers until the last micro-batch"),
    ("pp_size", None, "recompute", ["off", "full"], "checkpoints whole layers"),
    ("pp_size", None, "offload_weights", [None], "keeps the weights of a stage on its device"),
    ("pp_size", None, "quantization", [None], "does not support quantized weights"),
    ("pp_size", None, "deepspeed", [None], "does not support DeepSpeed"),
    ("deepspeed", None, "sharding_strategy", ["NO_SHARD"], "already shards weights"),
    ("deepspeed", None, "tp_size", [1], "already shards weights"),
    ("deepspeed", None, "device_memory", [None], "manages memory itself"),
    ("deepspeed", None, "host_memory", [None], "manages memory itself"),
    ("deepspeed", None, "memory", ["off", None], "has its own optimizer state and does not support --memory={memory}"),
    ("deepspeed", None, "optimizer", _ELEMENTWISE, "splits matrices, but --optimizer={optimizer} needs whole ones"),
    ("deepspeed", None, "release", [False], "manages gradients itself"),
    ("deepspeed", None, "layered", [False], "runs one micro-batch after the other"),
    ("deepspeed", None, "compile", [False], "manages layers itself"),
    ("neftune_noise_alpha", None, "tp_size", [1], "does not support tensor parallelism"),
    ("load_best_model_at_end", None, "save_model", [True], "chooses the model that a run saves"),
    ("load_best_model_at_end", None, "on_save_error", ["stop"], "needs the checkpoint of the best evaluation"),
]

_AT_ONCE = "applies gradients before they are summed; set --layered=True, or without it"
NEEDS_WITHOUT_LAYERED: list[tuple[str, Sequence[object] | None, str, Sequence[object], str]] = [
    ("release", None, "gradient_accumulation_steps", [1, None], _AT_ONCE),
    ("release", None, "num_processes", [1, None], _AT_ONCE),
    ("release", None, "sharding_strategy", ["NO_SHARD"], _AT_ONCE),
]


def conflicts(config: TrainConfig, presets: Sequence[str]) -> list[str]:
    """List values that are out of range, and pairs of values that contradict each other."""
    problems, fields = _out_of_range(config), fields_of(type(config))
    # a pipeline refuses release, with layered and without it
    more = () if config.layered or (config.pp_size or 1) > 1 else NEEDS_WITHOUT_LAYERED
    for name, values, other, needed, why in [*NEEDS, *more]:
        if name == "lora_rank" and config.lora_rank is None and config.trains_adapters:
            name = "model_name_or_path"  # a folder of adapters
        value, found, default = getattr(config, name), getattr(config, other), fields[other].default
        if (value in values if values else value != fields[name].default) and found not in needed:
            flag = f"--{name}" if value is True or name == "deepspeed" else f"--{name}={value}"
            advised = [str(each) for each in needed if each is not None]
            advice = f"set --{other}={advised[0]}{' too' * (found == default)}" if advised else f"remove --{other}"
            advice = f"use one of {', '.join(advised)} for --{other}" if advised[1:] else advice
            advice = f"{advice} (got {found})"
            problems.append(f"{flag} {why.format_map(vars(config))}: {advice}")
    if config.offload_weights and (config.num_processes or 1) > 1 and config.sharding_strategy == "NO_SHARD":
        found = f"--offload_weights on {config.num_processes} processes needs parts of weights"
        problems.append(f"{found}: set --sharding_strategy=FULL_SHARD, or start one process")
    stages, width = config.pp_size or 1, config.tp_size or 1
    if stages > 1 and config.num_processes and config.num_processes % (stages * width):
        found = f"--num_processes={config.num_processes} is not a multiple of --pp_size={stages} x --tp_size={width}"
        problems.append(f"{found}: change one of them")
    for name in ("shard_size", "tp_size"):
        processes, size = config.num_processes, getattr(config, name)
        if processes and size and processes % size:
            problems.append(f"--num_processes={processes} is not a multiple of --{name}={size}: change one of them")
    is_immediate = config.release and not config.layered
    if is_immediate and config.batch_size and (config.global_batch_size or 0) > config.batch_size:
        found = f"--release {_AT_ONCE}"
        most = f"at most --batch_size={config.batch_size} (got {config.global_batch_size})"
        problems.append(f"{found}: set --global_batch_size to {most}")
    causal = [f"--{name}" for name in ("text_column", "messages_column") if getattr(config, name)]
    causal += [f"--tp_size={config.tp_size}"] * ((config.tp_size or 1) > 1)
    if causal and config.model_config in MODEL_SHAPES:
        found = f"{', '.join(causal)} need{'' if causal[1:] else 's'} a causal model"
        if config.messages_column == ROW_FORMATS["sharegpt"]["messages_column"]:
            found = f"{found} (--row_format=sharegpt sets --messages_column={config.messages_column})"
        advice = "set --model_name_or_path, or set --model_config to a config file"
        problems.append(f"{found}, but --model_config={config.model_config} is a T5: {advice}")
    if holds_adapters(config.model_name_or_path):
        of_new = [name for name in ("lora_rank", *_OF_ADAPTERS) if getattr(config, name) != fields[name].default]
        if of_new:
            what = f"--{presets[0]}" if presets else ", ".join(f"--{name}" for name in of_new)
            found = f"{config.model_name_or_path} holds adapters, which are trained further as they are"
            advice = "remove it, and set what else you want, such as --quantization and --learning_rate"
            problems.append(f"{what} would add adapters, but {found}: {advice}")
    elif config.lora_rank is None:
        for name in _OF_ADAPTERS:
            if (value := getattr(config, name)) != fields[name].default:
                problems.append(f"--{name}={value} does nothing without --lora_rank: set it, or remove --{name}")
    elif config.model_name_or_path is None:
        found = "a model from scratch, which is not saved with them"
        problems.append(f"--lora_rank={config.lora_rank} would add adapters to {found}: set --model_name_or_path")
    if "is_finetune" in presets and not config.model_name_or_path:
        problems.append("--is_finetune freezes pretrained parts: set --model_name_or_path too")
    if config.on_bad_row == "error" and config.max_bad_rows != fields["max_bad_rows"].default:
        found = f"--max_bad_rows={config.max_bad_rows} does nothing without --on_bad_row=skip"
        problems.append(f"{found}: set --on_bad_row=skip or remove --max_bad_rows")
    if config.text_column and config.max_predict_samples not in (0, fields["max_predict_samples"].default):
        found = f"--max_predict_samples={config.max_predict_samples} does nothing"
        problems.append(f"{found}, because only prompts and chats are answered: remove it")
    package = _PACKAGES.get(config.attn_implementation)
    if package and not find_spec(package):
        found = f"--attn_implementation={config.attn_implementation} needs the package {package}"
        problems.append(f"{found}, which is not installed: install it, or set --attn_implementation=sdpa")
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        value = getattr(config, name)
        if value and not config.has_validation:
            advice = f"set --validation_file or --validation_rows, or remove --{name}"
            problems.append(f"--{name}={value} needs evaluations during the run: {advice}")
    if config.load_best_model_at_end and config.save_steps == 0:
        found = "--load_best_model_at_end=True needs checkpoints, but --save_steps=0 saves none"
        problems.append(f"{found}: set --save_steps={fields['save_steps'].default}, for example, or epoch")
    if config.weight_column is not None and config.train_file is None:
        problems.append("--weight_column names a column of --train_file: set --train_file too")
    if config.train_weights is not None and config.train_file is None:
        problems.append("--train_weights mixes the files of --train_file: set --train_file too")
    if config.accept_changed_data and config.resume == "never":
        advice = "set --resume=auto or remove --accept_changed_data"
        problems.append(f"--accept_changed_data=True does nothing unless a run is resumed: {advice}")
    problems += lr_problems(config.lr_scheduler_type, config.lr_scheduler_kwargs, peak=config.learning_rate)
    return problems + zero_problems(vars(config))


def _out_of_range(config: TrainConfig) -> list[str]:
    problems = []
    bounds = {"at_least": (operator.ge, "at least"), "above": (operator.gt, "above"), "below": (operator.lt, "below")}
    for name, value in vars(config).items():
        rules = fields_of(type(config))[name].metadata
        for bound, (is_within, words) in bounds.items():
            limit = rules.get(bound)
            if limit is None and bound == "below" and type(value) is int:
                limit = 2**63  # of the 64-bit integers that ranks exchange
            if None in (value, limit) or value == rules.get("or_word"):
                continue
            if not (math.isfinite(value) and is_within(value, limit)):
                rule = "0 or more" if (bound, limit) == ("at_least", 0) else f"{words} {limit}"
                problems.append(f"--{name}={value} must be {rule.replace(str(2**63), '2**63')}")
        if isinstance(value, str) and not value.strip() and not rules.get("may_be_empty"):
            problems.append(f"--{name} is empty: give it a value")
        choices = rules.get("choices", ())
        if choices and value is not None and value not in choices:
            problems.append(f"--{name}={value} must be one of {', '.join(choices)}")
        if rules.get("unit") == "bytes" and value is not None:
            try:
                parse_bytes(value)
            except UsageError as error:
                problems.append(f"--{name}: {error}")
    if config.prompt_template is not None:
        try:
            parse_template(config.prompt_template)
        except ValueError as error:
            problems.append(f"--prompt_template={config.prompt_template!r} cannot be used: {error}")
    try:
        problem = problem_of_weights(config.mixture_weights or [])
    except ValueError:
        problem = "write positive numbers, separated by commas"
    if problem:
        problems.append(f"--train_weights={config.train_weights} cannot be used: {problem}")
    for name, done in (("output_dir", "written"), ("resume", "read")):
        try:
            os.stat(getattr(config, name) or "")
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, or a folder on the path that is a file
            problems.append(f"--{name}={getattr(config, name)} cannot be {done}: {error.strerror}")
    where = config.offload_weights
    if where and where != "host" and os.path.exists(where) and not os.path.isdir(where):
        problems.append(f"--offload_weights={where} {describe(where)}: set a folder, or host")
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        value = getattr(config, name)
        if value and not re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", value) and not os.path.isdir(value):
            problems.append(f"--{name}={value} is neither a folder nor the name of a model on the hub")
        if value and any(os.path.isfile(os.path.join(value, "model", file)) for file in _OF_MODELS):
            problems.append(f"--{name}={value} is the output of a run, not a model: use {os.path.join(value, 'model')}")
    if config.model_config and config.model_config not in MODEL_SHAPES and not os.path.isfile(config.model_config):
        shapes, found = ", ".join(MODEL_SHAPES), describe(config.model_config)
        problems.append(f"--model_config={config.model_config} is neither a file nor one of {shapes} (it {found})")
    if config.trackers == ["all"]:
        if not any(map(find_spec, TRACKERS)):
            found = f"--report_to=all finds none of {', '.join(TRACKERS)}"
            problems.append(f"{found}: install one, or set --report_to=none")
        return problems
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            problems.append(f"--report_to={tracker} must be one of {', '.join(TRACKERS)}")
        elif not find_spec(tracker):
            problems.append(f"--report_to={tracker} is not installed: pip install {tracker}")
    return problems
