"""Compare MemoryMeter with byte counts done by hand, and fake tensors with real tensors."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowmem.data.batch import Batch
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.savers import entered, recompute, release
from lowmem.optim.make import make_optimizer
from lowmem.plan.fakes import fake_tensors, gpu_kernels
from lowmem.plan.meter import CUDA_BLOCK_BYTES, MemoryMeter
from lowmem.step import TrainState, train_step
from tests.models import build
from tests.processes import finish, started_function

FLOAT = 4
either = pytest.mark.parametrize("tensors", [nullcontext, fake_tensors], ids=["real", "fake"])


@either
def test_results_count_until_they_are_freed_and_peak_is_the_largest_sum(tensors):
    with tensors(), MemoryMeter() as meter:
        a, b = torch.ones(100), torch.ones(100)
        assert meter.live_bytes == 200 * FLOAT
        c = (a * b).exp()  # `a * b` is freed once its exponential exists
        assert (meter.live_bytes, meter.peak_bytes) == (300 * FLOAT, 400 * FLOAT)
        del a, b
        assert (meter.live_bytes, meter.peak_bytes) == (100 * FLOAT, 400 * FLOAT)
        meter.reset_peak()
        c.double()
        assert (meter.live_bytes, meter.peak_bytes) == (100 * FLOAT, 300 * FLOAT)


def test_dropout_as_on_a_gpu_keeps_a_byte_per_element_for_backward():
    for kernels, kept in ((gpu_kernels, 1), (nullcontext, FLOAT)):
        with fake_tensors(), kernels(), MemoryMeter() as meter:
            out = F.dropout(torch.ones(100, requires_grad=True), 0.1)
            assert meter.live_bytes == 2 * 100 * FLOAT + 100 * kept  # input and output
            del out


def test_layers_that_backward_runs_again_use_the_kernels_of_a_gpu_too():
    with fake_tensors(), gpu_kernels():
        x = torch.ones(100, requires_grad=True)
        checkpoint(
            lambda x: F.dropout(x, 0.1), x, use_reentrant=False
        ).sum().backward()  # raises if it keeps other tensors
        assert x.grad.shape == x.shape


@either
def test_views_and_in_place_operations_add_nothing_and_a_view_keeps_its_base_alive(tensors):
    with tensors(), MemoryMeter() as meter:
        whole = torch.zeros(10, 10)
        part = whole[2:4].t()
        part.add_(1).mul_(part)
        torch.add(whole, 1, out=whole)
        assert meter.peak_bytes == 100 * FLOAT
        del whole
        assert meter.live_bytes == 100 * FLOAT
        del part
        assert meter.live_bytes == 0


@either
def test_existing_tensors_count_only_after_they_are_added(tensors):
    with tensors():
        before = torch.zeros(100)
        with MemoryMeter() as meter:
            before.view(10, 10).add_(1)
            assert meter.peak_bytes == 0
            meter.count([before, before[:10]])
            assert meter.live_bytes == meter.peak_bytes == 100 * FLOAT
            del before
            assert meter.live_bytes == 0


@either
def test_tensors_in_lists_and_keyword_arguments_count_like_others(tensors):
    with tensors():
        before, named = [torch.zeros(10), torch.zeros(20)], torch.zeros(30)
        with MemoryMeter() as meter:
            made = torch._foreach_add(before, 1)
            assert meter.live_bytes == 30 * FLOAT
            torch._foreach_mul_(before, made)
            torch.cat(made, out=named)
            parts = torch.cat(made).split(10)
            assert meter.live_bytes == 60 * FLOAT
            del parts
            assert meter.peak_bytes == 60 * FLOAT and meter.live_bytes == 30 * FLOAT


@either
def test_a_tensor_made_from_a_list_is_counted(tensors):
    with tensors(), MemoryMeter() as meter:
        literal = torch.tensor([1.0, 2.0])
        assert meter.live_bytes == literal.nbytes == 2 * FLOAT


@either
def test_a_resized_storage_counts_at_its_new_size(tensors):
    with tensors(), MemoryMeter() as meter:
        out = torch.empty(0)
        torch.add(torch.ones(50), 1, out=out)
        assert meter.live_bytes == 50 * FLOAT


def test_values_read_from_fake_tensors_are_true_or_one():
    with fake_tensors():
        zeros = torch.zeros(3)
        assert zeros.sum().item() == 1 and zeros.isfinite().all().item() is True


def test_a_storage_resized_by_hand_counts_at_its_new_size_from_the_next_operation():
    with MemoryMeter() as meter:
        tensor = torch.ones(50)
        tensor.untyped_storage().resize_(100 * FLOAT)
        tensor.sum()
        assert meter.live_bytes == 100 * FLOAT


def test_sizes_round_up_to_blocks():
    with MemoryMeter(block_bytes=CUDA_BLOCK_BYTES) as meter:
        tensors = [torch.zeros(size) for size in (0, 1, 128, 129)]
        assert meter.live_bytes == (0 + 1 + 1 + 2) * CUDA_BLOCK_BYTES
        del tensors
        assert meter.live_bytes == 0


def test_a_memory_mapped_file_does_not_count(tmp_path):
    with MemoryMeter() as meter:
        mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=1000)
        meter.count([mapped])
        assert meter.peak_bytes == 0
        assert mapped.clone().nbytes == meter.peak_bytes == 1000 * FLOAT


@either
def test_backward_of_a_linear_layer(tensors):
    rows, wide, narrow = 8, 100, 50
    weights = wide * narrow + narrow
    with tensors():
        layer, x = nn.Linear(wide, narrow), torch.ones(rows, wide)
        with MemoryMeter() as meter:
            meter.count([*layer.parameters(), x])
            before = meter.live_bytes
            assert before == (weights + rows * wide) * FLOAT
            y = layer(x)
            assert meter.live_bytes - before == rows * narrow * FLOAT
            y.backward(torch.ones(()).expand(rows, narrow))
            assert meter.live_bytes - before == (rows * narrow + weights) * FLOAT  # y and the weight gradients


@either
def test_saved_activations_count_until_backward_and_checkpointing_avoids_them(tensors):
    size = 1000 * FLOAT
    with tensors(), MemoryMeter() as meter:

        def three_saved(x):
            return x.exp().exp().exp().sum()  # each `exp` saves its result for backward

        x = torch.ones(1000, requires_grad=True)
        for run, saved in ((three_saved, 3), (lambda x: checkpoint(three_saved, x, use_reentrant=False), 0)):
            x.grad = None
            meter.reset_peak()
            loss = run(x)
            assert meter.live_bytes == size + saved * size + FLOAT
            loss.backward()  # the meter also counts backward's gradients and recomputed activations
            assert meter.peak_bytes >= size + 3 * size
            del loss
            assert meter.live_bytes == 2 * size


def two_steps(family, loss_fn, accelerator, *, memory="off", savers=(), micro_batches=2):
    """Return the peak bytes of the second optimizer step, and the bytes that remain after it."""
    shallow = {"num_layers": 1} if family == "t5" else {}  # one encoder and one decoder layer: two in total
    model = build(family, **shallow)
    tokens = torch.ones((2, 16), dtype=torch.int64)
    labels = tokens if family == "t5" else F.pad(tokens[:, 1:], (1, 0), value=-100)
    num_targets = 32 if family == "t5" else 30
    # fake tensors have no values that could show that no mask is needed
    batch = Batch({"input_ids": tokens, "labels": labels}, num_targets, row_ids=[], needs_its_masks=True)
    optimizer = make_optimizer(model, memory=memory)
    state = TrainState(model, optimizer)
    clip = None if release in savers else 1.0
    with MemoryMeter() as meter, entered(savers, model, optimizer):
        tensors = [tensor for kept in optimizer.state.values() for tensor in kept.values()]
        meter.count([*model.parameters(), *tensors, tokens, labels])
        for _ in range(2):
            meter.reset_peak()
            result = train_step(
                state, [batch] * micro_batches, loss_fn, accelerator, learning_rate=1e-3, max_grad_norm=clip
            )
        assert result.updated
        return meter.peak_bytes, meter.live_bytes


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_fn": plain_loss},
        {"loss_fn": chunked_loss, "savers": [recompute]},
        {"loss_fn": chunked_loss, "memory": "exact"},
        {"loss_fn": chunked_loss, "memory": "lean", "savers": [recompute, release], "micro_batches": 1},
    ],
    ids=["plain", "recompute", "exact", "lean"],
)
def test_a_step_on_fake_tensors_takes_the_bytes_of_a_real_one(family, options):
    accelerator = Accelerator(cpu=True)
    with fake_tensors():
        predicted = two_steps(family, accelerator=accelerator, **options)
    assert predicted == two_steps(family, accelerator=accelerator, **options)


def test_a_step_on_fake_tensors_takes_the_bytes_of_a_real_one_under_autocast():
    # compare in another process, because an Accelerator sets the precision of the whole process
    with started_function(compare_under_autocast) as process:
        result = finish(process)
    assert result.returncode == 0, result.stderr


def compare_under_autocast():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for family in ("t5", "llama"):
        with fake_tensors():
            predicted = two_steps(family, plain_loss, accelerator, savers=[recompute])
        assert predicted == two_steps(family, plain_loss, accelerator, savers=[recompute])


def test_a_step_of_adamw_peaks_with_gradients_and_leaves_weights_and_moments():
    peak_bytes, rest_bytes = two_steps("llama", chunked_loss, Accelerator(cpu=True))
    parameter_bytes = sum(parameter.nbytes for parameter in build("llama").parameters())
    assert peak_bytes > 4 * parameter_bytes > rest_bytes > 3 * parameter_bytes
