"""The public names of a low-memory, hand-written training loop; each is imported when it is first used."""

from importlib import import_module

_HOMES = {
    "TrainConfig": "config.train_config",
    "UsageError": "errors",
    "SaveError": "errors",
    "OutOfMemory": "errors",
    "StepTooLarge": "errors",
    "resolve": "config.parse",
    "parallelize": "distributed.sharding",
    "data_place": "distributed.placement",
    "init_distributed": "distributed.setup",
    "join": "distributed.setup",
    "catching_signals": "distributed.signals",
    "open_rows": "data.rows",
    "split_rows": "data.rows",
    "make_encoder": "data.encode",
    "encode_seq2seq": "data.encode",
    "encode_causal": "data.encode",
    "encode_text": "data.encode",
    "encode_chat": "data.encode",
    "Batch": "data.batch",
    "collate": "data.batch",
    "check_packing": "data.packing",
    "Quarantine": "data.quarantine",
    "Stream": "data.stream",
    "open_stream": "data.stream",
    "open_eval": "data.eval_batches",
    "load_model": "model",
    "freeze": "model",
    "plain_loss": "loss",
    "chunked_loss": "loss",
    "make_optimizer": "optim.make",
    "learning_rate_at": "optim.schedule",
    "TrainState": "step",
    "StepResult": "step",
    "train_step": "step",
    "fitting_step": "recover",
    "evaluate": "evaluation",
    "generate": "evaluation",
    "text_metrics": "evaluation",
    "save_checkpoint": "checkpoint.save",
    "load_checkpoint": "checkpoint.load",
    "latest_checkpoint": "checkpoint.load",
    "verify_checkpoint": "checkpoint.manifest",
    "save_model": "checkpoint.save",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    # PEP 562: `import lowmem` costs milliseconds, and what a program does not use is not imported
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(import_module(f"lowmem.{_HOMES[name]}"), name)
