"""After a step runs out of memory, all ranks repeat it in smaller micro-batches, or all of them exit and report why."""

import json
import os
import re
import resource
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import ByT5Tokenizer

from lowmem import init_distributed, load_checkpoint, parallelize, save_checkpoint
from lowmem.config.parse import resolve
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.order import Groups, rows_at
from lowmem.data.rows import RowSets, open_rows
from lowmem.data.stream import open_stream
from lowmem.distributed.collectives import raise_on_all_ranks
from lowmem.distributed.heartbeat import current_step
from lowmem.distributed.signals import Signals
from lowmem.errors import OutOfMemory, RankError, StepTooLarge
from lowmem.loss import chunked_loss
from lowmem.memory.out_of_memory import free_failed_step, is_out_of_memory
from lowmem.memory.savers import release
from lowmem.optim.make import make_optimizer
from lowmem.recover import fitting_step
from lowmem.step import TrainState, train_step
from lowmem.train import train
from tests import runs
from tests.forked import fork_ranks, started_ranks
from tests.models import LLAMA, build, qa_rows

STEPS, FULL_AT = 10, 7


def stream_of(family, *, max_seq_len=64, **options):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=max_seq_len)
    settings = {"batch_size": 4, "gradient_accumulation_steps": 3, "seed": 2} | options
    return open_stream(qa_rows(50), encode, **settings)


def state_of(family, accelerator, *, memory="off", sharding_strategy="NO_SHARD", **options):
    model = parallelize(build(family), accelerator, sharding_strategy=sharding_strategy)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return TrainState(model, make_optimizer(model, memory=memory), stream_of(family, **ranks, **options))


class RunsOut:
    """A loss function whose backward runs out of memory, by default in step 7 in the third micro-batch of 4 rows.

    `left` is how many hooks of the failed attempt's autograd graphs are still alive when the next attempt begins.
    """

    def __init__(self, model, *, step=FULL_AT, micro_batch=3, rows=4, is_here=True):
        self._fails_at, self._is_here = (step, micro_batch, rows), is_here
        self._at, self._batch, self._number = None, None, 0
        self._graphs = []
        self.left = None
        for embeddings in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
            embeddings.register_forward_hook(self._hook_output)

    def __call__(self, model, batch):
        at = (current_step(), len(batch.row_ids))
        if at != self._at:
            if self._at == (self._fails_at[0], self._fails_at[2]) and at[0] == self._at[0]:
                self.left = self.alive()
            self._at, self._number, self._graphs = at, 0, []
        self._number += 1
        return chunked_loss(model, batch)

    def alive(self):
        return sum(graph() is not None for graph in self._graphs)

    def _hook_output(self, module, inputs, output):
        hook = Hook(self._is_full)  # only the graph refers to the hook, so both are freed together
        self._graphs.append(weakref.ref(hook))
        output.register_hook(hook)

    def _is_full(self):
        step, rows = self._at or (None, None)
        return self._is_here and (step, self._number, rows) == self._fails_at


class Hook:
    def __init__(self, is_full):
        self._is_full = is_full

    def __call__(self, gradient):
        if self._is_full():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full")


def losses(state, accelerator, loss_fn, *, until=STEPS, on_halving=pytest.fail):
    found = []
    for step, batches in zip(range(state.step, until), state.stream, strict=False):
        options = {"learning_rate": 1e-2 * (1 - step / STEPS), "max_grad_norm": 1.0}
        found.append(fitting_step(state, batches, loss_fn, accelerator, tell=on_halving, **options).loss.item())
    return found


@pytest.mark.parametrize(("family", "memory"), [("t5", "off"), ("llama", "off"), ("llama", "exact")])
def test_a_run_that_ran_out_of_memory_on_one_rank_has_the_losses_of_a_run_that_did_not(family, memory, tmp_path):
    assert fork_ranks(2, run_out_on_rank_1, family, memory, tmp_path) == [0, 0]


def run_out_on_rank_1(family, memory, folder):
    accelerator = init_distributed()
    expected = losses(state_of(family, accelerator, memory=memory), accelerator, chunked_loss)
    state = state_of(family, accelerator, memory=memory)
    loss_fn = RunsOut(state.model, is_here=accelerator.process_index == 1)
    found = losses(state, accelerator, loss_fn, until=FULL_AT - 1)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    halvings = []

    def check(halving):
        halvings.append(halving)
        assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
        assert all(parameter.grad is None for parameter in state.model.parameters())
        assert (state.step, state.stream.position) == (FULL_AT - 1, 24 * (FULL_AT - 1))

    found += losses(state, accelerator, loss_fn, until=8, on_halving=check)
    save_checkpoint(state, folder, accelerator)
    found += losses(state, accelerator, loss_fn)
    tolerance = 1e-6 if memory == "off" else 1e-2  # bf16 gradients round differently when micro-batches are smaller
    assert found == pytest.approx(expected, rel=tolerance) and found[-1] < 0.9 * found[0]
    (halving,) = halvings
    assert (halving.step, halving.rank, halving.batch_size, halving.smaller) == (FULL_AT, 1, 4, 2)
    assert (state.stream.micro_batches, loss_fn.left) == (6, 0)
    assert "step 7: rank 1 ran out of memory with micro-batches of 4 rows" in str(halving) and "mask" not in str(
        halving
    )

    resumed = state_of(family, accelerator, memory=memory)  # a new stream, with micro-batches of 4 rows again
    load_checkpoint(resumed, folder / "step-00000008", accelerator)
    assert losses(resumed, accelerator, chunked_loss) == pytest.approx(found[8:], rel=tolerance)
    accelerator.end_training()


def test_a_run_that_filled_host_memory_uses_smaller_micro_batches_and_can_be_killed_and_resumed(tmp_path):
    rows = qa_rows(40)
    for row_id in rows_at(4 * (FULL_AT - 1), 4 * FULL_AT, Groups.of([40]), seed=0):
        rows[row_id]["response"] = "long " * 100
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA | {"vocab_size": 16384, "max_position_embeddings": 1024}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert fork_ranks(1, measure_the_long_step, tmp_path) == [0]
    assert fork_ranks(1, train_with_three_quarters_of_those_bytes, tmp_path) == [-signal.SIGKILL]
    assert runs.steps(tmp_path, "full")[-1] == STEPS
    assert fork_ranks(1, train_here, tmp_path, "full") == [0]
    assert runs.losses(tmp_path, "full") == pytest.approx(runs.losses(tmp_path, "whole"), rel=1e-5)
    events = [record for record in runs.records(tmp_path, "full") if record.get("event") == "out_of_memory"]
    assert events == [{"event": "out_of_memory", "step": FULL_AT, "rank": 0, "batch_size": 4}]


def train_here(work, name):
    settings = {"train_file": work / "rows.jsonl", "model_config": work / "llama.json", "loss": "plain"}
    settings |= {"tokenizer_name_or_path": work / "tokenizer"}
    settings |= {"batch_size": 4, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "output_dir": work / name}
    config = resolve(settings | {"resume": "auto"})
    train(config, RowSets(open_rows(str(work / "rows.jsonl"))), signals=Signals())


def measure_the_long_step(work):
    """Measure by how many bytes the long step raises the peak memory of the process; write this number to a file."""
    peaks = []
    for step in (FULL_AT - 1, FULL_AT + 1):
        at_save(step, lambda: peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    train_here(work, "whole")
    (work / "bytes").write_text(str(peaks[1] - peaks[0]))


def train_with_three_quarters_of_those_bytes(work):
    """In the long step, let memory grow by only 3/4 of the measured bytes. Kill the run at its last save.

    Half of the step's rows fit within this limit.
    """

    def limit():
        held = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        room = int((work / "bytes").read_text()) * 3 // 4
        resource.setrlimit(resource.RLIMIT_DATA, (held + room, resource.RLIM_INFINITY))

    at_save(FULL_AT - 1, limit)
    at_save(STEPS, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_here(work, "full")


def at_save(step, action):
    """Call `action` once, when the checkpoint of `step` is about to be written."""
    calls = []

    def hook(event, arguments):
        if event == "lowmem.disk" and f"{step:08}" in str(arguments) and not calls:
            calls.append(event)
            action()

    sys.addaudithook(hook)


def test_running_out_of_memory_with_one_row_ends_all_ranks_and_reports_what_fills_memory():
    assert fork_ranks(2, run_out_with_one_row) == [0, 0]


def run_out_with_one_row():
    accelerator = init_distributed()
    state = state_of("t5", accelerator, memory="exact", batch_size=2, gradient_accumulation_steps=2)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    halvings = []
    model, is_here = state.model, accelerator.process_index == 1
    out_with_two, out_with_one = (RunsOut(model, step=1, micro_batch=2, rows=rows, is_here=is_here) for rows in (2, 1))

    def loss_fn(model, batch):
        return (out_with_two if len(batch.row_ids) == 2 else out_with_one)(model, batch)

    with pytest.raises(OutOfMemory) as raised:
        losses(state, accelerator, loss_fn, on_halving=halvings.append)
    assert [halving.smaller for halving in halvings] == [1]
    message = str(raised.value)
    assert message.startswith("rank 1 ran out of memory at step 1, computing gradients (tried to allocate 2.00 GiB). ")
    weights = sum(parameter.nbytes for parameter in state.model.parameters()) / 2**20
    held = f"weights {weights:.1f} MiB, optimizer state {5 * weights:.1f} MiB, gradients"
    assert f"Rank 1 holds at most {held}" in message
    assert "--recompute=full, --loss=chunked" in message and "--memory=lean" in message
    assert message.endswith(". At batch_size=1 micro-batches cannot be made smaller")
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert (state.step, state.stream.position) == (0, 0)
    accelerator.end_training()


def test_a_sharded_model_that_runs_out_of_memory_ends_both_ranks_and_reports_what_fills_memory():
    with started_ranks(2, run_out_sharded) as ranks:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    message = "rank 1 ran out of memory at step 1, computing gradients (tried to allocate 2.00 GiB). "
    message += "Rank 1 holds at most weights "
    assert f"errors.OutOfMemory: {message}" in outputs[1], outputs[1]
    assert f"rank 1 failed with OutOfMemory: {message}" in outputs[0], outputs[0]


def run_out_sharded():
    accelerator = init_distributed(heartbeat_timeout=10)
    state = state_of("llama", accelerator, sharding_strategy="FULL_SHARD")
    loss_fn = RunsOut(state.model, step=1, is_here=accelerator.process_index == 1)
    losses(state, accelerator, loss_fn)


def test_an_update_that_runs_out_of_memory_ends_both_ranks_with_that_error():
    assert fork_ranks(2, run_out_in_the_update) == [0, 0]


def run_out_in_the_update():
    accelerator = init_distributed(heartbeat_timeout=10)
    state = state_of("t5", accelerator)
    message = r"rank 1 ran out of memory at step 2, updating weights \(MemoryError: \)\. Rank 1 holds at most weights"

    def run_out(*_):
        if accelerator.process_index == 1 and state.step == 1:
            raise MemoryError

    state.optimizer.register_step_pre_hook(run_out)
    with pytest.raises(OutOfMemory if accelerator.process_index == 1 else RankError, match=message) as raised:
        losses(state, accelerator, chunked_loss)
    assert not isinstance(raised.value, StepTooLarge)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_stored_error_keeps_no_activations_alive(family):
    accelerator = Accelerator(cpu=True)
    state = state_of(family, accelerator)
    loss_fn = RunsOut(state.model, step=1)
    with pytest.raises(StepTooLarge) as raised:
        train_step(state, next(state.stream), loss_fn, accelerator, learning_rate=0.1)
    free_failed_step()
    assert loss_fn.alive() == 0 and raised.value.rank == 0


def test_a_step_with_gradient_release_is_not_repeated():
    accelerator = Accelerator(cpu=True)
    state = state_of("t5", accelerator, gradient_accumulation_steps=1)
    loss_fn = RunsOut(state.model, step=1, micro_batch=1)
    with release(state.model, state.optimizer), pytest.raises(OutOfMemory, match="rank 0 ran out of memory") as raised:
        train_step(state, next(state.stream), loss_fn, accelerator, learning_rate=0.1)
    assert not isinstance(raised.value, StepTooLarge)


def test_another_error_takes_precedence_over_out_of_memory():
    assert fork_ranks(2, fail_in_two_ways) == [0, 0]


def fail_in_two_ways():
    accelerator = init_distributed()
    is_main = accelerator.is_main_process
    with pytest.raises(RankError if is_main else KeyError, match="what was wrong"), raise_on_all_ranks():
        raise StepTooLarge("full", 0) if is_main else KeyError("what was wrong")
    with pytest.raises(StepTooLarge, match="^full 0$") as raised, raise_on_all_ranks():
        raise StepTooLarge(f"full {accelerator.process_index}", accelerator.process_index)
    assert raised.value.rank == 0
    accelerator.end_training()


def test_out_of_memory_errors_are_distinguished_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value) and is_out_of_memory(OSError(12, os.strerror(12)))
    assert not is_out_of_memory(RuntimeError("size of tensor a")) and not is_out_of_memory(OSError(28, "No space"))
    assert not is_out_of_memory(KeyError("out of memory"))


@pytest.mark.parametrize(("family", "packed_seq_len"), [("t5", None), ("llama", None), ("llama", 64)])
def test_a_halved_stream_gives_the_same_rows_in_smaller_micro_batches(family, packed_seq_len):
    options = {"batch_size": 5, "global_batch_size": 20, "gradient_accumulation_steps": 1, "world_size": 2, "rank": 1}
    stream = stream_of(family, packed_seq_len=packed_seq_len, max_seq_len=24, **options)
    first = next(stream)
    stream.advance()
    whole = next(stream)
    rows = [sorted(row_id for batch in batches for row_id in batch.row_ids) for batches in (first, whole)]
    sizes, counts = [], dict(stream.counts)
    while stream.halve():
        again = next(stream)
        sizes.append([len(batch.row_ids) for batch in again])
        assert sorted(row_id for batch in again for row_id in batch.row_ids) == rows[1] != rows[0]
        assert sum(batch.num_targets for batch in again) == sum(batch.num_targets for batch in whole)
        assert stream.counts == counts and counts["cut_rows"] > 0
        assert stream.state_dict() == {**stream.state_dict(), "position": 20}
    assert [len(step) for step in sizes] == [4, 5, 10] and sizes[-1] == [1] * 10
    assert packed_seq_len or sizes[0] == [2, 3, 2, 3]
    assert stream.batch_size == 1 and stream.micro_batches == 10


def test_a_stream_is_not_halved_if_a_process_would_have_an_empty_micro_batch():
    uneven = stream_of("t5", batch_size=2, gradient_accumulation_steps=1, global_batch_size=3, rank=0, world_size=2)
    before = next(uneven)
    assert not uneven.halve() and (uneven.batch_size, uneven.micro_batches) == (2, 1)
    assert next(uneven)[0].row_ids != before[0].row_ids  # after `halve` refuses, the stream continues with new rows
