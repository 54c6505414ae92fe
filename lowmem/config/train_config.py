"""What a run is asked to do: one frozen, flat record, its presets and its rules. Imports no torch."""

import dataclasses
from dataclasses import dataclass

# Shapes for models trained from scratch, as the fields of transformers' config classes.
_T5 = {"model_type": "t5", "decoder_start_token_id": 0, "tie_word_embeddings": True}
MODEL_SHAPES: dict[str, dict[str, object]] = {
    "t5-tiny": _T5
    | {"vocab_size": 384, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    | {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0},
    "t5-small": _T5 | {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
    "t5-base": _T5 | {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12},
}

# Presets are differences from the defaults. `tiny` is what a run without a preset and without a model means.
PRESETS: dict[str, dict[str, object]] = {
    "tiny": {"model_config": "t5-tiny", "batch_size": 32, "epochs": 4, "learning_rate": 2e-3, "warmup_steps": 50}
    | {"logging_steps": 50, "eval_steps": 500, "save_steps": 500, "eval_on_start": True},
    "use_small_config": {"model_config": "t5-small", "max_seq_len": 256, "batch_size": 16, "learning_rate": 3e-4}
    | {"warmup_ratio": 0.03},
    "use_fast_config": {"model_config": "t5-small", "max_seq_len": 128, "batch_size": 32, "learning_rate": 3e-4}
    | {"warmup_ratio": 0.03, "mixed_precision": "bf16"},
    "use_large_config": {"model_config": "t5-base", "max_seq_len": 512, "batch_size": 2, "learning_rate": 2e-4}
    | {"gradient_accumulation_steps": 16, "warmup_ratio": 0.03, "mixed_precision": "bf16", "recompute": "full"},
    "is_finetune": {"freeze": "embeddings,encoder", "learning_rate": 1e-4, "warmup_ratio": 0.03},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run. A field that is None after `resolve` is one that another field decides."""

    # --- model
    model_name_or_path: str | None = None
    """Model to start from: a folder that `from_pretrained` loads. None builds `model_config` from scratch."""
    model_config: str | None = None
    """Shape of a model built from scratch: t5-tiny, t5-small, t5-base, or the path of a transformers config.json."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer folder. None: the model's own; for a model from scratch, bytes (ByT5, needs no file)."""
    freeze: str = ""
    """Parts that keep their weights, comma-separated: embeddings (a tied output head with them), encoder."""

    # --- data
    train_file: str | None = None
    """Rows to train on, parquet, Arrow, JSONL or text: a path, a glob, a URL (hf://, s3://, https://) or a comma list
    of these, or a folder that `datasets` saved. None: the bundled rows."""
    validation_file: str | None = None
    """Rows to evaluate on during training."""
    validation_rows: int | None = None
    """Without validation_file: hold out this many rows from the end of train_file. 0 evaluates nothing."""
    test_file: str | None = None
    """Rows to evaluate on once, after training (`train`) or alone (`evaluate`, `test`)."""
    prompt_column: str | None = None
    """Column that the model reads. Default: prompt."""
    response_column: str | None = None
    """Column that the model learns to write. Default: response."""
    text_column: str | None = None
    """Instead of prompt and response: one column of plain text, every token a target (causal models)."""
    messages_column: str | None = None
    """Instead of prompt and response: a column of chats, lists of {"role", "content"}, which the tokenizer's chat
    template renders; the assistant's turns are targets (causal models)."""
    max_seq_len: int = 512
    """Tokens a sequence may have; longer ones are cut, and counted. Prompt and response of a T5-like model: each this
    many."""
    packing: bool = False
    """Lay rows of a step behind each other in sequences of up to max_seq_len tokens, instead of padding them; none sees
    another, and the gradient stays (causal models)."""
    on_bad_row: str = "error"
    """A row that cannot be read or encoded: error (end the run, telling where it stands) or skip (leave it out, write
    it to output_dir/bad_rows-RANK.jsonl; its position counts as consumed)."""
    max_bad_rows: int = 1000
    """With on_bad_row=skip: end the run when a process has met more than this many."""
    prefetch_steps: int = 2
    """Optimizer steps whose rows are encoded ahead, in a thread beside training. 0: each step waits for its own."""
    accept_changed_data: bool = False
    """Resume although the training rows are others than those of the checkpoint: its position goes on over them, so
    that rows of that epoch may come again or not at all."""

    # --- batches and length of the run
    epochs: float | None = None
    """Passes over the training rows; a part is allowed. Default: 3."""
    max_steps: int | None = None
    """Instead of epochs: optimizer steps to train."""
    batch_size: int = 8
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per process and optimizer step. Default: 1."""
    global_batch_size: int | None = None
    """Instead of gradient_accumulation_steps: rows per optimizer step over all processes."""

    # --- optimizer
    optimizer: str = "adamw"
    """adamw, adamw_bf16 (its moments in bf16), adafactor; with memory=off of torch.optim: adamw, adam, nadam, radam,
    adamax, adafactor, adagrad, adadelta, rmsprop, sgd."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine"
    """After warm-up: cosine or linear (both to 0 at the last step), or constant."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0. Default: 0."""
    warmup_ratio: float | None = None
    """Instead of warmup_steps: this part of all steps."""
    weight_decay: float = 0.0
    """As the optimizer defines it (decoupled in adamw and adafactor); biases and norms get none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Clip the gradient's global L2 norm to this. 0: no clipping."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the vocabulary (training loss only)."""
    loss: str = "chunked"
    """chunked: logits a slice at a time. plain: all at once, for heads that chunked refuses."""

    # --- exactness
    seed: int = 0
    """Seeds the initial weights, the order of rows and dropout."""
    nonfinite: str = "stop"
    """A loss or gradient that is not finite: stop (end the run before the update) or skip (leave the update out)."""
    deterministic: bool = False
    """Bit-equal repeats on CUDA too, at some cost in speed (on CPU they are bit-equal anyway)."""

    # --- memory and speed
    mixed_precision: str = "no"
    """no (fp32) or bf16. `accelerate launch --mixed_precision` means the same."""
    memory: str | None = None
    """What bf16 training keeps. exact: bf16 weights and the 16 bits that make them fp32; lean: bf16 weights alone and
    8-bit moments; off: fp32, cast at each use (autocast). Default: exact where the optimizer has it, else off."""
    recompute: str = "off"
    """off; cheap: keep products of matrices, take norms, activations and dropout again in backward; full: keep only
    the layers' inputs and run each layer again in backward."""
    offload_activations: bool = False
    """Keep what backward waits for in host memory (a model on CPU: in mapped temporary files)."""
    release: bool = False
    """Update each weight inside backward and free its gradient at once. Needs one micro-batch, one process and
    max_grad_norm=0; a gradient that is not finite ends the run."""
    compile: bool = False
    """Run each layer as kernels made by torch.compile: faster after minutes of compiling; rounds otherwise."""
    device_memory: str | None = None
    """What a process may take of its GPU, such as 20GB: the fastest settings that fit are chosen and told, but what a
    flag sets stays, and rows of a step, tier and optimizer. If nothing fits no run begins."""
    host_memory: str | None = None
    """The same of the host, for all processes of a machine together."""

    # --- processes
    num_processes: int | None = None
    """Processes to train with. Default: what the launcher started; plain python: one per visible GPU, or one."""
    sharding_strategy: str = "NO_SHARD"
    """NO_SHARD: all of the model on each process. FULL_SHARD: divided over them, a layer gathered while it computes.
    SHARD_GRAD_OP: gathered until backward is done. HYBRID_SHARD: divided among shard_size of them."""
    shard_size: int | None = None
    """Processes that share a copy in HYBRID_SHARD. Default: those of one machine."""
    cpu_offload: bool = False
    """Keep sharded weights and their optimizer, with its step, in host memory."""
    tp_size: int = 1
    """Neighbouring processes that share the layers of one model, by the plan that transformers has for it (causal
    models). They train on the same rows, so batch sizes count such sets of processes."""
    deepspeed: str | None = None
    """A DeepSpeed config, a JSON file (or its text), for ZeRO stage 1, 2 or 3. `accelerate launch` with one means the
    same. No checkpoints are saved then: a run that ends early is begun anew."""
    heartbeat_timeout: int = 120
    """Seconds after which a process that gives no sign of life ends the run, by name. They do while they work."""

    # --- evaluation
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    max_predict_samples: int = 256
    """Answer this many evaluation rows, the first ones, and count exact matches (prompt/response rows). 0: none."""
    generation_max_new_tokens: int = 64
    """Tokens an answer may have."""

    # --- reports and checkpoints
    logging_steps: int = 10
    """Steps between two records in metrics.jsonl."""
    eval_steps: int = 500
    """Steps between two evaluations (the last step is always evaluated)."""
    save_steps: int = 500
    """Steps between two checkpoints (the last step is always saved)."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones go after a new one stands. 0: all are kept."""
    max_shard_size: str = "5GB"
    """A weight file is at most this large (unless one tensor is larger): bytes, or 500MB, 5GB, 2GiB."""
    on_save_error: str = "stop"
    """A checkpoint that cannot be written (a full disk): stop (end the run) or continue (tell it, and train on)."""
    output_dir: str = "out"
    """Folder for config.json, metrics.jsonl, checkpoints/ and the final model/."""
    resume: str = "never"
    """never, auto (newest valid checkpoint of output_dir, or a fresh start), or the path of a checkpoint."""
    report_to: str = ""
    """Trackers that accelerate drives, comma-separated: tensorboard, wandb, ..."""

    @property
    def has_bf16_weights(self) -> bool:
        """Whether the weights themselves are in bf16, so that autocast has nothing to cast."""
        return self.memory in ("exact", "lean")

    @property
    def autocast(self) -> str:
        """The precision that the Accelerator brings along."""
        return "no" if self.has_bf16_weights else self.mixed_precision

    @property
    def is_divided(self) -> bool:
        """Whether processes share a model, by our own means."""
        return self.sharding_strategy != "NO_SHARD" or self.tp_size > 1

    @property
    def division(self) -> str:
        """How processes share a model, in words; empty if each has its own."""
        if self.tp_size > 1:
            return f"{self.tp_size} with the same rows"
        return self.sharding_strategy if self.is_divided else ""

    @property
    def distributed(self) -> dict[str, object]:
        """What `init_distributed` takes."""
        from lowmem.config.zero import complete_zero_config  # which takes a TrainConfig

        zero = complete_zero_config(self.deepspeed, **self.zero_settings) if self.deepspeed else None
        told = {"report_to": self.trackers, "heartbeat_timeout": self.heartbeat_timeout}
        return {"mixed_precision": self.autocast, "deepspeed": zero} | told

    @property
    def shared_flags(self) -> dict[str, object]:
        """The flags that must be the same on every rank."""
        return {f"--{name}": value for name, value in vars(self).items() if name not in MAY_DIFFER_BETWEEN_RANKS}

    @property
    def model_source(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("model_name_or_path", "model_config", "tokenizer_name_or_path")}

    @property
    def sharding(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("sharding_strategy", "shard_size", "cpu_offload", "tp_size")}

    @property
    def optimizer_options(self) -> dict[str, object]:
        betas = self.adam_beta1, self.adam_beta2
        adam = {"betas": betas, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}
        return {"name": self.optimizer, "memory": self.memory or "off"} | adam

    @property
    def savers(self) -> list[str]:
        """Names of SAVERS."""
        savers = {
            "recompute": self.recompute == "full",
            "recompute_cheap": self.recompute == "cheap",
            "offload_activations": self.offload_activations,
            "release": self.release,
            "compiled": self.compile,
        }
        return [name for name, is_wanted in savers.items() if is_wanted]

    @property
    def batching(self) -> dict[str, object]:
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "packed_seq_len": self.max_seq_len if self.packing else None,
            "prefetch": self.prefetch_steps,
            "accept_changed_data": self.accept_changed_data,
        }

    @property
    def schedule(self) -> dict[str, object]:
        names = ("epochs", "max_steps", "warmup_steps", "warmup_ratio")
        shape = {"peak": self.learning_rate, "schedule": self.lr_scheduler_type}
        return {name: getattr(self, name) for name in names} | shape

    @property
    def evaluation(self) -> dict[str, object]:
        return {
            "batch_size": self.batch_size,
            "num_answers": self.max_predict_samples if self.prompt_column else 0,
            "max_new_tokens": self.generation_max_new_tokens,
        }

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name]

    @property
    def frozen_parts(self) -> list[str]:
        return [part for part in self.freeze.split(",") if part]

    @property
    def zero_settings(self) -> dict[str, object]:
        """What DeepSpeed needs to know beside its own config."""
        is_bf16 = self.mixed_precision == "bf16"
        return {"batch_size": self.batch_size, "max_grad_norm": self.max_grad_norm, "bf16": is_bf16}

    @property
    def encoding(self) -> dict[str, object]:
        """What an encoder needs to know beside the model: the fields that name columns, and the longest sequence."""
        columns = {name: getattr(self, name) for name in vars(self) if name.endswith("_column")}
        return {"max_seq_len": self.max_seq_len, **columns}


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}

TRACKERS = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio".split()

CHOICES = {
    "optimizer": "adamw adamw_bf16 adam nadam radam adamax adafactor adagrad adadelta rmsprop sgd".split(),
    "lr_scheduler_type": ["cosine", "linear", "constant"],
    "loss": ["chunked", "plain"],
    "nonfinite": ["stop", "skip"],
    "mixed_precision": ["no", "bf16"],
    "memory": ["exact", "lean", "off"],
    "recompute": ["off", "cheap", "full"],
    "on_bad_row": ["error", "skip"],
    "on_save_error": ["stop", "continue"],
    "sharding_strategy": ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"],
}

# Those that the tiers exact and lean have.
TIERED_OPTIMIZERS = ["adamw", "adamw_bf16", "adafactor"]

# Two ways to say one thing: a layer that sets one side unsets the other side of the layers below it.
ALTERNATIVES = [
    ("model_name_or_path", "model_config"),
    ("validation_file", "validation_rows"),
    ("text_column", "prompt_column"),
    ("text_column", "response_column"),
    ("messages_column", "prompt_column"),
    ("messages_column", "response_column"),
    ("messages_column", "text_column"),
    ("max_steps", "epochs"),
    ("global_batch_size", "gradient_accumulation_steps"),
    ("warmup_ratio", "warmup_steps"),
]

# A resumed run may change these and stays the same run; a change of any other field is an error that names it.
# The micro-batch may change too as long as rows per optimizer step stay (resume.py checks that number), and so may the
# names of files as long as their content does (the stream checks fingerprints).
CHANGEABLE_ON_RESUME = frozenset(
    "epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio train_file validation_file test_file "
    "packing on_bad_row max_bad_rows prefetch_steps accept_changed_data batch_size gradient_accumulation_steps "
    "global_batch_size nonfinite recompute offload_activations release compile loss num_processes sharding_strategy "
    "shard_size cpu_offload tp_size device_memory host_memory heartbeat_timeout eval_on_start max_predict_samples "
    "generation_max_new_tokens logging_steps eval_steps save_steps save_total_limit max_shard_size on_save_error "
    "output_dir resume report_to".split()
)

# Ranks may name these differently, on hosts with paths of their own; what is at the paths is compared instead.
MAY_DIFFER_BETWEEN_RANKS = frozenset(
    "num_processes model_name_or_path tokenizer_name_or_path train_file validation_file test_file output_dir".split()
)
