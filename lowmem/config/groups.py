"""The settings of a run, grouped by the function that takes them. Imports no torch."""

import os
from collections.abc import Sequence
from pathlib import Path

from lowmem.config.fields import fields_of
from lowmem.config.lr_options import lr_options
from lowmem.config.zero import complete_zero_config
from lowmem.errors import UsageError
from lowmem.storage.files import read_json

AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""The torch dtype of products by `mixed_precision`."""

# of no interest to those who use the model
_NOT_IN_CARD = {"run_name", "report_to", "resume", "template_time", "heartbeat_timeout", "save_total_limit"}


def _group(*names: str) -> property:
    def group(self) -> dict[str, object]:
        return self._some(*names)

    return property(group)


def weights_in(text: str) -> list[float]:
    """Return the numbers between commas of `train_weights`. Raises ValueError for other text."""
    return list(map(float, text.split(",")))


def holds_adapters(folder: str | os.PathLike | None) -> bool:
    """Whether `folder` has adapters that were saved apart from their model, as peft does."""
    return folder is not None and os.path.isfile(os.path.join(folder, "adapter_config.json"))


def settings_of(folder: str | os.PathLike) -> dict[str, object]:
    """Return the settings of the run that wrote the model in `folder`; none if another program did."""
    file, advice = Path(folder) / "lowmem.json", "delete it, and set the flags instead"
    settings = read_json(file, advice=advice) if file.exists() else {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} is not an object: {advice}")
    return settings


def problem_of_weights(weights: Sequence[float]) -> str | None:
    """Return why sources cannot be mixed by these weights; None if they can."""
    if bad := [weight for weight in weights if not 0 < weight < float("inf")]:
        return f"{bad[0]:g} is not a positive number: correct it, or remove the source"
    if sum(weights) == float("inf"):
        return "their sum is more than 1.8e308: divide all by the largest"
    return None


class Groups:
    """Properties of TrainConfig: groups of keyword arguments for `train` to unpack, and values made from fields."""

    model_source = _group(
        "model_name_or_path", "model_config", "tokenizer_name_or_path", "quantization", "attn_implementation"
    )
    """Where the model and its tokenizer come from."""
    sharding = _group("sharding_strategy", "shard_size", "cpu_offload", "tp_size", "pp_size")
    """The options of `parallelize`."""
    encoding = _group(
        "max_seq_len",
        "prompt_column",
        "prompt_template",
        "response_column",
        "text_column",
        "messages_column",
        "template_time",
    )
    """The options of `make_encoder`."""
    step_size = _group("batch_size", "gradient_accumulation_steps", "global_batch_size")
    """The options of `rows_per_step`."""

    @property
    def shared_flags(self) -> dict[str, object]:
        """The flags that must be the same on every rank."""
        shared = [name for name, field in fields_of(type(self)).items() if not field.metadata.get("per_rank")]
        return {f"--{name}": getattr(self, name) for name in shared}

    @property
    def distributed(self) -> dict[str, object]:
        """The options of `init_distributed`."""
        zero = self._some("batch_size", "max_grad_norm") | {"bf16": self.mixed_precision == "bf16"}
        deepspeed = complete_zero_config(self.deepspeed, **zero) if self.deepspeed else None
        reports = {"report_to": self.trackers, "heartbeat_timeout": self.heartbeat_timeout}
        return self.precision | {"deepspeed": deepspeed} | reports

    @property
    def precision(self) -> dict[str, object]:
        """The options of `init_distributed` that say in which precision a run computes."""
        return {"mixed_precision": self.autocast, "needs_bf16": self.mixed_precision == "bf16"}

    @property
    def scratch_folder(self) -> str | None:
        """The folder in whose file `load_model` draws random weights; None if they fit into host memory."""
        return None if self.offload_weights == "host" else self.offload_weights

    @property
    def mixture_weights(self) -> list[float] | None:
        return None if self.train_weights is None else weights_in(self.train_weights)

    @property
    def trains_adapters(self) -> bool:
        """Whether the model is frozen and adapters are trained: new ones, or those of an adapter folder."""
        return self.lora_rank is not None or holds_adapters(self.model_name_or_path)

    @property
    def loaded_dtype(self) -> str:
        """The torch dtype in which to load the model: of a frozen one under adapters, that of its products."""
        return AUTOCAST_DTYPES.get(self.mixed_precision, "float32") if self.trains_adapters else "float32"

    @property
    def lora(self) -> dict[str, object]:
        """The options of `add_lora`."""
        names = {"target_modules": self.lora_target_modules, "modules_to_save": self.lora_modules_to_save}
        listed = {name: [part for part in text.split(",") if part] for name, text in names.items()}
        numbers = {"rank": self.lora_rank, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return numbers | listed | self._some("use_dora", "use_rslora")

    @property
    def frozen_parts(self) -> list[str]:
        return [part for part in self.freeze.split(",") if part]

    @property
    def is_sharded(self) -> bool:
        """Whether lowmem, rather than DeepSpeed, shards the model over processes."""
        return self.sharding_strategy != "NO_SHARD" or self.tp_size > 1

    @property
    def sharding_summary(self) -> str:
        """How lowmem shards the model over processes, for the log; empty if it does not."""
        strategy = self.sharding_strategy if self.sharding_strategy != "NO_SHARD" else ""
        sizes = [f"{name}={getattr(self, name)}" for name in ("pp_size", "tp_size") if getattr(self, name) > 1]
        return ", ".join(filter(None, [*sizes, strategy]))

    @property
    def optimizer_options(self) -> dict[str, object]:
        """The options of `make_optimizer`."""
        adam = {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        return {"name": self.optimizer, "memory": self.memory or "off", "weight_decay": self.weight_decay} | adam

    @property
    def training_loss(self) -> dict[str, object]:
        """The options of `make_loss`."""
        return {"name": self.loss} | self._some("label_smoothing", "neftune_noise_alpha")

    @property
    def schedule(self) -> dict[str, object]:
        """The options of `Schedule.of_run`."""
        shape = {"peak": self.learning_rate, "schedule": self.lr_scheduler_type}
        shape["options"] = lr_options(self.lr_scheduler_kwargs)
        return self._some("epochs", "max_steps", "warmup_steps", "warmup_ratio") | shape

    @property
    def savers(self) -> list[str]:
        """Names of the memory savers, in the order in which to enter them."""
        wanted = {
            "recompute": self.recompute == "full" and not self.layered,
            "recompute_cheap": self.recompute == "cheap",
            "offload_activations": self.offload_activations and not self.layered,
            "layered": self.layered and not self.offload_activations,
            "layered_offloaded": self.layered and self.offload_activations,
            "release": self.release,
            "compiled": self.compile,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]

    @property
    def has_bf16_weights(self) -> bool:
        """Whether the weights themselves are in bf16, without autocast."""
        return self.memory in ("exact", "lean")

    @property
    def autocast(self) -> str:
        return "no" if self.has_bf16_weights else self.mixed_precision

    @property
    def batching(self) -> dict[str, object]:
        """The options of `open_stream`."""
        packed_seq_len = self.max_seq_len if self.packing else None
        ahead = {"packed_seq_len": packed_seq_len, "prefetch": self.prefetch_steps}
        return self._some("batch_size", "seed", "accept_changed_data") | ahead

    @property
    def model_requirements(self) -> dict[str, object]:
        """The options of `check_model`. The default length may be shortened."""
        may_shorten = self.max_seq_len == type(self).max_seq_len
        weighted = self.weight_column is not None
        return self._some("packing", "max_seq_len") | {"may_shorten": may_shorten, "weighted": weighted}

    @property
    def evaluation(self) -> dict[str, object]:
        """The options of `Evaluation`."""
        num_answers = 0 if self.text_column else self.max_predict_samples
        answers = {"num_answers": num_answers, "max_new_tokens": self.generation_max_new_tokens}
        return self._some("max_seq_len") | {"batch_size": self.eval_batch_size or self.batch_size} | answers

    @property
    def has_validation(self) -> bool:
        """Whether a run evaluates while it trains."""
        return self.validation_file is not None or bool(self.validation_rows)

    @property
    def card(self) -> dict[str, object]:
        """Options of `model_card`. Of the settings, those that are not defaults, and no paths."""
        settings = {}
        for name, field in fields_of(type(self)).items():
            value, rules = getattr(self, name), field.metadata
            is_shown = value not in (field.default, rules.get("fallback")) and not rules.get("per_rank")
            if is_shown and name not in _NOT_IN_CARD:
                settings[name] = Path(value).name if rules.get("holds") == "path" else value
        title = self.run_name or Path(self.model_name_or_path or "model").name
        about = {"title": title, "base_model": self.model_name_or_path, "is_adapted": self.trains_adapters}
        return about | {"settings": settings}

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name]

    def _some(self, *names: str) -> dict[str, object]:
        return {name: getattr(self, name) for name in names}
