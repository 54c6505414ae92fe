"""After a kill or an error at any disk operation of a save, an intact checkpoint or model remains."""

import errno
import os
import re
import shutil
import signal
import sys
import traceback
from functools import partial
from itertools import count

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from lowmem.checkpoint.load import latest_checkpoint, load_checkpoint
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.checkpoint.tensors import model_tensors, named_parameters
from lowmem.errors import RankError, SaveError
from lowmem.optim.make import make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.step import TrainState
from tests.forked import fork_ranks

FAULTS = {"killed": None, "no space": errno.ENOSPC, "disk error": errno.EIO}
# Exit codes: REACHED if this rank reached the operation that fails, or saw another rank fail; NOT_REACHED otherwise.
REACHED, NOT_REACHED = 3, 4


def small_state(step):
    """Make a training state with optimizer moments; all its values depend on `step`."""
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, memory="off")
    for parameter in model.parameters():
        parameter.data.fill_(step)
        parameter.grad = torch.full_like(parameter, step)
    optimizer.step()
    return TrainState(model, optimizer, step=step)


def assert_equal(state, other):
    mine, theirs = (
        model_tensors(x.model) | optimizer_tensors(named_parameters(x.model, x.optimizer), x.optimizer)
        for x in (state, other)
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def fail_at(point, fault):
    """Make the `point`th disk operation after this call fail; return a list to which every operation is appended."""
    seen = []

    def hook(event, arguments):
        if event != "lowmem.disk":
            return
        seen.append(arguments)
        if len(seen) == point:
            if FAULTS[fault] is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]), arguments[1])

    sys.addaudithook(hook)
    return seen


def save_failing(folder, fault, point, failing_ranks):
    """Save step 2, and fail at the `point`th disk operation; a save that succeeds also removes step 1."""
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        # rank 0 hosts the store: if it were killed before all ranks have joined, the others could not join
        accelerator.wait_for_everyone()
    seen = fail_at(point, fault) if accelerator.process_index in failing_ranks else []
    outcome = REACHED
    try:
        save_checkpoint(small_state(2), folder, accelerator, keep=1, max_shard_size=60)
        outcome = REACHED if len(seen) >= point else NOT_REACHED
    except SaveError as error:
        assert re.search("could not be saved: .*; it takes 104 bytes, [0-9,]+ are free", str(error)), error
        if len(seen) >= point and seen[point - 1][0] == "fsync":  # a failed fsync must not be retried
            assert seen.count(seen[point - 1]) == 1
    except RankError:
        assert fault == "killed"  # another rank was killed while this rank waited for it
    os._exit(outcome)


def check_every_point(folder, fault, failing_ranks, attempt):
    """Repeat a save, failing at the 1st, 2nd, ... disk operation, until none fails; check what each save leaves."""
    accelerator = Accelerator(cpu=True)
    old = save_checkpoint(small_state(1), folder / "first", accelerator)
    for point in count(1):
        work = folder / str(point)
        shutil.copytree(old.parent, work)
        codes = attempt(save_failing, work, fault, point, failing_ranks)
        assert set(codes) <= {REACHED, NOT_REACHED, -signal.SIGKILL}, codes
        newest = latest_checkpoint(work)
        state = small_state(5)
        load_checkpoint(state, newest, accelerator)
        assert_equal(state, small_state(state.step))
        if -signal.SIGKILL not in codes:  # an error leaves no other folder, except perhaps the old one, renamed
            left = {path.name for path in work.iterdir()} - {"step-00000001", "step-00000002"}
            assert not left or (newest.name == "step-00000002" and left == {".unfinished-removal-step-00000001"})
        after = save_checkpoint(small_state(3), work, accelerator, keep=1)
        assert [path.name for path in work.iterdir()] == [after.name]
        if set(codes) == {NOT_REACHED}:
            assert point > 10 and newest.name == "step-00000002"
            return


def fork_alone(function, *arguments):
    process = os.fork()
    if process == 0:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_at_any_operation_of_a_save_leaves_an_intact_checkpoint(fault, tmp_path):
    # run `check_every_point` in a new process: it forks, which is unsafe in pytest's own process with its threads
    assert fork_ranks(1, check_every_point, tmp_path, fault, [0], fork_alone) == [0]


@pytest.mark.parametrize("fault", ["killed", "no space"])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failure_of_one_of_two_ranks_leaves_an_intact_checkpoint(failing_rank, fault, tmp_path):
    check_every_point(tmp_path, fault, [failing_rank], partial(fork_ranks, 2))


def test_everything_is_on_disk_before_the_rename(tmp_path):
    """The order is: fsync files, fsync folders, rename, fsync the parent folder, remove the old checkpoint."""
    assert fork_ranks(1, save_in_order, tmp_path) == [0]


def save_in_order(folder):
    accelerator = Accelerator(cpu=True)
    save_checkpoint(small_state(1), folder, accelerator)
    done = fail_at(-1, "no space")
    save_checkpoint(small_state(2), folder, accelerator, keep=1)
    last = {operation: index for index, operation in enumerate(done)}
    at = {(operation, os.path.relpath(path, folder)): index for (operation, path), index in last.items()}
    named, unfinished = at["rename", ".unfinished-step-00000002"], ".unfinished-step-00000002"
    files = [path for operation, path in at if operation == "open"]
    assert len(files) == 4 and all(at["write", path] < at["fsync", path] < named for path in files)
    assert max(files, key=lambda path: at["open", path]) == f"{unfinished}/manifest.json"
    folders = (at["fsync", unfinished], at["fsync", f"{unfinished}/model"])
    assert max(at["fsync", path] for path in files) < min(folders) < max(folders) < named < at["fsync", "."]
    assert at["fsync", "."] < at["rename", "step-00000001"] < at["remove", ".unfinished-removal-step-00000001"]


def replace_failing(folder, fault, point):
    seen = fail_at(point, fault)
    try:
        save_model(small_state(2).model, folder / "model")
    except SaveError:
        os._exit(REACHED)
    os._exit(REACHED if len(seen) >= point else NOT_REACHED)


def check_every_point_of_replacing(folder, fault):
    values = [small_state(step).model.weight for step in (1, 2, 3)]
    for point in count(1):
        work = folder / str(point)
        save_model(small_state(1).model, work / "model")
        (code,) = fork_alone(replace_failing, work, fault, point)
        assert code in (REACHED, NOT_REACHED, -signal.SIGKILL)
        current = work / "model" if (work / "model").exists() else work / ".unfinished-replaced-model"
        found = load_file(current / "model.safetensors")["weight"]
        assert any(torch.equal(found, value) for value in values[:2]), point
        assert current.name == "model" or fault == "killed"
        save_model(small_state(3).model, work / "model")
        assert torch.equal(load_file(work / "model" / "model.safetensors")["weight"], values[2])
        assert os.listdir(work) == ["model"]
        if code == NOT_REACHED:
            assert point > 8 and torch.equal(found, values[1])
            return


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_while_a_model_is_replaced_leaves_an_intact_model(fault, tmp_path):
    assert fork_ranks(1, check_every_point_of_replacing, tmp_path, fault) == [0]


def test_a_model_that_a_killed_save_moved_away_is_restored_even_if_the_next_save_fails(tmp_path):
    assert fork_ranks(1, fail_after_a_kill, tmp_path) == [0]


def fail_after_a_kill(folder):
    save_model(small_state(1).model, folder / "model")
    for point in count(1):
        fork_alone(replace_failing, folder, "killed", point)
        if not (folder / "model").exists():
            break
    assert fork_alone(replace_failing, folder, "no space", 4) == [REACHED]
    found = load_file(folder / "model" / "model.safetensors")["weight"]
    assert torch.equal(found, small_state(1).model.weight)
