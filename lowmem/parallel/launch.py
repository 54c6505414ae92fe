"""Whoever started us (python, torchrun, accelerate launch), be one process group of the size that was asked for."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.config import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lowmem.parallel.signals import Signals


def launched_processes() -> int | None:
    """Processes that a launcher started in all, or None under plain python. Needs no torch."""
    # accelerate starts a single process without a WORLD_SIZE, but never without its precision
    alone = "1" if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    world_size = os.environ.get("WORLD_SIZE", alone)
    return None if world_size is None else int(world_size)


def launched_settings() -> dict[str, object]:
    """Fields of a run that `accelerate launch` was told, by flags or a config file, in our names. Needs no torch.

    Raises UsageError for what it was told and we do not have.
    """
    settings: dict[str, object] = {}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # which it always exports, so that it means nothing said
        settings["mixed_precision"] = precision
    if _is_told("ACCELERATE_USE_FSDP"):
        settings |= _fsdp_settings()
    if _is_told("ACCELERATE_USE_PARALLELISM_CONFIG"):
        settings |= _parallelism_settings(settings)
    return settings


def _fsdp_settings() -> dict[str, object]:
    """Its fsdp_config. What this leaves out says how, not what: fully_shard groups layers, checkpoints are ours."""
    told = {name.removeprefix("FSDP_").lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}
    refused = {
        "fsdp_version: 2": told.get("version") != "2",
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": told.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP").upper()
        != "TRANSFORMER_BASED_WRAP",
        "no fsdp_ignored_modules": "ignored_modules" in told,
    }
    if wanted := [setting for setting, is_needed in refused.items() if is_needed]:
        raise UsageError(f"accelerate was told to use FSDP in another way than lowmem does: set {', '.join(wanted)}")
    reshards = told.get("reshard_after_forward", "true").lower() in ("true", "full_shard")
    settings: dict[str, object] = {"sharding_strategy": "FULL_SHARD" if reshards else "SHARD_GRAD_OP"}
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
    if shards == 1:
        return {"tp_size": tensor} if tensor > 1 else {}
    strategy = settings.get("sharding_strategy")
    if strategy is None or (copies > 1 and strategy == "SHARD_GRAD_OP"):
        raise UsageError(
            f"accelerate was told of {shards} shards in {copies} copies: set distributed_type: FSDP with "
            "fsdp_reshard_after_forward: true beside its parallelism_config"
        )
    hybrid = {"sharding_strategy": "HYBRID_SHARD", "shard_size": shards} if copies > 1 else {}
    return hybrid | ({"tp_size": tensor} if tensor > 1 else {})


def _is_told(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def check_launch(num_processes: int | None) -> None:
    """Raise UsageError where the environment contradicts `num_processes`, or asks for what is not built."""
    launched = launched_processes()
    if None not in (launched, num_processes) and launched != num_processes:
        raise UsageError(
            f"--num_processes={num_processes} was asked for, but the launcher started {launched}: "
            "set the number in one place, the launcher's"
        )
    if _is_told("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError("accelerate was told to use DeepSpeed, which is not built yet: launch with --multi_gpu")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UsageError(
            f"accelerate was told to accumulate over {accumulation} steps, which would divide gradients twice: "
            "leave it at 1 and set --gradient_accumulation_steps of this program"
        )


def processes_to_start(num_processes: int | None) -> int:
    """Under plain python: `num_processes`, or one for each visible GPU, or one. Under a launcher: 1, no more."""
    if launched_processes() is not None or num_processes == 1:
        return 1
    import torch

    num_gpus = torch.cuda.device_count()
    if num_processes is None:
        return max(1, num_gpus)
    if 0 < num_gpus < num_processes:
        raise UsageError(f"--num_processes={num_processes} was asked for, {num_gpus} GPUs are visible: ask for no more")
    return num_processes


def join(
    *,
    mixed_precision: str | None = None,
    report_to: Sequence[str] = (),
    output_dir: Path | None = None,
    heartbeat_timeout: float = 120.0,
    last_words: Callable[[str], None] | None = None,
    signals: "Signals | None" = None,
) -> "Accelerator":
    """Join the process group that the environment describes. Returns its Accelerator.

    Without a GPU it runs on the CPU over gloo, also where accelerate would start independent runs. `mixed_precision`
    None is what `accelerate launch` was told. Several processes find one another within `heartbeat_timeout` seconds, or
    end with a line that tells why (see `start_group`). From then on they watch one another: one that gives no sign of
    life for that long, or that fails alone, ends all of them with a line on stderr that names it and is given to
    `last_words`; and as the ranks can agree on when to end, `signals` do nothing at once any more. Raises UsageError
    if the group is not of the launched size, and for what `check_launch` and `start_group` refuse.
    """
    check_launch(None)
    import torch
    from accelerate import Accelerator
    from torch import distributed

    from lowmem.parallel.agree import watch_one_another
    from lowmem.parallel.rendezvous import first_sum, start_group

    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(variable, None)  # `launched_settings` tells of them; the Accelerator would shard by itself
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    launched = launched_processes() or 1
    if launched > 1:
        start_group(
            "gloo" if on_cpu else distributed.get_default_backend_for_device(torch.accelerator.current_accelerator()),
            limit_seconds=heartbeat_timeout,
        )
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed_precision,
        log_with=list(report_to) or None,
        project_dir=output_dir,
    )
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher started {launched} processes, accelerate sees {accelerator.num_processes} "
            f"({accelerator.distributed_type.value}): each would train alone, so none does; check the launcher's flags"
        )
    if launched > 1:
        first_sum(accelerator.device, limit_seconds=heartbeat_timeout, last_words=last_words)
    watch_one_another(heartbeat_timeout, last_words)
    if signals is not None:
        signals.at_once = None
    return accelerator


def make_deterministic(wanted: bool) -> None:
    """Let torch use only operations that repeat bit for bit. Call it before the first work on a GPU."""
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with fixed workspaces
    torch.use_deterministic_algorithms(wanted)
