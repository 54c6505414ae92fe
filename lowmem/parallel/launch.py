"""Whoever started us (python, torchrun, accelerate launch), be one process group of the size that was asked for."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.config import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


def launched_processes() -> int | None:
    """Processes that a launcher started in all, or None under plain python. Needs no torch."""
    # accelerate starts a single process without a WORLD_SIZE, but never without its precision
    alone = "1" if "ACCELERATE_MIXED_PRECISION" in os.environ else None
    world_size = os.environ.get("WORLD_SIZE", alone)
    return None if world_size is None else int(world_size)


def launched_mixed_precision() -> str | None:
    """What `accelerate launch --mixed_precision` was told. It always exports "no", which here means nothing said."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if told == "no" else told


def check_launch(num_processes: int | None) -> None:
    """Raise UsageError where the environment contradicts `num_processes`, or asks for what is not built."""
    launched = launched_processes()
    if None not in (launched, num_processes) and launched != num_processes:
        raise UsageError(
            f"--num_processes={num_processes} was asked for, but the launcher started {launched}: "
            "set the number in one place, the launcher's"
        )
    for variable, what in {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UsageError(f"accelerate was told to use {what}, which is not built yet: launch with --multi_gpu")
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


def start_processes(num_processes: int, arguments: Sequence[str]) -> int:
    """Run this script with `arguments` in `num_processes` processes on this machine, and return its exit code.

    By torch's elastic launcher, without restarts: when one process fails, it ends the others and its code is returned.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    print(f"starting {num_processes} processes on this machine", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *arguments)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 1
    return 0


def join(
    *, mixed_precision: str | None = None, report_to: Sequence[str] = (), output_dir: Path | None = None
) -> "Accelerator":
    """Join the process group that the environment describes. Returns its Accelerator.

    Without a GPU it runs on the CPU over gloo, also where accelerate would start independent runs. `mixed_precision`
    None is what `accelerate launch` was told. Raises UsageError if the group is not of the launched size, and for what
    `check_launch` refuses.
    """
    check_launch(None)
    import torch
    from accelerate import Accelerator

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed_precision,
        log_with=list(report_to) or None,
        project_dir=output_dir,
    )
    launched = launched_processes() or 1
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher started {launched} processes, accelerate sees {accelerator.num_processes} "
            f"({accelerator.distributed_type.value}): each would train alone, so none does; check the launcher's flags"
        )
    return accelerator


def make_deterministic(wanted: bool) -> None:
    """Let torch use only operations that repeat bit for bit. Call it before the first work on a GPU."""
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with fixed workspaces
    torch.use_deterministic_algorithms(wanted)
