"""Layered gradient accumulation gives the losses and gradients of micro-batch order, on any number of processes."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lowmem.data.batch import Batch
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.placement import data_place
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.loss import chunked_loss
from lowmem.memory.layered import layered
from lowmem.memory.savers import entered
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build

DROPOUT = {"t5": {"dropout_rate": 0.1}, "llama": {"attention_dropout": 0.1}, "qwen2": {"attention_dropout": 0.1}}
TIED = {"t5": "shared.weight", "qwen2": "model.embed_tokens.weight"}
ACCUMULATED = 4
STRATEGIES = ["NO_SHARD", "FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"]


def batches_of(family, count=ACCUMULATED, first=0):
    """Make micro-batches of unequal shapes, with padding."""
    batches = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(index)
        rows, length = 2 + index % 2, 16 + 8 * (index % 3)
        ids = torch.randint(3, 384, (rows, length), generator=generator)
        labels = torch.randint(3, 384, (rows, 12 if family == "t5" else length), generator=generator)
        if family != "t5":
            labels[:, :4] = -100
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        batches.append(Batch(inputs, int((labels != -100).sum()), []))
    return batches


def trained(model, savers, batches, *, memory="off", steps=1, accelerator=None, **options):
    """Train, and return losses, gradient norms and weights."""
    optimizer = make_optimizer(model, name="sgd" if memory == "off" else "adamw", memory=memory)
    state, accelerator = TrainState(model, optimizer, seed=3), accelerator or Accelerator(cpu=True)
    options = {"learning_rate": 1.0 if memory == "off" else 1e-2} | options
    with entered(savers, model, optimizer):
        results = [train_step(state, batches, chunked_loss, accelerator, **options) for _ in range(steps)]
    weights = {name: local_of(parameter.detach()) for name, parameter in model.named_parameters()}
    return [x.loss for x in results], [x.grad_norm for x in results], weights


@pytest.mark.parametrize("memory", ["off", "exact", "lean"])
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
def test_layered_gives_the_bits_of_micro_batch_order(family, memory):
    """SGD at rate 1 subtracts the gradient. Only gradients of tied embeddings are summed in another order."""
    (loss, _, weights), (same_loss, _, same_weights) = (
        trained(build(family, **DROPOUT[family]), savers, batches_of(family), memory=memory)
        for savers in ([], [layered])
    )
    assert loss == same_loss
    for name, weight in weights.items():
        if name != TIED.get(family):
            assert torch.equal(weight, same_weights[name]), name
        elif memory == "off":
            torch.testing.assert_close(weight, same_weights[name], rtol=1e-6, atol=1e-6)


def on_a_rank(folder, strategy, memory, savers, options):
    """Train on this rank's micro-batches, and save the gathered weights."""
    accelerator = init_distributed()
    rank = accelerator.process_index
    shard_size = {"shard_size": 2} if strategy == "HYBRID_SHARD" else {}
    model = parallelize(build("llama", **DROPOUT["llama"]), accelerator, sharding_strategy=strategy, **shard_size)
    assert data_place(model).rank == rank
    batches = batches_of("llama", first=ACCUMULATED * rank)
    losses, norms, _ = trained(model, savers, batches, memory=memory, steps=2, accelerator=accelerator, **options)
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in model.named_parameters()}
    if rank == 0:
        whole |= {"loss": torch.stack(losses), "norm": torch.stack(norms)}
        save_file({name: x.detach().contiguous() for name, x in whole.items()}, folder / "result.safetensors")
    accelerator.end_training()


def on_ranks(tmp_path, ranks, *, strategy="NO_SHARD", memory="off", savers=(layered,), **options):
    folder = tmp_path / f"{ranks}-{strategy}-{memory}-{len(savers)}"
    folder.mkdir()
    assert fork_ranks(ranks, on_a_rank, folder, strategy, memory, savers, options) == [0] * ranks
    return load_file(folder / "result.safetensors")
