"""What whoever started us (torchrun, accelerate launch, deepspeed) has left in the environment. Imports no torch."""

import json
import os
from collections.abc import Mapping

from lowmem.errors import UsageError


def launched_processes() -> int | None:
    """Processes that a launcher started in all, or None under plain python. Raises UsageError if that is no number."""
    # accelerate starts a single process without a WORLD_SIZE, but never without its precision
    alone = "1" if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    world_size = os.environ.get("WORLD_SIZE", alone)
    if world_size is None:
        return None
    if not world_size.isdecimal() or world_size == "0":
        raise UsageError(f"WORLD_SIZE={world_size!r} was set: launchers set it to the number of processes, so must you")
    return int(world_size)


def launched_settings() -> dict[str, object]:
    """Fields of a run that `accelerate launch` was told, by flags or a config file, in our names. Needs no torch.

    Raises UsageError for what it was told and we do not have.
    """
    if _is_told("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("accelerate was told to use Megatron-LM, which lowmem does not: set another distributed_type")
    settings: dict[str, object] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # which it always exports, so that it means nothing said
        settings["mixed_precision"] = precision
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("no", "inductor"):
        raise UsageError(f"accelerate was told dynamo_backend {compiler}, lowmem compiles by inductor: set that, or no")
    if compiler == "inductor":
        settings["compile"] = True
    if _is_told("ACCELERATE_USE_FSDP"):
        settings |= _fsdp_settings()
    if _is_told("ACCELERATE_USE_PARALLELISM_CONFIG"):
        settings |= _parallelism_settings(settings)
    if _is_told("ACCELERATE_USE_DEEPSPEED"):
        settings["deepspeed"] = _deepspeed_config()
    return settings


def _fsdp_settings() -> dict[str, object]:
    """Its fsdp_config. What this leaves out says how, not what: fully_shard groups layers, checkpoints are ours."""
    told = {name.removeprefix("FSDP_").lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}
    reshards = told.get("reshard_after_forward", "true").lower()
    refused = {
        "fsdp_version: 2": told.get("version") != "2",
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": told.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP").upper()
        != "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward: true or false": reshards not in ("true", "false"),
        "no fsdp_ignored_modules": "ignored_modules" in told,
    }
    if wanted := [setting for setting, is_needed in refused.items() if is_needed]:
        raise UsageError(f"accelerate was told to use FSDP in another way than lowmem does: set {', '.join(wanted)}")
    settings: dict[str, object] = {"sharding_strategy": "FULL_SHARD" if reshards == "true" else "SHARD_GRAD_OP"}
    if told.get("offload_params") == "true":
        settings["cpu_offload"] = True
    if told.get("activation_checkpointing") == "true":
        settings["recompute"] = "full"
    if told.get("activation_checkpointing_offload") == "true":
        settings["offload_activations"] = True
    return settings


def _parallelism_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Its parallelism_config, beside what its fsdp_config says."""
    copies, shards, tensor, context, sequence = (
        int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    )
    if context > 1 or sequence > 1:
        raise UsageError(
            "accelerate was told to divide sequences over processes (cp, sp), which lowmem does not: leave it"
        )
    in_parts = {"tp_size": tensor} if tensor > 1 else {}
    if shards == 1 and (copies == 1 or "sharding_strategy" not in settings):
        return in_parts
    processes = launched_processes()
    if processes not in (None, copies * shards * tensor):
        raise UsageError(
            f"accelerate was told of {copies} copies of {shards} shards, tp_size {tensor}, but started {processes} "
            "processes: their number must be the product of the three"
        )
    strategy = settings.get("sharding_strategy")
    if strategy is None or (copies > 1 and strategy == "SHARD_GRAD_OP"):
        raise UsageError(
            f"accelerate was told of {shards} shards in {copies} copies: set distributed_type: FSDP with "
            "fsdp_reshard_after_forward: true beside its parallelism_config"
        )
    return in_parts | ({"sharding_strategy": "HYBRID_SHARD", "shard_size": shards} if copies > 1 else {})


def _deepspeed_config() -> str:
    """Its deepspeed_config: the name of DeepSpeed's own file, or JSON text that says what the YAML's fields say."""
    told = os.environ.get
    if (file := told("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return file
    zero: dict[str, object] = {"stage": int(told("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = told(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device == "nvme":
            raise UsageError(
                f"accelerate was told offload_{part}_device: nvme, but does not pass its path on: write both into a "
                "DeepSpeed config and name it as deepspeed_config_file"
            )
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    config: dict[str, object] = {"zero_optimization": zero}
    if (clipping := told("ACCELERATE_GRADIENT_CLIPPING", "auto")) != "auto":
        config["gradient_clipping"] = float(clipping)
    return json.dumps(config, separators=(",", ":"))


def _is_told(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
