"""All settings of a run: one frozen, flat record in which a field carries its rules. Imports no torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem.config.groups import Groups

# The optimizers that have the memory tiers exact and lean.
TIERED_OPTIMIZERS = ["adamw", "adamw_bf16", "adafactor"]
_OPTIMIZERS = "adamw adamw_bf16 adam nadam radam adamax adafactor adagrad adadelta rmsprop sgd".split()
_PROMPTS = ["prompt_column", "response_column"]
_FIXED_IN_EVALUATE = {"on_resume": "fixed", "in_evaluate": True}


def setting(
    default: object = None,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: Literal["bytes"] | None = None,
    may_be_empty: bool = False,
    instead_of: Sequence[str] = (),
    fallback: object = None,
    on_resume: Literal["may change", "fixed"] = "may change",
    per_rank: bool = False,
    in_evaluate: bool = False,
) -> Any:
    """Make a field with rules.

    `instead_of` names fields that say the same in another way, `fallback` is the value if none is set. A resumed run
    must keep a `fixed` field, a `per_rank` one may differ between ranks, and `evaluate` takes only `in_evaluate` ones.
    """
    return dataclasses.field(default=default, metadata=locals())


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Groups):
    """Every setting of a run. After `resolve`, None in a field means that another field decides."""

    # --- model
    model_name_or_path: str | None = setting(instead_of=["model_config"], per_rank=True, **_FIXED_IN_EVALUATE)
    """Model to start from: a folder that `from_pretrained` loads. None builds `model_config` from scratch."""
    model_config: str | None = setting(on_resume="fixed")
    """Shape of a model built from scratch: t5-tiny, t5-small, t5-base, or the path of a transformers config.json."""
    tokenizer_name_or_path: str | None = setting(on_resume="fixed", per_rank=True, in_evaluate=True)
    """Tokenizer folder. None: the model's own; for a model from scratch, bytes (ByT5, needs no file)."""
    freeze: str = setting("", may_be_empty=True, on_resume="fixed")
    """Parts that keep their weights, comma-separated: embeddings (a tied output head with them), encoder."""

    # --- data
    train_file: str | None = setting(per_rank=True)
    """Rows to train on, parquet, Arrow, JSONL or text: a path, a glob, a URL (hf://, s3://, https://), a comma list of
    these, or a folder that `datasets` saved. None: the bundled rows."""
    validation_file: str | None = setting(instead_of=["validation_rows"], per_rank=True)
    """Rows to evaluate on during training."""
    validation_rows: int | None = setting(at_least=0, fallback=0, on_resume="fixed")
    """Without validation_file: hold out this many rows from the end of train_file. 0 evaluates nothing."""
    test_file: str | None = setting(per_rank=True, in_evaluate=True)
    """Rows to evaluate on once, after training (`train`) or alone (`evaluate`, `test`)."""
    prompt_column: str | None = setting(fallback="prompt", on_resume="fixed", in_evaluate=True)
    """Column that the model reads."""
    response_column: str | None = setting(fallback="response", on_resume="fixed", in_evaluate=True)
    """Column that the model learns to write."""
    text_column: str | None = setting(instead_of=_PROMPTS, **_FIXED_IN_EVALUATE)
    """Instead of prompt and response: one column of plain text, every token a target (causal models)."""
    messages_column: str | None = setting(instead_of=[*_PROMPTS, "text_column"], **_FIXED_IN_EVALUATE)
    """Instead: chats, lists of {"role", "content"}, of which the assistant's turns are targets (causal models)."""
    max_seq_len: int = setting(512, at_least=1, on_resume="fixed", in_evaluate=True)
    """Longest sequence in tokens; longer ones are cut, and counted. T5-like models: prompt and response each."""
    packing: bool = False
    """Combine rows of a step in sequences of up to max_seq_len tokens, with the same gradient (causal models)."""
    on_bad_row: str = setting("error", choices=["error", "skip"])
    """A row that cannot be read or encoded: error (end the run) or skip (write it to bad_rows-RANK.jsonl, train on)."""
    max_bad_rows: int = setting(1000, at_least=0)
    """With on_bad_row=skip: end the run when a process has met more than this many."""
    prefetch_steps: int = setting(2, at_least=0)
    """Optimizer steps whose rows a thread encodes ahead of training. 0: each step encodes its own."""
    accept_changed_data: bool = False
    """Resume although training rows have changed: the position counts in the new rows, some may repeat or be missed."""

    # --- batches and length of the run
    epochs: float | None = setting(above=0, fallback=3.0)
    """Passes over the training rows; fractions are allowed."""
    max_steps: int | None = setting(at_least=1, instead_of=["epochs"])
    """Instead of epochs: optimizer steps to train."""
    batch_size: int = setting(8, at_least=1, in_evaluate=True)
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int | None = setting(at_least=1, fallback=1)
    """Micro-batches per process and optimizer step."""
    global_batch_size: int | None = setting(at_least=1, instead_of=["gradient_accumulation_steps"])
    """Instead of gradient_accumulation_steps: rows per optimizer step over all processes."""

    # --- optimizer
    optimizer: str = setting("adamw", choices=_OPTIMIZERS, on_resume="fixed")
    """adamw_bf16: moments in bf16. adamw, adamw_bf16 and adafactor have memory tiers, others need memory=off."""
    learning_rate: float = setting(5e-5, above=0)
    """Peak learning rate."""
    lr_scheduler_type: str = setting("cosine", choices=["cosine", "linear", "constant"])
    """After warm-up: cosine and linear fall to 0 at the last step."""
    warmup_steps: int | None = setting(at_least=0, fallback=0)
    """Steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float | None = setting(at_least=0, below=1, instead_of=["warmup_steps"])
    """Instead of warmup_steps: this fraction of all steps."""
    weight_decay: float = setting(0.0, at_least=0, on_resume="fixed")
    """As the optimizer defines it (decoupled in adamw and adafactor); biases and norms get none."""
    adam_beta1: float = setting(0.9, at_least=0, below=1, on_resume="fixed")
    """Decay of the first moment."""
    adam_beta2: float = setting(0.999, at_least=0, below=1, on_resume="fixed")
    """Decay of the second moment."""
    adam_epsilon: float = setting(1e-8, above=0, on_resume="fixed")
    """Added to the root of the second moment."""
    max_grad_norm: float = setting(1.0, at_least=0, on_resume="fixed")
    """Clip the gradient's global L2 norm to this. 0: no clipping."""
    label_smoothing: float = setting(0.0, at_least=0, below=1, on_resume="fixed")
    """Probability mass spread evenly over the vocabulary (training loss only)."""
    loss: str = setting("chunked", choices=["chunked", "plain"], in_evaluate=True)
    """chunked: logits a slice at a time. plain: all at once, for heads that chunked refuses."""

    # --- exactness
    seed: int = setting(0, at_least=0, below=2**63, on_resume="fixed")
    """Seeds the initial weights, the order of rows and dropout."""
    nonfinite: str = setting("stop", choices=["stop", "skip"])
    """A loss or gradient that is not finite: stop (end the run before the update) or skip (skip the update)."""
    deterministic: bool = setting(False, on_resume="fixed")
    """Bit-equal repeats on CUDA too, at some cost in speed (on CPU they are bit-equal anyway)."""

    # --- memory and speed
    mixed_precision: str = setting("no", choices=["no", "bf16"], on_resume="fixed", in_evaluate=True)
    """no means fp32. `accelerate launch --mixed_precision` means the same."""
    memory: str | None = setting(choices=["exact", "lean", "off"], on_resume="fixed")
    """What bf16 training keeps. exact: bf16 weights and the 16 bits that make them fp32; lean: bf16 weights alone and
    8-bit moments; off: fp32, cast at each use (autocast). Default: exact where the optimizer has it, else off."""
    recompute: str = setting("off", choices=["off", "cheap", "full"])
    """Activation checkpointing. cheap: keep layer inputs and matrix products; full: keep only the layers' inputs."""
    offload_activations: bool = False
    """Keep the activations that backward needs in host memory (a model on CPU: in mapped temporary files)."""
    release: bool = False
    """Update each weight inside backward and free its gradient (one process and micro-batch, no clipping)."""
    compile: bool = False
    """Compile each layer with torch.compile: faster after minutes of compiling; rounds differently."""
    device_memory: str | None = setting(unit="bytes")
    """GPU memory per process, such as 20GB: the run takes the fastest settings that fit and keep the flags set."""
    host_memory: str | None = setting(unit="bytes")
    """Host memory that all processes of a machine may use together, as device_memory."""

    # --- processes
    num_processes: int | None = setting(at_least=1, per_rank=True, in_evaluate=True)
    """Processes to train with. Default: those of the launcher; plain python: one per visible GPU, or one."""
    sharding_strategy: str = setting("NO_SHARD", choices=["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"])
    """FULL_SHARD all-gathers a layer at a time, SHARD_GRAD_OP until backward ends; HYBRID_SHARD uses shard_size."""
    shard_size: int | None = setting(at_least=1)
    """Processes that share a copy in HYBRID_SHARD. Default: those of one machine."""
    cpu_offload: bool = False
    """Keep sharded weights and their optimizer, with its step, in host memory."""
    tp_size: int = setting(1, at_least=1)
    """Tensor parallelism: neighbouring processes that share layers and rows; batch sizes are per such group."""
    deepspeed: str | None = setting(on_resume="fixed")
    """A DeepSpeed JSON config (path or text) for ZeRO stage 1, 2 or 3, as of `accelerate launch`; no checkpoints."""
    heartbeat_timeout: int = setting(120, at_least=1)
    """Abort the run, naming the process, after this many seconds without a heartbeat of it."""

    # --- evaluation
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    max_predict_samples: int = setting(256, at_least=0, in_evaluate=True)
    """Answer this many evaluation rows, the first ones, and count exact matches (prompt/response rows). 0: none."""
    generation_max_new_tokens: int = setting(64, at_least=1, in_evaluate=True)
    """Tokens an answer may have."""

    # --- reports and checkpoints
    logging_steps: int = setting(10, at_least=1)
    """Steps between two records in metrics.jsonl."""
    eval_steps: int = setting(500, at_least=1)
    """Steps between two evaluations (the last step is always evaluated)."""
    save_steps: int = setting(500, at_least=1)
    """Steps between two checkpoints (the last step is always saved)."""
    save_total_limit: int = setting(2, at_least=0)
    """Checkpoints to keep; older ones are deleted once a new one is complete. 0: keep all."""
    max_shard_size: str = setting("5GB", unit="bytes")
    """A weight file is at most this large (unless one tensor is larger): bytes, or 500MB, 5GB, 2GiB."""
    on_save_error: str = setting("stop", choices=["stop", "continue"])
    """A checkpoint that cannot be written (a full disk): stop (end the run) or continue (report it and train on)."""
    output_dir: str = setting("out", per_rank=True)
    """Folder for config.json, metrics.jsonl, checkpoints/ and the final model/."""
    resume: str = "never"
    """never, auto (newest valid checkpoint of output_dir, or a fresh start), or the path of a checkpoint."""
    report_to: str = setting("", may_be_empty=True)
    """Trackers that accelerate drives, comma-separated: tensorboard, wandb, ..."""


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}

# Pairs of fields that say the same in two ways.
ALTERNATIVES = [(name, other) for name, field in FIELDS.items() for other in field.metadata.get("instead_of", ())]


def fields_where(**rules: object) -> frozenset[str]:
    """The fields that were made with all of these rules of `setting`."""
    return frozenset(name for name, field in FIELDS.items() if rules.items() <= field.metadata.items())


def choices(name: str) -> Sequence[str]:
    """The values that the field `name` may have; empty if it has no such list."""
    return FIELDS[name].metadata.get("choices", ())
