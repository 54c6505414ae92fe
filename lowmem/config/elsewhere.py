"""What settings of transformers' Trainer, TRL, LLaMA-Factory and axolotl are here. Imports no torch.

A row maps names, separated by blanks, to an answer, or to answers by value. An answer is flags ({} is the value that
was set), or says why a setting is not needed, or what to do because it is not here. Values are patterns in lower case,
separated by blanks; the first that matches counts. `advice.py` finds the answer; docs/coming-from.md lists all rows.
"""

from collections.abc import Mapping

Answer = str | Mapping[str, str]

_NO_REWARDS = "not here: lowmem has no losses for preferences and rewards, as TRL has"
_NO_LOW_RANK_GRADIENTS = "not here: set --memory=lean to save memory in the optimizer, or --use_lora=True"
_NO_FRACTION = "not here: set a number of steps, or epoch"
_NO_EVALUATIONS = "remove it (evaluations need --validation_file or --validation_rows)"
FRACTION = "0.*[1-9]*"

_OPTIMIZERS = {
    "*galore* *apollo*": _NO_LOW_RANK_GRADIENTS,
    "*adamw*8bit *adamw*4bit": "--optimizer=adamw --memory=lean --mixed_precision=bf16",
    "paged_adamw*": "--optimizer=adamw, and --offload_weights=host if its state is too large",
    "adamw_anyprecision": "--optimizer=adamw_bf16 --mixed_precision=bf16",
    "adamw_torch* adamw_hf adamw_apex_fused": "--optimizer=adamw",
    "rmsprop_*": "--optimizer=rmsprop",
}
_SCHEDULES = {
    "reduce_lr_on_plateau greedy": "not here: the learning rate depends on the step only",
    "cosine_warmup_with_min_lr": "--lr_scheduler_type=cosine_with_min_lr, whose warm-up starts at 0",
    "one_cycle rex": "not here: set --lr_scheduler_type=cosine, with --warmup_ratio",
}
_PRECISIONS = {"bf16 bfloat16": "--mixed_precision=bf16", "fp16 float16": "--mixed_precision=fp16"}

TRAINER: dict[str, Answer] = {
    # the model
    "config_name": "--model_config={}",
    "tokenizer_name": "--tokenizer_name_or_path={}",
    "trust_remote_code": "not here: no code from a model's folder is run, so transformers must have the model's class",
    "model_revision revision": "not here: set --model_name_or_path to a folder, and download the revision into it",
    "dtype torch_dtype": _PRECISIONS | {"*": "not needed, because weights are loaded as --mixed_precision needs them"},
    "low_cpu_mem_usage": "not needed, because a model is loaded one tensor at a time",
    "cache_dir": "not here: set the environment variable HF_HOME",
    "hub_token hf_hub_token use_auth_token hf_use_auth_token": "not here: set the environment variable HF_TOKEN",
    "use_fast_tokenizer tokenizer_use_fast": "not needed, because fast tokenizers are used where they exist",
    "use_cache": "not needed, because training keeps no cache of keys and values",
    "use_liger_kernel liger_kernel_config enable_liger_kernel": (
        "not needed, because --loss=chunked, the default, never holds all logits (--compile=True fuses operations)"
    ),
    # rows
    "dataset_name": "--train_file=FILE, or hf://datasets/{}/FILE.parquet",
    "block_size max_source_length max_seq_length model_max_length": "--max_seq_len={}",
    "max_target_length val_max_target_length": "not here: --max_seq_len cuts prompts and responses at the same length",
    "text_column_name": "--text_column={}",
    "summary_column": "--response_column={}",
    "source_prefix": '--prompt_template="{}{prompt}"',
    "source_lang target_lang": "not here: set src_lang and tgt_lang in the model's tokenizer_config.json",
    "validation_split_percentage": "--validation_rows=N, a number of rows",
    "max_train_samples max_samples": "not here: write a smaller file, or set --max_steps",
    "max_eval_samples": "not here: write a smaller --validation_file, or hold out fewer rows: --validation_rows=N",
    "pad_to_max_length pad_to_multiple_of pad_to_sequence_len": (
        "not needed, because a micro-batch is padded to its longest row"
    ),
    "preprocessing_num_workers preprocessing_batch_size dataset_num_proc dataset_processes dataset_kwargs": (
        "not needed, because rows are encoded during training, one optimizer step at a time"
    ),
    "overwrite_cache tokenized_path dataset_prepared_path": "not needed, because no encoded rows are stored",
    "streaming dataset_streaming buffer_size": "not needed, because rows are always read from their files in pieces",
    "dataloader_num_workers dataloader_prefetch_factor": (
        "not needed, because a thread encodes the next steps' rows (--prefetch_steps)"
    ),
    "dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order": (
        "not needed, because rows come from a thread, and micro-batches for a GPU are always pinned"
    ),
    "dataloader_drop_last": "not needed, because each epoch holds each row exactly once",
    "remove_unused_columns label_names": "not needed, because only the columns that flags name are read",
    "group_by_length sortish_sampler": "--packing=True, which leaves less padding",
    "train_sampling_strategy": {
        "random": "remove it (rows are always shuffled)",
        "group_by_length batch_rebalance": "--packing=True, which leaves less padding",
        "sequential": "not here: rows are always shuffled, by --seed",
    },
    "length_column_name": "not needed, because --packing=True takes the lengths of encoded rows",
    # batches and length of the run
    "per_device_train_batch_size per_gpu_train_batch_size": "--batch_size={}",
    "per_device_eval_batch_size per_gpu_eval_batch_size": "--eval_batch_size={}",
    "auto_find_batch_size": (
        "not needed, because a step that runs out of memory is repeated in smaller pieces (and "
        "--device_memory=20GB chooses settings that fit)"
    ),
    "num_train_epochs": "--epochs={}",
    "do_train": "not needed, because the command `train` trains",
    "do_eval": "not needed, because --validation_file or --validation_rows turns evaluations on",
    "do_predict": "not needed, because a --test_file is evaluated at the end",
    # the optimizer
    "lr": "--learning_rate={}",
    "optim": _OPTIMIZERS
    | {
        "adafactor adagrad rmsprop sgd": "--optimizer={}",
        "*": "not here: set one that --help lists (adamw with --memory=lean, or adafactor, to save memory)",
    },
    "adafactor": {"true": "--optimizer=adafactor"},
    "optim_args optim_target_modules": "not here: --adam_beta1, --adam_beta2 and --adam_epsilon are all options",
    "label_smoothing_factor": "--label_smoothing={}",
    "average_tokens_across_devices": "not needed, because the loss is always the mean over the tokens of all processes",
    # memory and speed
    "bf16 bfloat16": {"true auto": "--mixed_precision=bf16", "full": "--mixed_precision=bf16 --memory=lean"},
    "fp16 float16": {"true": "--mixed_precision=fp16"},
    "bf16_full_eval fp16_full_eval": "not needed, because evaluations compute in --mixed_precision too",
    "half_precision_backend fp16_backend fp16_opt_level": "not needed, because precision is --mixed_precision alone",
    "tf32": "not here: set --mixed_precision=bf16 (fp32 products are computed as torch does by default)",
    "gradient_checkpointing activation_checkpointing": {
        "offload offload_disk": "--recompute=full --offload_activations=True",
        "true": "--recompute=full",
        "false": "--recompute=off",
    },
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant_gc": (
        "not needed, because checkpointing is never reentrant"
    ),
    "torch_compile": {"true auto": "--compile=True"},
    "torch_compile_backend torch_compile_mode": "not here: --compile=True compiles each layer with torch's defaults",
    "torch_empty_cache_steps gc_steps": "not needed, because a step that runs out of memory frees the cache by itself",
    # processes
    "use_cpu no_cuda": "not here: set the environment variable CUDA_VISIBLE_DEVICES to nothing",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp": (
        "not needed, because gradients are all-reduced once per step, without DistributedDataParallel"
    ),
    "ddp_backend": "not needed, because GPUs use nccl and CPUs use gloo",
    "ddp_timeout": "not needed, because ranks send heartbeats (--heartbeat_timeout, in seconds)",
    "fsdp": {
        "*hybrid_shard*offload* *offload*hybrid_shard*": "--sharding_strategy=HYBRID_SHARD --cpu_offload=True",
        "*hybrid_shard*": "--sharding_strategy=HYBRID_SHARD",
        "*shard_grad_op*offload* *offload*shard_grad_op*": "--sharding_strategy=SHARD_GRAD_OP --cpu_offload=True",
        "*shard_grad_op*": "--sharding_strategy=SHARD_GRAD_OP",
        "*offload*": "--sharding_strategy=FULL_SHARD --cpu_offload=True",
        "no_shard": "remove it (nothing is sharded by default)",
        "true *full_shard*": "--sharding_strategy=FULL_SHARD",
    },
    "fsdp_config fsdp_version fsdp_final_state_dict_type fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params": (
        "not needed, because layers are sharded one by one and checkpoints hold whole tensors (and "
        "--cpu_offload=True offloads, --recompute=full checkpoints activations)"
    ),
    "accelerator_config": "not needed, because batches do not depend on accelerate's data loaders",
    "parallelism_config": "--sharding_strategy, and --tp_size for tensor parallelism",
    # evaluation
    "eval_strategy evaluation_strategy": {
        "no": _NO_EVALUATIONS,
        "steps": "remove it (--eval_steps counts steps)",
        "epoch": "--eval_steps=epoch",
    },
    "eval_delay": "not here: the first evaluation is after --eval_steps steps",
    "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
    "include_for_metrics include_inputs_for_metrics": (
        "not needed, because evaluations sum the loss as they go and keep no logits"
    ),
    "prediction_loss_only": {"true": "--max_predict_samples=0"},
    "predict_with_generate": {
        "true": "remove it (--max_predict_samples counts the answers)",
        "false": "--max_predict_samples=0",
    },
    "generation_max_length max_new_tokens": "--generation_max_new_tokens={}",
    "generation_num_beams num_beams eval_num_beams do_sample temperature top_p top_k": (
        "not here: answers are generated greedily"
    ),
    "generation_config": (
        "not here: answers are generated greedily, with the start and end tokens of the model's generation_config.json"
    ),
    "metric_for_best_model": {
        "loss eval_loss": "remove it (the best evaluation is the one with the lowest eval_loss)",
        "*": "not here: the best evaluation is the one with the lowest eval_loss",
    },
    "greater_is_better": "not needed, because the best evaluation is the one with the lowest eval_loss",
    # logs and checkpoints
    "logging_strategy": {
        "steps": "remove it (--logging_steps counts steps)",
        "epoch": "not here: set --logging_steps to the steps of an epoch",
        "no": "not here: set --logging_steps to more than all steps",
    },
    "logging_first_step": "not here: --logging_steps=1 logs each step",
    "logging_dir": "not needed, because tensorboard's files are in --output_dir",
    "logging_nan_inf_filter": "not needed, because a loss that is not finite ends the run (--nonfinite)",
    "include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second include_tkps": (
        "not needed, because metrics.jsonl has num_tokens (of targets) and tokens_per_second"
    ),
    "skip_memory_metrics": "not needed, because metrics.jsonl has the peaks of device and host memory",
    "log_level log_level_replica log_on_each_node": "not needed, because a run prints few lines, and one process does",
    "disable_tqdm": "not needed, because the progress bar is shown only on a terminal",
    "save_strategy": {
        "no": "--save_steps=0",
        "steps": "remove it (--save_steps counts steps)",
        "epoch": "--save_steps=epoch",
        "best": "--load_best_model_at_end=True, which also saves each new best",
    },
    "save_only_model": "not here: checkpoints can always resume (--save_steps=0 saves only the final model/)",
    "save_safetensors save_on_each_node": "not needed, because weights are safetensors, and each is written once",
    "enable_jit_checkpoint": "not needed, because a signal ends the run after it has saved",
    "overwrite_output_dir": "not here: each run needs its own --output_dir, or --resume=auto",
    "resume_from_checkpoint": {
        "true": "--resume=auto",
        "*": "--resume={} if lowmem wrote it, or else --model_name_or_path={}, from the first step",
    },
    "restore_callback_states_from_checkpoint": "not needed, because there are no callbacks",
    "ignore_data_skip": "not needed, because a resume starts at the exact row at once",
    "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision": (
        "not here: after the run, `hf upload NAME out/model` publishes the model"
    ),
    "project mlflow_experiment_name": "not here: trackers log to a project named lowmem (--run_name names the run)",
    # exactness
    "data_seed": "not here: --seed seeds the order of rows too",
    "full_determinism": "--deterministic={}",
    "debug": "not needed, because a loss or gradient that is not finite is reported with its step",
}

TRL: dict[str, Answer] = {
    "max_length": "--max_seq_len={}",
    "truncation_mode excess_length_strategy": {
        "keep_start truncate": "remove it (the ends of long rows are cut)",
        "*": "not here: the ends of long rows are cut, and counted in metrics.jsonl",
    },
    "dataset_text_field": "--text_column={}",
    "completion_only_loss": {
        "true": "remove it (the loss is on the response)",
        "false": "not here: to train on whole rows, join prompt and response in a --text_column",
    },
    "assistant_only_loss": {
        "true": "remove it (with --messages_column, the loss is on the assistant's turns)",
        "false": "not here: to train on whole chats, print them into a --text_column",
    },
    "padding_free neat_packing sample_packing": "--packing={}",
    "packing_strategy": "not needed, because --packing=True places whole rows",
    "eval_packing eval_sample_packing": "not needed, because evaluations do not pack rows, which changes no loss",
    "shuffle_dataset shuffle_merged_datasets": {
        "true": "remove it (rows are always shuffled)",
        "false": "not here: rows are always shuffled, by --seed",
    },
    "loss_type": {
        "nll chunked_nll": "remove it (both give this loss, and --loss=chunked is the default)",
        "*": "not here: a loss of your own is a function (docs/library.md)",
    },
    "activation_offloading": "--offload_activations={}",
    "chat_template_path chat_template chat_template_jinja": (
        "not here: put chat_template.jinja into the folder of --tokenizer_name_or_path"
    ),
    "eos_token pad_token bos_token unk_token special_tokens": "not here: set it in the model's tokenizer_config.json",
    "model_init_kwargs": "not here: set --attn_implementation and --mixed_precision",
    "router_aux_loss_coef moe_aux_loss_coef": "not here: models that add a loss of their own are refused",
    "use_peft": {"true": "--use_lora=True"},
    "lora_r r": "--lora_rank={}",
    "target_modules": {"all-linear all": "--lora_target_modules=all-linear", "*": "--lora_target_modules={}"},
    "modules_to_save": "--lora_modules_to_save={}",
    "lora_target_parameters": "not here: only linear layers can be adapted (--lora_target_modules)",
    "lora_task_type task_type": "not needed, because it follows from the model",
    "load_in_4bit": {"true": "--quantization=nf4"},
    "load_in_8bit": {"true": "--quantization=int8"},
    "bnb_4bit_quant_type quantization_type": {"nf4": "--quantization=nf4", "*": "not here: set --quantization=nf4"},
    "use_bnb_nested_quant double_quantization bnb_4bit_use_double_quant": (
        "not needed, because --quantization=nf4 always quantizes its scales too"
    ),
    "bnb_4bit_compute_dtype": _PRECISIONS,
    "bnb_4bit_quant_storage": "not needed, because quantized weights are not sharded",
}

LLAMA_FACTORY: dict[str, Answer] = {
    "stage": {
        "sft": "remove it (rows with responses, or chats, are fine-tuned)",
        "pt": "--text_column=text",
        "*": _NO_REWARDS,
    },
    "finetuning_type": {
        "full": "remove it (all weights are trained by default)",
        "lora": "--use_lora=True",
        "freeze": "--freeze=PATTERNS, the names of what to freeze",
        "*": "not here: set --use_lora=True",
    },
    "dataset": "--train_file=FILE, as dataset_info.json names it (of a JSON array, after the command `convert`)",
    "eval_dataset": "--validation_file=FILE",
    "dataset_dir": "not needed, because --train_file is a path",
    "template": "not here: chats use the tokenizer's own template, and prompts the text of --prompt_template",
    "default_system default_system_message": "not here: put it into the rows, or for prompts into --prompt_template",
    "enable_thinking": "not needed, because what the template prints for the assistant's turns is trained",
    "cutoff_len": "--max_seq_len={}",
    "val_size val_set_size": {
        "0 0.0": "remove it (no rows are held out by default)",
        FRACTION: "--validation_rows=N, a number of rows",
        "*": "--validation_rows={}",
    },
    "mix_strategy": {
        "concat": "remove it (several files of --train_file are read as one)",
        "*": "--train_weights, one number for each file of --train_file",
    },
    "interleave_probs": "--train_weights={}",
    "train_on_prompt train_on_inputs": {
        "true": "not here: to train on whole rows, join prompt and response in a --text_column"
    },
    "mask_history": (
        "not here: all turns of the assistant are targets, so print the turns before the last into a --prompt_column"
    ),
    "disable_shuffling": "not here: rows are always shuffled, by --seed",
    "adapter_name_or_path lora_model_dir": "--model_name_or_path={} instead of the model, which the adapters name",
    "create_new_adapter": "not here: merge the old adapter first (the command `export` with --merge=True)",
    "lora_target": {"all": "--lora_target_modules=all-linear", "*": "--lora_target_modules={}"},
    "additional_target": "--lora_modules_to_save={}",
    "quantization_bit": {
        "4": "--quantization=nf4",
        "8": "--quantization=int8",
        "*": "not here: set 4 bits, nf4, or 8, int8",
    },
    "quantization_method": {
        "bnb bitsandbytes": "remove it (--quantization uses bitsandbytes)",
        "*": "not here: --quantization uses bitsandbytes",
    },
    "loraplus_lr_ratio loraplus_lr_embedding pissa_init": (
        "not here: adapters start at zero and have one learning rate (--use_rslora=True scales them)"
    ),
    "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules unfrozen_parameters": (
        "--freeze=PATTERNS, the names of what to freeze instead"
    ),
    "pure_bf16": {"true": "--mixed_precision=bf16 --memory=lean"},
    "upcast_layernorm": "not needed, because --memory=exact keeps all bits of fp32 weights",
    "disable_gradient_checkpointing": {"true": "--recompute=off", "false": "--recompute=full"},
    "use_unsloth_gc": {"true": "--recompute=full --offload_activations=True"},
    "use_unsloth": "not here: set --recompute=full (--loss=chunked, the default, saves the memory of logits)",
    "flash_attn": {
        "auto": "remove it (transformers chooses)",
        "fa2": "--attn_implementation=flash_attention_2",
        "fa3": "--attn_implementation=flash_attention_3",
        "disabled": "--attn_implementation=eager",
        "*": "--attn_implementation={}",
    },
    "rope_scaling": "not here: change rope_parameters in the model's config.json",
    "resize_vocab add_tokens add_special_tokens tokens": (
        "not here: add the tokens, resize the embeddings, and save both with transformers first"
    ),
    "train_from_scratch": {"true": "--model_config=FILE, the model's config.json, and --tokenizer_name_or_path"},
    "use_galore use_apollo use_badam use_adam_mini use_muon": _NO_LOW_RANK_GRADIENTS,
    "tensor_model_parallel_size": "--tp_size={}",
    "pipeline_model_parallel_size": "--pp_size={}",
    "early_stopping_steps": "--early_stopping_patience={}",
    "plot_loss": "not needed, because the command `plot` draws the curves",
    "compute_accuracy": "not here: evaluations measure loss, exact answers and, with sacrebleu, chrF",
    "export_dir": "not here: the command `export` with --merge=True writes a merged model",
    "use_swanlab": {"true": "--report_to=swanlab"},
    "swanlab_run_name wandb_name mlflow_run_name trackio_run_name": "--run_name={}",
}

AXOLOTL: dict[str, Answer] = {
    "base_model": "--model_name_or_path={}",
    "tokenizer_config": "--tokenizer_name_or_path={}",
    "model_type tokenizer_type processor_type base_model_config": "not needed, because the model's folder says it",
    "datasets pretraining_dataset": "--train_file=FILES, with --messages_column, --text_column or --row_format",
    "test_datasets": "--validation_file=FILES",
    "sequence_len": "--max_seq_len={}",
    "micro_batch_size": "--batch_size={}",
    "num_epochs": "--epochs={}",
    "lr_scheduler": _SCHEDULES | {"*": "--lr_scheduler_type={}"},
    "cosine_min_lr_ratio": "--lr_scheduler_type=cosine_with_min_lr --lr_scheduler_kwargs=min_lr_rate={}",
    "embedding_lr embedding_lr_scale lr_groups": "not here: all weights have one learning rate",
    "adapter": {
        "lora": "--use_lora=True",
        "qlora": "--use_qlora=True",
        "*": "not here: set --use_lora=True or --use_qlora=True",
    },
    "lora_target_linear": {"true": "--lora_target_modules=all-linear"},
    "peft_use_dora": "--use_dora={}",
    "peft_use_rslora": "--use_rslora={}",
    "relora use_qalora": "not here: set --use_lora=True",
    "flash_attention": {"true": "--attn_implementation=flash_attention_2"},
    "sdp_attention": {"true": "--attn_implementation=sdpa"},
    "eager_attention": {"true": "--attn_implementation=eager"},
    "flex_attention": {"true": "not here: its kernels have no dropout, so set --attn_implementation=sdpa"},
    "xformers_attention sage_attention shift_attn": "not here: set --attn_implementation",
    "layer_offloading": {"true": "--offload_weights=host --mixed_precision=bf16"},
    "gpu_memory_limit max_memory": "--device_memory=20GB, which chooses settings that fit",
    "evals_per_epoch": {
        "0": _NO_EVALUATIONS,
        "1": "--eval_steps=epoch",
        "*": "--eval_steps=N, the steps of an epoch divided by {}",
    },
    "saves_per_epoch": {
        "0": "--save_steps=0",
        "1": "--save_steps=epoch",
        "*": "--save_steps=N, the steps of an epoch divided by {}",
    },
    "auto_resume_from_checkpoints": {"true": "--resume=auto"},
    "tensor_parallel_size": "--tp_size={}",
    "dp_shard_size": "--sharding_strategy=FULL_SHARD, or HYBRID_SHARD with --shard_size={}",
    "context_parallel_size sequence_parallel_degree": (
        "not here: for long rows, set --recompute=full, --offload_activations=True or --layered=True"
    ),
    "loss_watchdog_threshold loss_watchdog_patience": "not here: only a loss that is not finite ends a run",
    "wandb_project": "--report_to=wandb, which logs to a project named lowmem",
    "wandb_entity wandb_mode wandb_watch wandb_log_model wandb_run_id": "not here: set wandb's environment variables",
    "use_comet": {"true": "--report_to=comet_ml"},
    "use_trackio": {"true": "--report_to=trackio"},
    "use_wandb": {"true": "--report_to=wandb"},
    "use_tensorboard": {"true": "--report_to=tensorboard"},
    "use_mlflow": {"true": "--report_to=mlflow"},
    "strict": "not needed, because an unknown flag is always refused",
    "chunked_cross_entropy cut_cross_entropy": "not needed, because --loss=chunked is the default",
    "plugins": "not here: copy lowmem/train.py, the whole loop, and change it",
    "rl reward_model": _NO_REWARDS,
}

SAME_NAMES: dict[str, Answer] = {
    "optimizer": _OPTIMIZERS,
    "lr_scheduler_type": _SCHEDULES,
    "warmup_steps": {FRACTION: "--warmup_ratio={}"},
    "max_steps": {"-1": "remove it (--epochs counts)"},
    "logging_steps": {FRACTION: "not here: set a number of steps"},
    "eval_steps": {FRACTION: _NO_FRACTION},
    "save_steps": {FRACTION: _NO_FRACTION},
    "save_total_limit": {"none null": "--save_total_limit=0, which keeps all"},
    "lora_target_modules": {"all all_linear": "--lora_target_modules=all-linear"},
    "quantization": {"4 4bit": "--quantization=nf4", "8 8bit": "--quantization=int8"},
    "mixed_precision": {
        "bfloat16": "--mixed_precision=bf16",
        "float16": "--mixed_precision=fp16",
        "fp32": "--mixed_precision=no",
    },
}

SOURCES = {
    "Trainer and the example scripts of transformers": TRAINER,
    "TRL and peft": TRL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "axolotl": AXOLOTL,
    "Other values of flags that have the same name here": SAME_NAMES,
}

DEFAULTS = {"logging_steps": "500", "lr_scheduler_type": "linear", "save_total_limit": "all", "seed": "42"}
"""Trainer's defaults of flags that have the same name and another default here."""
