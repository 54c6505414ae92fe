"""The command line, in two phases: Fire only parses flags into a frozen job; then the job runs."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import getsource
from pathlib import Path

import fire
from fire.core import FireExit
from fire.decorators import SetParseFn

from lowmem.checkpoint.verify import verify
from lowmem.config.parse import named_fields, resolve
from lowmem.config.sizes import parse_bytes
from lowmem.config.train_config import PRESETS, TrainConfig
from lowmem.data.bundled import BundledRows
from lowmem.data.rows import RowSets, open_rows, split_rows
from lowmem.distributed.launcher import launched_processes, launched_settings
from lowmem.distributed.setup import check_launch, processes_to_start
from lowmem.distributed.signals import PREEMPTED, Signals, end_as_signalled
from lowmem.errors import UsageError
from lowmem.job.exit_file import final_exit
from lowmem.job.folder import check_output
from lowmem.job.processes import die_with_launcher, is_restarted, start_processes
from lowmem.job.supervise import end_at_once, record_preempted, supervise, tell_failure
from lowmem.plot import plot

# What `evaluate` understands; the others would do nothing there.
_EVALUATE_FLAGS = frozenset(
    "model_name_or_path tokenizer_name_or_path test_file prompt_column response_column text_column messages_column "
    "max_seq_len batch_size loss mixed_precision num_processes max_predict_samples generation_max_new_tokens".split()
)
_EXPORT_DTYPES = ("float32", "bfloat16", "float16", "None")
_PLANNED = "LOWMEM_PLANNED"
_FROM_MODEL_FOLDER = ("prompt_column", "response_column", "text_column", "messages_column", "max_seq_len", "loss")


@dataclass(frozen=True)
class Job:
    """What was asked for, wholly understood and not yet begun."""

    command: str
    config: TrainConfig
    fixed: frozenset[str] = frozenset()
    """Fields that flags set one by one, which a plan leaves as they are."""


@dataclass(frozen=True)
class FileJob:
    """The same of a command that works on saved files alone."""

    command: str
    arguments: Mapping[str, str | Sequence[str]]


@SetParseFn(str)  # every value stays the text that was typed; resolve knows the types
def _train(**flags: str) -> Job:
    return Job("train", _resolve(flags), named_fields(flags))


@SetParseFn(str)
def _plan(**flags: str) -> Job:
    config = _resolve(flags)
    if config.deepspeed:
        raise UsageError("DeepSpeed lays out memory by itself: `plan` predicts what runs without it")
    return Job("plan", config, named_fields(flags))


@SetParseFn(str)
def _evaluate(**flags: str) -> Job:
    if unused := sorted(flags.keys() - _EVALUATE_FLAGS - {"local_rank"}):
        raise UsageError(f"{', '.join('--' + name for name in unused)}: `evaluate` has no such flag; see --help")
    if divided := {"deepspeed", "sharding_strategy", "tp_size"} & launched_settings().keys():
        raise UsageError(
            f"accelerate was told to divide the model ({', '.join(sorted(divided))}), but `evaluate` has a whole one "
            "in each process: launch with --multi_gpu"
        )
    if missing := [name for name in ("model_name_or_path", "test_file") if not flags.get(name)]:
        raise UsageError(f"`evaluate` needs {' and '.join('--' + name for name in missing)}")
    trained_with = Path(flags["model_name_or_path"]) / "lowmem.json"
    saved = json.loads(trained_with.read_text()) if trained_with.exists() else {}
    given = {name: saved[name] for name in _FROM_MODEL_FOLDER if name in saved}
    if saved.get("mixed_precision") == flags.get("mixed_precision", saved.get("mixed_precision")) == "bf16":
        given |= {"mixed_precision": "bf16", "memory": saved.get("memory", "off")}
    return Job("evaluate", _resolve(flags, given))


@SetParseFn(str)
def _verify(path: str | None = None, **unknown: str) -> FileJob:
    return _file_job("verify", unknown, path=path)


@SetParseFn(str)
def _export(
    path: str | None = None,
    out: str | None = None,
    dtype: str = "None",
    max_shard_size: str = "5GB",
    **unknown: str,
) -> FileJob:
    if dtype not in _EXPORT_DTYPES:
        raise UsageError(f"--dtype={dtype} must be one of {', '.join(_EXPORT_DTYPES)}")
    if parse_bytes(max_shard_size) < 1:
        raise UsageError(f"--max_shard_size={max_shard_size} leaves no room for a tensor")
    return _file_job("export", unknown, path=path, out=out, dtype=dtype, max_shard_size=max_shard_size)


@SetParseFn(str)
def _plot(*out: str, **unknown: str) -> FileJob:
    return _file_job("plot", unknown, out=out)


def _file_job(command: str, unknown: Mapping[str, str], **arguments: str | Sequence[str] | None) -> FileJob:
    if unknown:
        raise UsageError(f"{', '.join('--' + name for name in unknown)}: `{command}` has no such flag; see --help")
    if missing := [name.upper() for name, value in arguments.items() if not value]:
        raise UsageError(f"`{command}` needs {' and '.join(missing)}; see --help")
    return FileJob(command, arguments)


_COMMANDS = {
    "train": _train,
    "plan": _plan,
    "evaluate": _evaluate,
    "test": _evaluate,
    "verify": _verify,
    "export": _export,
    "plot": _plot,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv) and return the exit code: 0 done, 2 a mistake of the user,
    75 a training run that was preempted, with what it had done saved, 1 anything else; 128 and the number of a signal
    that ended something else. `train` and `evaluate` catch signals for the rest of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and re.match("--local[_-]rank=", arguments[0]):  # old launchers put it before the command
        del arguments[0]
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(_help())
        return 0
    try:
        job = _parse(arguments)
        return _run_on_files(job) if isinstance(job, FileJob) else _run(job, arguments)
    except Exception as error:
        return tell_failure(error)


def _parse(arguments: Sequence[str]) -> Job | FileJob:
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            job = fire.Fire(_COMMANDS, command=list(arguments), serialize=lambda job: None)
    except FireExit:
        first = complaints.getvalue().partition("\n")[0].removeprefix("ERROR: ")
        first = first.replace("Cannot find key", "unknown command").replace("Could not consume arg", "unexpected word")
        raise UsageError(f"{first}; commands are {', '.join(_COMMANDS)}, flags --name=value") from None
    if not isinstance(job, Job | FileJob):
        raise UsageError(f"words without -- were given: {' '.join(arguments)}; flags are --name=value")
    return job


def _resolve(flags: dict[str, str], given: Mapping[str, object] | None = None) -> TrainConfig:
    """The config of flags (without the --local_rank that older launchers add), with what the launcher was told."""
    flags = {name: value for name, value in flags.items() if name != "local_rank"}
    told = launched_settings()
    config = resolve(flags, given={**(given or {}), **told})
    found = {name: (getattr(config, name), value) for name, value in told.items() if getattr(config, name) != value}
    if found:
        differ = "; ".join(
            f"{name}={ours} was set, but accelerate was told {its}" for name, (ours, its) in found.items()
        )
        raise UsageError(f"{differ}: set it in one place")
    return config


def _run_on_files(job: FileJob) -> int:
    if job.command == "verify":
        for line in verify(**job.arguments):
            print(line, flush=True)
        return 0
    if job.command == "plot":
        print(plot(**job.arguments))
        return 0
    import torch

    from lowmem.checkpoint.export import export

    path, out, dtype, max_shard_size = job.arguments.values()
    dtype = None if dtype == "None" else getattr(torch, dtype)
    print(export(path, out, dtype=dtype, max_shard_bytes=parse_bytes(max_shard_size)))
    return 0


def _run(job: Job, arguments: Sequence[str]) -> int:
    """Look at files and folders while nothing is loaded, then train or evaluate, in as many processes as asked for."""
    if job.command == "plan":
        from lowmem.plan.command import plan

        plan(job.config, job.fixed)
        return 0
    config, output = job.config, Path(job.config.output_dir)
    signals = Signals(at_once=end_at_once if job.command == "train" else end_as_signalled)
    signals.catch()  # for good: the echo of a signal may come when all is done
    die_with_launcher()
    if job.command == "train" and is_restarted() and (ended := final_exit(output)):
        if os.environ["LOCAL_RANK"] == "0":
            print(f"not started again, this launch has ended: {ended['cause']}, {ended['message']}", file=sys.stderr)
        return ended["code"]
    check_launch(config.num_processes)
    columns = [name for name in (config.prompt_column, config.response_column, config.text_column) if name]
    opened = partial(open_rows, columns=columns, messages_column=config.messages_column)
    test_rows = opened(config.test_file) if config.test_file else None
    if job.command == "train":
        check_output(output, config.resume)
        train_rows = opened(config.train_file) if config.train_file else BundledRows()
        if config.validation_file:
            validation_rows = opened(config.validation_file)
        else:
            train_rows, validation_rows = split_rows(train_rows, config.validation_rows)
    # Before torch loads OpenMP: let threads that wait sleep. It costs a tiny model a sixth of its speed on idle cores,
    # but spinning ones hold each other up, five times and more, as soon as anything else runs there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Before torch allocates on a GPU: memory that batches of changing lengths leave in pieces can be joined again.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if job.command == "train" and (config.device_memory or config.host_memory) and _PLANNED not in os.environ:
        from lowmem.plan.command import fitted, flags_between

        fitting = fitted(config, job.fixed)
        arguments = [*arguments, *flags_between(config, fitting)]
        os.environ[_PLANNED], config = "1", fitting  # the processes that this one starts find it done
    processes = processes_to_start(config.num_processes)
    # DeepSpeed wants a process group even of one
    if processes > 1 or (config.deepspeed and launched_processes() is None):
        code = start_processes(processes, [sys.argv[0], *arguments], signals)
        if job.command == "evaluate":
            return code if code >= 0 else 128 - code
        if code == PREEMPTED or code < 0:
            record_preempted(output)
            return PREEMPTED
        return code
    if job.command == "evaluate":
        _hide_bars()
        from lowmem.job.evaluate_command import evaluate_model

        evaluate_model(config, test_rows)
        return 0
    if config.train_file is None and os.environ.get("RANK", "0") == "0":
        print(f"no --train_file: training on the {len(train_rows):,} bundled rows")

    def load_and_train(**supervision) -> tuple[int, bool]:
        _hide_bars()
        from lowmem.train import train

        return train(config, RowSets(train_rows, validation_rows, test_rows), **supervision)

    return supervise(load_and_train, output, signals)


def _hide_bars() -> None:
    """Those of transformers, for loading and writing weights, would stand between our lines. Imports torch."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _help() -> str:
    """All commands, presets and fields, from the comments and explanations in config.py."""
    lines = [
        "usage: train_low_mem.py train|plan|evaluate|test|verify|export|plot [--flag=value ...]",
        "  train                                      a tiny T5 learns bundled rows: no file, no network",
        "  train --train_file=rows.parquet --model_name_or_path=FOLDER --output_dir=out",
        "  train --use_large_config=True --train_file=rows.parquet --resume=auto",
        "  plan ...flags of train...                  predicts memory and disk, and runs nothing",
        "      with --device_memory=20GB --host_memory=12GB it chooses the fastest settings that fit; so does `train`",
        "  evaluate --model_name_or_path=out/model --test_file=rows.parquet",
        "  verify PATH                                is a checkpoint, or each one of a run, as it was saved",
        "  export PATH OUT --dtype=bfloat16 --max_shard_size=5GB",
        "      writes the model of a checkpoint, or any model's folder, as a new folder for from_pretrained; dtype:",
        "      float32 (of a checkpoint in memory=exact the fp32 master), float16, bfloat16, None (default: as saved)",
        "  plot OUT [OUT2 ...]                        curves of runs: OUT/plot.png, or text without matplotlib",
        "",
        "presets, below --config=FILE.yaml and flags:",
    ]
    for name, values in PRESETS.items():
        shown = "without a preset and a model" if name == "tiny" else f"--{name}=True"
        lines.append(f"  {shown}: " + ", ".join(f"{field}={value}" for field, value in values.items()))
    lines.append("  --is_keep_training=True: resume=auto")
    group_or_field = re.compile(r'^    # --- (.+)|^    (\w+): (.+?) = (.+)\n    """((?s:.+?))"""', re.MULTILINE)
    for group, name, kind, default, explanation in group_or_field.findall(getsource(TrainConfig)):
        told = " ".join(explanation.split())
        lines.append(f"\n{group}:" if group else f"  --{name} ({kind.removesuffix(' | None')}, {default}): {told}")
    return "\n".join(lines)
