"""Build a model in less memory than its weights: large parameters are in a file, except those in use."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lowmem.distributed.dtensor import is_shared, set_local_
from lowmem.distributed.fill import fill_from
from lowmem.storage.records import Record, ScratchFile, Space

_MIN_BYTES = 2**20  # smaller parameters stay in memory
_RESIDENT_BYTES = 2**28  # of the larger ones
_aten = torch.ops.aten
_OVERWRITE = {_aten.normal_.default, _aten.uniform_.default, _aten.zero_.default, _aten.fill_.Scalar}


def built_in_file(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Return what `build` returns, with its large parameters on meta and their values in a file without a name.

    `build` runs as it is, so that it draws the same random weights as in memory. `parallelize` will fill the parameters
    from the file. Raises StoreError if there is no room in `folder`.
    """
    space = Space(ScratchFile(folder, pin_memory=False), torch.device("cpu"))
    pager = _Pager(space)
    registering = register_module_parameter_registration_hook(pager.register)
    try:
        with pager:
            model = build()
    finally:
        registering.remove()
    records = {}
    for name, parameter in model.named_parameters():
        if (record := pager.take(parameter)) is not None:
            records[name] = record
            set_local_(parameter, torch.empty_like(parameter, device="meta"))
    space.sync()
    fill_from(model, records)
    return model


class _Pager(TorchDispatchMode):
    """Write the least recently used parameters to a file, and read one back before an operation on it."""

    def __init__(self, space: Space):
        super().__init__()
        self._space = space
        self._records: dict[Tensor, Record] = {}
        self._resident: dict[Tensor, None] = {}  # least recently used first
        self._absent: dict[torch.dtype, Tensor] = {}

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.nbytes < _MIN_BYTES or not parameter.is_cpu:
            return
        if not self._is_absent(parameter):  # else it is now tied to another module
            self._resident[parameter] = None
            with _disable_current_modes():
                self._spill(keep={parameter})

    def take(self, parameter: Tensor) -> Record | None:
        """Write a parameter to the file and return its record; return None if the parameter is small."""
        if parameter in self._resident or (parameter in self._records and not self._is_absent(parameter)):
            self._write(parameter)
        return self._records.pop(parameter, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        used = {x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)}
        for parameter in used & (self._records.keys() | self._resident.keys()):
            if self._is_absent(parameter) and function in _OVERWRITE:
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
            elif self._is_absent(parameter):
                parameter.data = self._space.read_to_host(self._records[parameter])
            self._resident[parameter] = self._resident.pop(parameter, None)
        self._spill(keep=used)
        return function(*args, **(kwargs or {}))

    def _spill(self, keep: set[Tensor]) -> None:
        """Write parameters until few are in memory. Those of which views are in use stay."""
        num_bytes = sum(parameter.nbytes for parameter in self._resident)
        for parameter in list(self._resident):
            if num_bytes <= _RESIDENT_BYTES:
                return
            if parameter not in keep and not is_shared(parameter):
                num_bytes -= parameter.nbytes
                self._write(parameter)

    def _write(self, parameter: Tensor) -> None:
        record = self._records.get(parameter)
        if record is None or (record.shape, record.dtype) != (parameter.shape, parameter.dtype):
            self._records[parameter] = record = self._space.allocate(parameter.shape, parameter.dtype)
        self._space.write(record, parameter.detach().contiguous())
        absent = self._absent.setdefault(parameter.dtype, torch.full((), torch.nan, dtype=parameter.dtype))
        parameter.data = absent.expand(parameter.shape)
        self._resident.pop(parameter, None)

    def _is_absent(self, parameter: Tensor) -> bool:
        absent = self._absent.get(parameter.dtype)
        return absent is not None and parameter.untyped_storage().data_ptr() == absent.data_ptr()
