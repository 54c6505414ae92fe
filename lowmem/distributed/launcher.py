"""Settings that a launcher (torchrun, accelerate launch, deepspeed) puts into the environment. Imports no torch."""

import json
import os
from collections.abc import Mapping

from lowmem.errors import UsageError


def launched_processes() -> int | None:
    """How many processes a launcher started, or None under plain python. Raises UsageError if that is no number."""
    # accelerate starts a single process without a WORLD_SIZE, but never without its precision
    alone = "1" if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    world_size = os.environ.get("WORLD_SIZE", alone)
    if world_size is None:
        return None
    if not world_size.isdecimal() or world_size == "0":
        raise UsageError(f"WORLD_SIZE={world_size!r} was set: set it to the number of processes, as launchers do")
    return int(world_size)


def launched_settings() -> dict[str, object]:
    """The settings of `accelerate launch`, by the names of our fields. Raises UsageError for what lowmem lacks."""
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("accelerate is set to use Megatron-LM, which lowmem does not: set another distributed_type")
    settings: dict[str, object] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # accelerate always sets it, so "no" may be its default
        settings["mixed_precision"] = precision
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("no", "inductor"):
        raise UsageError(f"accelerate has dynamo_backend {compiler}, lowmem compiles by inductor: set that, or no")
    if compiler == "inductor":
        settings["compile"] = True
    if _is_set("ACCELERATE_USE_FSDP"):
        settings |= _fsdp_settings()
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        settings |= _parallelism_settings(settings)
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        settings["deepspeed"] = _deepspeed_config()
    return settings


def _fsdp_settings() -> dict[str, object]:
    """Those of fsdp_config, without the ones on grouping layers and on checkpoints."""
    found = {k.removeprefix("FSDP_").lower(): x.lower() for k, x in os.environ.items() if k.startswith("FSDP_")}
    reshards, wraps = found.get("reshard_after_forward", "true"), "transformer_based_wrap"
    needs = {
        "fsdp_version: 2": found.get("version") == "2",
        f"fsdp_auto_wrap_policy: {wraps.upper()}": found.get("auto_wrap_policy", wraps) == wraps,
        "fsdp_reshard_after_forward: true or false": reshards in ("true", "false"),
        "no fsdp_ignored_modules": "ignored_modules" not in found,
    }
    if missing := [setting for setting, is_met in needs.items() if not is_met]:
        raise UsageError(f"accelerate is set to use FSDP in another way than lowmem does: set {', '.join(missing)}")
    settings = {
        "cpu_offload": (found.get("offload_params"), True),
        "recompute": (found.get("activation_checkpointing"), "full"),
        "offload_activations": (found.get("activation_checkpointing_offload"), True),
    }
    strategy = "FULL_SHARD" if reshards == "true" else "SHARD_GRAD_OP"
    return {"sharding_strategy": strategy} | {name: ours for name, (x, ours) in settings.items() if x == "true"}


def _parallelism_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of parallelism_config, given `settings` of fsdp_config."""
    names = [f"PARALLELISM_CONFIG_{name}_SIZE" for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")]
    copies, shards, tensor, context, sequence = (int(os.environ.get(name, "1")) for name in names)
    if context > 1 or sequence > 1:
        raise UsageError("accelerate is set to divide sequences, which lowmem does not: remove cp_size and sp_size")
    tp_settings = {"tp_size": tensor} if tensor > 1 else {}
    strategy = settings.get("sharding_strategy")
    if shards == 1 and (copies == 1 or strategy is None):
        return tp_settings
    processes = launched_processes()
    if processes not in (None, copies * shards * tensor):
        asked = f"{copies} copies of {shards} shards, tp_size {tensor}"
        raise UsageError(f"accelerate has {asked}, but started {processes} processes: start their product")
    if strategy is None or (copies > 1 and strategy == "SHARD_GRAD_OP"):
        needed = "distributed_type: FSDP with fsdp_reshard_after_forward: true"
        raise UsageError(f"accelerate has {shards} shards in {copies} copies: set {needed} too")
    return tp_settings | ({"sharding_strategy": "HYBRID_SHARD", "shard_size": shards} if copies > 1 else {})


def _deepspeed_config() -> str:
    """deepspeed_config: the name of DeepSpeed's own file, or its fields as JSON text."""
    get = os.environ.get
    if (file := get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return file
    zero: dict[str, object] = {"stage": int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device == "nvme":
            asked = f"offload_{part}_device: nvme"
            raise UsageError(f"accelerate has {asked}, but does not pass its path on: use a deepspeed_config_file")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    config: dict[str, object] = {"zero_optimization": zero}
    if (clipping := get("ACCELERATE_GRADIENT_CLIPPING", "auto")) != "auto":
        config["gradient_clipping"] = float(clipping)
    return json.dumps(config, separators=(",", ":"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
