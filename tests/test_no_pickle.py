"""Saving and resuming neither pickle nor unpickle anything, and read no pickle file."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.resume import checkpoint_to_resume
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.distributed.collectives import on_main_rank
from lowmem.distributed.setup import init_distributed
from lowmem.errors import UsageError
from lowmem.model.load import load_model
from tests.forked import fork_ranks
from tests.models import build
from tests.test_sharded import DDP, FSDP, new_state, train


def forbid_pickles():
    """From now on, raise in this process if anything is pickled or unpickled, or if a pickle file is read."""

    def refuse(event, arguments):
        is_read = event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[1] != "w"
        if event == "pickle.find_class" or (is_read and Path(arguments[0]).suffix in (".pkl", ".bin", ".pt", ".pth")):
            raise AssertionError(f"{event} {arguments}")

    def forbidden(*arguments, **options):
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "dumps"), (pickle, "dump"), (pickle, "loads"), (pickle, "load"), (torch, "load")]:
        setattr(module, name, forbidden)
    torch.save = forbidden
    sys.addaudithook(refuse)


def save_and_load_unpickled(folder, sharding_strategy):
    accelerator = init_distributed()
    state = new_state(accelerator, sharding_strategy)
    train(state, 1, accelerator)
    forbid_pickles()
    path = save_checkpoint(state, folder, accelerator, tokenizer=ByT5Tokenizer(), config={"a": 1}, keep=1)
    on_main_rank(lambda: write_malicious_pickles(path))
    other = new_state(accelerator, sharding_strategy, seed=5)
    load_checkpoint(other, checkpoint_to_resume(str(path), folder), accelerator)
    load_model(path / "model")


def write_malicious_pickles(path):
    for name in ("optimizer.pkl", "model/pytorch_model.bin", "model/training_args.bin", "optimizer.pt"):
        (path / name).write_bytes(pickle_that_creates(path / "opened"))


def pickle_that_creates(path):
    return b"cos\nmkdir\n(V" + str(path).encode() + b"\ntR."


@pytest.mark.parametrize("sharding_strategy", [DDP, FSDP])
def test_nothing_is_pickled_or_unpickled(sharding_strategy, tmp_path):
    pickle.loads(pickle_that_creates(tmp_path / "works"))
    assert (tmp_path / "works").exists()
    assert fork_ranks(2, save_and_load_unpickled, tmp_path / "run", sharding_strategy) == [0, 0]
    assert not list(tmp_path.rglob("opened"))
    written = {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()} - {".pkl", ".bin", ".pt"}
    assert written == {".safetensors", ".json"}


def test_a_model_that_is_only_pickled_is_not_opened(tmp_path):
    path = save_model(build("t5"), tmp_path / "model", tokenizer=ByT5Tokenizer())
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle_that_creates(path / "opened"))
    with pytest.raises(UsageError, match="safetensors"):
        load_model(path)
    assert not list(tmp_path.rglob("opened"))
