"""All settings of a run: one flat, frozen dataclass whose fields carry their rules. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.fields import alternatives_of, fields_of, setting
from lowmem.config.groups import Groups
from lowmem.config.lr_options import OPTIONS
from lowmem.config.row_formats import ROW_FORMATS

# The optimizers that have the memory tiers exact and lean.
TIERED_OPTIMIZERS = ["adamw", "adamw_bf16", "adafactor"]
_OPTIMIZERS = "adamw adamw_bf16 adam nadam radam adamax adafactor adagrad adadelta rmsprop sgd".split()
_ATTENTION = ["eager", "sdpa", "flash_attention_2", "flash_attention_3"]
_PROMPTS = ["prompt_column", "response_column", "prompt_template"]
_FIXED_IN_EVALUATE = {"on_resume": "fixed", "in_evaluate": True}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Groups):
    """Every setting of a run. After `resolve`, None means: not set, or an alternative is set instead."""

    # --- model
    model_name_or_path: str | None = setting(
        holds="path", instead_of=["model_config"], per_rank=True, **_FIXED_IN_EVALUATE
    )
    """Model to start from: a folder or hub name for `from_pretrained`. None builds `model_config` from scratch."""
    model_config: str | None = setting(holds="path", on_resume="fixed")
    """Shape of a new model: t5-tiny, t5-small, t5-base, or the path of a config.json."""
    tokenizer_name_or_path: str | None = setting(holds="path", per_rank=True, in_evaluate=True)
    """Tokenizer: a folder or hub name. None: the model's own; for a new model, bytes (ByT5, needs no file)."""
    freeze: str = setting("", holds="names", may_be_empty=True, on_resume="fixed")
    """What to freeze, comma-separated: embeddings, encoder, patterns of parameter names.
    A pattern, such as *.layers.0.*, is matched as a shell matches file names; one that matches none is an error.
    embeddings include a tied output head."""
    attn_implementation: str | None = setting(choices=_ATTENTION, in_evaluate=True)
    """Attention kernels of transformers. Default: transformers' choice; eager for a T5 on CPU.
    flash_attention_2 and flash_attention_3 need the package flash-attn."""

    # --- adapters
    lora_rank: int | None = setting(at_least=1, below=2**16, on_resume="fixed")
    """Freeze the model and train LoRA adapters of this rank. Needs `pip install 'lowmem[lora]'`."""
    lora_alpha: float | None = setting(above=0, on_resume="fixed")
    """Scale what adapters add by this over lora_rank. Default: twice the rank."""
    lora_dropout: float = setting(0.0, at_least=0, below=1, on_resume="fixed")
    """Dropout of what adapters read."""
    lora_target_modules: str = setting("all-linear", holds="names", on_resume="fixed")
    """Layers to adapt, comma-separated, such as q_proj,v_proj. all-linear: all but the output head."""
    lora_modules_to_save: str = setting("", holds="names", may_be_empty=True, on_resume="fixed")
    """Layers to train whole, comma-separated, such as embed_tokens. They are saved with the adapters."""
    use_dora: bool = setting(False, on_resume="fixed")
    """DoRA: also train the norm of each adapted weight's rows."""
    use_rslora: bool = setting(False, on_resume="fixed")
    """Scale what adapters add by lora_alpha over the square root of lora_rank."""
    quantization: str | None = setting(choices=["nf4", "int8"], **_FIXED_IN_EVALUATE)
    """Load the frozen model in 4 bits (nf4) or 8 bits (int8). Needs adapters, and bitsandbytes."""

    # --- data
    train_file: str | None = setting(holds="files", per_rank=True)
    """Training rows: paths, globs or URLs, comma-separated. Formats: Parquet, Arrow, JSONL, text, or a folder saved by
    `datasets`. URLs: hf://, s3://, https://. None: the bundled rows."""
    train_weights: str | None = setting(holds="names", on_resume="fixed")
    """Mix the files of train_file by these weights: comma-separated numbers.
    There is one for each file or glob; they are rounded to 1/10,000 of their sum. Each has its own epochs; `epochs`
    counts those of the first."""
    validation_file: str | None = setting(holds="files", instead_of=["validation_rows"], per_rank=True)
    """Rows to evaluate on during training."""
    validation_rows: int | None = setting(at_least=0, fallback=0, on_resume="fixed")
    """Without validation_file: evaluate on this many rows from the end of train_file. 0: none."""
    test_file: str | None = setting(holds="files", per_rank=True, in_evaluate=True)
    """Rows to evaluate on once: after `train`, or without training (`evaluate`, `test`)."""
    prompt_column: str | None = setting(fallback="prompt", on_resume="fixed", in_evaluate=True)
    """Column that the model reads."""
    response_column: str | None = setting(fallback="response", on_resume="fixed", in_evaluate=True)
    """Column that the model learns to write."""
    prompt_template: str | None = setting(instead_of=["prompt_column"], **_FIXED_IN_EVALUATE)
    r"""Instead of prompt_column: several columns, as in "{instruction}\n{input}\n".
    Lines whose columns are all empty, null or missing in a row are left out; \n is a newline, {{ is a brace."""
    text_column: str | None = setting(instead_of=_PROMPTS, **_FIXED_IN_EVALUATE)
    """Instead of prompt and response: a column of plain text. Every token but the first is a target (causal models)."""
    messages_column: str | None = setting(instead_of=[*_PROMPTS, "text_column"], **_FIXED_IN_EVALUATE)
    """Instead of prompt or text: chats, lists of {"role", "content"}. Assistant turns are targets (causal models)."""
    row_format: str | None = setting(
        choices=list(ROW_FORMATS), instead_of=[*_PROMPTS, "text_column", "messages_column"], in_evaluate=True
    )
    """alpaca: columns instruction, output, perhaps input; sharegpt: conversations.
    The messages of sharegpt have from and value; they need a causal model. If no column is set, files without the
    default columns are searched for these."""
    weight_column: str | None = setting(on_resume="fixed")
    """Column with a row's weight, which multiplies its token losses in training.
    The loss is the weighted mean over target tokens; weights are numbers of 0 or more. Evaluations ignore them."""
    template_time: str | None = setting(on_resume="fixed", in_evaluate=True)
    """The time that chat templates print, such as 2026-01-31T12:00:00. Default: when the run started."""
    max_seq_len: int = setting(512, at_least=1, below=2**24, on_resume="fixed", in_evaluate=True)
    """Maximum tokens per sequence; longer rows are cut and counted. T5-like models: per prompt and per response."""
    packing: bool = False
    """Put several rows in a sequence of at most max_seq_len tokens. The gradient stays the same.
    T5-like models: several prompts in one sequence, and their responses in another."""
    on_bad_row: str = setting("error", choices=["error", "skip"])
    """If a row cannot be read or encoded: end the run, or skip the row. skip writes it to bad_rows-RANK.jsonl."""
    max_bad_rows: int = setting(1000, at_least=0)
    """With on_bad_row=skip: end the run when a process has skipped more rows than this."""
    prefetch_steps: int = setting(2, at_least=0, below=10_000)
    """Optimizer steps whose rows a thread encodes in advance. 0: each step encodes its own rows."""
    accept_changed_data: bool = False
    """Resume although rows or tokenizer changed. The position applies to the new rows; some may repeat or be missed."""

    # --- batches and length of the run
    epochs: float | None = setting(above=0, below=2**63, fallback=3.0)
    """Epochs over the training rows; fractions are allowed."""
    max_steps: int | None = setting(at_least=1, instead_of=["epochs"])
    """Instead of epochs: optimizer steps to train."""
    batch_size: int = setting(8, at_least=1, below=2**24, in_evaluate=True)
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int | None = setting(at_least=1, below=2**24, fallback=1)
    """Micro-batches per process and optimizer step."""
    global_batch_size: int | None = setting(at_least=1, below=2**24, instead_of=["gradient_accumulation_steps"])
    """Instead of gradient_accumulation_steps: rows per optimizer step, all processes."""

    # --- optimizer
    optimizer: str = setting("adamw", choices=_OPTIMIZERS, on_resume="fixed")
    """The optimizer; adamw_bf16 keeps moments in bf16. Only adamw, adamw_bf16 and adafactor have memory tiers."""
    learning_rate: float = setting(5e-5, above=0)
    """Peak learning rate."""
    lr_scheduler_type: str = setting("cosine", choices=list(OPTIONS))
    """Learning rate after warm-up, as in transformers.
    cosine and linear fall to 0 just after the last step."""
    lr_scheduler_kwargs: str = setting("", holds="options", may_be_empty=True)
    """Options of lr_scheduler_type: name=value,name=value or a JSON object.
    They are those of transformers. cosine_with_restarts: num_cycles. cosine_with_min_lr: min_lr or min_lr_rate (of the
    peak), num_cycles. polynomial: lr_end, power. inverse_sqrt: timescale. warmup_stable_decay: num_decay_steps,
    decay_type and warmup_type (linear, cosine, 1-sqrt), min_lr_ratio, num_cycles."""
    warmup_steps: int | None = setting(at_least=0, fallback=0)
    """Steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float | None = setting(at_least=0, below=1, instead_of=["warmup_steps"])
    """Instead of warmup_steps: this fraction of all steps."""
    weight_decay: float = setting(0.0, at_least=0, on_resume="fixed")
    """Weight decay; biases and norms get none. Decoupled in adamw, adamw_bf16, adafactor; else as in torch."""
    adam_beta1: float = setting(0.9, at_least=0, below=1, on_resume="fixed")
    """Decay of the first moment."""
    adam_beta2: float = setting(0.999, at_least=0, below=1, on_resume="fixed")
    """Decay of the second moment."""
    adam_epsilon: float = setting(1e-8, above=0, on_resume="fixed")
    """Added to the square root of the second moment."""
    max_grad_norm: float = setting(1.0, at_least=0, on_resume="fixed")
    """Clip the gradient's global L2 norm to this; 0: no clipping."""
    label_smoothing: float = setting(0.0, at_least=0, below=1, on_resume="fixed")
    """Probability mass spread evenly over the vocabulary (training loss only)."""
    neftune_noise_alpha: float | None = setting(above=0, on_resume="fixed")
    """NEFTune: in training, add uniform noise of this scale to the input's embeddings.
    5 is usual. A row of L tokens gets noise up to this over the square root of L times the embedding size. L does not
    count padding, and in packed rows it is that of each document. T5-like models: the encoder's input."""
    loss: str = setting("chunked", choices=["chunked", "plain"], in_evaluate=True)
    """chunked computes logits a slice at a time, plain all at once. Use plain for heads that chunked rejects."""

    # --- exactness
    seed: int = setting(0, at_least=0, below=2**63, on_resume="fixed")
    """Seeds the initial weights, the order of rows and dropout."""
    nonfinite: str = setting("stop", choices=["stop", "skip"])
    """If a loss or gradient is not finite, stop before the update, or skip the update."""
    deterministic: bool = setting(False, on_resume="fixed")
    """Make repeated runs bit-identical on CUDA too, at some cost in speed. On CPU they always are."""

    # --- memory and speed
    mixed_precision: str = setting("no", choices=["no", "bf16", "fp16"], on_resume="fixed", in_evaluate=True)
    """Precision of forward and backward (no: fp32). `accelerate launch --mixed_precision` sets it too.
    fp16 keeps weights in fp32, for GPUs without bf16, and scales the loss."""
    memory: str | None = setting(choices=["exact", "lean", "off"], on_resume="fixed")
    """Memory tier of bf16 training. exact: bf16 weights plus the low 16 bits of fp32; lean: bf16 alone, with 8-bit
    moments for adamw; off: fp32, cast at each use (autocast). Default: exact if the optimizer supports it, else off."""
    recompute: str = setting("off", choices=["off", "cheap", "full"])
    """Activation checkpointing: keep layer inputs (full) or matrix products too (cheap)."""
    offload_activations: bool = False
    """Keep activations for backward in host memory. For a model on CPU: in memory-mapped temporary files."""
    release: bool = False
    """Gradient release: update weights in backward, free gradients. Needs no clipping and, without layered, one process
    and one micro-batch."""
    layered: bool = False
    """Run all micro-batches of a step through one layer before the next. Implies recompute=full; keeps the inputs of
    all layers. release then works with accumulation and several processes, and FULL_SHARD gathers twice a step."""
    offload_weights: str | None = setting(holds="path", per_rank=True, in_evaluate=True)
    """Keep the layers' weights and optimizer state in host memory (host) or a folder.
    They are pinned memory for a GPU, or a file in the folder; a layer at a time comes to the device. Needs a memory
    tier; implies layered. Several processes need FULL_SHARD."""
    compile: bool = False
    """torch.compile each layer: faster after minutes of compiling; changes rounding."""
    device_memory: str | None = setting(unit="bytes")
    """GPU memory per process, such as 20GB: use the fastest settings that fit. Flags that you set are kept."""
    host_memory: str | None = setting(unit="bytes")
    """Host memory for all processes on a machine, such as 12GB; used like device_memory."""

    # --- processes
    num_processes: int | None = setting(at_least=1, below=2**16, per_rank=True, in_evaluate=True)
    """Number of processes. Default: set by the launcher; without a launcher, one per visible GPU (at least one)."""
    sharding_strategy: str = setting("NO_SHARD", choices=["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"])
    """How to shard weights, gradients and optimizer state. FULL_SHARD all-gathers one layer's weights at a time,
    SHARD_GRAD_OP keeps them until backward ends; HYBRID_SHARD shards within groups of shard_size processes."""
    shard_size: int | None = setting(at_least=1, below=2**16)
    """Processes that shard one copy of the model in HYBRID_SHARD. Default: those of one machine."""
    cpu_offload: bool = False
    """Keep sharded weights and optimizer state in host memory, and update them there."""
    tp_size: int = setting(1, at_least=1, below=2**16)
    """Tensor parallelism: this many neighbouring ranks shard each layer and share rows. batch_size is per group."""
    pp_size: int = setting(1, at_least=1, below=2**16)
    """Pipeline parallelism: this many stages of layers, each on ranks of its own.
    All stages get the same rows: batch_size is per pipeline. They work on different micro-batches at the same time, so
    set gradient_accumulation_steps to several times pp_size. Combines with tp_size and FULL_SHARD."""
    deepspeed: str | None = setting(holds="path")
    """DeepSpeed config (path or JSON) for ZeRO stage 1, 2 or 3. `accelerate launch` can set it too."""
    heartbeat_timeout: int = setting(120, at_least=1, below=2**31)
    """Abort the run if a rank sends no heartbeat for this many seconds. The other ranks name that rank."""

    # --- evaluation
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    eval_batch_size: int | None = setting(at_least=1, below=2**24, in_evaluate=True)
    """Rows per process and micro-batch of an evaluation (default: batch_size).
    `plan` does not count evaluations."""
    early_stopping_patience: int | None = setting(at_least=1)
    """End the run after this many evaluations without a better eval_loss."""
    load_best_model_at_end: bool = False
    """Save model/ from the checkpoint with the best eval_loss. Default: from the last step.
    Each evaluation with a new best eval_loss then saves a checkpoint at once. The test rows are evaluated with that
    model too."""
    max_predict_samples: int = setting(256, at_least=0, in_evaluate=True)
    """Generate answers for the first N rows of an evaluation (not for text). 0: none.
    Of a chat, the last answer is generated. A run writes answers to predictions.jsonl."""
    generation_max_new_tokens: int = setting(64, at_least=1, in_evaluate=True)
    """Maximum number of tokens in a generated answer."""

    # --- reports and checkpoints
    logging_steps: int = setting(10, at_least=1)
    """Steps between two training records in metrics.jsonl."""
    eval_steps: int | str = setting(500, at_least=1, or_word="epoch")
    """Steps between two evaluations, or epoch (the last step is always evaluated).
    epoch: the first step at or after the end of each epoch; of a mixture, those of the first source."""
    save_steps: int | str = setting(500, at_least=0, or_word="epoch")
    """Steps between two checkpoints, or epoch (the last step is always saved).
    0: no checkpoints, so the run cannot resume. epoch: as in eval_steps."""
    save_model: bool = True
    """Save the trained model in output_dir/model."""
    save_total_limit: int = setting(2, at_least=0)
    """Checkpoints to keep: the newest and the best. Others are deleted after a save. 0: keep all."""
    max_shard_size: str = setting("5GB", unit="bytes")
    """Maximum size of a weight file: 500MB, 5GB, 2GiB or a number of bytes. A larger tensor has its own file."""
    on_save_error: str = setting("stop", choices=["stop", "continue"])
    """If a checkpoint cannot be written (full disk), stop the run or continue."""
    output_dir: str = setting("out", holds="path", per_rank=True)
    """Folder for config.json, metrics.jsonl, checkpoints/ and the final model/."""
    resume: str = setting("never", holds="path")
    """never, auto (newest valid checkpoint, or a fresh start), or a checkpoint's path."""
    report_to: str = setting("", holds="names", may_be_empty=True)
    """Experiment trackers of accelerate, such as tensorboard,wandb; none; all.
    all: those that are installed."""
    run_name: str | None = setting()
    """Name of the run for trackers, and title of the model card.
    With tensorboard alone, it names the folder in output_dir."""


FIELDS = fields_of(TrainConfig)

ALTERNATIVES = alternatives_of(FIELDS)


def fields_where(config_class: type = TrainConfig, /, **rules: object) -> frozenset[str]:
    """The names of the fields of a config class whose `setting` has all of these rules."""
    return frozenset(name for name, field in fields_of(config_class).items() if rules.items() <= field.metadata.items())


def choices(name: str) -> Sequence[str]:
    """The allowed values of the field `name`; empty if any value is allowed."""
    return FIELDS[name].metadata.get("choices", ())
