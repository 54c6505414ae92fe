"""Tensor-parallel ranks compute what one process computes, and unsharded tensors stay identical on all ranks."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from lowmem import load_model
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.save import save_checkpoint
from lowmem.data.batch import Batch
from lowmem.data.encode import encode_causal
from lowmem.data.eval_batches import open_eval
from lowmem.data.stream import open_stream
from lowmem.distributed.dtensor import local_part
from lowmem.distributed.placement import data_place
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.distributed.tensor_parallel import apply_tensor_parallelism, check_plan
from lowmem.errors import UsageError
from lowmem.evaluation import evaluate, generate
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.savers import offload_activations, recompute, recompute_cheap
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build, qa_rows
from tests.test_sharded import tensors_of

# Families with special cases: starcoder2 adds biases after the all-reduce. phi3 gathers the outputs of fused
# projections, so that every rank then computes with all of them. qwen3 has norms within heads.
FAMILIES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "starcoder2": {"model_type": "starcoder2", "attention_dropout": 0.0, "residual_dropout": 0.0},
    "phi3": {"model_type": "phi3"},
}


def of_family(family, **changes):
    model = build("llama", **FAMILIES[family] | changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # biases of 0, the default, would hide a bias that is added twice
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batches(count, seed=0):
    """Yield micro-batches of different lengths; one row of each is padded."""
    generator = torch.Generator().manual_seed(seed)
    for length in range(9, 9 + 4 * count, 4):
        ids = torch.randint(3, 384, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 0] = -100
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield Batch(inputs, num_targets=int((labels != -100).sum()), row_ids=[0, 1])


def losses_of(model, loss_fn, micro_batches, saver=None):
    """Run forward and backward on each micro-batch, so that gradients accumulate; return the losses."""
    losses = []
    with saver(model, None) if saver else nullcontext():
        for batch in micro_batches:
            loss = loss_fn(model, batch) / 50
            loss.backward()
            losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_on_ranks(tensor, group=None):
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    assert all(torch.equal(tensor, copy) for copy in copies)


def assert_close_to(reference, model, size=1e-6):
    for (name, expected), parameter in zip(reference.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            whole(parameter.grad), expected.grad, rtol=size, atol=size, msg=lambda m, n=name: f"{n}: {m}"
        )


def compare_with_one_process(family):
    accelerator = init_distributed()
    mesh = init_device_mesh("cpu", (1, 2))
    for loss_fn in (plain_loss, chunked_loss):
        reference, model = of_family(family), of_family(family)
        apply_tensor_parallelism(model, mesh)
        expected = losses_of(reference, loss_fn, batches(3))
        assert losses_of(model, loss_fn, batches(3)) == pytest.approx(expected, rel=1e-6)
        assert_close_to(reference, model)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                assert parameter.grad.placements == parameter.placements and parameter.placements[1] in (
                    Shard(0),
                    Shard(1),
                )
                local = parameter.to_local()  # a view of the full tensor would keep all of it in memory
                assert local.untyped_storage().nbytes() == local.nbytes == 2 * parameter.numel(), name
            else:
                assert_same_on_ranks(parameter.grad)
        layers = [name for name, x in model.named_parameters() if x.dim() == 2 and not isinstance(x, DTensor)]
        assert all("embed" in name or "head" in name for name in layers)
    accelerator.end_training()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_the_gradients_of_one_process(family):
    assert fork_ranks(2, compare_with_one_process, family) == [0, 0]


def compare_in_two_dimensions():
    accelerator = init_distributed()
    mesh = init_device_mesh("cpu", (2, 2))
    data_rank, copies = mesh.get_local_rank(0), mesh.get_group(0)
    reference, model = of_family("qwen3"), of_family("qwen3")
    apply_tensor_parallelism(model, mesh)
    rows = [list(batches(2, seed=0)), list(batches(1, seed=1))]
    losses_of(reference, chunked_loss, rows[0] + rows[1])
    losses_of(model, chunked_loss, rows[data_rank])
    for parameter in model.parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
        dist.all_reduce(gradient, group=copies)
    assert_close_to(reference, model)
    accelerator.end_training()


def test_tensor_parallel_gradients_need_a_sum_over_data_ranks_only():
    assert fork_ranks(4, compare_in_two_dimensions) == [0] * 4


def compare_savers():
    accelerator = init_distributed()
    mesh = init_device_mesh("cpu", (1, 2))
    found = {}
    for saver in (None, recompute, recompute_cheap, offload_activations):
        model = build("llama", **FAMILIES["qwen3"], attention_dropout=0.2, hidden_size=256)
        apply_tensor_parallelism(model, mesh)
        torch.manual_seed(3)
        losses = losses_of(model, chunked_loss, batches(2), saver)
        gradients = [x.grad.to_local() if isinstance(x, DTensor) else x.grad for x in model.parameters()]
        found[saver] = (losses, gradients)
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                assert_same_on_ranks(parameter.grad)  # even with dropout, because all ranks use one seed
    for saver in (recompute, recompute_cheap, offload_activations):
        assert found[saver][0] == found[None][0]
        assert all(map(torch.equal, found[saver][1], found[None][1])), saver
    accelerator.end_training()


def test_recompute_and_offloading_change_no_bit():
    assert fork_ranks(2, compare_savers) == [0, 0]


def generate_as_one_process():
    accelerator = init_distributed()
    # large weights, because with small ones the next token would depend only on the embedding of the last token
    reference, model = (build("qwen2", initializer_range=0.5).eval() for _ in range(2))
    apply_tensor_parallelism(model, init_device_mesh("cpu", (1, 2)))
    prompts = torch.tensor([[0, 5, 9, 14], [7, 8, 11, 200]])
    options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(prompts, **options)
    assert torch.equal(generated, reference.generate(prompts, **options)) and generated.shape == (2, 16)
    assert_same_on_ranks(generated)
    accelerator.end_training()


def test_all_ranks_generate_what_one_process_generates():
    assert fork_ranks(2, generate_as_one_process) == [0, 0]


def compute_in_bf16():
    """Compute losses and gradients after converting the weights to bf16 in place, as memory tiers do."""
    accelerator = init_distributed()
    exact, reference, model = (of_family("starcoder2") for _ in range(3))
    apply_tensor_parallelism(model, init_device_mesh("cpu", (1, 2)))
    expected = losses_of(exact, chunked_loss, batches(2))
    for one in (reference, model):
        one.to(torch.bfloat16)
        assert losses_of(one, chunked_loss, batches(2)) == pytest.approx(expected, rel=1e-2)
    true, rounded, ours = (
        torch.cat([whole(parameter.grad).float().flatten() for parameter in one.parameters()])
        for one in (exact, reference, model)
    )
    assert (ours - true).norm() < 1.2 * (rounded - true).norm() < 0.03 * true.norm()
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
        if not isinstance(parameter, DTensor):
            assert_same_on_ranks(parameter.grad)
    accelerator.end_training()


def test_sharded_weights_may_be_converted_to_bf16():
    assert fork_ranks(2, compute_in_bf16) == [0, 0]


def start_from_other_weights():
    accelerator = init_distributed()
    first = build("llama", seed=0)
    model = build("llama", seed=accelerator.process_index)
    model.model.layers[0].mlp.requires_grad_(False)
    if accelerator.process_index == 3:
        model.to("meta")  # this rank has no weights
    parallelize(model, accelerator, tp_size=2)
    assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) == 14
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), first.get_parameter(name))
        assert parameter.requires_grad == ("layers.0.mlp" not in name)
    accelerator.end_training()


def test_every_rank_gets_the_weights_of_rank_0_and_frozen_ones_stay_frozen():
    assert fork_ranks(4, start_from_other_weights) == [0] * 4


def train_and_save(folder, seed):
    """If `seed` is 0, take an AdamW step on the same rows on all data ranks; else, load a checkpoint. Then save."""
    accelerator = init_distributed()
    model = build("llama", seed=seed, intermediate_size=36)
    if accelerator.num_processes > 1:
        apply_tensor_parallelism(model, init_device_mesh("cpu", (2, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    state = TrainState(model, optimizer)
    if seed:
        load_checkpoint(state, folder / "step-00000000", accelerator)
    else:
        losses_of(model, plain_loss, batches(2))
        optimizer.step()
    save_checkpoint(state, folder / f"saved by {accelerator.num_processes}", accelerator, max_shard_size="20KB")
    if accelerator.num_processes > 1:
        assert {x.placements[1] for x in model.parameters() if isinstance(x, DTensor)} == {Shard(0), Shard(1)}
        moments = optimizer.state[model.model.layers[0].mlp.down_proj.weight]
        assert isinstance(moments["exp_avg"], DTensor) and moments["exp_avg"].placements[1] == Shard(1)
    accelerator.end_training()


@pytest.mark.parametrize(("saving", "loading"), [(1, 4), (4, 1), (4, 4)])
def test_a_checkpoint_loads_in_its_own_or_another_layout(tmp_path, saving, loading):
    assert fork_ranks(saving, train_and_save, tmp_path, 0) == [0] * saving
    (tmp_path / f"saved by {saving}" / "step-00000000").rename(tmp_path / "step-00000000")
    assert fork_ranks(loading, train_and_save, tmp_path, 1) == [0] * loading
    before, after = (tensors_of(path) for path in (tmp_path / "step-00000000", tmp_path / f"saved by {loading}"))
    assert before.keys() == after.keys() and len(before) == 4 * 21
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("model", "tp_size", "message"),
    [
        (("t5", {}), 2, "no plan to shard T5ForConditionalGeneration"),
        (("llama", {}), 4, "has num_key_value_heads=2: set a tp_size that divides all"),
        (("llama", {"num_key_value_heads": 4}), 3, r"num_attention_heads=4, .*mlp.down_proj.weight.shape\[1\]=64"),
        (
            ("llama", {"model_type": "qwen3_moe"}),
            2,
            r"model.layers.\*.mlp.experts as moe_tp_experts, which is not supported",
        ),
        (
            ("llama", {"model_type": "apertus"}),
            2,
            r"leaves out model.layers.\*.mlp.act_fn.alpha_n, .*part of its gradient",
        ),
    ],
)
def test_models_that_cannot_be_sharded_are_refused_with_the_reason(model, tp_size, message):
    with pytest.raises(UsageError, match=f"tp_size={tp_size} was set, but .*{message}"):
        check_plan(build(model[0], **model[1]), tp_size)


# these sizes are large enough that lean rounds the sharded weights, and that no block of moments is split among ranks
LARGE = {"hidden_size": 16, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 512}


def train_in_two_dimensions(folder):
    """Train on two data ranks of two tensor-parallel ranks each, and on four data ranks; compare the results."""
    accelerator = init_distributed()
    for memory in ("off", "exact", "lean"):
        curves = []
        for tp_size in (1, 2):
            model = parallelize(of_family("qwen3", **LARGE), accelerator, tp_size=tp_size)
            place = data_place(model)
            optimizer = make_optimizer(model, memory=memory, weight_decay=0.1)
            stream = open_stream(
                qa_rows(40),
                encode_causal(ByT5Tokenizer(), max_seq_len=64),
                batch_size=2,
                global_batch_size=16,
                rank=place.rank,
                world_size=place.size,
            )
            state, curve = TrainState(model, optimizer, stream), []
            for _, micro_batches in zip(range(4), stream, strict=False):
                options = {"learning_rate": 1e-2, "max_grad_norm": 1.0}
                result = train_step(state, micro_batches, chunked_loss, accelerator, **options)
                curve.append([result.loss.item(), result.grad_norm.item(), result.num_tokens.item()])
            stream.close()
            rows = open_eval(
                qa_rows(5),
                encode_causal(ByT5Tokenizer(), max_seq_len=64),
                batch_size=2,
                rank=place.rank,
                world_size=place.size,
            )
            metrics = evaluate(model, rows, chunked_loss, accelerator)
            curve.append([metrics["eval_loss"], metrics["eval_rows"]])
            answers = generate(model, ByT5Tokenizer(), rows, accelerator, max_new_tokens=4)
            assert [answer.row_id for answer in answers] == [0, 1, 2, 3, 4]
            curves.append(curve)
            for parameter in model.parameters():
                if isinstance(parameter, DTensor):
                    assert_same_on_ranks(parameter.to_local(), parameter.device_mesh.get_group(0))
                else:
                    assert_same_on_ranks(parameter.detach())
        of_copies, of_shards = curves
        size = 1e-6 if memory == "off" else 2e-3  # bf16 sums round differently
        assert [step[2] for step in of_shards[:-1]] == [step[2] for step in of_copies[:-1]]
        for mine, expected in zip(of_shards, of_copies, strict=True):
            assert mine == pytest.approx(expected, rel=10 * size if expected is not of_copies[-1] else size)
            assert mine[0] == pytest.approx(expected[0], rel=size)
        if memory == "exact":  # the checkpoint also loads without tensor parallelism
            save_checkpoint(state, folder, accelerator)
            model = parallelize(of_family("qwen3", **LARGE), accelerator)
            again = TrainState(model, make_optimizer(model, memory=memory, weight_decay=0.1))
            load_checkpoint(again, folder / "step-00000004", accelerator)
            for parameter, copy in zip(state.model.parameters(), model.parameters(), strict=True):
                local, row, column = local_part(parameter.data)
                part = copy[row : row + local.shape[0]]
                part = part[:, column : column + local.shape[1]] if local.dim() > 1 else part
                assert torch.equal(local, part)
    accelerator.end_training()


def test_tensor_and_data_parallelism_train_the_same_run_as_data_parallelism_alone(tmp_path):
    assert fork_ranks(4, train_in_two_dimensions, tmp_path) == [0] * 4


def fill_shards(folder):
    accelerator = init_distributed()
    for name in ("qwen2", "llama", "qwen3"):
        model, _ = load_model(folder / name, on_meta=True)
        assert all(parameter.is_meta for parameter in model.parameters())
        model = parallelize(model, accelerator, tp_size=2)
        expected = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        assert len([*model.parameters()]) == len([*expected.parameters()])
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(whole(mine), theirs)
    for each in (model, expected):
        losses_of(each.eval(), plain_loss, batches(1))
    mine, theirs = (each.model.layers[0].self_attn.k_norm.weight.grad for each in (model, expected))
    assert torch.allclose(mine, theirs, rtol=1e-4)  # summed over ranks, each of which has half the heads
    with pytest.raises(ValueError, match="model.layers.0.self_attn.o_proj.weight has 48 per rank"):
        make_optimizer(
            parallelize(
                build("llama", hidden_size=96, num_attention_heads=4, intermediate_size=512), accelerator, tp_size=2
            ),
            memory="lean",
        )
    for options, message in (
        ({"tp_size": 3}, "it does not divide 2 processes"),
        ({"tp_size": 2, "sharding_strategy": "FULL_SHARD"}, "but they do not combine: remove one"),
    ):
        with pytest.raises(UsageError, match=message):
            parallelize(of_family("llama"), accelerator, **options)
    accelerator.end_training()


def test_shards_are_read_from_files_and_sizes_that_do_not_fit_are_refused(tmp_path):
    for family in ("qwen2", "llama", "qwen3"):
        of_family(family).save_pretrained(tmp_path / family)
        ByT5Tokenizer().save_pretrained(tmp_path / family)
    assert fork_ranks(2, fill_shards, tmp_path) == [0, 0]
