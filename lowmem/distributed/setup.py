"""Initialize the process group under any launcher: plain python, torchrun, accelerate launch, deepspeed."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.distributed.launcher import check_leftovers, launched_processes, launched_settings
from lowmem.errors import UsageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lowmem.distributed.signals import Signals

_OTHER_TORCH = "install a torch for an older CUDA, or set CUDA_VISIBLE_DEVICES= to train on CPUs"


def check_launch(num_processes: int | None) -> None:
    """Raise UsageError if the environment contradicts `num_processes` or sets an unsupported option."""
    check_leftovers()
    launched = launched_processes()
    if None not in (launched, num_processes) and launched != num_processes:
        found = f"the launcher started {launched} processes"
        raise UsageError(f"--num_processes={num_processes} was set, but {found}: remove --num_processes")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        found = f"accelerate has gradient_accumulation_steps={accumulation}, which would scale gradients twice"
        raise UsageError(f"{found}: remove it, and set --gradient_accumulation_steps in lowmem")


def processes_to_start(num_processes: int | None) -> int:
    """How many processes to run: `num_processes` (None: one per visible GPU, at least one); 1 under a launcher."""
    if launched_processes() is not None or num_processes == 1:
        return 1
    import torch

    _check_driver()
    num_gpus = torch.cuda.device_count()
    if num_processes is None:
        return max(1, num_gpus)
    if 0 < num_gpus < num_processes:
        raise UsageError(f"--num_processes={num_processes} exceeds the {num_gpus} visible GPUs: set at most {num_gpus}")
    return num_processes


def _check_driver() -> None:
    """Raise UsageError if the driver lists GPUs that torch cannot use, because the run would then use only CPUs."""
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # says why
        except RuntimeError as error:
            found = f"the NVIDIA driver lists {num_gpus} GPUs, but torch {torch.__version__} cannot use them ({error})"
            raise UsageError(f"{found}: update the driver, or {_OTHER_TORCH}") from error


def _check_kernels(device: "torch.device") -> None:
    """Raise UsageError if this torch was not compiled for the GPU `device`."""
    import torch

    compiled = [int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if "sm_" in name]
    major, minor = torch.cuda.get_device_capability(device) if compiled else (0, 0)
    if compiled and 10 * major + minor < min(compiled):
        name = torch.cuda.get_device_name(device)
        found = f"torch {torch.__version__} has no kernels for {name} (compute capability {major}.{minor})"
        raise UsageError(f"{found}: {_OTHER_TORCH}")


def _check_bf16(device: "torch.device") -> None:
    """Raise UsageError if the GPU `device` has no instructions for bf16, which torch then emulates."""
    import torch

    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        found = f"bf16 needs a GPU of compute capability 8.0, but {name} has {major}.{minor} and only emulates it"
        raise UsageError(f"{found}, several times slower: set --mixed_precision=fp16, or no for fp32")


def init_distributed(
    *,
    mixed_precision: str | None = None,
    needs_bf16: bool = False,
    deepspeed: Mapping[str, object] | None = None,
    report_to: Sequence[str] = (),
    output_dir: Path | None = None,
    heartbeat_timeout: float = 120.0,
    on_abort: Callable[[str], None] | None = None,
    signals: "Signals | None" = None,
) -> "Accelerator":
    """Join the process group that the environment describes (with gloo if there is no GPU). Return an Accelerator.

    `mixed_precision=None` uses the setting of `accelerate launch`. Set `needs_bf16` if the run computes in bf16 without
    autocast. `deepspeed` is a full DeepSpeed config, including the precision. Raises UsageError if the run computes in
    bf16, which the GPU only emulates, and UsageError or RankError if ranks do not find each other in
    `heartbeat_timeout` seconds. Later, if a rank fails or is silent for that long, the others name it on stderr, call
    `on_abort(message)` and exit.
    Sets `signals.at_once` to None, because the ranks can now agree on when to stop. Calls `speed_up_bf16`.
    """
    check_launch(None)
    if deepspeed is None and "deepspeed" in launched_settings():
        raise UsageError("accelerate is set to use DeepSpeed, which this command does not support: use --multi_gpu")
    import torch
    from accelerate import Accelerator
    from torch import distributed

    from lowmem.distributed.collectives import start_heartbeats
    from lowmem.distributed.rendezvous import connect_ranks, start_group
    from lowmem.kernels.products_cpu import speed_up_bf16

    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(variable, None)  # lowmem applies these settings itself, so Accelerator must not
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if not wants_cpu:
        _check_driver()
    on_cpu = wants_cpu or not torch.accelerator.is_available()
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
    if accelerator.device.type == "cuda":
        _check_kernels(accelerator.device)
        if needs_bf16 or accelerator.mixed_precision == "bf16":
            _check_bf16(accelerator.device)
    speed_up_bf16(accelerator.device)
    if accelerator.num_processes != launched:
        found = f"accelerate sees {accelerator.num_processes} ({accelerator.distributed_type.value})"
        raise UsageError(f"the launcher started {launched} processes, but {found}: check the launcher's flags")
    if launched > 1:
        connect_ranks(accelerator.device, limit_seconds=heartbeat_timeout, on_abort=on_abort)
    start_heartbeats(heartbeat_timeout, on_abort)
    if signals is not None:
        signals.at_once = None
    return accelerator


def join(*, last_words: Callable[[str], None] | None = None, **options: object) -> "Accelerator":
    """Deprecated: use `init_distributed`, whose `on_abort` replaces `last_words`."""
    return init_distributed(on_abort=last_words, **options)


def make_deterministic(wanted: bool) -> None:
    """If `wanted`, let torch use only deterministic operations. Call it before any work on a GPU."""
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(wanted)
    # torch would then fill each new tensor, which is slow; lowmem never reads an element that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False
