"""Load a checkpoint into a training state: verify it, compare it with the model, then read this rank's part."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from lowmem.adapters.lora import base_digest, check_scales
from lowmem.checkpoint.manifest import check_contents, check_hashes, check_sizes, checkpoints, verify_checkpoint
from lowmem.checkpoint.saved import read_manifest, saved_settings
from lowmem.checkpoint.tensors import model_tensors, named_parameters, of_all_stages
from lowmem.distributed.collectives import gather_json, raise_on_all_ranks, rank_and_world_size
from lowmem.distributed.dtensor import is_in_columns
from lowmem.distributed.fill import read_local
from lowmem.distributed.heartbeat import phase
from lowmem.distributed.placement import is_adapted, is_engine, unwrapped
from lowmem.distributed.zero import refresh_weights
from lowmem.errors import UsageError, one_line
from lowmem.memory.precision import LossScale
from lowmem.optim.adamw import DEFINITION
from lowmem.optim.state import fill_state, needs_rounding, round_state, state_differences
from lowmem.optim.tiers import TieredOptimizer
from lowmem.step import TrainState
from lowmem.storage.shard_files import model_stem
from lowmem.storage.tensor_files import open_shards, tensor_differences

_MOST_DIFFERENCES = 10


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest intact checkpoint in `folder`, or None. For each newer one, prints its damage."""
    return first_valid(reversed(checkpoints(Path(folder))), verify_checkpoint)


def first_valid(paths: Iterable[Path], verify: Callable[[Path], None], *, silent: bool = False) -> Path | None:
    """Return the first path for which `verify` raises no UsageError. Unless `silent`, print why earlier ones fail."""
    for path in paths:
        try:
            verify(path)
        except UsageError as error:
            if not silent:
                print(f"skipped a checkpoint: {one_line(error)}", flush=True)
        else:
            return path
    return None


def verify_together(path: str | Path) -> None:
    """Like `verify_checkpoint`, but each rank hashes only a share of the files. If one rank raises, all raise."""
    path, (rank, world_size) = Path(path), rank_and_world_size()
    with raise_on_all_ranks():
        records = read_manifest(path)["files"]
        check_sizes(path, records)
        by_size = sorted(records, key=lambda name: -records[name]["bytes"])
        check_hashes(path, {name: records[name] for name in by_size[rank::world_size]})
    with raise_on_all_ranks():
        check_contents(path, records)


@phase("loading a checkpoint")
def load_checkpoint(state: TrainState, path: str | Path, accelerator: Accelerator, *, verify: bool = True) -> None:
    """Load the checkpoint `path` into `state`, in place, on every rank. World size and sharding may have changed.

    AdamW's state can also be loaded into a smaller memory tier: from off into exact (lossless), and from off or exact
    into lean (rounded). First checks sizes and hashes of the files, unless `verify` is False. Then compares the names,
    shapes and dtypes of weights and optimizer state with `state`. Of a torch optimizer, compares only the class.
    Raises a UsageError that names the damaged file or up to 10 differing tensors.
    """
    path, (rank, _) = Path(path), rank_and_world_size()
    if verify:
        verify_together(path)
    base = gather_json(base_digest(unwrapped(state.model)))[0]  # other ranks may not have the weights
    tensors, parameters = model_tensors(state.model), named_parameters(state.model, state.optimizer)
    of_all = of_all_stages(state.model, tensors)
    trained_now = of_all_stages(state.model, parameters).keys()
    with raise_on_all_ranks():
        saved, _ = saved_settings(path)
        files = read_manifest(path)["files"]
        weights, optimizer_state = (open_shards(path, stem, files) for stem in (model_stem(files), "optimizer"))
        _check_base(path, saved.get("base"), base)
        if is_adapted(state.model):
            check_scales(unwrapped(state.model), path / "model")
        if of_all is not tensors:  # other stages load their own state
            of_stage = (name for name in optimizer_state if name.rpartition(".")[0] in parameters)
            optimizer_state = {name: optimizer_state[name] for name in of_stage}
        rounds = needs_rounding(path, saved["optimizer"], saved.get("memory"), state.optimizer)
        if rounds and any(map(is_in_columns, tensors.values())):
            raise UsageError(f"{path} was saved in a larger memory tier; rounding it needs full rows: set tp_size=1")
        trained = set(saved.get("parameters", trained_now))  # checkpoints of early versions have no such list
        diff = trained_now ^ trained
        differences = [
            *tensor_differences(weights, of_all, any_dtype=rounds),
            *sorted(f"{name} is trained only in the {'checkpoint' if name in trained else 'model'}" for name in diff),
            *state_differences(optimizer_state, parameters, state.optimizer, rounds=rounds),
        ]
        if differences:
            more, found = len(differences) - _MOST_DIFFERENCES, "; ".join(differences[:_MOST_DIFFERENCES])
            found += f" and {more} more" * (more > 0)
            advice = "Build the model that was saved, with its optimizer in the same memory tier"
            raise UsageError(f"{path} does not match the model: {found}. {advice}")
        is_of_tier = isinstance(state.optimizer, TieredOptimizer) and saved.get("memory") != "off"
        if is_of_tier and saved.get("definition", 1) != DEFINITION and rank == 0:
            found = f"{path} is from another version of lowmem, whose updates round differently"
            print(f"{found}: weights will differ from that version's in their last bits, or within lean's rounding")
        if state.stream is not None:
            if saved["stream"] is None:
                raise UsageError(f"{path} was saved without a stream, so it has no position to resume from: start over")
            state.stream.load_state_dict(saved["stream"])
    with raise_on_all_ranks(), torch.no_grad():
        for name, tensor in tensors.items():
            if not (rounds and name in parameters):
                read_local(tensor, weights[name])
        if rounds:
            round_state(state.optimizer, parameters, weights, optimizer_state, seed=saved["seed"])
        else:
            fill_state(state.optimizer, parameters, optimizer_state)
    if is_engine(state.model):
        with torch.no_grad():
            refresh_weights(state.model, tensors, weights)
    state.step, state.best, state.seed = saved["step"], saved["best"], saved["seed"]
    scale = saved.get("loss_scale")
    state.loss_scale = scale and LossScale(float(scale["value"]), scale["finite_steps"])
    state.updates = saved.get("updates", saved["step"])  # checkpoints of early versions have no such number
    state.evaluated_step, state.evaluations_since_best = (
        saved.get(name, 0) for name in ("evaluated_step", "evaluations_since_best")
    )


def _check_base(path: Path, then: str | None, now: str | None) -> None:
    """Raise UsageError if the hash of the adapted weights differs; it is None if the whole model is trained."""
    if then == now:
        return
    if None in (then, now):
        saved, present = ("the weights", "adapters") if then is None else ("adapters", "none")
        raise UsageError(f"{path} has {saved} of a model, but this model has {present}: train it as it was saved")
    found = f"{path} has adapters of a model with other weights, or in other bits"
    raise UsageError(f"{found}: restore them, or set --model_name_or_path and --quantization to that model")
