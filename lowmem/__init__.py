"""The public names of lowmem. Each is imported on first use."""

from importlib import import_module

_NAMES = {
    "cli": ["main"],
    "config.fields": ["setting"],
    "config.train_config": ["TrainConfig"],
    "config.parse": ["resolve"],
    "errors": ["UsageError", "SaveError", "OutOfMemory", "StepTooLarge"],
    "distributed.sharding": ["parallelize"],
    "distributed.placement": ["data_place"],
    "distributed.setup": ["init_distributed", "join"],
    "distributed.offloaded": ["offload_weights"],
    "distributed.signals": ["catching_signals"],
    "data.rows": ["open_rows", "split_rows"],
    "data.encode": ["make_encoder", "encode_seq2seq", "encode_causal", "encode_text", "encode_chat", "with_weights"],
    "data.batch": ["Batch", "collate"],
    "data.quarantine": ["Quarantine"],
    "data.stream": ["Stream", "open_stream"],
    "data.eval_batches": ["open_eval"],
    "model.load": ["load_model"],
    "model.build": ["freeze"],
    "adapters.lora": ["add_lora"],
    "model.documents": ["documents_apart"],
    "loss": ["plain_loss", "chunked_loss"],
    "model.checks": ["check_model"],
    "model.packing_checks": ["check_packing"],
    "optim.make": ["make_optimizer"],
    "optim.master": ["master_weights"],
    "optim.schedule": ["learning_rate_at"],
    "step": ["TrainState", "StepResult", "train_step"],
    "recover": ["fitting_step"],
    "report": ["Report"],
    "evaluation": ["evaluate", "generate", "text_metrics"],
    "checkpoint.save": ["save_checkpoint", "save_model"],
    "checkpoint.extra": ["load_extra"],
    "checkpoint.load": ["load_checkpoint", "latest_checkpoint"],
    "checkpoint.manifest": ["verify_checkpoint"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # Python calls this when a name is used (PEP 562), so `import lowmem` takes milliseconds and loads no such module
    if name not in _MODULES:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(import_module(f"lowmem.{_MODULES[name]}"), name)
