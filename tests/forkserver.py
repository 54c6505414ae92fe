"""Start processes quickly: fork them from an interpreter that has already imported torch and lowmem."""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

# forks come from a fork server, which has no threads; pytest's own process has threads, so forking it is unsafe
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])
_SERVER_DIED = 255  # the exit code that multiprocessing reports if its fork server has died


class Forked:
    """Call `function(*arguments)` in a new process and session; offer the methods of `subprocess.Popen` that tests use.

    Output goes to files, which are read after the process has ended. The process exits as an interpreter does:
    SystemExit sets its exit code, and sys.excepthook and the atexit handlers run. `tests.preloaded`
    imports modules before the fork, so code that runs at their import does not see `env`.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        env: Mapping[str, str],
        cwd: Path,
        stderr: int = subprocess.PIPE,
    ):
        self.args = [function.__name__, *map(str, arguments)]
        self.stdout = NamedTemporaryFile("r")
        self.stderr = self.stdout if stderr == subprocess.STDOUT else NamedTemporaryFile("r")
        files = [self.stdout.name, self.stderr.name]
        self._process = _CONTEXT.Process(target=_call, args=(function, arguments, dict(env), cwd, files))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode != _SERVER_DIED, "multiprocessing's forkserver has died"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        self.wait(timeout)
        return self.stdout.read(), None if self.stderr is self.stdout else self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _call(
    function: Callable[..., object],
    arguments: Sequence[object],
    env: Mapping[str, str],
    cwd: Path,
    files: Sequence[str],
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in zip((1, 2), files, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)  # buffer as Python does when stdout is a pipe
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not run the atexit handlers
