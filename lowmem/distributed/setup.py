"""Initialize the process group under any launcher: plain python, torchrun, accelerate launch, deepspeed."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.distributed.launcher import launched_processes, launched_settings
from lowmem.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lowmem.distributed.signals import Signals


def check_launch(num_processes: int | None) -> None:
    """Raise UsageError if the environment contradicts `num_processes`, or sets what lowmem does not have."""
    launched = launched_processes()
    if None not in (launched, num_processes) and launched != num_processes:
        asked = f"--num_processes={num_processes} was set"
        raise UsageError(f"{asked}, but the launcher started {launched}: set the number in the launcher alone")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        asked = f"accelerate is set to accumulate over {accumulation} steps"
        raise UsageError(f"{asked}, which would divide gradients twice: set --gradient_accumulation_steps instead")


def processes_to_start(num_processes: int | None) -> int:
    """Under plain python: `num_processes`, or one for each visible GPU, at least one. Under a launcher: 1."""
    if launched_processes() is not None or num_processes == 1:
        return 1
    import torch

    num_gpus = torch.cuda.device_count()
    if num_processes is None:
        return max(1, num_gpus)
    if 0 < num_gpus < num_processes:
        raise UsageError(f"--num_processes={num_processes} was set, but {num_gpus} GPUs are visible: set at most that")
    return num_processes


def init_distributed(
    *,
    mixed_precision: str | None = None,
    deepspeed: Mapping[str, object] | None = None,
    report_to: Sequence[str] = (),
    output_dir: Path | None = None,
    heartbeat_timeout: float = 120.0,
    on_abort: Callable[[str], None] | None = None,
    signals: "Signals | None" = None,
) -> "Accelerator":
    """Join the process group that the environment describes (gloo without a GPU). Return its Accelerator.

    `mixed_precision` None is what `accelerate launch` sets; with `deepspeed`, a whole DeepSpeed config for `zero.wrap`,
    the config's. Raises UsageError or RankError if the processes do not find one another within `heartbeat_timeout`
    seconds. Later, one that sends no heartbeat for that long, or fails alone, ends all with a message that names it, on
    stderr and to `on_abort`. `signals.at_once` is unset, as the ranks can now agree on when to end.
    """
    check_launch(None)
    if deepspeed is None and "deepspeed" in launched_settings():
        raise UsageError("accelerate is set to use DeepSpeed, which this command does not: launch with --multi_gpu")
    import torch
    from accelerate import Accelerator
    from torch import distributed

    from lowmem.distributed.collectives import watch_one_another
    from lowmem.distributed.rendezvous import first_sum, start_group

    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(variable, None)  # `launched_settings` has read them; the Accelerator would shard by itself
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    launched = launched_processes() or 1
    if launched > 1:
        device = "cpu" if on_cpu else torch.accelerator.current_accelerator()
        start_group(distributed.get_default_backend_for_device(device), limit_seconds=heartbeat_timeout)
    options = {"log_with": list(report_to) or None, "project_dir": output_dir}
    if deepspeed is None:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision, **options)
    else:
        from lowmem.distributed.zero import make_accelerator

        accelerator = make_accelerator(deepspeed, on_cpu=on_cpu, **options)
    if accelerator.num_processes != launched:
        found = f"accelerate sees {accelerator.num_processes} ({accelerator.distributed_type.value})"
        raise UsageError(f"the launcher started {launched} processes, {found}: check the launcher's flags")
    if launched > 1:
        first_sum(accelerator.device, limit_seconds=heartbeat_timeout, on_abort=on_abort)
    watch_one_another(heartbeat_timeout, on_abort)
    if signals is not None:
        signals.at_once = None
    return accelerator


def join(*, last_words: Callable[[str], None] | None = None, **options: object) -> "Accelerator":
    """The former name of `init_distributed`, whose `on_abort` was `last_words`."""
    return init_distributed(on_abort=last_words, **options)


def make_deterministic(wanted: bool) -> None:
    """Let torch use only deterministic operations. Call it before the first work on a GPU."""
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only in fixed workspaces
    torch.use_deterministic_algorithms(wanted)
