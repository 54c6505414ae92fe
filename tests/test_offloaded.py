"""Offloaded weights: a run with layers in host memory or a file has the bits of the same run in memory."""

import dataclasses
import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoConfig, ByT5Tokenizer

from lowmem import cross_entropy, init_distributed, parallelize
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.checkpoint.tensors import model_tensors, named_parameters
from lowmem.config.parse import resolve
from lowmem.config.rules import conflicts
from lowmem.data.rows import open_rows
from lowmem.distributed import vocabulary
from lowmem.distributed.fully_sharded import forward_only
from lowmem.distributed.offloaded import offload_weights
from lowmem.distributed.placement import training_layers
from lowmem.errors import StoreError, UsageError
from lowmem.evaluation import Evaluation
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.offload import Offload, ScratchSpace
from lowmem.memory.savers import entered, layered, layered_offloaded, release
from lowmem.model import spilled
from lowmem.model.build import freeze
from lowmem.model.checks import check_model
from lowmem.model.load import load_model
from lowmem.optim import tiers
from lowmem.optim.make import make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.plan.alternatives import variants
from lowmem.plan.choose import ladder
from lowmem.plan.parts import Cluster
from lowmem.plan.predict import planners, predicting
from lowmem.step import TrainState, train_step
from lowmem.storage.records import HostMemory, Record, ScratchFile, Space
from tests import runs
from tests.forked import fork_ranks
from tests.models import FAMILIES, LLAMA, build
from tests.processes import PROGRAM, finish, run_program, started_function, train
from tests.runs import assert_same_run, write_files
from tests.test_evaluate import TOKENIZER, encoder
from tests.test_layered import batches_of
from tests.test_plan import CPU, config_for

# matrices of more than 4,096 elements, which are offloaded
WIDE = {
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 3, "dropout_rate": 0.1},
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "attention_dropout": 0.1},
}


# layers that are smaller than the embeddings
NARROW = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2},
    "llama": {"hidden_size": 80, "intermediate_size": 80, "num_hidden_layers": 2},
}
VOCABULARY = ["shared.weight", "model.embed_tokens.weight", "lm_head.weight"]


def offloaded(family, where, *, memory="lean", name="adamw", **changes):
    """Build a model and its optimizer, with weights `where` says (None: in the model)."""
    model = build(family, **WIDE[family] | changes)
    if where is not None:
        offload_weights(model, where, torch.device("cpu"))
    return model, make_optimizer(model, memory=memory, name=name)


def trained(model, optimizer, savers, *, steps=2, first=0, **options):
    """Train. Return losses and norms."""
    state, accelerator = TrainState(model, optimizer, seed=3, step=first), Accelerator(cpu=True)
    batches = batches_of(model.config.is_encoder_decoder, count=2)
    with entered(savers, model, optimizer):
        results = [
            train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, **options) for _ in range(steps)
        ]
    return [(result.loss.item(), result.grad_norm.item()) for result in results]


def tensors_of(model, optimizer):
    """Copy all weights and optimizer state to memory."""
    tensors = model_tensors(model) | optimizer_tensors(named_parameters(model, optimizer), optimizer)
    return {name: x.to_host() if isinstance(x, Record) else x.detach().clone() for name, x in tensors.items()}


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize(
    ("family", "memory", "name"),
    [
        ("t5", "exact", "adamw"),
        ("t5", "lean", "adamw"),
        ("llama", "exact", "adamw"),
        ("llama", "lean", "adamw"),
        ("llama", "lean", "adafactor"),
        ("llama", "exact", "adamw_bf16"),
    ],
)
def test_offloaded_weights_give_the_bits_of_weights_in_memory(family, memory, name, max_grad_norm, tmp_path):
    options = {"memory": memory, "name": name}
    savers = [] if max_grad_norm else [release]
    model, optimizer = offloaded(family, None, **options)
    losses = trained(model, optimizer, [layered, *savers], max_grad_norm=max_grad_norm)
    expected = tensors_of(model, optimizer)
    for where, saver in (("host", layered), (tmp_path, layered_offloaded)):
        model, optimizer = offloaded(family, where, **options)
        assert trained(model, optimizer, [saver, *savers], max_grad_norm=max_grad_norm) == losses
        assert_equal(tensors_of(model, optimizer), expected)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize(("family", "memory"), [("t5", "lean"), ("llama", "lean"), ("llama", "exact")])
def test_embeddings_and_head_larger_than_a_layer_are_offloaded_too(
    family, memory, max_grad_norm, tmp_path, monkeypatch
):
    for module, name in (
        (vocabulary, "_ELEMENTS"),
        (cross_entropy, "_WEIGHT_ELEMENTS"),
        (tiers, "_OFFLOADED_ELEMENTS"),
    ):
        monkeypatch.setattr(module, name, 2**15)  # several slices
    changes = {"vocab_size": 1500, **NARROW[family]}
    savers = [] if max_grad_norm else [release]
    model, optimizer = offloaded(family, None, memory=memory, **changes)
    losses = trained(model, optimizer, [layered, *savers], max_grad_norm=max_grad_norm)
    expected, in_memory = tensors_of(model, optimizer), model
    model, optimizer = offloaded(family, tmp_path, memory=memory, **changes)
    assert trained(model, optimizer, [layered, *savers], max_grad_norm=max_grad_norm) == losses
    assert all(isinstance(model_tensors(model)[name], Record) for name in expected if name in VOCABULARY)
    assert_equal(tensors_of(model, optimizer), expected)
    ids = batches_of(family == "t5")[0].inputs["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(each.eval().generate(ids, **options) for each in (model, in_memory)))
    with pytest.raises(UsageError, match="--loss=chunked"):
        plain_loss(model.train(), batches_of(family == "t5")[0])


def test_frozen_parts_and_evaluation_between_steps_keep_the_bits(tmp_path):
    found = []
    for where in (None, tmp_path):
        model = build("t5", **WIDE["t5"])
        freeze(model, parts=["encoder", "embeddings"])
        if where:
            offload_weights(model, where, torch.device("cpu"))
        optimizer = make_optimizer(model, memory="lean")
        results = []
        for step in range(2):
            results += trained(model, optimizer, [layered], steps=1, first=step)
            with torch.no_grad():
                results.append(chunked_loss(model, batches_of(True)[3]).item())
        found.append((results, tensors_of(model, optimizer)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


def test_a_matrix_that_two_layers_share_stays_on_the_device(tmp_path):
    found = []
    for where in (None, tmp_path):
        model = build("llama", **WIDE["llama"])
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        if where:
            offload_weights(model, where, torch.device("cpu"))
        optimizer = make_optimizer(model, memory="lean")
        found.append((trained(model, optimizer, [layered]), tensors_of(model, optimizer)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


def test_large_matrices_and_their_state_are_only_in_the_file(tmp_path):
    model, optimizer = offloaded("llama", tmp_path, memory="exact")
    trained(model, optimizer, [layered], steps=1)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    tensors = model_tensors(model)
    for name, parameter in named_parameters(model, optimizer).items():
        is_large, in_layer = parameter.dim() > 1 and parameter.numel() > 4096, ".layers." in name
        assert isinstance(tensors[name], Record) == (is_large and in_layer), name
        assert parameter.isnan().all().item() == (is_large and in_layer), name
        assert parameter.untyped_storage().nbytes() == (2 if is_large and in_layer else 2 * parameter.numel())
        kept = {key: isinstance(x, Record) for key, x in optimizer.state[parameter].items() if key != "step"}
        assert set(kept.values()) == {is_large} and len(kept) == 3, name


@pytest.mark.parametrize("family", WIDE)
def test_an_offloaded_model_evaluates_and_generates_as_in_memory(family, tmp_path):
    (expected, _), (model, _) = offloaded(family, None), offloaded(family, tmp_path)
    batch = batches_of(family == "t5")[0]
    for each in (model, expected):
        each.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(chunked_loss(model, batch), chunked_loss(expected, batch))
    ids = batch.inputs["input_ids"]
    assert torch.equal(*(each.generate(ids, max_new_tokens=8, do_sample=False) for each in (model, expected)))


@pytest.mark.parametrize("where", [None, "host", "folder"])
def test_a_checkpoint_continues_with_offloaded_weights_or_without(where, tmp_path):
    where = tmp_path / "store" if where == "folder" else where
    accelerator = Accelerator(cpu=True)
    model, optimizer = offloaded("llama", None)
    first = trained(model, optimizer, [layered], steps=4, max_grad_norm=1.0)
    expected = tensors_of(model, optimizer)
    model, optimizer = offloaded("llama", "host" if where is None else None)
    assert trained(model, optimizer, [layered], steps=2, max_grad_norm=1.0) == first[:2]
    saved = save_checkpoint(TrainState(model, optimizer, step=2), tmp_path, accelerator)
    model, optimizer = offloaded("llama", where, seed=5)
    trained(model, optimizer, [layered], steps=1)  # so that the buffers hold weights that loading replaces
    load_checkpoint(TrainState(model, optimizer), saved, accelerator)
    assert trained(model, optimizer, [layered], steps=2, first=2, max_grad_norm=1.0) == first[2:]
    assert_equal(tensors_of(model, optimizer), expected)
    save_model(model, tmp_path / "model")
    of_model = load_file(tmp_path / "model" / "model.safetensors")
    assert_equal(of_model, {name: expected[name] for name in of_model})


def test_a_checkpoint_of_a_larger_tier_is_rounded_into_the_file(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = offloaded("llama", tmp_path, memory="exact")
    trained(model, optimizer, [layered], steps=1)
    saved = save_checkpoint(TrainState(model, optimizer, step=1), tmp_path, accelerator)
    loaded = []
    for where in (None, tmp_path):
        model, optimizer = offloaded("llama", where)
        load_checkpoint(TrainState(model, optimizer), saved, accelerator)
        loaded.append(tensors_of(model, optimizer))
    assert_equal(*loaded)


# --- processes


def train_shards(folder):
    """Train sharded models with weights in memory and in files, and continue each with the other's checkpoint."""
    accelerator = init_distributed()
    rank, syncs = accelerator.process_index, []
    sys.addaudithook(lambda event, what: syncs.append(what) if event == "lowmem.store" and what[0] == "sync" else None)
    with pytest.raises(UsageError, match="needs FULL_SHARD"):
        offload_weights(build("llama"), "host", accelerator.device)
    for family, memory, savers, max_grad_norm in (
        ("llama", "lean", [layered_offloaded], 0.1),
        ("t5", "exact", [layered, release], None),
    ):
        batches = batches_of(family == "t5", count=6)[2 * rank :][:2]

        def state_of(where, seed=0, family=family, memory=memory):
            model = build(family, seed=seed, **WIDE[family])
            parallelize(model, accelerator, sharding_strategy="FULL_SHARD", fill=False)
            if where:
                offload_weights(model, where, accelerator.device)
            return TrainState(model, make_optimizer(model, memory=memory), seed=3)

        def steps(state, count=2, savers=savers, batches=batches, max_grad_norm=max_grad_norm):
            options = {"learning_rate": 1e-2, "max_grad_norm": max_grad_norm}
            with entered(savers, state.model, state.optimizer):
                results = [train_step(state, batches, chunked_loss, accelerator, **options) for _ in range(count)]
            with forward_only(state.model):
                loss = chunked_loss(state.model, batches[0])
            return [(result.loss.item(), result.grad_norm.item()) for result in results], loss.item()

        found = []
        for where, after in ((None, "host"), (folder / f"rank {rank}", None)):
            state = state_of(where)
            losses, synced = [steps(state)], len(syncs)
            saved = save_checkpoint(state, folder / f"{family} {where is None}", accelerator)
            assert (len(syncs) > synced) == (where is not None)
            state = state_of(after, seed=5)
            steps(state, count=1)  # so that there is something to replace
            load_checkpoint(state, saved, accelerator)
            losses.append(steps(state))
            last = save_checkpoint(state, folder / f"{family} {where is None}", accelerator)
            found.append((losses, saved, last))
        assert found[0][0] == found[1][0], found
        for saved in zip(*(each[1:] for each in found), strict=True):
            files, others = ({x.name: x.read_bytes() for x in path.rglob("*.safetensors")} for path in saved)
            assert files == others and len(files) > 1, files.keys() ^ others.keys()
    state, errors = state_of(folder / f"failing {rank}"), [OSError(errno.EIO, os.strerror(errno.EIO))] * (rank == 1)

    def fail(event, arguments):
        if event == "lowmem.store" and arguments[0] == "read" and errors:
            raise errors[0]

    sys.addaudithook(fail)
    with pytest.raises(StoreError, match="cannot be read"):  # on all ranks, none of which waits for ever
        save_checkpoint(state, folder / "failed", accelerator)
    assert not list((folder / "failed").glob("step-*"))
    errors.clear()
    accelerator.end_training()


def test_sharded_weights_in_files_give_the_bits_of_shards_in_memory(tmp_path):
    assert fork_ranks(3, train_shards, tmp_path) == [0] * 3  # parts of unequal size


# --- random weights


@pytest.mark.parametrize("family", WIDE)
def test_random_weights_drawn_in_a_file_are_those_drawn_in_memory(family, tmp_path, monkeypatch):
    monkeypatch.setattr(spilled, "_MIN_BYTES", 2**12)
    monkeypatch.setattr(spilled, "_RESIDENT_BYTES", 2**16)  # fewer than those of the embeddings
    fields, found = FAMILIES[family] | WIDE[family], []
    for folder in (None, tmp_path):
        torch.manual_seed(5)
        model, _ = load_model(model_config=fields, scratch_folder=folder)
        in_file = sum(parameter.is_meta for parameter in model.parameters())
        assert (in_file > 20) == (folder is not None)
        found.append((dict(parallelize(model, Accelerator(cpu=True)).state_dict()), torch.rand(1).item()))
    assert found[0][1] == found[1][1]
    assert_equal(found[0][0], found[1][0])


def test_a_run_with_random_weights_trains_and_evaluates_from_a_file(tmp_path):
    work, fields = write_files(tmp_path, num_rows=90), LLAMA | {"hidden_size": 512, "intermediate_size": 600}
    (work / "t5.json").write_text(AutoConfig.for_model(**fields).to_json_string())
    result = train("train", *run_flags(work, "run", offload_weights=tmp_path / "store", max_steps=2, save_steps=0))
    assert result.returncode == 0, result.stderr
    flags = [f"--model_name_or_path={work / 'run' / 'model'}", f"--test_file={work / 'rows.jsonl'}"]
    results = [train("evaluate", *flags, *more) for more in ([], [f"--offload_weights={tmp_path / 'store'}"])]
    assert results[0].returncode == 0 and results[0].stdout == results[1].stdout, results[1].stderr


# --- runs


def run_flags(work, name, **changes):
    options = {"batch_size": 2, "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "memory": "lean"}
    return runs.flags(work, name, **options | {"max_steps": 6, "save_steps": 3, "save_total_limit": 0} | changes)


def write_model(work):
    fields = LLAMA | WIDE["llama"]
    (write_files(work, num_rows=90) / "t5.json").write_text(AutoConfig.for_model(**fields).to_json_string())
    return work


def test_a_run_may_switch_offloading_on_and_off_when_it_resumes(tmp_path):
    work = write_model(tmp_path)
    assert train("train", *run_flags(work, "plain", layered=True)).returncode == 0
    for changes in ({"offload_weights": tmp_path / "store"}, {"layered": True}, {"offload_weights": "host"}):
        result = train("train", *run_flags(work, "switched", resume="auto", **changes))
        assert result.returncode == 0, result.stderr
        assert_same_run(work, "switched", "plain")
        rmtree(work / "switched" / "checkpoints" / "step-00000006")  # as if it had been killed just before the end


@contextmanager
def failing(operation, folder, fault=errno.EIO, *, number=1):
    """Within this block, raise an error at the `number`th `operation` in `folder`, or kill this process."""
    left = [number]

    def fail(event, arguments):
        if event == "lowmem.store" and arguments == (operation, str(folder)):
            left[0] -= 1
            if left[0] == 0:
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(fault, os.strerror(fault))

    sys.addaudithook(fail)
    yield
    left[0] = 0  # hooks stay until the process ends


def fail_at(operation, number, fault, folder, *flags):
    """Train with a fault."""
    with failing(operation, folder, fault, number=number):
        run_program(PROGRAM, "train", *flags)


FAULTS = [
    ("grow", 3, errno.ENOSPC),  # before the first step
    ("write", 50, errno.EIO),  # within the first step
    ("write", 300, "killed"),  # within the second
    ("read", 30, errno.EIO),
    ("read", 350, errno.EIO),
    ("sync", 2, errno.EIO),  # when the files of the second checkpoint are complete
]


def test_after_a_fault_of_the_file_a_run_resumes_with_the_same_bits(tmp_path):
    work, store = write_model(tmp_path), tmp_path / "store"
    options = {"save_steps": 1, "max_steps": 2, "resume": "auto"}
    assert train("train", *run_flags(work, "whole", layered=True, **options)).returncode == 0
    for operation, number, fault in FAULTS:
        name = f"{operation}-{number}"
        flags = run_flags(work, name, offload_weights=store, **options)
        with started_function(fail_at, operation, number, fault, store, *flags) as process:
            result = finish(process)
        assert list(store.iterdir()) == []
        if fault == "killed":
            assert result.returncode == -signal.SIGKILL
        else:
            assert result.returncode == 1, result.stderr
            (line,) = result.stderr.splitlines()
            assert f"the file for offloaded tensors in {store} cannot" in line and os.strerror(fault) in line
        result = train("train", *flags)
        assert result.returncode == 0, result.stderr
        assert_same_run(work, name, "whole")


def test_a_run_that_saves_nothing_leaves_no_checkpoint_and_no_model(tmp_path):
    work = write_model(tmp_path)
    result = train("train", *run_flags(work, "run", save_steps=0, save_model=False, max_steps=2))
    assert result.returncode == 0, result.stderr
    assert "this run saves no checkpoints" in result.stdout and "the model is in" not in result.stdout
    assert not (work / "run" / "model").exists() and not (work / "run" / "checkpoints").exists()


def test_plan_says_what_a_step_reads_and_writes(tmp_path):
    resident = config_for(tmp_path, "llama", "lean", layered=True)
    configs = [resident, *(dataclasses.replace(resident, offload_weights=where) for where in ("host", "store"))]
    with planners() as pool:
        resident, *offloaded = predicting(pool, Cluster(1, 1, on_gpu=True))(configs)
    assert not resident.streaming
    for found, stored, is_file in zip(offloaded, (offloaded[0].host, offloaded[1].disk), (False, True), strict=True):
        assert found.device["weights"] < resident.device["weights"]
        assert any("offloaded weights and state" in name and size for name, size in stored.items())
        assert "each step reads" in found.streaming and ("1,000 steps write" in found.streaming) == is_file


def test_the_last_rungs_offload_weights(tmp_path):
    config = config_for(tmp_path, "llama", "lean")
    for processes, strategy in ((1, "NO_SHARD"), (2, "FULL_SHARD")):
        rungs = list(ladder(config, Cluster(processes, processes, on_gpu=True), ()))
        assert [rung.changes.get("offload_weights") for rung in rungs[-2:]] == ["host", "out/offloaded"]
        assert rungs[-1].changes["sharding_strategy"] == strategy
        for rung in rungs:
            assert not conflicts(dataclasses.replace(config, **rung.changes), ())
    assert all(not conflicts(found, ()) for _, _, found in variants(dataclasses.replace(config, layered=True), CPU))


def peak_of_training(peak_file, *flags):
    try:
        run_program(PROGRAM, "train", *flags)
    finally:
        (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        peak_file.write_text(str(int(peak) * 1024))


def test_resident_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks, bytes_of_layer = [], 0
    for depth in (4, 16):
        model = build("llama", hidden_size=320, intermediate_size=640, num_hidden_layers=depth)
        model.save_pretrained(tmp_path / str(depth))
        ByT5Tokenizer().save_pretrained(tmp_path / str(depth))
        bytes_of_layer = 14 * sum(x.numel() for x in training_layers(model, "")[0].parameters())
        work = write_files(tmp_path, num_rows=90)
        flags = run_flags(
            work, f"out-{depth}", model_name_or_path=tmp_path / str(depth), offload_weights=tmp_path / "store"
        )
        flags = [flag for flag in flags if "model_config" not in flag and "memory=" not in flag]
        with started_function(
            peak_of_training, tmp_path / "peak", *flags, "--memory=exact", "--max_steps=1"
        ) as process:
            result = finish(process)
        assert result.returncode == 0, result.stderr
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[1] - peaks[0] < 0.2 * 12 * bytes_of_layer


@pytest.mark.parametrize(
    ("call", "fault"),
    [("check_model", errno.EIO), ("check", errno.EIO), ("measure", errno.EIO), ("step", errno.ENOMEM)],
)
def test_an_error_of_the_file_is_not_taken_for_one_of_the_model_or_of_memory(call, fault, tmp_path):
    model, optimizer = offloaded("llama", tmp_path)
    options = {"batch_size": 2, "num_answers": 2, "max_new_tokens": 2}
    measure = Evaluation(model, TOKENIZER, encoder("llama"), chunked_loss, Accelerator(cpu=True), **options)
    rows = open_rows(write_files(tmp_path, num_rows=2) / "rows.jsonl")
    calls = {
        "check_model": lambda: check_model(model, chunked_loss, packing=False, max_seq_len=64, may_shorten=True),
        "check": lambda: measure.check(rows, "validation"),
        "measure": lambda: measure(rows),
        "step": lambda: trained(model, optimizer, [layered], steps=1),
    }
    events = []
    sys.addaudithook(lambda event, arguments: events.append(arguments) if event == "lowmem.store" else None)
    calls[call]()
    # the second call does not read the first layer again, and nobody waits for the last read, which is ahead
    number = events.count(("read", str(tmp_path))) - 2
    with failing("read", tmp_path, fault, number=number), pytest.raises(StoreError, match="cannot be read"):
        calls[call]()


# --- what is refused


def test_what_offloading_does_not_support_is_refused_in_one_line(tmp_path):
    model = build("llama", **WIDE["llama"])
    offload_weights(model, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="use exact or lean"):
        make_optimizer(model, memory="off")
    optimizer = make_optimizer(model, memory="lean")
    with pytest.raises(UsageError, match="enter layered"):
        trained(model, optimizer, [], steps=1)
    for again in (
        lambda: make_optimizer(model, memory="lean"),
        lambda: offload_weights(model, tmp_path, torch.device("cpu")),
    ):
        with pytest.raises(UsageError, match="already have an optimizer|called twice"):
            again()
    model = build("llama", **WIDE["llama"])
    offload_weights(model, tmp_path, torch.device("cpu"))
    with pytest.raises(UsageError, match="call make_optimizer after offload_weights"):
        model(**batches_of(False)[0].inputs)
    model = build("llama", **WIDE["llama"])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=f"can be made in {file} .*exists.*set offload_weights to another"):
        offload_weights(model, file, torch.device("cpu"))


def test_a_file_is_refused_as_the_folder_for_weights(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file: set a folder, or host"):
        resolve({"mixed_precision": "bf16", "offload_weights": tmp_path / "file"})


@pytest.mark.parametrize(
    "flag", ["--memory=off", "--layered=False", "--compile=True", "--sharding_strategy=SHARD_GRAD_OP"]
)
def test_flags_that_contradict_offloading_are_refused(flag, tmp_path):
    result = train("train", "--mixed_precision=bf16", f"--offload_weights={tmp_path}", flag)
    assert result.returncode == 2 and "--offload_weights" in result.stderr and len(result.stderr.splitlines()) == 1


# --- records


@pytest.mark.parametrize(
    "make", [lambda folder: HostMemory(pin_memory=False), lambda folder: ScratchFile(folder, pin_memory=False)]
)
def test_records_keep_rows_of_all_shapes_and_dtypes(make, tmp_path):
    space, expected = Space(make(tmp_path), torch.device("cpu")), []
    for dtype in (torch.bfloat16, torch.float32, torch.int16, torch.uint8):
        for shape in ((5, 7), (3, 4, 5), (1,), (0, 3), (9000, 3)):
            values = torch.randint(0, 100, shape).to(dtype)
            record = space.allocate(shape, dtype)
            assert record.to_host().count_nonzero() == 0
            for part in record.split(64):
                first = (part.address - record.address) // max(1, record.num_bytes // max(1, shape[0]))
                space.write(part, values[first : first + part.shape[0]])
            expected.append((record, values))
    for record, values in expected:
        assert torch.equal(record.to_host(), values)
        if len(values) > 2:
            assert torch.equal(record.rows(slice(1, 3)).to_host(), values[1:3])
    space.drain()


def test_after_a_failed_write_every_later_call_raises_its_error(tmp_path):
    space = Space(ScratchFile(tmp_path, pin_memory=False), torch.device("cpu"))
    record = space.allocate([10], torch.float32)
    with failing("write", tmp_path):
        space.write(record, torch.ones(10))
        calls = [space.drain, space.drain, record.to_host, lambda: space.write(record, torch.ones(10))]
        for call in calls:
            with pytest.raises(StoreError, match="cannot be written: Input/output error"):
                call()


def test_a_sync_covers_both_files_and_its_error_stays(tmp_path):
    space = Space(ScratchFile(tmp_path, pin_memory=False), torch.device("cpu"))
    other = Space(space.storage.in_same_folder(), space.device)
    record = other.allocate([10], torch.float32)
    other.write(record, torch.ones(10))
    space.sync()
    with failing("sync", tmp_path, number=2):
        for call in (space.sync, space.drain):
            with pytest.raises(StoreError, match="cannot be written: Input/output error"):
                call()


def test_an_activation_that_nobody_needs_raises_no_error_when_it_is_freed(tmp_path):
    space = Space(ScratchFile(tmp_path, pin_memory=False), torch.device("cpu"))
    offload = Offload((), ScratchSpace(space))
    with failing("write", tmp_path):
        copy = offload.pack(torch.ones(2000))
        del copy  # pytest fails if __del__ raises
        with pytest.raises(StoreError):
            offload.pack(torch.ones(2000))
