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

from lowmem.config import PRESETS, RankError, TrainConfig, UsageError
from lowmem.data.bundled import BundledRows
from lowmem.data.rows import FileRows, RowError, open_rows, split_rows
from lowmem.flags import resolve
from lowmem.parallel.launch import (
    check_launch,
    launched_mixed_precision,
    processes_to_start,
    start_processes,
)

# What `evaluate` understands; the others would do nothing there.
_EVALUATE_FLAGS = frozenset(
    "model_name_or_path tokenizer_name_or_path test_file prompt_column response_column text_column messages_column "
    "max_seq_len batch_size loss mixed_precision num_processes max_predict_samples generation_max_new_tokens".split()
)
_FROM_MODEL_FOLDER = ("prompt_column", "response_column", "text_column", "messages_column", "max_seq_len", "loss")


@dataclass(frozen=True)
class Job:
    """What was asked for, wholly understood and not yet begun."""

    command: str
    config: TrainConfig


@SetParseFn(str)  # every value stays the text that was typed; resolve knows the types
def _train(**flags: str) -> Job:
    return Job("train", _resolve(flags))


@SetParseFn(str)
def _evaluate(**flags: str) -> Job:
    if unused := sorted(flags.keys() - _EVALUATE_FLAGS - {"local_rank"}):
        raise UsageError(f"{', '.join('--' + name for name in unused)}: `evaluate` has no such flag; see --help")
    if missing := [name for name in ("model_name_or_path", "test_file") if not flags.get(name)]:
        raise UsageError(f"`evaluate` needs {' and '.join('--' + name for name in missing)}")
    trained_with = Path(flags["model_name_or_path"]) / "lowmem.json"
    saved = json.loads(trained_with.read_text()) if trained_with.exists() else {}
    given = {name: saved[name] for name in _FROM_MODEL_FOLDER if name in saved}
    if saved.get("mixed_precision") == flags.get("mixed_precision", saved.get("mixed_precision")) == "bf16":
        given |= {"mixed_precision": "bf16", "memory": saved.get("memory", "off")}
    return Job("evaluate", _resolve(flags, given))


_COMMANDS = {"train": _train, "evaluate": _evaluate, "test": _evaluate}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv). Returns the exit code: 0 done, 2 a mistake of the user."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(_help())
        return 0
    try:
        return _run(_parse(arguments), arguments)
    except UsageError as error:
        # Before the processes are one group, all see the same mistake and one tells it; later a rank may be alone.
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank == "0" or ("torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()):
            print(f"error: {error}" if rank == "0" else f"error on local rank {rank}: {error}", file=sys.stderr)
        return 2
    except (RowError, RankError) as error:  # where it stands says all: a traceback would hide it
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str]) -> Job:
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            job = fire.Fire(_COMMANDS, command=list(arguments), serialize=lambda job: None)
    except FireExit:
        first = complaints.getvalue().partition("\n")[0].removeprefix("ERROR: ")
        first = first.replace("Cannot find key", "unknown command").replace("Could not consume arg", "unexpected word")
        raise UsageError(f"{first}; commands are {', '.join(_COMMANDS)}, flags --name=value") from None
    if not isinstance(job, Job):
        raise UsageError(f"words without -- were given: {' '.join(arguments)}; flags are --name=value")
    return job


def _resolve(flags: dict[str, str], given: Mapping[str, object] | None = None) -> TrainConfig:
    """The config of flags (without the --local_rank that older launchers add), with the launcher's precision."""
    flags = {name: value for name, value in flags.items() if name != "local_rank"}
    told = launched_mixed_precision()
    config = resolve(flags, given={**(given or {}), **({"mixed_precision": told} if told else {})})
    if told and config.mixed_precision != told:
        raise UsageError(
            f"mixed_precision={config.mixed_precision} was set, but accelerate was told {told}: set it in one place"
        )
    return config


def _run(job: Job, arguments: Sequence[str]) -> int:
    """Look at files and folders while nothing is loaded, then train or evaluate, in as many processes as asked for."""
    config = job.config
    check_launch(config.num_processes)
    columns = [name for name in (config.prompt_column, config.response_column, config.text_column) if name]
    opened = partial(open_rows, columns=columns, messages_column=config.messages_column)
    test_rows = opened(config.test_file) if config.test_file else None
    if job.command == "train":
        _check_output(config)
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
    processes = processes_to_start(config.num_processes)
    if processes > 1:
        return start_processes(processes, [sys.argv[0], *arguments])
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars for loading and writing weights would stand between our lines
    if job.command == "evaluate":
        _evaluate_model(config, test_rows)
    else:
        from lowmem.train import train

        if config.train_file is None and os.environ.get("RANK", "0") == "0":
            print(f"no --train_file: training on the {len(train_rows):,} bundled rows")
        train(config, train_rows, validation_rows, test_rows)
    return 0


def _evaluate_model(config: TrainConfig, test_rows: FileRows) -> None:
    """Evaluate the model at `model_name_or_path` and print what was measured as one line of JSON."""
    import torch

    from lowmem.data.batch import collate
    from lowmem.data.encode import make_encoder
    from lowmem.data.finite import open_eval
    from lowmem.evaluation import measure
    from lowmem.memory.loss import LOSSES
    from lowmem.model import load_model
    from lowmem.parallel.launch import join
    from lowmem.parallel.sharding import parallelize
    from lowmem.report import tell, tell_answers

    accelerator = join(mixed_precision="no" if config.has_bf16_weights else config.mixed_precision)
    model, tokenizer = load_model(
        config.model_name_or_path,
        tokenizer_name_or_path=config.tokenizer_name_or_path,
        dtype=torch.bfloat16 if config.has_bf16_weights else torch.float32,
    )
    encode = make_encoder(
        tokenizer,
        is_encoder_decoder=model.config.is_encoder_decoder,
        max_seq_len=config.max_seq_len,
        **config.columns,
    )
    model = parallelize(model, accelerator)
    open_batches = partial(
        open_eval,
        encode=encode,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        collate=partial(collate, causal=not model.config.is_encoder_decoder),
    )
    metrics, answers = measure(
        model,
        tokenizer,
        test_rows,
        open_batches,
        LOSSES[config.loss],
        accelerator,
        num_answers=config.max_predict_samples if config.prompt_column else 0,
        max_new_tokens=config.generation_max_new_tokens,
        prefix="test",
    )
    if accelerator.is_main_process:
        tell_answers(answers[:3])
        tell(json.dumps(metrics))
    accelerator.end_training()


def _check_output(config: TrainConfig) -> None:
    """Raise UsageError if the run would mix with another one in output_dir, or starts from what is no checkpoint."""
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir={output} is a file: name a folder")
    present = sorted(path.name for path in output.glob("checkpoints/step-*"))
    model = output / "model"
    if model.exists() and not (model / "lowmem.json").is_file():
        raise UsageError(f"{model} is not of a lowmem run, and would be replaced at the end: set another --output_dir")
    if config.resume == "never" and not present and model.exists():
        raise UsageError(f"{model} is of another run, and would be replaced at the end: set another --output_dir")
    if config.resume == "never" and present:
        raise UsageError(
            f"--output_dir={output} holds checkpoints already ({', '.join(present)}): "
            "set --resume=auto to go on from the newest, or another --output_dir"
        )
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not (path / "manifest.json").is_file():
            raise UsageError(f"--resume={path} is no checkpoint: give never, auto, or a folder with a manifest.json")
        if present and path.resolve().parent != (output / "checkpoints").resolve():
            raise UsageError(
                f"--output_dir={output} holds checkpoints of another run than {path}: set another --output_dir"
            )
        if later := [name for name in present if name > path.name]:
            raise UsageError(
                f"--output_dir={output} holds later checkpoints than {path.name} ({', '.join(later)}), "
                "which this run would write again: move them away, or set another --output_dir"
            )


def _help() -> str:
    """All commands, presets and fields, from the comments and explanations in config.py."""
    lines = [
        "usage: train_low_mem.py train|evaluate|test [--flag=value ...]",
        "  train                                      a tiny T5 learns bundled rows: no file, no network",
        "  train --train_file=rows.parquet --model_name_or_path=FOLDER --output_dir=out",
        "  train --use_large_config=True --train_file=rows.parquet --resume=auto",
        "  evaluate --model_name_or_path=out/model --test_file=rows.parquet",
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
