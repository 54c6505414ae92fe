"""Save checkpoints: safetensors and JSON in a folder that is complete or absent.

step-00000500/
  model/            in transformers' format: `from_pretrained` loads it; of an adapted model, the adapters in peft's
  optimizer.safetensors (or shards of it): "<parameter>.<state>" for every tensor of the optimizer's state
  state.json        step, updates, best evaluation and number of those since, seed, state of the data stream; the
                    optimizer's class, tier and parameter names; hashes of the tokenizer and of an adapted model's
                    weights
  extra/            what the caller adds: NAME.safetensors (or shards of it) for tensors, NAME.json for other values
  manifest.json     size and xxh3_128 of every other file; written last

Ranks write tensor files in parallel; rank 0 then writes the other files. One rank saves a sharded tensor whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowmem.adapters.lora import base_digest
from lowmem.checkpoint.extra import Extra
from lowmem.checkpoint.manifest import checkpoint_of, checkpoints, is_damaged, step_of, write_manifest
from lowmem.checkpoint.model_files import Config, check_loadable, write_model_files
from lowmem.checkpoint.parallel_write import write_together
from lowmem.checkpoint.tensors import model_tensors, named_parameters, num_bytes, of_all_stages
from lowmem.config.sizes import parse_bytes
from lowmem.distributed.collectives import on_main_rank, rank_and_world_size
from lowmem.distributed.dtensor import pieces
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.pipeline import sum_over_stages
from lowmem.distributed.placement import is_adapted, unwrapped
from lowmem.errors import SaveError, UsageError
from lowmem.optim.adamw import DEFINITION
from lowmem.optim.state import optimizer_bytes, optimizer_tensors
from lowmem.optim.tiers import TieredOptimizer
from lowmem.step import TrainState
from lowmem.storage.atomic_folder import clear_leftovers, remove
from lowmem.storage.files import FileRecord, free_bytes, to_json, write_file
from lowmem.storage.tensor_files import Shard, check_dtype, split_shards


@phase("saving a checkpoint")
def save_checkpoint(
    state: TrainState,
    folder: str | Path,
    accelerator: Accelerator,
    *,
    tokenizer=None,
    config: Config = None,
    tokenizer_hash: str | None = None,
    keep: int | None = None,
    max_shard_size: int | str = "5GB",
    on_error: Callable[[SaveError], object] | None = None,
    extra: Mapping[str, object] | None = None,
) -> Path | None:
    """Write `folder`/step-XXXXXXXX, remove the oldest checkpoints beyond `keep` (None: keep all), return the new one.

    The checkpoint of `state.best` is always kept. Call this on every rank: each writes a share, with at most one whole
    tensor in host memory. `config` is saved as model/lowmem.json. `tokenizer_hash` is saved in state.json, and a resume
    compares it. `extra` holds values for `load_extra`, such as {"ema": {name: tensor}, "note": JSON value}. They must
    be the same on every rank, except for the parts of sharded tensors (DTensors). If the disk is full or fails, older
    checkpoints stay intact, the new one is removed, and every rank raises SaveError, or passes it to `on_error` and
    returns None. Raises UsageError if `from_pretrained` could not load the model, because adapters or a wrapper rename
    its weights, or if `extra` cannot be saved.
    """
    check_loadable(state.model)
    path = checkpoint_of(state.step, folder)
    parameters = named_parameters(state.model, state.optimizer)
    weights = of_all_stages(state.model, model_tensors(state.model))
    optimizer_state = of_all_stages(state.model, optimizer_tensors(parameters, state.optimizer))
    trained = [*of_all_stages(state.model, parameters)]
    max_bytes, (_, world_size) = parse_bytes(max_shard_size), rank_and_world_size()
    others = Extra.of(extra or {})
    in_all = [weights, optimizer_state, *others.tensors.values()]
    share = -(-sum(map(num_bytes, in_all)) // world_size)  # a limit for all files but the model's
    groups = {
        **_model_files(state.model, weights, max_bytes, folder="model/"),
        "optimizer": split_shards(optimizer_state, "optimizer", min(max_bytes, share)),
        **{stem: split_shards(tensors, stem, min(max_bytes, share)) for stem, tensors in others.tensors.items()},
    }

    def write_rest(unfinished: Path, records: dict[str, FileRecord]) -> None:
        stream = state.stream and state.stream.state_dict()
        training = {"step": state.step, "updates": state.updates, "best": state.best, "seed": state.seed}
        training |= {"loss_scale": state.loss_scale and asdict(state.loss_scale)}
        training |= {name: getattr(state, name) for name in ("evaluated_step", "evaluations_since_best")}
        training |= {"stream": stream, "tokenizer": tokenizer_hash, "base": base_digest(unwrapped(state.model))}
        kind, memory = type(state.optimizer).__name__, getattr(state.optimizer, "memory", "off")
        training |= {"optimizer": kind, "memory": memory, "parameters": trained}
        if isinstance(state.optimizer, TieredOptimizer):
            training["definition"] = DEFINITION
        for file, record in write_model_files(unfinished / "model", state.model, tokenizer, config).items():
            records[file.relative_to(unfinished).as_posix()] = record
        records |= others.write_contents(unfinished)
        records["state.json"] = write_file(unfinished / "state.json", [to_json(training)])
        write_manifest(unfinished, state.step, records)

    try:
        write_together(path, groups, write_rest, may_replace=is_damaged)
    except SaveError as error:
        if on_error is None:
            raise
        on_error(error)
        return None
    if keep:
        prune_checkpoints(state, folder, keep=keep)
    return path


def prune_checkpoints(state: TrainState, folder: str | Path, *, keep: int) -> None:
    """Keep this step's checkpoint, the best and, up to `keep` in total, the newest earlier ones. Call it on every rank.

    Checkpoints of later steps are never removed.
    """
    on_main_rank(lambda: _prune(Path(folder), keep, state.step, state.best))


@phase("saving the model")
def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer=None,
    config: Config = None,
    card: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save the model for `from_pretrained`. Replaces `folder` once all files are on disk. Call this on every rank.

    `card` is the text of README.md, which only rank 0 needs. Raises UsageError if `from_pretrained` could not load the
    model, because adapters or a wrapper rename its weights.
    """
    check_loadable(model)
    path = Path(folder).resolve()  # if `folder` is a link, replace its target
    groups = _model_files(model, of_all_stages(model, model_tensors(model)), parse_bytes(max_shard_size))

    def write_rest(unfinished: Path, records: dict[str, FileRecord]) -> None:
        write_model_files(unfinished, model, tokenizer, config)
        if card is not None:
            write_file(unfinished / "README.md", [card.encode()])

    write_together(path, groups, write_rest, may_replace=lambda path: True)
    return Path(folder)


def check_space(
    state: TrainState,
    folder: str | Path,
    *,
    saves: int,
    keep: int | None,
    saves_model: bool = True,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Check on every rank that the disk has room for `saves` checkpoints (at most `keep` + 1 at a time) and a model.

    The tensors in `extra`, as in `save_checkpoint`, count as part of each checkpoint. Raises UsageError if there is too
    little room, if a tensor or value cannot be saved, or if `from_pretrained` could not load the model.
    """
    check_loadable(state.model)
    folder = Path(folder)
    tensors = model_tensors(state.model)
    for name, tensor in tensors.items():
        check_dtype(name, tensor)
        if isinstance(tensor, DTensor):
            pieces(tensor)
    weights = checkpoint = num_bytes(of_all_stages(state.model, tensors))
    if saves:
        of_stage = optimizer_bytes(named_parameters(state.model, state.optimizer), state.optimizer)
        checkpoint += sum_over_stages(state.model, of_stage)
        checkpoint += sum(map(num_bytes, Extra.of(extra or {}).tensors.values()))

    def check() -> None:
        clear_leftovers(checkpoint_of(state.step, folder))
        # room for keep + 1, because an old checkpoint is removed only after the new one is complete
        most = saves if keep is None else min(saves, max(1, keep + 1 - len(checkpoints(folder))))
        needed, free = most * checkpoint + saves_model * weights, free_bytes(folder)
        if needed > free:
            model = " and the model" * saves_model
            what = f"{folder} needs {needed:,} bytes for {most} more checkpoints ({checkpoint:,} each){model}"
            raise UsageError(f"{what}, but only {free:,} are free: free disk space or lower save_total_limit")

    on_main_rank(check)


def _model_files(
    model: nn.Module, tensors: Mapping[str, Tensor], max_shard_bytes: int, folder: str = ""
) -> dict[str, list[Shard]]:
    """Divide a model's tensors into files: {stem: shards}. Adapters have one file, because peft reads no index."""
    stem, most = ("adapter_model", num_bytes(tensors)) if is_adapted(model) else ("model", max_shard_bytes)
    return {f"{folder}{stem}": split_shards(tensors, f"{folder}{stem}", most)}


def _prune(folder: Path, keep: int, step: int, best: Mapping[str, float] | None) -> None:
    older = [old for old in checkpoints(folder) if step_of(old) < step]
    kept = [old for old in older if best and step_of(old) == best["step"]]
    others = [old for old in older if old not in kept]
    for old in others[: max(0, len(others) - max(0, keep - 1 - len(kept)))]:
        remove(old)
