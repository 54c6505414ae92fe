"""The checkpoints that fuzz.py damages, and how a run resumes from them."""

import json
from pathlib import Path

import torch
import xxhash
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.fuzz_inputs import Case, Rows, texts
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.manifest import write_manifest
from lowmem.checkpoint.resume import check_same_run, checkpoint_to_resume, rows_per_step, template_time
from lowmem.checkpoint.save import save_checkpoint
from lowmem.checkpoint.tensors import model_tensors, named_parameters
from lowmem.data.stream import open_stream
from lowmem.errors import UsageError
from lowmem.optim.make import make_optimizer
from lowmem.optim.state import optimizer_tensors
from lowmem.step import TrainState
from lowmem.storage.files import record_file


def checkpoint_case(folder: Path, *, is_resealed: bool = False) -> Case:
    torch.set_num_threads(1)
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    optimizer = make_optimizer(model, name="adamw", memory="exact")
    stream = open_stream(texts(), lambda row: {"input_ids": [1, 2], "labels": [1, 2]}, batch_size=4, prefetch=0)
    state = TrainState(model, optimizer, stream, seed=3)
    state.step, state.updates, state.best = 5, 5, {"step": 4, "eval_loss": 1.5}
    stream.position = 20
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 1, "global_batch_size": None}
    settings = sizes | {"memory": "exact", "optimizer": "adamw", "template_time": "2026-01-01T00:00:00"}
    accelerator = Accelerator(cpu=True)
    path = save_checkpoint(state, folder / "checkpoints", accelerator, config=settings)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]

    def items(tensors: dict[str, torch.Tensor], fields: dict[str, object]) -> Rows:
        found = {name: x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}
        return [f"{name} {value!r}" for name, value in sorted((found | fields).items())]

    def read() -> Rows:
        """Resume as `train` does, and use what was loaded."""
        checkpoint = checkpoint_to_resume("auto", folder)
        if checkpoint is None:
            raise UsageError("--resume=auto skips it")
        template_time(checkpoint)
        check_same_run(checkpoint, settings, fixed=["template_time"])
        size = rows_per_step(checkpoint, 1, **sizes)
        state.step = state.updates = state.seed = state.best = None
        load_checkpoint(state, checkpoint, accelerator, verify=False)
        fields = {"step": state.step, "updates": state.updates, "seed": state.seed, "best": state.best}
        fields |= {"position": state.stream.position}
        state.note_best(2.0)
        torch.Generator().manual_seed(state.seed + state.step + state.updates + size)
        next(iter(state.stream))
        return items(model_tensors(model) | optimizer_tensors(named_parameters(model, optimizer), optimizer), fields)

    def second() -> Rows:
        saved = json.loads((path / "state.json").read_text())
        fields = {name: saved[name] for name in ("step", "updates", "seed", "best")}
        tensors = load_file(path / "model" / "model.safetensors") | load_file(path / "optimizer.safetensors")
        return items(tensors, fields | {"position": saved["stream"]["position"]})

    def structure(data: bytes) -> list[range]:
        header = int.from_bytes(data[:8], "little")
        return [range(8 + header)] if header < len(data) else []

    def reseal(target: Path) -> None:
        manifest = path / "manifest.json"
        if target != manifest:
            others = {file.relative_to(path).as_posix(): record_file(file) for file in files if file != manifest}
            write_manifest(path, 5, others)
            return
        try:
            sealed = json.loads(manifest.read_text())
            digest = xxhash.xxh3_128_hexdigest(json.dumps(sealed["manifest"], sort_keys=True).encode())
            manifest.write_text(json.dumps(sealed | {"xxh3_128": digest}))
        except (ValueError, LookupError, TypeError, RecursionError):
            return

    if is_resealed:
        return Case(folder, files, read, second, structure, reseal)
    return Case(folder, files, read, None, structure)
