"""Whoever started us (python, torchrun, accelerate launch), be one process group of the size that was asked for."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem.config import UsageError


def launched_processes() -> int | None:
    """Processes that a launcher started in all, or None under plain python. Needs no torch."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


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
    if launched_processes() is not None:
        return 1
    if num_processes is None:
        import torch

        num_processes = max(1, torch.cuda.device_count())
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


def join(*, mixed_precision: str = "no", report_to: Sequence[str] = (), output_dir: Path | None = None):
    """Join the process group that the environment describes. Returns its Accelerator.

    Without a GPU it runs on the CPU over gloo, also where accelerate would start independent runs. Raises UsageError
    if the group is not of the launched size.
    """
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
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
