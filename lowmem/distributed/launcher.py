"""Read launcher settings (torchrun, accelerate launch, deepspeed) from the environment. Imports no torch."""

import json
import os
from collections.abc import Mapping

from lowmem.errors import UsageError

_ALONE = {"LOCAL_RANK": "-1", "RANK": "0"}  # values that do no harm to a single process
_MPI_FAMILIES = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")


def launched_processes() -> int | None:
    """How many processes a launcher started; None under plain python. Raises UsageError if WORLD_SIZE is invalid."""
    # for a single process, accelerate sets ACCELERATE_MIXED_PRECISION but not WORLD_SIZE
    world_size = os.environ.get("WORLD_SIZE", "1" if "ACCELERATE_MIXED_PRECISION" in os.environ else None)
    if world_size is None:
        return None
    if not world_size.isdecimal() or world_size == "0":
        raise UsageError(f"WORLD_SIZE={world_size!r} is not a positive integer: set it to the number of processes")
    return int(world_size)


def check_leftovers() -> None:
    """Raise UsageError if only some of a launcher's variables are set: accelerate would wait for ranks or fail."""
    if "WORLD_SIZE" in os.environ:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if os.environ["WORLD_SIZE"] == "1" and "LOCAL_RANK" in os.environ and missing:
            found = f"WORLD_SIZE=1 and LOCAL_RANK are set without {', '.join(missing)}"
            raise UsageError(f"{found}: unset them, or start the processes by a launcher")
        return
    leftovers = [name for name, alone in _ALONE.items() if os.environ.get(name, alone) != alone]
    for family in _MPI_FAMILIES:
        if os.environ.get(f"{family}SIZE", "1") not in ("-1", "0", "1"):
            leftovers += sorted(name for name in os.environ if name.startswith(family))
    if leftovers:
        needed = "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        found = f"a launcher's variables are set without WORLD_SIZE: unset {', '.join(leftovers)}"
        raise UsageError(f"{found}, or set each of {needed} to start several processes")


def launched_settings() -> dict[str, object]:
    """The settings of `accelerate launch`, by lowmem's names. Raises UsageError if one is not supported."""
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("accelerate is set to use Megatron-LM, which lowmem does not support: change distributed_type")
    settings: dict[str, object] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # accelerate always sets the variable, so "no" may be only its default
        settings["mixed_precision"] = precision
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("no", "inductor"):
        raise UsageError(f"accelerate has dynamo_backend={compiler}, but lowmem has only inductor: set that or no")
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
    """lowmem's settings for accelerate's fsdp_config. Ignores fields about checkpoints, and those that name layers."""
    found = {k.removeprefix("FSDP_").lower(): x.lower() for k, x in os.environ.items() if k.startswith("FSDP_")}
    reshards, wraps = found.get("reshard_after_forward", "true"), "transformer_based_wrap"
    needs = {
        "fsdp_version: 2": found.get("version") == "2",
        f"fsdp_auto_wrap_policy: {wraps.upper()}": found.get("auto_wrap_policy", wraps) == wraps,
        "fsdp_reshard_after_forward: true or false": reshards in ("true", "false"),
        "no fsdp_ignored_modules": "ignored_modules" not in found,
    }
    if missing := [setting for setting, is_met in needs.items() if not is_met]:
        raise UsageError(f"accelerate has FSDP settings that lowmem does not support: set {', '.join(missing)}")
    settings = {
        "cpu_offload": (found.get("offload_params"), True),
        "recompute": (found.get("activation_checkpointing"), "full"),
        "offload_activations": (found.get("activation_checkpointing_offload"), True),
    }
    strategy = "FULL_SHARD" if reshards == "true" else "SHARD_GRAD_OP"
    return {"sharding_strategy": strategy} | {name: ours for name, (x, ours) in settings.items() if x == "true"}


def _parallelism_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """lowmem's settings for accelerate's parallelism_config. `settings` holds those from fsdp_config."""
    names = [f"PARALLELISM_CONFIG_{name}_SIZE" for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")]
    copies, shards, tensor, context, sequence = (int(os.environ.get(name, "1")) for name in names)
    if context > 1 or sequence > 1:
        raise UsageError("accelerate has cp_size or sp_size, which lowmem does not support: remove cp_size and sp_size")
    tp_settings = {"tp_size": tensor} if tensor > 1 else {}
    strategy = settings.get("sharding_strategy")
    if shards == 1 and (copies == 1 or strategy is None):
        return tp_settings
    processes = launched_processes()
    if processes not in (None, copies * shards * tensor):
        requested = f"{copies} replicas x {shards} shards x tp_size {tensor}"
        raise UsageError(f"accelerate has {requested}, but started {processes} processes: start as many as the product")
    if strategy is None or (copies > 1 and strategy == "SHARD_GRAD_OP"):
        needed = "distributed_type: FSDP with fsdp_reshard_after_forward: true"
        raise UsageError(f"accelerate has {shards} shards in {copies} replicas: also set {needed}")
    return tp_settings | ({"sharding_strategy": "HYBRID_SHARD", "shard_size": shards} if copies > 1 else {})


def _deepspeed_config() -> str:
    """The DeepSpeed config: the name of its file, or its fields as JSON."""
    get = os.environ.get
    if (file := get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return os.path.expanduser(file)
    zero: dict[str, object] = {"stage": int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device == "nvme":
            found = f"offload_{part}_device: nvme"
            raise UsageError(f"accelerate has {found}, but does not pass on its path: set deepspeed_config_file")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device}
    config: dict[str, object] = {"zero_optimization": zero}
    if (clipping := get("ACCELERATE_GRADIENT_CLIPPING", "auto")) != "auto":
        config["gradient_clipping"] = float(clipping)
    return json.dumps(config, separators=(",", ":"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
