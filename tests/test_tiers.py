"""Memory tiers: exact has the bits of torch's fp32 AdamW, lean stays close to AdamW, and all ranks have equal bits."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowmem import init_distributed, parallelize
from lowmem.distributed.reduce import BucketedSum, all_reduce_sum
from lowmem.loss import chunked_loss
from lowmem.optim import tiers
from lowmem.optim.formats import merge_halves
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build
from tests.test_step import stream_of


class Matrices(nn.Module):
    """Parameters of irregular sizes: two matrices, a vector, a scalar, and one with three dimensions."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"wide": (37, 1001), "tall": (1003, 19), "bias": (77,), "scalar": (), "deep": (24, 7, 31)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))


def master(optimizer, parameter):
    """Return the weight in fp32, with the low bits that a tier may keep in the optimizer state."""
    low = optimizer.state[parameter].get("weight_low")
    return parameter.detach().float() if low is None else merge_halves(parameter.detach(), low)


def set_gradients(step, dtype, *models):
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator).to(dtype)
        for parameter in parameters:
            parameter.grad_dtype = None  # let gradients have any dtype
            parameter.grad = gradient.to(dtype if parameter.dtype == torch.bfloat16 else torch.float32)


@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float32])
def test_exact_has_the_weights_of_torchs_adamw(gradients):
    """The bits differ, because torch's kernel fuses multiplications with additions, and `adamw.py` does not."""
    mine, reference = Matrices(), Matrices()
    adam = {"betas": (0.9, 0.99), "eps": 1e-6}
    optimizer = make_optimizer(mine, weight_decay=0.1, **adam)
    theirs = make_optimizer(reference, memory="off", weight_decay=0.1, **adam)
    assert type(theirs) is torch.optim.AdamW
    for step in range(100):
        set_gradients(step, gradients, mine, reference)
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 * (step + 1) / 100
        optimizer.step()
        theirs.step()
    for (name, parameter), expected in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(master(optimizer, parameter), expected.detach(), rtol=1e-6, atol=1e-6, msg=name)
        for key in ("exp_avg", "exp_avg_sq"):
            found, wanted = optimizer.state[parameter][key], theirs.state[expected][key]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("slice_elements", [4000, 2**18])
def test_exact_adafactor_has_the_weights_of_torchs_adafactor(slice_elements):
    mine, reference = Matrices(), Matrices()
    for model in (mine, reference):
        del model.deep  # torch factors the last two of its dimensions, but lowmem reshapes it to a matrix first
    optimizer = make_optimizer(mine, name="adafactor", weight_decay=0.1, slice_elements=slice_elements)
    theirs = make_optimizer(reference, name="adafactor", memory="off", weight_decay=0.1)
    for step in range(30):
        set_gradients(step, torch.float32, mine, reference)
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2
        optimizer.step()
        theirs.step()
    for (name, parameter), expected in zip(mine.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(master(optimizer, parameter), expected.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_clip_factor_multiplies_the_gradients_of_one_update(name):
    weights = []
    for factor in (None, torch.tensor(0.5)):
        model = Matrices()
        optimizer = make_optimizer(model, name=name)
        for step in range(2):
            set_gradients(step, torch.float32, model)
            for parameter in model.parameters() if factor is None and step == 0 else ():
                parameter.grad *= 0.5
            optimizer.clip_factor = factor if step == 0 else optimizer.clip_factor
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
        weights.append([master(optimizer, parameter) for parameter in model.parameters()])
    assert all(torch.equal(mine, other) for mine, other in zip(*weights, strict=True))


@pytest.mark.parametrize(("name", "memory"), [("adamw", "lean"), ("adamw_bf16", "exact"), ("adamw_bf16", "lean")])
def test_rounded_state_keeps_large_parameters_near_adamw_and_small_ones_equal(name, memory):
    mine, reference = Matrices(), Matrices()
    start = [parameter.detach().clone() for parameter in mine.parameters()]
    optimizer, theirs = make_optimizer(mine, name=name, memory=memory), make_optimizer(reference, memory="off")
    for step in range(200):
        set_gradients(step % 5, torch.bfloat16, mine, reference)  # gradients repeat every five steps, so updates add up
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 1e-3
        optimizer.step()
        theirs.step()
    for before, parameter, expected in zip(start, mine.parameters(), reference.parameters(), strict=True):
        moved, wanted = master(optimizer, parameter) - before, expected.detach() - before
        if tiers.is_large(parameter):
            assert (moved - wanted).norm() < 0.25 * wanted.norm()
            along = (moved * wanted).sum() / wanted.square().sum()
            assert along == pytest.approx(1, abs=0.02)  # on average, weights move as far as in the reference
        else:
            torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-6)


def test_a_small_learning_rate_moves_lean_weights_but_not_plain_bf16_weights():
    model, frozen = build("llama"), build("llama").bfloat16()
    weight, stuck = model.lm_head.weight, frozen.lm_head.weight
    optimizer = make_optimizer(model, memory="lean")
    before, stuck_before = weight.detach().float().clone(), stuck.detach().float().clone()
    nearest = torch.optim.AdamW([stuck], lr=1e-6, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1e-6
    for _ in range(200):
        weight.grad, stuck.grad = torch.ones_like(weight), torch.ones_like(stuck)
        optimizer.step()
        nearest.step()
    large = before.abs() > 1e-2  # bf16 values of this size are at least 6e-5 apart, so bf16 loses an update of 1e-6
    assert torch.equal(stuck.detach().float()[large], stuck_before[large])
    assert (weight.detach().float() - before)[large].mean().item() == pytest.approx(-200e-6, rel=0.05)


BYTES = [("adamw", "exact", 12), ("adamw", "lean", 4), ("adamw_bf16", "exact", 8), ("adamw_bf16", "lean", 6)]


@pytest.mark.parametrize(("name", "memory", "expected"), [*BYTES, ("adafactor", "exact", 4), ("adafactor", "lean", 2)])
def test_bytes_of_weights_and_state(name, memory, expected):
    model = nn.Linear(1024, 2048, bias=False)
    optimizer = make_optimizer(model, name=name, memory=memory)
    held = model.weight.nbytes + sum(tensor.nbytes for tensor in optimizer.state[model.weight].values())
    assert held / model.weight.numel() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("memory", ["exact", "lean"])
def test_frozen_weights_become_bf16_too(memory):
    model = build("t5")
    model.encoder.requires_grad_(False)
    make_optimizer(model, memory=memory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_bf16_weights_keep_their_values():
    model = build("llama").bfloat16()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(master(optimizer, parameter), before[name].float())


@pytest.mark.parametrize("memory", ["exact", "lean"])
def test_a_state_dict_keeps_its_dtypes(memory):
    """The optimizer needs its own load_state_dict, because torch's would convert state to the weight's dtype."""
    optimizers = []
    for step in (1, 2):
        model = build("llama", hidden_size=64)
        optimizers.append(make_optimizer(model, memory=memory))
        set_gradients(step, torch.bfloat16, model)
        optimizers[-1].param_groups[0]["lr"] = 1e-2
        optimizers[-1].step()
    saved, loaded = optimizers
    expected = [dict(tensors) for tensors in saved.state_dict()["state"].values()]
    loaded.load_state_dict(saved.state_dict())
    for tensors, found in zip(expected, loaded.state_dict()["state"].values(), strict=True):
        assert tensors.keys() == found.keys()
        assert all(torch.equal(tensors[key], found[key]) and tensors[key].dtype == found[key].dtype for key in found)


def batches_of(family, steps):
    return next(stream_of(family, batch_size=8 // steps, gradient_accumulation_steps=steps))


def gradients_of(model, batches):
    num_targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (chunked_loss(model, batch) / num_targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("memory", "factor"), [("exact", 1.2), ("lean", 2.0)])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_accumulated_gradients_have_less_than_twice_the_error_of_one_batch(family, memory, factor):
    """Compare errors against fp64. `exact` adds gradients in fp32, and `lean` rounds each sum stochastically."""
    batches = batches_of(family, 8)
    expected = gradients_of(build(family).double(), batches)
    at_once = gradients_of(build(family).bfloat16(), batches_of(family, 1))
    model = build(family)
    optimizer, seen = make_optimizer(model, memory=memory), {}
    stepped = optimizer.step
    optimizer.step = lambda: (seen.update({n: p.grad.clone() for n, p in model.named_parameters()}), stepped())
    train_step(TrainState(model, optimizer), batches, chunked_loss, Accelerator(cpu=True), learning_rate=1e-3)
    dtypes = {gradient.dtype for name, gradient in seen.items() if tiers.is_large(model.get_parameter(name))}
    assert dtypes == {torch.float32 if memory == "exact" else torch.bfloat16}

    def distance(gradients):
        return torch.stack([(gradients[name].double() - expected[name]).norm() for name in expected]).norm()

    assert 0 < distance(seen) < factor * distance(at_once)


def test_one_micro_batch_gives_bf16_gradients_and_several_give_fp32_ones():
    model = build("t5")
    optimizer, accelerator, dtypes = make_optimizer(model), Accelerator(cpu=True), []
    stepped = optimizer.step
    optimizer.step = lambda: (dtypes.append(model.shared.weight.grad.dtype), stepped())
    state = TrainState(model, optimizer)
    for steps in (1, 2, 1):
        train_step(state, batches_of("t5", steps), chunked_loss, accelerator, learning_rate=1e-3)
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("memory", ["exact", "lean"])
def test_two_processes_hold_equal_bits_at_every_step(memory, tmp_path):
    assert fork_ranks(2, steps_of_a_rank, memory, tmp_path) == [0, 0]
    mine, theirs = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert mine.keys() == theirs.keys() and len({name.partition(":")[0] for name in mine}) == 4
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def steps_of_a_rank(memory, folder):
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = parallelize(build("t5", seed=rank, dropout_rate=0.1), accelerator)
    optimizer = make_optimizer(model, memory=memory)
    state, tensors, losses = TrainState(model, optimizer), {}, []
    stream = stream_of("t5", batch_size=2, gradient_accumulation_steps=2, rank=rank, world_size=2)
    for step, batches in zip(range(4), stream, strict=False):
        if step == 3:  # a single micro-batch, whose gradients stay in bf16
            batches = batches[:1]
        result = train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, max_grad_norm=1.0)
        losses.append(result.loss.item())
        for name, parameter in model.named_parameters():
            for key, tensor in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
                tensors[f"{step}:{name}.{key}"] = tensor.clone()
    save_file(tensors, f"{folder}/{rank}.safetensors")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(losses, file)
    accelerator.end_training()


def test_make_optimizer_refuses_a_ddp_model_and_ddp_may_wrap_the_model_later(tmp_path):
    assert fork_ranks(2, wrap_before_and_after, tmp_path) == [0, 0]
    mine, theirs = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def wrap_before_and_after(folder):
    accelerator = init_distributed()
    rank = accelerator.process_index
    early = accelerator.prepare(build("t5"))
    with pytest.raises(ValueError, match="DDP has wrapped the model: make the optimizer first"):
        make_optimizer(early)
    model = parallelize(build("t5", seed=rank), accelerator)
    optimizer = make_optimizer(model)
    wrapped = accelerator.prepare(model)
    assert isinstance(wrapped, DistributedDataParallel)
    start, state = master(optimizer, model.shared.weight), TrainState(wrapped, optimizer)
    for steps in (2, 1):
        batches = next(
            stream_of("t5", batch_size=4 // steps, gradient_accumulation_steps=steps, rank=rank, world_size=2)
        )
        train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, max_grad_norm=1.0)
    assert not torch.equal(master(optimizer, model.shared.weight), start)
    kept = {name: master(optimizer, parameter) for name, parameter in model.named_parameters()}
    save_file(kept, f"{folder}/{rank}.safetensors")
    # free DDP models: a reducer that outlives its gloo group can wait forever in the group's destructor (torch 2.13)
    del state
    accelerator.free_memory(early, wrapped)
    del early, wrapped
    accelerator.end_training()


def test_rounding_depends_on_the_optimizers_seed_but_not_on_torchs():
    def weight(seed, disturb):
        model = build("llama")
        optimizer = make_optimizer(model, memory="lean")
        optimizer.seed = seed
        torch.manual_seed(disturb)
        optimizer.param_groups[0]["lr"] = 1e-3
        for _ in range(2):
            set_gradients(0, torch.bfloat16, model)
            optimizer.step()
        return model.lm_head.weight.detach()

    assert torch.equal(weight(0, 1), weight(0, 2))
    assert not torch.equal(weight(0, 1), weight(1, 1))


def test_the_keys_of_random_bits_name_micro_batch_step_and_rank_or_the_update():
    model = build("llama")
    optimizer, keys = make_optimizer(model, memory="lean"), []
    key_of = optimizer.key_of
    optimizer.key_of = lambda parameter, *key: (keys.append((id(parameter), *key)), key_of(parameter, *key))[1]
    state = TrainState(model, optimizer)
    for _ in range(2):
        train_step(state, batches_of("llama", 4), chunked_loss, Accelerator(cpu=True), learning_rate=1e-3)
    of_head = [key[1:] for key in keys if key[0] == id(model.lm_head.weight)]
    # Two kinds of keys: (micro-batch, step, rank) to round the sum of gradients after each micro-batch but the first,
    # and (update,) to round the weight.
    expected = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (1,), (1, 1, 0), (2, 1, 0), (3, 1, 0), (2,)]
    assert of_head == expected
    of_embedding = {key for key in keys if key[0] == id(model.model.embed_tokens.weight)}
    seeds = {optimizer.seed: [key_of(model.lm_head.weight, *key) for key in expected]}
    optimizer.seed = 1
    seeds[1] = [key_of(model.lm_head.weight, *key) for key in expected]
    assert len({*seeds[0], *seeds[1]}) == 2 * len(expected) and len(of_embedding) == len(expected)


@pytest.mark.parametrize("memory", ["exact", "lean"])
def test_a_parameter_that_the_loss_of_one_rank_does_not_use_is_reduced_like_all_others(memory, tmp_path):
    assert fork_ranks(2, step_with_an_idle_parameter, memory, tmp_path) == [0, 0]
    mine, theirs = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (mine["idle"] != 1).any()


def step_with_an_idle_parameter(memory, folder):
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = build("t5")
    model.register_parameter("idle", nn.Parameter(torch.ones(64, 100)))
    model = parallelize(model, accelerator)
    state = TrainState(model, make_optimizer(model, memory=memory))

    def loss_fn(model, batch):
        return chunked_loss(model, batch) + (model.idle.float().sum() if rank == 0 else 0.0)

    batches = next(stream_of("t5", batch_size=2, gradient_accumulation_steps=2, rank=rank, world_size=2))
    train_step(state, batches, loss_fn, accelerator, learning_rate=1e-2)
    save_file(
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        f"{folder}/{rank}.safetensors",
    )
    accelerator.end_training()


def test_bf16_tensors_are_summed_over_ranks_in_fp32(tmp_path):
    assert fork_ranks(3, sum_of_a_rank, tmp_path) == [0, 0, 0]
    for rank in range(3):
        total = load_file(tmp_path / f"{rank}.safetensors")
        assert (total["narrow"] == 258).all() and (total["wide"] == 3).all()  # in bf16, 256 + 1 + 1 would be 256


def sum_of_a_rank(folder):
    accelerator = init_distributed()
    narrow = torch.full((9_000_000,), 256.0 if accelerator.process_index == 0 else 1.0, dtype=torch.bfloat16)
    wide = torch.ones(5)
    all_reduce_sum([narrow, wide])
    save_file({"narrow": narrow, "wide": wide}, f"{folder}/{accelerator.process_index}.safetensors")
    sum_in_another_order(accelerator.process_index)
    accelerator.end_training()


def sum_in_another_order(rank):
    """Each rank adds the tensors in another order. Rank 2 fails in the first sum, which must not block the others."""
    torch.manual_seed(rank)
    shapes = {"bf16": (9_000_000,), "small": (5,), "columns": (40, 3), "fp64": (7,), "fp32": (9_000_000,), "none": (0,)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given |= {"bf16": given["bf16"].bfloat16(), "columns": given["columns"].t(), "fp64": given["fp64"].double()}
    if rank == 0:
        given["small"] = given["small"].bfloat16()  # as gradients are that only some ranks accumulated
    tensors = list(given.values())
    expected = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    all_reduce_sum(expected)
    for fails in (True, False):
        total, mine = BucketedSum(tensors), [tensor.clone() for tensor in tensors]
        with pytest.raises(KeyError) if fails and rank == 2 else nullcontext(), total.completed():
            for index in range(rank, len(tensors)):
                total.add(index, mine[index])
                if fails and rank == 2:
                    raise KeyError
            total.finish(mine)
    assert all(map(torch.equal, mine, expected))
    strided = torch.ones(6)[::2]
    all_reduce_sum([strided])
    assert strided.tolist() == [3.0] * 3
    with pytest.raises(ValueError, match=r"the gradient of shape \[5\] changed after its sum over ranks had begun"):
        total.add(1, mine[1])


def test_an_optimizer_wrapped_by_accelerate_is_refused():
    model = build("t5")
    optimizer, batches = make_optimizer(model), batches_of("t5", 1)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="the optimizer is wrapped by accelerator.prepare"):
        state = TrainState(model, accelerator.prepare(optimizer))
        train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2)


def test_gradients_left_by_an_exception_do_not_reach_the_next_step():
    results = []
    for fails in (False, True):
        model, accelerator = build("t5"), Accelerator(cpu=True)
        state, batches = TrainState(model, make_optimizer(model)), batches_of("t5", 2)

        def broken(model, batch, batches=batches):
            if batch.row_ids == batches[1].row_ids:
                raise KeyError("of a test")
            return chunked_loss(model, batch)

        if fails:
            with pytest.raises(KeyError):
                train_step(state, batches, broken, accelerator, learning_rate=1e-2)
        results.append(train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2).grad_norm)
    assert torch.equal(*results)
