"""The connections of a pipeline's stage with the stages before and after it."""

from collections import deque
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lowmem.distributed.collectives import collective


class StageFailed(Exception):
    """A stage before this one has failed."""


class Links:
    """The connections of a stage with its neighbours, one for forward and one for backward."""

    def __init__(self, mesh: DeviceMesh):
        rank = dist.get_rank()
        self.device = torch.device(mesh.device_type)
        self._forward = mesh.get_group(1)
        self.sent_bytes = 0
        """Bytes of all messages that this process has sent."""
        for line in lines_of(mesh):  # all processes make all groups, in one order
            # a group of its own, because NCCL runs what is sent and received in a group in one order
            group = dist.new_group(line)
            if rank in line:
                self.ranks, self._backward = line, group
        self._index = self.ranks.index(rank)
        self._in_flight: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Begin to send `tensor` to the next stage. It must not change before `wait`."""
        self._send(tensor, 1, self._forward)

    def receive(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive a tensor from the stage before."""
        return self._receive(shape, dtype, -1, self._forward)

    def send_back(self, gradient: Tensor) -> None:
        """Begin to send a gradient to the stage before."""
        self._send(gradient, -1, self._backward)

    def receive_back(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive a gradient from the next stage."""
        return self._receive(shape, dtype, 1, self._backward)

    def send_or_fail(self, tensor: Tensor | None) -> None:
        """Send `tensor` to the next stage or, if it is None, that this stage has failed."""
        num_bytes = -1 if tensor is None else tensor.nbytes
        self.send(torch.tensor([num_bytes], dtype=torch.int64, device=self.device))
        if tensor is not None:
            self.send(tensor.detach().contiguous().view(-1).view(torch.uint8))

    def receive_or_fail(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Receive what the stage before passes to `send_or_fail`. Raises StageFailed if it has failed."""
        return self._received_bytes().view(dtype).view(shape)

    def drop(self, count: int) -> None:
        """Receive what the stage before passes to `count` calls of `send_or_fail`, or until it fails, for no use."""
        with suppress(StageFailed):
            for _ in range(count):
                self._received_bytes()

    def _received_bytes(self) -> Tensor:
        num_bytes = int(self.receive(torch.Size([1]), torch.int64).item())
        if num_bytes < 0:
            raise StageFailed
        return self.receive(torch.Size([num_bytes]), torch.uint8)

    def wait(self) -> None:
        """Wait until all that was sent has been received. (On a GPU, its stream waits, not the host.)"""
        while self._in_flight:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self._in_flight.popleft()
        with collective("sending to a neighbouring stage"):
            work.wait()

    def _send(self, tensor: Tensor, offset: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.detach().contiguous()
        # Gloo completes a message only in `wait`. At most one micro-batch for each stage is on its way, with at most
        # two messages in each direction, so an older message has been received.
        while len(self._in_flight) >= 4 * len(self.ranks) or (self._in_flight and self._in_flight[0][0].is_completed()):
            self._wait_for_oldest()
        with collective(f"sending to stage {self._index + offset}"):
            work = dist.isend(tensor, self.ranks[self._index + offset], group=group)
        self._in_flight.append((work, tensor))
        self.sent_bytes += tensor.nbytes

    def _receive(self, shape: torch.Size, dtype: torch.dtype, offset: int, group: dist.ProcessGroup) -> Tensor:
        received = torch.empty(shape, dtype=dtype, device=self.device)
        with collective(f"waiting for stage {self._index + offset}"):
            dist.recv(received, self.ranks[self._index + offset], group=group)
        return received


def lines_of(mesh: DeviceMesh) -> list[list[int]]:
    """Return the ranks of each line of stages."""
    return mesh.mesh.movedim(1, -1).reshape(-1, mesh.size(1)).tolist()
