"""Build launcher command lines, and run them."""

import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def launch_command(launcher: str, processes: int, *options: str, interpreter: str = sys.executable) -> list[str]:
    """Return the command to start a script in `processes` processes (python: one), without the script's name.

    The launcher uses a free port and the flags `options`. It comes from the Python environment of `interpreter`.
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


def run_to_end(command: Sequence[object], *, seconds: float, env: Mapping[str, str], **options: object) -> str:
    """Run a launcher's command and return the combined output of all processes.

    Raises RuntimeError with the reason if the command fails or exceeds `seconds`. A timeout kills all of its processes.
    """
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=env, start_new_session=True, **pipes, **options) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            # list the workers now: each has its own session, so killing the launcher's process group would miss them
            left = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"did not end within {seconds:g} s") from error
            raise
    if process.returncode:
        print(output, file=sys.stderr)
        reasons = [line.strip() for line in output.splitlines() if re.search(r"Error: .|^error", line)]
        raise RuntimeError((reasons or [f"exit code {process.returncode}"])[0][:300])
    return output
