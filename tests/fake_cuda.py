"""Take training steps on fake CUDA tensors, without a GPU, and count their launches, bytes, host syncs and peak.

Needs the CUDA build of torch. `measured` starts a process in which a small library (fake_cuda.c) claims that there are
devices. There, fake tensors are on cuda:0, and all code takes the paths of a GPU: Triton's kernels get their arguments
and are counted, but not compiled or run; streams and pinned memory do nothing.
"""

import ctypes
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from lowmem import cross_entropy
from lowmem.config.train_config import TrainConfig
from lowmem.data.batch import Batch, collate
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.sharding import make_mesh, shard
from lowmem.loss import LOSSES
from lowmem.memory.savers import SAVERS, entered
from lowmem.model.build import build_model, config_from
from lowmem.optim import tiers
from lowmem.optim.adamw import Update
from lowmem.optim.make import make_optimizer
from lowmem.plan.fakes import fake_ranks, fake_tensors
from lowmem.plan.meter import CUDA_BLOCK_BYTES, MemoryMeter
from lowmem.plan.parts import Cluster, Kind
from lowmem.plan.rehearsal import count
from lowmem.step import TrainState, train_step
from tests.processes import ROOT, environment

CUDA = torch.device("cuda", 0)
_NUM_DEVICES = 64  # that torch's guard for fake tensors claims
_WRITTEN = {"add_kernel": ["total"], "sums_kernel": ["log_sums", "expected"], "gradient_kernel": ["logits"]}
"""The arguments that a Triton kernel writes. It reads all arguments."""
_WITHOUT_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}
_WITHOUT_KERNEL |= {"_unsafe_view", "device"}
_ONLY_WRITES = {"copy_", "fill_", "zero_"}  # these do not read the tensor that they change


def measured(cases: Mapping[str, Mapping[str, object]], *, timeout: float = 1200) -> dict[str, dict[str, object]]:
    """Call `count_step` with the arguments of each case, all in one new process; return the results by name.

    If a case has `is_planned`, its result also has the peak that `plan` predicts, as `predicted_bytes`.
    """
    with TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"  # the name that torch loads
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
        child = subprocess.run(
            [sys.executable, "-m", "tests.fake_cuda"],
            cwd=ROOT,
            env=environment(LD_PRELOAD=str(library)),  # hides GPUs, so that torch has none to seed
            input=json.dumps(cases),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            check=True,
        )
    return dict(map(json.loads, child.stdout.splitlines()))


def count_step(
    *,
    shape: Mapping[str, object],
    memory: str = "exact",
    optimizer: str = "adamw",
    savers: Iterable[str] = (),
    loss: str = "chunked",
    lengths: Iterable[int] = (24, 16),
    micro_batches: int = 1,
    packed: bool = False,
    sharding: str = "NO_SHARD",
    ranks: int = 1,
) -> dict[str, object]:
    """Take steps on rows of these `lengths`; return what the last one does, which is like all after the first.

    By phase: its launches, the bytes that they read and write, and the places of its host syncs. Of the whole step:
    the launches of Triton's kernels by name, and the peak of the bytes of tensors. Also this rank's number of
    parameters and weights.
    """
    cluster, mixed_precision = Cluster(ranks, ranks, on_gpu=True), "bf16" if memory == "off" else "no"
    config, is_sharded = config_from(shape), sharding != "NO_SHARD"
    batch = _batch(lengths, is_causal=not config.is_encoder_decoder, packed=packed)  # real: counts its targets
    with ExitStack() as stack:
        accelerator = stack.enter_context(fake_ranks(cluster, mixed_precision=mixed_precision, shards=is_sharded))
        accelerator.state.device = CUDA
        mesh = make_mesh(accelerator, sharding, None, 1) if is_sharded else None
        stack.enter_context(fake_tensors())
        with CUDA:
            model = build_model(config, "sdpa")
        if is_sharded:
            shard(model, mesh, sharding_strategy=sharding, cpu_offload=False)
        tier = make_optimizer(model, name=optimizer, memory=memory)
        tier.register_step_pre_hook(lambda *_: COUNTS.begin_update())
        tier.register_step_post_hook(lambda *_: COUNTS.end_update())
        meter = stack.enter_context(MemoryMeter(block_bytes=CUDA_BLOCK_BYTES))
        meter.count([*model.parameters(), *model.buffers()])
        stack.enter_context(entered([SAVERS[name] for name in savers], model, tier))
        state = TrainState(model, tier)
        is_first = memory == "off" or is_sharded  # its first step also makes state or prepares collectives
        for _ in range(1 + is_first):
            COUNTS.reset()
            meter.count(x for held in tier.state.values() for x in held.values() if isinstance(x, Tensor) and x.is_cuda)
            meter.reset_peak()
            with COUNTS:
                train_step(
                    state,
                    [batch] * micro_batches,
                    LOSSES[loss],
                    accelerator,
                    learning_rate=1e-4,
                    max_grad_norm=None if "release" in savers else 1.0,
                )
        local = [local_of(parameter) for parameter in model.parameters()]
        sizes = {"parameters": len(local), "weights": sum(tensor.numel() for tensor in local)}
        return COUNTS.by_phase() | {"kernels": COUNTS.kernels, "peak_bytes": meter.peak_bytes} | sizes


def predicted_peak(
    *,
    shape: Mapping[str, object],
    memory: str = "exact",
    savers: Iterable[str] = (),
    lengths: Sequence[int] = (24, 16),
    micro_batches: int = 1,
) -> int:
    """Return the peak of the bytes of tensors that `plan` predicts for the step of `count_step`."""
    sizes = {"batch_size": len(lengths), "max_seq_len": max(lengths), "gradient_accumulation_steps": micro_batches}
    recompute = "full" if "recompute" in savers else "cheap" if "recompute_cheap" in savers else "off"
    config = TrainConfig(
        memory=memory, mixed_precision="bf16", recompute=recompute, release="release" in savers, **sizes
    )
    counted = count(config, Cluster(1, 1, on_gpu=True), config_from(shape))
    return max(sum(size for kind, size in parts.items() if kind != Kind.OFFLOADED) for parts in counted.peaks.values())


def _batch(lengths: Iterable[int], *, is_causal: bool, packed: bool) -> Batch:
    """Make rows of these lengths; with `packed`, each of two documents."""
    rows = []
    for length in lengths:
        row = {"input_ids": [5] * length, "labels": [5] * length}
        if packed:
            row["position_ids"] = [*range(length // 2), *range(length - length // 2)]
        rows.append(row)
    return collate(rows, causal=is_causal)


class Counts(TorchDispatchMode):
    """Count, in this context, the launches of operations on CUDA tensors, their bytes and host syncs.

    An operation that computes counts as one launch, though some of torch's launch several kernels (`_foreach_norm`,
    `_fused_adamw_`), or none if a tensor is empty. A gather from a table counts all of the table's bytes as read.
    Raises AssertionError for an operation on tensors of a CPU and of CUDA, other than a copy or with a CPU scalar.
    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.launches, self.bytes, self.kernels = Counter(), Counter(), Counter()
        self.syncs: dict[str, Counter[str]] = {}
        self._is_updating = False

    def begin_update(self) -> None:
        self._is_updating = True

    def end_update(self) -> None:
        self._is_updating = False

    def by_phase(self) -> dict[str, object]:
        return {"launches": self.launches, "bytes": self.bytes, "syncs": self.syncs}

    def add_sync(self, name: str) -> None:
        self.syncs.setdefault(self._phase(), Counter())[f"{name} in {_place()}"] += 1

    def add_launch(self, num_bytes: int) -> None:
        self.launches[self._phase()] += 1
        self.bytes[self._phase()] += num_bytes

    def _phase(self) -> str:
        """Return the current phase: the method that `train_step` called; other threads only run backward."""
        name, frame = "accumulate", sys._getframe(1)
        while frame is not None and frame.f_code is not train_step.__code__:
            name, frame = frame.f_code.co_name, frame.f_back
        if self._is_updating:
            return "update"
        return "forward and backward" if frame is None or name == "accumulate" else "norm"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = _tensors([*args, *kwargs.values()]), _tensors([result])
        on_cuda = [tensor for tensor in (*given, *made) if tensor.is_cuda]
        name = func._schema.name.partition("::")[2]
        if not on_cuda or func.is_view or name in _WITHOUT_KERNEL:
            return result
        on_cpu = [tensor for tensor in (*given, *made) if not tensor.is_cuda]
        is_copy = name in ("_to_copy", "copy_")
        assert is_copy or not any(tensor.dim() for tensor in on_cpu), f"{func} mixes a CPU and CUDA in {_place()}"
        is_blocking = is_copy and on_cpu and not (kwargs.get("non_blocking") or True in args[2:])
        if name == "_local_scalar_dense" or is_blocking:
            self.add_sync(name)
        changed = [
            x for x, of in zip(args, func._schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write
        ]
        written = [*_tensors(changed), *(x for x in made if not any(x is other for other in given))]
        read = given[1:] if name in _ONLY_WRITES else given
        self.add_launch(sum(tensor.nbytes for tensor in (*read, *written) if tensor.is_cuda))
        return result


def _tensors(values: Iterable[object]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(local_of(value))
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _place() -> str:
    """Return the innermost function of lowmem, or of a library that it calls, as "path function"."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in ("lowmem", "transformers", "accelerate"):
            _, found, path = frame.f_code.co_filename.rpartition(f"/{package}/")
            if found and "/torch/" not in path:
                return f"{package}/{path} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


# --- torch and Triton as on a GPU, except that nothing runs
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Call the kernel that torch chooses on a GPU of compute capability 8.0, which it asks the driver for."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if attn_mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


def _address(tensor: Tensor) -> int:
    # each storage is far from others and, as in torch's allocator, begins at a multiple of the block size
    return tensor.untyped_storage()._cdata * CUDA_BLOCK_BYTES + tensor.storage_offset() * tensor.itemsize


def _tensor(make, *args, pin_memory: bool = False, **options: object) -> Tensor:
    return make(*args, **options)


class _Event:
    def __init__(self, *_, **options):
        pass

    def record(self, stream: object = None) -> None:
        pass

    wait = record

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        COUNTS.add_sync("Event.synchronize")


class _Stream:
    device = CUDA

    def __init__(self, *_, **options):
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        COUNTS.add_sync("Stream.synchronize")


def _pretend() -> None:
    """Make torch and Triton accept fake CUDA tensors in this process."""
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_devices").value = _NUM_DEVICES
    current = _Stream()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # if CUDA were available, fake tensors would initialize it
    answers = {"is_available": False, "is_bf16_supported": True, "is_initialized": True, "current_device": 0}
    answers |= {"current_stream": current, "set_device": None, "device_count": 1}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **options: answer)
    torch.cuda.synchronize = lambda *_: COUNTS.add_sync("synchronize")
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.stream = torch.cuda.device = lambda *_: nullcontext()
    # what torch's C++ code would do with the device before it dispatches an operation
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.data_ptr = _address
    torch.tensor = partial(_tensor, torch.tensor)
    F.scaled_dot_product_attention = _attention
    # fake tensors must take the paths of tensors that have data
    import_utils.is_fake_tensor = lambda _: False
    cross_entropy.FakeTensor = tiers.FakeTensor = ()
    kernels_cuda, jit = import_module("lowmem.optim.kernels_cuda"), import_module("triton.runtime.jit")
    jit.JITFunction.run = _count_launch
    kernels_cuda.adamw = partial(_count_updates, kernels_cuda.adamw)


def _count_launch(kernel, *args, grid: object, warmup: bool, **options: object) -> None:
    name = kernel.fn.__name__
    COUNTS.kernels[name] += 1
    tensors = {key: value for key, value in zip(kernel.arg_names, args, strict=False) if isinstance(value, Tensor)}
    COUNTS.add_launch(sum(x.nbytes * (1 + (key in _WRITTEN.get(name, ()))) for key, x in tensors.items()))


def _count_updates(adamw, updates: Iterable[Update], clip_factor: Tensor | None) -> None:
    """Call the kernels' `adamw`, and count the bytes of the tensors that it finds by their addresses.

    It reads each gradient once, and reads and writes each other tensor once.
    """
    updates = list(updates)
    adamw(updates, clip_factor)
    COUNTS.bytes["update"] += sum(x.gradient.nbytes + 2 * sum(t.nbytes for t in x.tensors.values()) for x in updates)


COUNTS = Counts()

if __name__ == "__main__":
    cases = json.loads(sys.stdin.read())
    predicted = {name: predicted_peak(**case) for name, case in cases.items() if case.pop("is_planned", False)}
    _pretend()
    for name, case in cases.items():
        found = count_step(**case) | {"predicted_bytes": predicted.get(name)}
        print(json.dumps([name, found]), flush=True)
