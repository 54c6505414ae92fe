"""Measure one save or one load of one system. Each of the system's ranks (one or two) runs this program.

`checkpoint.py` starts `python benchmarks/checkpoint_systems.py SETTINGS` (JSON), then reads each rank's record.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lowmem, installed or not

from metrics import Watch
from records import Record
from systems import OPTIMIZER, machine

SAMPLED_SECONDS = 0.002
VERSIONS = ("torch", "transformers", "accelerate", "safetensors")


class Gauge:
    """Measure seconds and host memory from `start`, which waits for all ranks, to `stop`."""

    def __init__(self):
        self.record: Record = {}

    def start(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # otherwise, a save could reuse freed memory that is still resident
        barrier()
        self._watch, self._ended = Watch(), threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_SECONDS):
            self._watch.look()

    def stop(self) -> None:
        self.record["seconds"] = self._watch.seconds()
        self._ended.set()
        self._sampler.join()
        self.record |= self._watch.bytes()

    def sync(self, folder: Path) -> None:
        """Sync all files of the save to disk, and record how long this takes."""
        started = time.perf_counter()
        for path in (*folder.rglob("*"), folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self.record["sync_seconds"] = time.perf_counter() - started


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


# --- the same for all systems
def build(settings: SimpleNamespace):
    """Build the model in fp32. A load starts from other weights than the save, so equal digests prove the load."""
    import torch

    from lowmem import load_model

    torch.manual_seed(settings.is_load)
    return load_model(model_config=settings.shape)[0].to(settings.device)


def adamw(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-4, **OPTIMIZER)


def take_step(model, optimizer) -> None:
    """Take one optimizer step on a short row (the same on every rank), so that there are moments to save."""
    import torch

    ids = torch.arange(3, 35, device=next(model.parameters()).device)[None]
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors_of(model, optimizer) -> Iterator:
    """Yield all weights and all tensors of optimizer state."""
    import torch

    for parameter in model.parameters():
        yield parameter.detach()
        for _, value in sorted(optimizer.state[parameter].items()):
            if isinstance(value, torch.Tensor):
                yield value


def digest(model, optimizer) -> str:
    """Hash all weights and tensors of optimizer state, reading each byte once."""
    import torch
    import xxhash

    whole = xxhash.xxh3_128()
    for tensor in tensors_of(model, optimizer):
        whole.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


# --- the systems: each calls gauge.start() before its save or load, and gauge.stop() after a save. After a load, `main`
# calls gauge.stop()
def run_lowmem(settings: SimpleNamespace, gauge: Gauge, memory: str):
    from lowmem import (
        TrainState,
        init_distributed,
        load_checkpoint,
        make_optimizer,
        parallelize,
        save_checkpoint,
    )

    accelerator = init_distributed()
    model = parallelize(build(settings), accelerator)
    state = TrainState(model, make_optimizer(model, memory=memory, **OPTIMIZER))
    if settings.is_load:
        gauge.start()
        load_checkpoint(state, next(Path(settings.folder).glob("step-*")), accelerator)
    else:
        take_step(model, state.optimizer)
        gauge.start()
        save_checkpoint(state, settings.folder, accelerator)
        gauge.stop()
    return model, state.optimizer


def run_accelerate(settings: SimpleNamespace, gauge: Gauge):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=settings.device == "cpu")
    model = build(settings)
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    if settings.is_load:
        gauge.start()
        accelerator.load_state(settings.folder)
    else:
        take_step(wrapped, optimizer)
        gauge.start()
        accelerator.save_state(settings.folder)
        gauge.stop()
    return model, optimizer.optimizer


def run_trainer(settings: SimpleNamespace, gauge: Gauge):
    """Time Trainer's save from `on_step_end` to `on_save`, and its load up to `on_train_begin`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Loaded(Exception):
        pass

    class Bounds(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gauge.start()

        def on_save(self, args, state, control, **kwargs):
            gauge.stop()

        def on_train_begin(self, args, state, control, **kwargs):
            if settings.is_load:
                raise Loaded

    arguments = TrainingArguments(
        output_dir=settings.folder,
        use_cpu=settings.device == "cpu",
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        weight_decay=OPTIMIZER["weight_decay"],
        optim="adamw_torch",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": list(range(3, 35)), "labels": list(range(3, 35))} for _ in range(2)]
    trainer = Trainer(model=build(settings), args=arguments, train_dataset=rows, callbacks=[Bounds()])
    if settings.is_load:
        gauge.start()
        try:
            trainer.train(resume_from_checkpoint=f"{settings.folder}/checkpoint-1")
        except Loaded:
            pass
    else:
        trainer.train()
    return trainer.model, trainer.optimizer.optimizer


def run_torch_save(settings: SimpleNamespace, gauge: Gauge):
    import torch

    model = build(settings)
    optimizer, path = adamw(model), f"{settings.folder}/checkpoint.pt"
    if settings.is_load:
        gauge.start()
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        take_step(model, optimizer)
        gauge.start()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        gauge.stop()
    return model, optimizer


def run_dcp(settings: SimpleNamespace, gauge: Gauge):
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = build(settings)
    optimizer = adamw(model)
    if settings.is_load:
        gauge.start()
        weights, moments = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": moments}
        dcp.load(saved, checkpoint_id=settings.folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    else:
        take_step(model, optimizer)
        gauge.start()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=settings.folder)
        gauge.stop()
    return model, optimizer


@dataclass(frozen=True)
class System:
    run: Callable
    processes: int = 1
    memory: str | None = None
    """lowmem's memory tier; None for other systems."""


SYSTEMS = {
    **{f"lowmem-{memory}": System(run_lowmem, memory=memory) for memory in ("off", "exact", "lean")},
    "accelerate": System(run_accelerate),
    "trainer": System(run_trainer),
    "torch.save": System(run_torch_save),
    "dcp": System(run_dcp),
    **{f"lowmem-{memory} x 2": System(run_lowmem, 2, memory) for memory in ("off", "exact", "lean")},
    "accelerate x 2": System(run_accelerate, 2),
    "dcp x 2": System(run_dcp, 2),
}


def main() -> None:
    settings = SimpleNamespace(**json.loads(sys.argv[1]))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    system, gauge, rank = SYSTEMS[settings.system], Gauge(), os.environ.get("RANK", "0")
    folder = Path(settings.folder)
    arguments = {"memory": system.memory} if system.memory else {}
    model, optimizer = system.run(settings, gauge, **arguments)
    if settings.is_load and settings.device == "cpu":
        digest(model, optimizer)  # counts as part of the load, because a memory-mapped tensor is read only when used
    if settings.is_load:
        gauge.stop()
    record = {"digest": digest(model, optimizer)}
    if settings.is_load:
        # a load creates the state of torch's optimizers; lowmem's exact and lean ones create theirs when constructed
        is_made = system.memory not in ("exact", "lean") and settings.device == "cpu"
        state = sum(tensor.nbytes for tensor in tensors_of(model, optimizer))
        weights = sum(parameter.nbytes for parameter in model.parameters())
        record["made_bytes"] = state - weights if is_made else 0
    barrier()
    if not settings.is_load and rank == "0":
        gauge.sync(folder)
    versions = {name: version(name) for name in VERSIONS}
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    record |= gauge.record | {"machine": machine() | {"device": device}, "versions": versions}
    folder.with_name(f"record-{rank}.json").write_text(json.dumps(record))
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
