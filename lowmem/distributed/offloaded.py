"""The weights of a model's layers, and optimizer state, in host memory or a file."""

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowmem.distributed.collectives import rank_and_world_size
from lowmem.distributed.dtensor import local_of, set_local_
from lowmem.distributed.fully_sharded import Shards, reshards_after_forward
from lowmem.distributed.placement import is_large, is_quantized, is_sharded, pipeline_mesh, training_layers
from lowmem.distributed.vocabulary import OffloadedRows
from lowmem.errors import UsageError
from lowmem.storage.records import HostMemory, Record, ScratchFile, Space, Transfer

_IN_HOST_MEMORY = "host"
_M_MMAP_THRESHOLD = -3  # of malloc.h


class Offloaded:
    """The store of a model whose layers are on the device only while they compute (`Store` in memory/layered.py).

    The large matrices of a layer are one record, which is read into one of two buffers while the layer in the other
    computes. At all other times these parameters are NaN. The optimizer's state of all large matrices is in records
    too, and is read and written some rows at a time, for updates only. So are the weights of embeddings and head, if
    they are larger than a layer and `row_wise` updates allow it. Other weights and state stay on the device.

    With FULL_SHARD, records have this rank's parts, and `fully_shard` all-gathers a layer from its buffer.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], space: Space, dtype: torch.dtype):
        self.space = space
        self.gathered: dict[nn.Parameter, nn.Parameter] = {}
        self._shards = Shards(model) if is_sharded(model) else None
        self._matrices = _matrices(model, layers)
        self._records: dict[nn.Module, Record] = {}
        self._weights: dict[nn.Parameter, Record] = {}
        self._layer_of = {parameter: layer for layer, matrices in self._matrices.items() for parameter in matrices}
        self._dtype = dtype
        self._taken: set[nn.Parameter] = set()
        self._largest = max(sum(map(self._numel, matrices)) for matrices in self._matrices.values())
        vocabulary = {} if self._shards else _vocabulary(model)  # of shards, all ranks need all rows at the same time
        self._vocabulary = {x: modules for x, modules in vocabulary.items() if x.numel() > self._largest}
        self.rows: dict[nn.Parameter, OffloadedRows] = {}
        """The weights of embeddings and head that are offloaded."""
        self._nan = torch.full((), torch.nan, dtype=dtype, device=space.device)
        self.buffers: list[Tensor] = []
        """Two, each of the bytes of the largest layer; empty before the first forward."""
        self._fetched: dict[nn.Module, tuple[int, Transfer]] = {}  # the buffer that each has
        self._in_step = False
        for index, layer in enumerate(layers):
            following = layers[(index + 1) % len(layers)]
            # before the hook of fully_shard, which all-gathers the layer
            layer.register_forward_pre_hook(partial(self._before_forward, following), prepend=True)

    def new_scratch(self) -> Space | None:
        """Return a space for activations and gradients in a second file, or None if weights are in host memory."""
        storage = self.space.storage
        return None if storage.is_memory else Space(storage.in_same_folder(), self.space.device)

    def record_of(self, parameter: nn.Parameter) -> Record | None:
        """Return the record of a weight, or None if it stays on the device."""
        return self._weights.get(parameter)

    def take_weight(self, parameter: nn.Parameter, *, row_wise: bool, sum_dtype: torch.dtype) -> None:
        """Move a weight, which has its final dtype, to its record. Does nothing if it stays on the device.

        `row_wise` says whether updates are, `sum_dtype` in which dtype gradients are summed over micro-batches.
        """
        if parameter in self._taken:
            raise UsageError("offloaded weights already have an optimizer: offload the weights of a new model")
        self._taken.add(parameter)
        if (layer := self._layer_of.get(parameter)) not in self._records and layer is not None:
            self._allocate(layer)
        if row_wise and (modules := self._vocabulary.get(parameter)):
            self._weights[parameter] = record = self.space.allocate(parameter.shape, self._dtype)
            self.rows[parameter] = OffloadedRows(parameter, record, sum_dtype, modules)
        if (record := self.record_of(parameter)) is not None:
            local = local_of(parameter.data)
            writing = self.space.write(record, local.contiguous())
            if self._shards:
                writing.wait()  # because set_local_ frees the data
                set_local_(parameter, self._nan.expand(local.shape))
            self._let_go_of(parameter)

    def _allocate(self, layer: nn.Module) -> None:
        matrices, offset = self._matrices[layer], 0
        self._records[layer] = self.space.allocate([sum(map(self._numel, matrices))], self._dtype)
        for parameter in matrices:
            local = local_of(parameter.data)
            rows = slice(offset, offset + local.numel())
            self._weights[parameter] = self._records[layer].rows(rows)._replace(shape=local.shape)
            offset += self._numel(parameter)

    def _numel(self, parameter: nn.Parameter) -> int:
        return self._shards.numel(parameter) if self._shards else parameter.numel()

    def new_record(self, values: Tensor) -> Record:
        """Return a new record of these values, or of zeros if they are on the meta device."""
        record = self.space.allocate(values.shape, values.dtype)
        if not values.is_meta:
            self.space.write(record, values.contiguous())
        return record

    def opened(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor | Record], slices: Sequence[slice]
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield each slice of rows with these rows of weight and state on the device, and store what they became.

        Tensors in `state` are yielded as they are. Records of the next rows are read while the caller has these.
        """
        records = {name: value for name, value in state.items() if isinstance(value, Record)}
        weight, fetched = self.record_of(parameter), self._fetched.get(self._layer_of.get(parameter))
        is_here = weight is None or (fetched is not None and not self._shards)
        if not is_here:
            records["weight"] = weight
        elif fetched is not None:
            fetched[1].wait()
        rest = {name: value for name, value in state.items() if name not in records}

        def begin(rows: slice) -> dict[str, tuple[Tensor, Transfer]]:
            parts = {name: record.rows(rows) for name, record in records.items()}
            new = {name: torch.empty(x.shape, dtype=x.dtype, device=self.space.device) for name, x in parts.items()}
            return {name: (new[name], self.space.read(part, new[name])) for name, part in parts.items()}

        ahead = begin(slices[0]) if slices else {}
        for index, rows in enumerate(slices):
            opened, ahead = ahead, begin(slices[index + 1]) if index + 1 < len(slices) else {}
            tensors = {name: tensor for name, (tensor, _) in opened.items()}
            for _, transfer in opened.values():
                transfer.wait()
            del opened
            if is_here:
                tensors["weight"] = local_of(parameter.data)[rows]
            yield rows, tensors | rest
            for name, tensor in tensors.items():
                if (record := weight if name == "weight" else records[name]) is not None:
                    self.space.write(record.rows(rows), tensor)

    @contextmanager
    def step(self) -> Iterator[None]:
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def fetch(self, layer: nn.Module, following: nn.Module | None) -> None:
        for other in [other for other in self._fetched if other not in (layer, following)]:
            self._let_go(other)
        self._begin(layer)
        self._fetched[layer][1].wait()
        if following is not None:
            self._begin(following)

    def finish(self, layer: nn.Module) -> None:
        """Let go of sharded weights, because updates change only the records. Others stay until `fetch`."""
        if self._shards and layer in self._fetched:
            self._let_go(layer)

    def let_go(self) -> None:
        """Until the next forward, only records have the layers' weights. Raises the StoreError of a failed write."""
        for layer in list(self._fetched):
            self._let_go(layer)
        self.space.drain()

    def _before_forward(self, following: nn.Module, layer: nn.Module, inputs: object) -> None:
        if not self._in_step:
            self.fetch(layer, following)
            if self._shards and self.space.device.type == "cuda":
                torch.cuda.current_stream(self.space.device).synchronize()  # fully_shard reads in a stream of its own

    def _begin(self, layer: nn.Module) -> None:
        if layer in self._fetched:
            return
        if not self._taken.issuperset(self._matrices[layer]):
            raise UsageError(
                "the model runs, but its weights are not offloaded yet: call make_optimizer after offload_weights"
            )
        if layer not in self._records:  # it has only small weights
            self._allocate(layer)
        self.make_buffers()
        index = next(iter({0, 1} - {index for index, _ in self._fetched.values()}))
        record = self._records[layer]
        buffer = self.buffers[index][: record.numel()]
        self._fetched[layer] = index, self.space.read(record, buffer)
        offset = 0
        for parameter in self._matrices[layer]:
            data = buffer[offset : offset + self._numel(parameter)]
            if self._shards:
                self._shards.gather_from(parameter, data)
            else:
                parameter.data = data.view(parameter.shape)
            offset += len(data)

    def make_buffers(self) -> None:
        if not self.buffers:
            self.buffers = [self._nan.new_empty(self._largest) for _ in range(2)]

    def _let_go(self, layer: nn.Module) -> None:
        if self.space.device.type == "cpu":
            trim_heap()  # about 8 MB for each call of a layer
        self._fetched.pop(layer)[1].wait()
        for parameter in self._matrices[layer]:
            self._let_go_of(parameter)

    def _let_go_of(self, parameter: nn.Parameter) -> None:
        if self._shards:
            self._shards.gather_from(parameter, self._nan.expand(self._shards.numel(parameter)))
        else:
            parameter.data = self._nan.expand(parameter.shape)


_offloaded: WeakKeyDictionary[nn.Module, Offloaded] = WeakKeyDictionary()


def offload_weights(model: nn.Module, where: str | Path | Space, device: torch.device) -> None:
    """Let `make_optimizer` move weights and optimizer state to "host" memory or to a file in a folder.

    From then on, a layer comes to `device` when it runs, and only `layered` can train (see `Offloaded`). At other times
    the parameters of layers are NaN; `save_model` and `save_checkpoint` read the store. The file has no name, and is
    deleted when the process ends. To train on several processes, use FULL_SHARD: each then has a store for its parts.
    Raises UsageError without shards on several processes, for SHARD_GRAD_OP, for quantized weights and for a model
    without layers or in stages, and StoreError if there is no room.
    """
    if offloaded_of(model) is not None:
        raise UsageError("offload_weights was called twice for this model: call it once")
    if pipeline_mesh(model) is not None:
        raise UsageError("a pipeline keeps weights on their stage's device: set pp_size=1, or remove offload_weights")
    if rank_and_world_size()[1] > 1 and not is_sharded(model):
        raise UsageError("offload_weights on several processes needs FULL_SHARD: set it, or start one process")
    if any(map(is_quantized, model.parameters())):
        raise UsageError("offload_weights does not support quantized weights: remove one of the two")
    if is_sharded(model) and not reshards_after_forward(model):
        raise UsageError("offload_weights keeps one layer at a time, SHARD_GRAD_OP all: set FULL_SHARD")
    layers, pin_memory = training_layers(model, "offload_weights"), device.type == "cuda"
    if where == _IN_HOST_MEMORY:
        where = Space(HostMemory(pin_memory=pin_memory), device)
    elif not isinstance(where, Space):
        where = Space(ScratchFile(Path(where), pin_memory=pin_memory), device)
    if device.type == "cpu":
        _map_large_blocks()
    _offloaded[model] = Offloaded(model, layers, where, torch.bfloat16)


def _map_large_blocks() -> None:
    """Let glibc map blocks of 256 KiB or more, which then go back to the system when they are freed."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)


def trim_heap() -> None:
    """Give what glibc keeps of freed memory back to the system."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def offloaded_of(model: nn.Module) -> Offloaded | None:
    """Return the store that `offload_weights` gave to the model."""
    return _offloaded.get(model)


def _matrices(model: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the large matrices of each layer that neither another layer nor a module outside layers uses."""
    within = {module for layer in layers for module in layer.modules()}
    uses = Counter(x for layer in layers for x in layer.parameters())
    uses.update(x for module in model.modules() if module not in within for x in module.parameters(recurse=False))
    return {layer: [x for x in layer.parameters() if is_large(x) and uses[x] == 1] for layer in layers}


def _vocabulary(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """Return the weights that only embeddings and the output head use, and these modules."""
    head = model.get_output_embeddings()
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    return {
        parameter: modules
        for parameter, modules in users.items()
        if parameter.dim() == 2 and all(isinstance(x, nn.Embedding) or x is head for x in modules)
    }


def rows_of(model: nn.Module, weight: nn.Parameter) -> OffloadedRows | None:
    """Return where to read the rows of the weight of an embedding or head, if it is offloaded."""
    offloaded = offloaded_of(model)
    return offloaded and offloaded.rows.get(weight)
