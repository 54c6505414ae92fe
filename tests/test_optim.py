import json

import pytest
import torch
from transformers import Trainer, get_scheduler

from lowmem.config.lr_options import lr_options, lr_problems
from lowmem.config.train_config import choices
from lowmem.errors import UsageError
from lowmem.optim.make import OPTIMIZERS, make_optimizer
from lowmem.optim.norms import gradient_norms
from lowmem.optim.schedule import Schedule, learning_rate_at
from lowmem.plan.meter import MemoryMeter
from tests.models import build

SCHEDULES = [
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 0.02}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 0.01, "power": 2.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 12}),
    ("warmup_stable_decay", {"num_decay_steps": 20}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt", "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 43, "decay_type": "linear", "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "1-sqrt", "min_lr_ratio": 0.1, "num_cycles": 1}),
]


@pytest.mark.parametrize("schedule, options", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_schedules_are_those_of_transformers(schedule, options, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    numbers = {"num_warmup_steps": warmup_steps, "num_training_steps": 50}
    scheduler = get_scheduler(name, optimizer, **numbers, scheduler_specific_kwargs=dict(options))
    shape = {"total_steps": 50, "peak": 0.3, "warmup_steps": warmup_steps, "schedule": schedule}
    assert lr_problems(schedule, json.dumps(options), peak=0.3) == []
    for step in range(51):
        mine = learning_rate_at(step, **shape, **options)
        assert mine == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_and_linear_schedules_end_at_zero_and_an_unknown_one_is_refused():
    assert learning_rate_at(50, total_steps=50, peak=1.0) == pytest.approx(0)
    assert learning_rate_at(60, total_steps=50, peak=1.0, schedule="linear") == 0
    with pytest.raises(ValueError, match="use one of cosine, linear, constant"):
        learning_rate_at(0, total_steps=1, peak=1.0, schedule="sine")
    assert {name for name, _ in SCHEDULES} == {*choices("lr_scheduler_type")}


def test_a_number_of_an_option_may_be_text():  # as YAML reads 1e-6
    assert lr_options('{"min_lr": "1e-6"}') == lr_options("min_lr=1e-6") == {"min_lr": 1e-6}
    assert lr_options('{"decay_type": "1-sqrt"}') == lr_options("decay_type=1-sqrt") == {"decay_type": "1-sqrt"}


LENGTH = {"epochs": None, "max_steps": 20, "warmup_ratio": None, "warmup_steps": 5}
SHAPE = {"peak": 1.0, "schedule": "warmup_stable_decay"}


def test_epoch_is_the_first_step_at_or_after_the_end_of_each_epoch():
    schedule = Schedule.of_run(10, 4, **LENGTH, **SHAPE, options={})
    ends = [step for step in range(1, 21) if schedule.is_due(step, "epoch")]
    assert ends == [3, 5, 8, 10, 13, 15, 18, 20]  # 10, 20, 30, ... rows, in steps of 4
    assert [step for step in range(1, 21) if schedule.is_due(step, 6)] == [6, 12, 18, 20]
    for step in range(20):
        later = [each for each in ends if each > step]
        assert len(later) <= schedule.num_due(step, "epoch") <= len(later) + 1
    mixed = Schedule.of_run(10.5, 4, **LENGTH, **SHAPE, options={})  # of a mixture, whose epochs are not whole rows
    assert [step for step in range(1, 20) if mixed.is_due(step, "epoch")] == [3, 6, 8, 11, 14, 16, 19]


def test_a_decay_that_does_not_fit_into_the_run_is_refused():
    with pytest.raises(UsageError, match="num_decay_steps=16 and 5 steps of warm-up are more than the 20 steps"):
        Schedule.of_run(10, 4, **LENGTH, **SHAPE, options={"num_decay_steps": 16})


@pytest.mark.parametrize("memory", ["off", "exact"])
@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
def test_the_same_weights_decay_as_in_trainer(family, memory):
    model = build(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Trainer lists both names of a tied weight, but `names` has only one, so keep only names that are in `names`
    expected = set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
    optimizer = make_optimizer(model, memory=memory, weight_decay=0.1)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_named_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    inputs = torch.randn(64, 8)
    optimizer = make_optimizer(model, name=name, memory="off", weight_decay=0.0)
    losses = []
    for _ in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 if name == "adadelta" else 0.01
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("memory", ["off", "exact"])
def test_betas_and_epsilon_reach_the_optimizer(memory):
    group = make_optimizer(build("t5"), memory=memory, betas=(0.5, 0.6), eps=1e-3).param_groups[0]
    assert group["betas"] == (0.5, 0.6) and group["eps"] == 1e-3


def test_frozen_weights_are_left_out():
    model = build("t5")
    model.shared.requires_grad_(False)
    trained = {id(p) for group in make_optimizer(model).param_groups for p in group["params"]}
    assert id(model.shared.weight) not in trained
    with pytest.raises(ValueError, match="every parameter is frozen"):
        make_optimizer(model.requires_grad_(False))
    with pytest.raises(ValueError, match="with memory=off: use one of adamw"):
        make_optimizer(build("t5"), name="lion", memory="off")
    with pytest.raises(ValueError, match="with memory=exact: use one of adamw, adamw_bf16, adafactor"):
        make_optimizer(build("t5"), name="sgd")
    with pytest.raises(ValueError, match="use exact, lean or off"):
        make_optimizer(build("t5"), memory="tiny")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 2048), (131072, 64), (3, 2000, 1000), (5000,), (), (0, 8)])
def test_the_norm_of_a_gradient_is_accurate_in_fp32(shape, dtype):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = gradient_norms([gradient])[0]
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(norm.double(), gradient.double().norm(), rtol=1e-6, atol=0)
    for worst in (torch.inf, torch.nan, 3e38) if gradient.numel() > 1 else ():
        gradient.view(-1)[:2] = worst
        expected = gradient.double().norm().float()  # infinity, if it is above the range of fp32
        torch.testing.assert_close(gradient_norms([gradient])[0], expected, equal_nan=True)


def test_the_norm_of_a_large_bf16_gradient_takes_little_memory():
    gradient = torch.ones(4, 2048, 1024, dtype=torch.bfloat16)
    with MemoryMeter() as meter:
        gradient_norms([gradient])[0]
    assert meter.peak_bytes < 5 * 2**20
