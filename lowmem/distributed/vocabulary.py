"""The weights of embeddings and output head in records: only the rows that are used at a time are on the device."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem.errors import UsageError
from lowmem.storage.records import Record, Transfer

_ELEMENTS = 2**23  # of a weight or gradient, read at a time


class OffloadedRows:
    """A weight (vocabulary, hidden) of embeddings, a head, or both, and its gradient in a step.

    Embeddings read the rows of their tokens, and keep what backward says of these. The loss reads the head's rows a
    slice at a time, and adds the gradient of each slice to a record. `gradient` puts both together, for some rows.
    """

    def __init__(self, parameter: nn.Parameter, weight: Record, sum_dtype: torch.dtype, modules: Sequence[nn.Module]):
        self._parameter, self._weight, self._sum_dtype = parameter, weight, sum_dtype
        self.add: Callable[[int, int, Tensor, Tensor], None]
        """Add a gradient of rows to a total, in place: (number of the sum, first row, total, gradient)."""
        self._gradient: Record | None = None  # embeddings need one only to keep gradients
        self._lookups: list[tuple[Tensor, Tensor]] = []
        self._sums = 0  # gradients of the head that were added
        for module in modules:
            is_head = isinstance(module, nn.Linear)
            module.forward = (self._head if is_head else self._embedding)(module)
            if is_head and parameter.requires_grad:
                self._allocate()

    def read(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the rows of each slice; the next are read while the caller has these."""
        ahead = self._begin(parts[0])
        for index in range(len(parts)):
            rows, transfer = ahead
            ahead = self._begin(parts[index + 1]) if index + 1 < len(parts) else None
            transfer.wait()
            yield rows

    def parts(self) -> list[slice]:
        """Split all rows into slices."""
        height = max(1, _ELEMENTS // self._weight.shape[1])
        return [
            slice(first, min(first + height, self._weight.shape[0]))
            for first in range(0, self._weight.shape[0], height)
        ]

    def clear(self) -> None:
        """Forget the gradient. Call it before each step."""
        self._lookups.clear()
        self._sums = 0

    def add_gradient(self, part: slice, gradient: Tensor) -> None:
        """Add a micro-batch's gradient of the head. A micro-batch adds all slices before the next one does."""
        if self._sums:
            total = self.kept(part)
            self.add(self._sums, part.start, total, gradient)
        else:
            total = gradient.to(self._sum_dtype).contiguous()
        self.keep(part, total)
        self._sums += part.stop == len(self._parameter)

    def gradient(self, part: slice) -> Tensor:
        """Return the complete gradient of some rows."""
        total = self.kept(part) if self._sums else None
        height = part.stop - part.start
        for number, (tokens, gradient) in enumerate(self._lookups, self._sums):
            rows = (tokens - part.start).masked_fill_((tokens < part.start) | (tokens >= part.stop), height)
            # tokens of other slices get the last row, for which there is no gradient
            dense = torch.ops.aten.embedding_dense_backward(gradient, rows, height + 1, height, False)[:height]
            if total is None:
                total = dense.to(self._sum_dtype)
            else:
                self.add(number, part.start, total, dense)
        if total is None:
            shape = (height, self._weight.shape[1])
            total = torch.zeros(shape, dtype=self._sum_dtype, device=self._weight.space.device)
        return total

    def keep(self, part: slice, gradient: Tensor) -> None:
        """Keep the complete gradient of some rows, which `kept` returns."""
        self._allocate()
        self._gradient.space.write(self._gradient.rows(part), gradient)

    def kept(self, part: slice) -> Tensor:
        """Return what was kept, or before that the head's sum, of some rows."""
        record = self._gradient.rows(part)
        gradient = torch.empty(record.shape, dtype=record.dtype, device=record.space.device)
        record.space.read(record, gradient).wait()
        return gradient

    def _allocate(self) -> None:
        if self._gradient is None:
            self._gradient = self._weight.space.allocate(self._weight.shape, self._sum_dtype)

    def _begin(self, part: slice) -> tuple[Tensor, Transfer]:
        record = self._weight.rows(part)
        rows = torch.empty(record.shape, dtype=record.dtype, device=record.space.device)
        return rows, record.space.read(record, rows)

    def _embedding(self, module: nn.Embedding) -> Callable[[Tensor], Tensor]:
        forward = type(module).forward

        def look_up(tokens: Tensor) -> Tensor:
            with _Lookup(self, self._parameter):
                return forward(module, tokens)

        return look_up

    def _head(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def all_logits(hidden: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise UsageError(
                    "the head's weight is offloaded, so only the chunked loss can train: set --loss=chunked"
                )
            logits = torch.cat([F.linear(hidden, rows) for rows in self.read(self.parts())], dim=-1)
            return logits if module.bias is None else logits + module.bias

        return all_logits

    def _looked_up(self, tokens: Tensor, padding: int | None) -> Tensor:
        return _Rows.apply(self._parameter, tokens, self, padding)


class _Lookup(TorchFunctionMode):
    """Let F.embedding take the rows of an offloaded weight."""

    def __init__(self, rows: OffloadedRows, parameter: nn.Parameter):
        super().__init__()
        self._rows, self._parameter = rows, parameter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.embedding and len(args) > 1 and args[1] is self._parameter:
            padding = args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx")
            return self._rows._looked_up(args[0], padding)
        return function(*args, **(kwargs or {}))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, tokens: Tensor, rows: OffloadedRows, padding: int | None) -> Tensor:
        ctx.rows, ctx.tokens, ctx.padding = rows, tokens, padding
        record = rows._weight
        return record.space.gather(record, tokens.flatten()).view(*tokens.shape, record.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, ...]:
        tokens = ctx.tokens
        if ctx.padding is not None:  # its row gets no gradient
            tokens = tokens.masked_fill(tokens == ctx.padding, -1)
        ctx.rows._lookups.append((tokens, gradient))
        return None, None, None, None
