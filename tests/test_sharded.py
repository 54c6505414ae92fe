"""A checkpoint saved on any number of processes, sharded or not, loads on any other number."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ByT5Tokenizer

from lowmem.checkpoint.load import load_checkpoint, verify_together
from lowmem.checkpoint.manifest import verify_checkpoint
from lowmem.checkpoint.parallel_write import assign_shards
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.data.encode import encode_seq2seq
from lowmem.data.stream import open_stream
from lowmem.distributed.collectives import gather_bytes, on_main_rank
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import SaveError, UsageError
from lowmem.loss import plain_loss
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from lowmem.storage.tensor_files import split_shards
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.test_files import fail_at

DDP, FSDP = "NO_SHARD", "FULL_SHARD"


def new_state(accelerator, sharding_strategy, seed=0):
    model = parallelize(build("t5", seed=seed, d_ff=50), accelerator, sharding_strategy=sharding_strategy)
    stream = open_stream(
        qa_rows(40),
        encode_seq2seq(ByT5Tokenizer(), max_seq_len=64),
        batch_size=2,
        global_batch_size=12,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return TrainState(model, make_optimizer(model, memory="off"), stream)


def train(state, steps, accelerator):
    """Train for `steps` steps; return the loss, the gradient norm and the row ids of all ranks for each step."""
    results = []
    for _ in range(steps):
        batches = next(iter(state.stream))
        rows = json.dumps([row_id for batch in batches for row_id in batch.row_ids])
        rows = sorted(row_id for part in gather_bytes(rows.encode()) for row_id in json.loads(part))
        result = train_step(state, batches, plain_loss, accelerator, learning_rate=1e-2, max_grad_norm=1.0)
        results.append((result.loss.item(), result.grad_norm.item(), rows))
    return results


def train_and_save(sharding_strategy, folder):
    """Train two steps, save, train two more steps, and write the results of these two to a file."""
    accelerator = init_distributed()
    state = new_state(accelerator, sharding_strategy)
    train(state, 2, accelerator)
    save_checkpoint(state, folder / "saved", accelerator, max_shard_size="40KB")
    results = train(state, 2, accelerator)
    if accelerator.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    accelerator.end_training()


def load_and_save(sharding_strategy, folder, name):
    """Load the checkpoint, save it again, train two more steps, and write their results to a file."""
    accelerator = init_distributed()
    state = new_state(accelerator, sharding_strategy, seed=5)
    load_checkpoint(state, folder / "saved" / "step-00000002", accelerator)
    save_checkpoint(state, folder / name, accelerator)
    results = train(state, 2, accelerator)
    if accelerator.is_main_process:
        (folder / name / "results.json").write_text(json.dumps(results))
    accelerator.end_training()


def tensors_of(path):
    return {name: x for file in path.rglob("*.safetensors") for name, x in load_file(file).items()}


@pytest.fixture(scope="module", params=[DDP, FSDP])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    assert fork_ranks(3, train_and_save, request.param, folder) == [0, 0, 0]
    return folder


@pytest.mark.parametrize(("world_size", "sharding_strategy"), [(1, DDP), (2, FSDP), (2, DDP), (4, FSDP), (4, DDP)])
def test_a_checkpoint_saved_on_three_ranks_loads_on_one_two_and_four(saved, world_size, sharding_strategy):
    name = f"{world_size} {sharding_strategy}"
    assert fork_ranks(world_size, load_and_save, sharding_strategy, saved, name) == [0] * world_size
    before, after = tensors_of(saved / "saved"), tensors_of(saved / name)
    assert before.keys() == after.keys() and len(before) == 4 * 47  # for each parameter: weight, two moments, step
    assert all(torch.equal(before[name], after[name]) for name in before)
    # a file has at most one rank's share of all bytes, and most bytes are optimizer state, so it fills many files
    assert len([*(saved / name).rglob("optimizer*.safetensors")]) >= 0.75 * world_size
    results, expected = (json.loads((path / "results.json").read_text()) for path in (saved / name, saved))
    for (loss, norm, rows), (loss_then, norm_then, rows_then) in zip(results, expected, strict=True):
        assert rows == rows_then and len(rows) == 12
        assert (loss, norm) == pytest.approx((loss_then, norm_then), rel=1e-4)


def shard_in_two_dimensions(folder):
    """Save and load a model on four ranks, which hold two replicas of two shards each (HSDP)."""
    accelerator = init_distributed()
    model = build("t5", d_ff=50)
    whole = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "halves")))
    path = save_model(model, folder / "model")
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors_of(path).items())
    state = TrainState(model, make_optimizer(model, memory="off"))
    path = save_checkpoint(state, folder, accelerator)
    for tensor in model.parameters():
        tensor.detach().to_local().zero_()
    load_checkpoint(state, path, accelerator)
    assert all(torch.equal(whole[name], tensor.full_tensor()) for name, tensor in model.named_parameters())
    accelerator.end_training()


def test_replicas_of_shards_are_saved_as_whole_tensors_and_loaded_everywhere(tmp_path):
    assert fork_ranks(4, shard_in_two_dimensions, tmp_path) == [0] * 4


def find_every_damage(path):
    accelerator = init_distributed()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"):
        data = file.read_bytes()
        on_main_rank(lambda file=file, data=data: file.write_bytes(data[:-1] + bytes([data[-1] ^ 1])))
        with pytest.raises(UsageError, match=f"{file.name} changed since it was saved"):
            verify_together(path)
        on_main_rank(lambda file=file, data=data: file.write_bytes(data))
    verify_together(path)
    accelerator.end_training()


def test_damage_that_one_rank_finds_is_raised_on_all(saved):
    assert fork_ranks(3, find_every_damage, saved / "saved" / "step-00000002") == [0] * 3


def fail_on_one_disk(folder):
    """Rank 1 has no disk space, so both ranks raise its error; then they continue to train, and can save again."""
    accelerator = init_distributed()
    state = new_state(accelerator, FSDP)
    train(state, 1, accelerator)
    operations = fail_at(3, "no space") if accelerator.process_index == 1 else []
    with pytest.raises(SaveError, match="No space left on device"):
        save_checkpoint(state, folder, accelerator)
    assert len(operations) == accelerator.process_index * 3
    assert accelerator.process_index or not any(folder.iterdir())  # rank 0 has removed the files
    train(state, 1, accelerator)
    verify_checkpoint(save_checkpoint(state, folder, accelerator))
    accelerator.end_training()


def test_a_full_disk_on_one_rank_does_not_block_the_other(tmp_path):
    assert fork_ranks(2, fail_on_one_disk, tmp_path / "run") == [0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_write_about_the_same_number_of_bytes(world_size):
    model = {f"w{i}": torch.empty(1000 + 37 * i, dtype=torch.bfloat16) for i in range(40)}
    moments = {f"{name}.exp_avg": torch.empty(tensor.shape) for name, tensor in model.items()}
    shards = [*split_shards(model, "model", 10_000), *split_shards(moments, "optimizer", 10_000)]
    loads = [sum(shard.num_bytes for shard in share) for share in assign_shards(shards, world_size)]
    assert len(loads) == world_size and sum(loads) == 6 * sum(tensor.numel() for tensor in model.values())
    assert max(loads) - min(loads) <= 10_000
