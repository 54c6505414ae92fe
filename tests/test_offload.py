"""Offload bounds the bytes in flight, frees no memory that a copy uses, and does not copy weights that autocast casts.

On a CPU, copies are done at once, but `Offload` calls its host in the order in which a GPU would need.
"""

from functools import partial
from weakref import finalize

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lowmem.loss import chunked_loss
from lowmem.memory.offload import Offload, PinnedMemory, Slabs
from lowmem.memory.savers import offload_activations
from tests.models import build
from tests.test_savers import batch_of

ROW_BYTES = 4 * 64


class Watched:
    """A host that counts the bytes of copies for which nothing has waited, and notes memory that is freed before."""

    def __init__(self, window_bytes=0):
        self.window_bytes = window_bytes
        self.in_flight, self.most_bytes, self.copied, self.fetched = {}, 0, 0, 0
        self.freed_early = []

    def to_host(self, tensor):
        self.copied += 1
        return tensor.clone(), self._started(tensor)

    def to_device(self, copy):
        self.fetched += 1
        tensor = copy.clone()
        return tensor, self._started(tensor)

    def wait(self, event):
        del self.in_flight[event]

    def _started(self, tensor):
        event = self.copied + self.fetched
        self.in_flight[event] = tensor.nbytes
        self.most_bytes = max(self.most_bytes, sum(self.in_flight.values()))
        finalize(tensor.untyped_storage(), lambda: event in self.in_flight and self.freed_early.append(event))
        return event


def weights_on(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 64, generator=generator).to(device).requires_grad_() for _ in range(6)]


def loss_of(weights, rows):
    """A loss whose operations save tensors of two sizes, some of them twice, and a transposed one."""
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(weights[0].device)
    for weight in weights:
        hidden = (hidden @ weight).tanh() * hidden.sigmoid() + (hidden[: rows // 2].T.contiguous().T @ weight).sum(0)
    return hidden.square().sum()


@pytest.mark.parametrize("window_rows", [1, 300])
def test_bytes_in_flight_are_bounded_and_no_memory_is_freed_before_its_copy(window_rows):
    weights, largest = weights_on("cpu"), 128 * ROW_BYTES
    host = Watched(window_rows * ROW_BYTES)
    bound = max(host.window_bytes, largest)
    offload = Offload(weights, host)
    for rows in (128, 96, 128):
        expected = torch.autograd.grad(loss_of(weights, rows), weights)
        with saved_tensors_hooks(offload.pack, offload.unpack):
            host.most_bytes = 0
            loss = loss_of(weights, rows)
            assert sum(host.in_flight.values()) == offload.bytes_in_flight
            assert 0.6 * rows / 128 * bound < host.most_bytes <= bound
            found = torch.autograd.grad(loss, weights, retain_graph=True)
            again = torch.autograd.grad(loss, weights)
            assert host.most_bytes <= bound + largest  # the one that an operation takes
            assert all(map(torch.equal, expected, found)) and all(map(torch.equal, expected, again))
            loss = loss_of(weights, rows)  # this graph is dropped after forward, the next in the middle of its backward
            loss = loss_of(weights, rows)
            torch.autograd.grad(loss, weights[-2:])
            del loss
        assert host.in_flight == {} and offload.bytes_in_flight == 0
    assert host.freed_early == []


def test_fetches_run_ahead_of_backward_within_the_same_bytes():
    order = []

    class Logged(Watched):
        def to_device(self, copy):
            order.append("fetch")
            return super().to_device(copy)

    host = Logged(3 * 128 * ROW_BYTES)
    offload = Offload([], host)

    def unpack(packed):
        order.append("take")
        return offload.unpack(packed)

    with saved_tensors_hooks(offload.pack, unpack):
        value = torch.randn(128, 64, requires_grad=True)
        for _ in range(8):
            value = value.sin()
        value.sum().backward()
    # the last three were in flight when backward began; from then on, each one taken makes room for an earlier one
    assert order == ["take", "fetch"] * 5 + ["take"] * 3 and host.most_bytes == host.window_bytes


def test_slabs_waste_little_and_are_used_again():
    slabs = Slabs(pin_memory=False, slab_bytes=2**18)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        live, num_bytes = [], 0
        for number, rows in enumerate(torch.randint(100, 3_000, (40,), generator=generator).tolist()):
            source = torch.full((3, rows), number, dtype=torch.int16).T
            live.append((number, slabs.empty_like(source).copy_(source)))
            num_bytes += source.nbytes
            assert live[-1][1].stride() == source.stride()
        del source
        assert num_bytes < slabs.num_bytes <= 2**19
        live.pop(20)  # not in order
        while live:
            assert all((tensor == number).all() for number, tensor in live)
            del live[-7:]
    large = slabs.empty_like(torch.empty(2**18 + 1, dtype=torch.uint8))
    assert len(large) == 2**18 + 1 and slabs.num_bytes == 2**20


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_weights_that_autocast_casts_are_not_copied(family):
    model, batch = build(family), batch_of(family)
    casts = [weight.detach().bfloat16() for weight in model.parameters() if weight.dim() == 2]
    copied = []

    class Logged(Watched):
        def to_host(self, tensor):
            copied.append(tensor.clone())
            return super().to_host(tensor)

    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    with autocast():
        loss = chunked_loss(model, batch)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    with autocast(), offload_activations(model, host=Logged(2**20)):
        loss = chunked_loss(model, batch)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, expected, found))
    assert len(copied) > 20
    for tensor in copied:
        assert not any(torch.equal(tensor, cast) or torch.equal(tensor, cast.T) for cast in casts)


@pytest.mark.gpu
@pytest.mark.parametrize("window_rows", [1, 3 * 2**14, 2**30])
def test_on_a_gpu_gradients_keep_their_bits_and_forward_holds_the_window_only(window_rows):
    weights, rows = weights_on("cuda"), 2**14
    host = PinnedMemory(torch.device("cuda"), window_bytes=window_rows * ROW_BYTES)
    for _ in range(3):
        expected = torch.autograd.grad(loss_of(weights, rows), weights)
        before = torch.cuda.memory_allocated()
        with offload_activations(torch.nn.ParameterList(weights), host=host):
            loss = loss_of(weights, rows)
        held = torch.cuda.memory_allocated() - before
        assert held <= (max(window_rows, rows) + 16) * ROW_BYTES
        assert all(map(torch.equal, expected, torch.autograd.grad(loss, weights)))
        del loss
