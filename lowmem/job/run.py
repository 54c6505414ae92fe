"""Train or evaluate, in this process or in processes that it starts."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lowmem.config.row_formats import format_of
from lowmem.config.rules import conflicts
from lowmem.config.train_config import FIELDS, TrainConfig
from lowmem.data.bundled import BundledRows
from lowmem.data.mixture import open_mixture
from lowmem.data.rows import RowSets, open_rows, split_rows
from lowmem.distributed.launcher import launched_processes
from lowmem.distributed.setup import check_launch, processes_to_start
from lowmem.distributed.signals import PREEMPTED, Signals, end_as_signalled
from lowmem.errors import ColumnsError, UsageError
from lowmem.job.exit_file import final_exit
from lowmem.job.folder import check_output
from lowmem.job.processes import die_with_launcher, program, start_processes
from lowmem.job.supervise import end_at_once, record_preempted, supervise

Train = Callable[..., tuple[int, bool]]
"""What the command `train` calls; see `lowmem.train.train`."""

_PLANNED = "LOWMEM_PLANNED"
_COLUMN_FLAGS = FIELDS["row_format"].metadata["instead_of"]


def run(
    command: str, config: TrainConfig, *, arguments: Sequence[str], fixed: frozenset[str], train: Train | None
) -> int:
    """Run `command` (train or evaluate) and return the exit code. Catches signals until the process ends.

    Trains by `train` (None: lowmem's). Started processes run the same program with the command line `arguments`.
    Fitting settings to memory never changes the fields in `fixed`.
    """
    trains, output = command == "train", Path(config.output_dir)
    signals = Signals(at_once=end_at_once if trains else end_as_signalled)
    signals.catch()  # never released: a launcher may forward a signal after the run is done
    die_with_launcher()
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by the launcher, after a process failed
    if trains and is_restarted and (ended := final_exit(output)):
        if os.environ["LOCAL_RANK"] == "0":
            print(f"not restarting: this launch has ended ({ended['cause']}: {ended['message']})", file=sys.stderr)
        return ended["code"]
    check_launch(config.num_processes)
    if trains:
        check_output(output, config.resume)
    config, rows, found = _open_in_found_format(config, trains, fixed)
    _set_environment()
    if trains and (config.device_memory or config.host_memory) and _PLANNED not in os.environ:
        from lowmem.plan.command import fitted, flags_between

        requested, config = config, fitted(config, fixed, is_own_loop=train is not None)
        arguments = [*arguments, *flags_between(requested, config)]
        os.environ[_PLANNED] = "1"  # so that started processes do not fit the settings again

    processes = processes_to_start(config.num_processes)
    # DeepSpeed needs a process group even for one process
    if processes > 1 or (config.deepspeed and launched_processes() is None):
        code = start_processes(processes, [*program(), *arguments], signals)
        if trains and (code == PREEMPTED or code < 0):
            record_preempted(output)
            return PREEMPTED
        return code if code >= 0 else 128 - code
    if os.environ.get("RANK", "0") == "0":
        unread = getattr(rows.training if trains else rows.test, "unread", None)
        hint = " (see --prompt_template)" if config.response_column else ""
        lines = [found, unread and f"columns of the first rows that are not read: {', '.join(unread)}{hint}"]
        print("".join(f"{line}\n" for line in lines if line), end="", flush=True)
    if trains:
        return supervise(partial(_train, train, config, rows), output, signals)
    _hide_bars()
    from lowmem.job.evaluate_command import evaluate_model

    evaluate_model(config, rows.test)
    return 0


def _open_all_rows(config: TrainConfig, trains: bool) -> RowSets:
    columns = [name for name in (config.prompt_column, config.response_column, config.text_column) if name]
    options = {"columns": columns, "prompt_template": config.prompt_template, "messages_column": config.messages_column}
    opened = partial(open_rows, **options)
    of_training = options | {"weight_column": config.weight_column}
    test_rows = opened(config.test_file) if config.test_file else None
    if not trains:
        return RowSets(None, None, test_rows)
    if config.mixture_weights:
        train_rows = open_mixture(config.train_file, config.mixture_weights, **of_training)
    else:
        train_rows = open_rows(config.train_file, **of_training) if config.train_file else BundledRows()
    if config.validation_file:
        return RowSets(train_rows, opened(config.validation_file), test_rows)
    if config.mixture_weights:
        return RowSets(train_rows, None, test_rows)
    return RowSets(*split_rows(train_rows, config.validation_rows), test_rows)


def _open_in_found_format(
    config: TrainConfig, trains: bool, fixed: frozenset[str]
) -> tuple[TrainConfig, RowSets, str | None]:
    """Open all rows. If no flag sets columns, and a file has those of another format, change the config to that.

    Returns the config, the rows, and a message if the config was changed.
    """
    try:
        return config, _open_all_rows(config, trains), None
    except ColumnsError as error:
        first_error, found = error, None if fixed & {"row_format", *_COLUMN_FLAGS} else format_of(error.present)
        if found is None:
            raise
    name, settings = found
    message = f"the rows are {name}: using " + " ".join(f"--{flag}={shlex.quote(settings[flag])}" for flag in settings)
    config = dataclasses.replace(config, **dict.fromkeys(_COLUMN_FLAGS) | settings)
    if problems := conflicts(config, ()):
        raise UsageError(f"{first_error.file}: {message}; {'; '.join(problems)}")
    try:
        rows = _open_all_rows(config, trains)
    except ColumnsError as error:
        found = f"{first_error}; {error.file} has other columns"
        raise UsageError(f"{found}: all files of a run need the same columns (--row_format applies to all)") from None
    return config, rows, message


def _set_environment() -> None:
    """Set environment variables that torch reads on import, unless they are already set."""
    # With PASSIVE, waiting OpenMP threads sleep instead of spinning. A tiny model then loses a sixth of its speed on
    # idle cores, but with spinning threads it is at least five times slower as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The thread that encodes rows would otherwise start a thread per core, in each process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # batches of varying lengths fragment the CUDA allocator's memory; expandable segments avoid that
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _train(train: Train | None, config: TrainConfig, rows: RowSets, **supervision) -> tuple[int, bool]:
    if config.train_file is None and os.environ.get("RANK", "0") == "0":
        print(f"no --train_file: training on the {len(rows.training):,} bundled rows")
    _hide_bars()
    if train is None:
        from lowmem.train import train

    return train(config, rows, **supervision)


def _hide_bars() -> None:
    """Hide the progress bars of transformers. Imports torch."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
