"""The command line of each launcher."""

import socket
import sys
from pathlib import Path


def launch_command(launcher: str, processes: int, *options: str, interpreter: str = sys.executable) -> list[str]:
    """What goes before a script's name to have `launcher` start it in `processes` processes, on a free port.

    `options` are the launcher's own; `interpreter` is the Python beside which the launcher is installed.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    programs = Path(interpreter).parent
    number = f"--nproc_per_node={processes}"
    return {
        "python": [interpreter],
        "torchrun": [f"{programs}/torchrun", number, f"--master_port={port}", *options],
        "torch.distributed.launch": [interpreter, "-m", "torch.distributed.launch", "--use_env"]
        + [number, f"--master_port={port}", *options],
        "accelerate": [f"{programs}/accelerate", "launch", f"--num_processes={processes}"]
        + [f"--main_process_port={port}", *options],
        "deepspeed": [interpreter, f"{programs}/deepspeed", f"--num_gpus={processes}"]
        + [f"--master_port={port}", *options],
    }[launcher]
