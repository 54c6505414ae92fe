"""The command line: Fire parses the arguments into a frozen `Job`, which `main` then checks and runs."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import fire
from fire.core import FireExit
from fire.decorators import SetParseFn

from lowmem.checkpoint.verify import verify
from lowmem.config.advice import advice_of
from lowmem.config.fields import fields_of
from lowmem.config.groups import settings_of
from lowmem.config.help import help_text
from lowmem.config.parse import named_fields, resolve, typed_fields
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import TrainConfig, fields_where
from lowmem.data.files.convert import convert
from lowmem.distributed.launcher import launched_settings
from lowmem.distributed.signals import discard_output, ignore_closed_output
from lowmem.errors import UsageError
from lowmem.job.processes import program
from lowmem.job.run import Train, run
from lowmem.job.supervise import report_error
from lowmem.plot import plot

_EXPORT_DTYPES = ("float32", "bfloat16", "float16", "None")


@dataclass(frozen=True)
class Job:
    """A parsed command that has not started."""

    command: str
    options: Mapping[str, object]
    """Flags of a run as they were typed, or checked arguments of another command."""


@SetParseFn(str)  # keep every value as text, for `resolve` to convert
def _train(**flags: str) -> Job:
    return Job("train", flags)


@SetParseFn(str)
def _plan(**flags: str) -> Job:
    return Job("plan", flags)


@SetParseFn(str)
def _evaluate(**flags: str) -> Job:
    return Job("evaluate", flags)


@SetParseFn(str)
def _verify(path: str = "", **unknown: str) -> Job:
    return _on_files("verify", unknown, path=os.path.expanduser(path))


@SetParseFn(str)
def _export(
    path: str = "",
    out: str = "",
    dtype: str = "None",
    max_shard_size: str = "5GB",
    merge: str = "False",
    **unknown: str,
) -> Job:
    if dtype not in _EXPORT_DTYPES:
        raise UsageError(f"--dtype={dtype} must be one of {', '.join(_EXPORT_DTYPES)}")
    if merge not in ("True", "False"):
        raise UsageError(f"--merge={merge} must be True or False")
    paths = {"path": os.path.expanduser(path), "out": os.path.expanduser(out)}
    options = {"dtype": dtype, "max_shard_bytes": parse_bytes(max_shard_size), "merge": merge}
    return _on_files("export", unknown, **paths, **options)


@SetParseFn(str)
def _convert(path: str = "", out: str = "", **unknown: str) -> Job:
    return _on_files("convert", unknown, path=os.path.expanduser(path), out=os.path.expanduser(out))


@SetParseFn(str)
def _plot(*out: str, **unknown: str) -> Job:
    return _on_files("plot", unknown, out=list(map(os.path.expanduser, out)))


def _on_files(command: str, unknown: Iterable[str], **options: object) -> Job:
    _refuse(command, unknown)
    if missing := [name.upper() for name, value in options.items() if not value]:
        raise UsageError(f"`{command}` needs {' and '.join(missing)}; see --help")
    return Job(command, options)


def _refuse(command: str, unknown: Iterable[str]) -> None:
    if unknown:
        flags = ", ".join(f"--{name}" for name in sorted(unknown))
        raise UsageError(f"{flags}: `{command}` has no such flag; see --help")


_COMMANDS = {"train": _train, "plan": _plan, "evaluate": _evaluate, "test": _evaluate}
_COMMANDS |= {"verify": _verify, "export": _export, "convert": _convert, "plot": _plot}


def main(
    train: Train | None = None,
    *,
    config_class: type[TrainConfig] = TrainConfig,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the command line `arguments` (default: sys.argv) and return the exit code.

    The command `train` calls `train(config, rows, signals=..., on_abort=..., check_folder=...)`; None: `train` of
    lowmem/train.py, which is also what a copy starts from. It returns the number of steps, and whether a signal ended
    the run. `config_class` derives from TrainConfig: each of its fields is a flag. Processes that a run starts execute
    the same program, so call this under `if __name__ == "__main__":`.
    Exit codes: 0 done, 1 failed, 2 user error, 75 training preempted, 128 + n another command ended by signal n.
    `train` and `evaluate` leave their signal handlers installed until the process ends.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and re.match("--local[_-]rank=", arguments[0]):  # old launchers put this flag before the command
        del arguments[0]
    ignore_closed_output()  # now, so that no file which the run opens gets the number of stdout or stderr
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape characters that the terminal cannot show
    outputs = [_SafeStream(sys.stdout), _SafeStream(sys.stderr)]
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        try:
            if not arguments or {"-h", "--help", "help"} & set(arguments):
                name = " ".join(("python", *program())) if program()[1:] else Path(sys.argv[0]).name
                print(help_text(config_class, program=name))
                code = 0
            else:
                code = _start(_parse(arguments), arguments, train, config_class)
        except Exception as error:
            code = report_error(error)
    for output in outputs:
        output.end()
    return code


class _SafeStream:
    """A text stream that drops what cannot be written: no reader (as with `| head -1`), no terminal, a full disk."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ignoring_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignoring_errors():
            self._stream.flush()

    def end(self) -> None:
        """Flush, or discard what cannot be written: the interpreter's flush at exit would change the exit code."""
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream.fileno())

    @contextlib.contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            ignore_closed_output()


def _parse(arguments: Sequence[str]) -> Job:
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            job = fire.Fire(_COMMANDS, command=list(arguments), serialize=lambda job: None)
    except FireExit:
        first = complaints.getvalue().partition("\n")[0].removeprefix("ERROR: ")
        first = first.replace("Could not consume arg", "unexpected argument")
        first = first.replace("Cannot find key", "unknown command")
        raise UsageError(f"{first}; commands are {', '.join(_COMMANDS)}; flags are --name=value") from None
    if not isinstance(job, Job):
        raise UsageError(f"unexpected arguments: {' '.join(arguments)}; flags are --name=value")
    return job


def _training(flags: Mapping[str, str], config_class: type[TrainConfig]) -> tuple[TrainConfig, frozenset[str]]:
    """Return the config of a run, and the fields that flags set directly."""
    config = _resolve(flags, config_class)
    if config.quantization and not config.trains_adapters:
        what = f"--quantization={config.quantization} freezes the model, so that nothing is trained"
        raise UsageError(f"{what}: set --lora_rank=16 too, or --model_name_or_path to a folder of adapters")
    return config, named_fields(flags, config_class)


def _planning(flags: Mapping[str, str], config_class: type[TrainConfig]) -> tuple[TrainConfig, frozenset[str]]:
    config, named = _training(flags, config_class)
    if config.deepspeed:
        raise UsageError("`plan` cannot predict DeepSpeed, which manages memory itself: remove --deepspeed")
    return config, named


def _evaluation(flags: Mapping[str, str], config_class: type[TrainConfig]) -> tuple[TrainConfig, frozenset[str]]:
    unknown = flags.keys() - fields_where(config_class, in_evaluate=True) - {"local_rank"}
    # `resolve` says what a setting of another trainer is here
    own = fields_of(config_class)
    _refuse("evaluate", [name for name in unknown if name in own or advice_of(name, flags[name]) is None])
    if sharding := {"deepspeed", "sharding_strategy", "tp_size"} & launched_settings().keys():
        found = f"accelerate is configured to shard the model ({', '.join(sorted(sharding))})"
        raise UsageError(f"{found}, but `evaluate` needs the whole model in each process: launch with --multi_gpu")
    if missing := [f"--{name}" for name in ("model_name_or_path", "test_file") if not flags.get(name)]:
        raise UsageError(f"`evaluate` needs {' and '.join(missing)}")
    folder = Path(os.path.expanduser(flags["model_name_or_path"]))
    saved = settings_of(folder)
    given = {name: saved[name] for name in (*TrainConfig().encoding, "loss", "quantization") if name in saved}
    precision = saved.get("mixed_precision", "no")
    if precision != "no" and flags.get("mixed_precision", precision) == precision:
        given |= {"mixed_precision": precision, "memory": saved.get("memory", "off")}
    config = _resolve(flags, config_class, typed_fields(given, folder / "lowmem.json"))
    return config, named_fields(flags, config_class) | given.keys()


_CONFIGS = {"train": _training, "plan": _planning, "evaluate": _evaluation}


def _resolve(
    flags: Mapping[str, str], config_class: type[TrainConfig], given: Mapping[str, object] | None = None
) -> TrainConfig:
    """Resolve flags and accelerate's settings into a config. Ignores --local_rank, which old launchers add."""
    given = {**(given or {}), **(launched := launched_settings())}
    flags = {name: value for name, value in flags.items() if name != "local_rank"}
    config = resolve(flags, given=given, config_class=config_class)
    differ = [name for name, value in launched.items() if getattr(config, name) != value]
    if problems := [f"{x}={getattr(config, x)} was set, but accelerate has {x}={launched[x]}" for x in differ]:
        raise UsageError(f"{'; '.join(problems)}: remove one of the two settings")
    return config


def _start(job: Job, arguments: Sequence[str], train: Train | None, config_class: type[TrainConfig]) -> int:
    if job.command in _CONFIGS:
        config, fixed = _CONFIGS[job.command](job.options, config_class)
        if job.command != "plan":
            return run(job.command, config, arguments=arguments, fixed=fixed, train=train)
        from lowmem.plan.command import plan

        plan(config, fixed, is_own_loop=train is not None)
    elif job.command == "verify":
        for line in verify(**job.options):
            print(line, flush=True)
    elif job.command == "plot":
        print(plot(**job.options))
    elif job.command == "convert":
        print(convert(Path(job.options["path"]), Path(job.options["out"])))
    elif job.command == "export":
        import torch

        from lowmem.checkpoint.export import export

        options = {"dtype": getattr(torch, job.options["dtype"], None), "merge": job.options["merge"] == "True"}
        print(export(**job.options | options))
    return 0
