"""Checkpoints that are whole or absent: safetensors and JSON in a folder that appears under its name when it is done.

step-00000500/
  model/            as transformers saves it: `from_pretrained` loads it as it stands
  optimizer.safetensors (or shards of it): "<parameter>.<state>" for every tensor of the optimizer's state
  state.json        step, best, seed, position of the stream, and whose state it is
  manifest.json     size and xxh3_128 of every other file; written last

Every rank writes a share of the files, all at the same time; a tensor is whole in its file, sharded or not.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lowmem.checkpoint.manifest import checkpoints, is_damaged, step_of, write_manifest
from lowmem.checkpoint.parallel_write import TensorFiles, within, write_together
from lowmem.checkpoint.tensors import (
    check_writable,
    model_tensors,
    named_parameters,
    num_bytes,
    optimizer_bytes,
    optimizer_tensors,
)
from lowmem.config.sizes import parse_bytes
from lowmem.distributed.collectives import on_main_rank, rank_and_world_size
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.placement import unwrapped
from lowmem.errors import SaveError, UsageError
from lowmem.step import TrainState
from lowmem.storage.atomic_folder import clear_leftovers, remove
from lowmem.storage.files import FileRecord, free_bytes, record_file, sync, to_json, write_file
from lowmem.storage.tensor_files import split_shards


@phase("saving a checkpoint")
def save_checkpoint(
    state: TrainState,
    folder: str | Path,
    accelerator: Accelerator,
    *,
    tokenizer=None,
    config: Mapping[str, object] | None = None,
    keep: int | None = None,
    max_shard_size: int | str = "5GB",
    on_error: Callable[[SaveError], object] | None = None,
) -> Path | None:
    """Write `folder`/step-XXXXXXXX and return it; then remove older ones, so that `keep` are left (None: all stay).

    The one of `state.best` stays among them. Called by every rank: each writes a share of the bytes, at most one tensor
    at a time in host memory. `config` is kept as model/lowmem.json. If the disk has no room or fails, every rank raises
    SaveError: older checkpoints are as they were, and nothing is left of the new one. With `on_error` it is called
    with that error instead, and None returned.
    """
    path = Path(folder) / f"step-{state.step:08d}"
    weights, moments = model_tensors(state.model), optimizer_tensors(state.model, state.optimizer)
    max_bytes, (_, world_size) = parse_bytes(max_shard_size), rank_and_world_size()
    share = -(-(num_bytes(weights) + num_bytes(moments)) // world_size)  # so that no rank has more to write
    tensors = [
        TensorFiles("model", "model", split_shards(weights, "model", max_bytes)),
        TensorFiles("", "optimizer", split_shards(moments, "optimizer", min(max_bytes, share))),
    ]

    def write_rest(unfinished: Path, records: dict[str, FileRecord]) -> None:
        training_state = {
            "step": state.step,
            "best": state.best,
            "seed": state.seed,
            "stream": state.stream and state.stream.state_dict(),
            "optimizer": type(state.optimizer).__name__,
            "memory": getattr(state.optimizer, "memory", "off"),
            "parameters": [*named_parameters(state.model, state.optimizer)],
        }
        records |= within("model", _write_model_files(unfinished / "model", state.model, tokenizer, config))
        records["state.json"] = write_file(unfinished / "state.json", [to_json(training_state)])
        write_manifest(unfinished, state.step, records)

    try:
        write_together(path, tensors, write_rest, may_replace=is_damaged)
    except SaveError as error:
        if on_error is None:
            raise
        on_error(error)
        return None
    if keep:
        on_main_rank(lambda: _prune(path, keep, state.best))
    return path


@phase("saving the model")
def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer=None,
    config: Mapping[str, object] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write only what `from_pretrained` loads, in place of what stood at `folder` before. Called by every rank.

    What stood there goes only after the new folder is on disk. Raises SaveError as `save_checkpoint` does.
    """
    path = Path(folder).resolve()  # what a link names is replaced where it is
    tensors = TensorFiles("", "model", split_shards(model_tensors(model), "model", parse_bytes(max_shard_size)))

    def write_rest(unfinished: Path, records: dict[str, FileRecord]) -> None:
        _write_model_files(unfinished, model, tokenizer, config)

    write_together(path, [tensors], write_rest, may_replace=lambda path: True)
    return Path(folder)


def check_space(state: TrainState, folder: str | Path, *, saves: int, keep: int | None) -> None:
    """Called by every rank before a run that will save `saves` checkpoints under `folder`, `keep` as there.

    Raises UsageError if they, and the model beside them, will not find room on its disk, or if a tensor is of a kind
    that no checkpoint holds.
    """
    folder = Path(folder)
    tensors = model_tensors(state.model)
    for name, tensor in tensors.items():
        check_writable(name, tensor)
    weights = num_bytes(tensors)
    checkpoint = weights + optimizer_bytes(state.model, state.optimizer) if saves else 0

    def check() -> None:
        clear_leftovers(folder / f"step-{state.step:08d}")
        # before one goes its successor stands
        most = saves if keep is None else min(saves, max(1, keep + 1 - len(checkpoints(folder))))
        needed, free = most * checkpoint + weights, free_bytes(folder)
        if needed > free:
            raise UsageError(
                f"{folder} needs {needed:,} bytes for {most} checkpoints more ({checkpoint:,} each) and the model, "
                f"{free:,} are free: make room, choose another disk or lower save_total_limit"
            )

    on_main_rank(check)


def _write_model_files(
    folder: Path, model: nn.Module, tokenizer, config: Mapping[str, object] | None
) -> dict[str, FileRecord]:
    """All that belongs to a model beside its tensors, which are in `folder` already."""
    base, tensors = unwrapped(model), set(folder.iterdir())
    if hasattr(base, "config"):
        model_config = copy.deepcopy(base.config)
        model_config.architectures = [_class_of(base).__name__]
        model_config.dtype = base.dtype
        model_config.save_pretrained(folder)
    if tokenizer is not None:
        with _errors_of_rust():
            tokenizer.save_pretrained(folder)
    records = {}
    for path in sorted(set(filter(Path.is_file, folder.rglob("*"))) - tensors):  # transformers wrote them
        sync(path)
        records[path.relative_to(folder).as_posix()] = record_file(path)
    if getattr(base, "generation_config", None) is not None:
        # not its save_pretrained: that raises for settings that pretrained models really come with
        encoded = base.generation_config.to_json_string().encode()
        records["generation_config.json"] = write_file(folder / "generation_config.json", [encoded])
    if config is not None:
        records["lowmem.json"] = write_file(folder / "lowmem.json", [to_json(dict(config))])
    return records


@contextmanager
def _errors_of_rust() -> Iterator[None]:
    """The tokenizers library raises no OSError when a disk is full, but names its number."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _class_of(model: nn.Module) -> type:
    """The class that was written for the model: fully_shard puts one of its own before it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def _prune(path: Path, keep: int, best: Mapping[str, float] | None) -> None:
    """Leave `keep` checkpoints: `path`, the best one, and the newest before it."""
    # Later ones are damaged, or another branch's: they neither count nor go.
    older = [old for old in checkpoints(path.parent) if step_of(old) < step_of(path)]
    kept = [old for old in older if best and step_of(old) == best["step"]]
    others = [old for old in older if old not in kept]
    for old in others[: max(0, len(others) - max(0, keep - 1 - len(kept)))]:
        remove(old)
