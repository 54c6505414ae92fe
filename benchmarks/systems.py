"""The systems to compare, the settings that they share, and the rows on which they train.

Each system is a line of settings in SYSTEMS; its training loop is a file in `loops/`.
"""

import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# Use this checkout's lowmem, installed or not. Each function imports what it needs itself, because imports count as
# memory of a system.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# --- shared by all systems, in addition to the flags
SEED = 0
OPTIMIZER = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}  # no weight decay for biases and norms
SCHEDULE = {"peak": 1e-4, "warmup_steps": 1, "schedule": "cosine"}
WARM_UP_STEPS = 2  # not timed: in them, AdamW creates its moments, and allocators and thread pools warm up


# --- the systems
@dataclass(frozen=True)
class System:
    """The settings of one system. All other settings are the same for every system."""

    loop: str
    """A module of `loops`."""
    optimizer: str = "adamw"
    """adamw or adafactor, as the loop implements it. Settings that are not in OPTIMIZER keep the loop's defaults."""
    memory: str = "off"
    """lowmem's memory tier."""
    weights: str = "float32"
    """The dtype in which Trainer's model is loaded. lowmem's model is loaded in float32, and its tier converts it."""
    recompute: str | None = None
    """What to recompute: full, cheap or off. None: the value of --recompute."""
    savers: tuple[str, ...] = ()
    """lowmem's other savers: offload_activations, release."""
    attention: str = "sdpa"
    """Trainer's attention: transformers' default, or eager, which lowmem chooses for T5 on a CPU."""
    sharding_strategy: str = "NO_SHARD"
    """lowmem's sharding strategy."""
    zero_stage: int = 0
    """The ZeRO stage of DeepSpeed under Trainer; 0: no DeepSpeed."""
    launcher: str = "torchrun"
    """torchrun or accelerate. With torchrun, a single process is started by python alone."""

    @property
    def has_bf16_weights(self) -> bool:
        return self.memory != "off" or self.weights == "bfloat16"

    @property
    def package(self) -> str | None:
        """The package to install in addition to lowmem's dependencies, if any."""
        return "llamafactory" if self.loop == "llamafactory" else "deepspeed" if self.zero_stage else None

    def cannot(self, *, is_causal: bool, processes: int) -> str:
        """Return why the system cannot run with these settings, or an empty string if it can."""
        if self.loop == "llamafactory" and not is_causal:
            return "trains causal models only"
        if self.loop == "plain" and processes > 1:
            return "trains on one process only"
        if self.sharding_strategy != "NO_SHARD" and processes == 1:
            return "needs at least two processes"
        return ""


SYSTEMS = {
    "lowmem-off": System("lowmem"),
    "lowmem-exact": System("lowmem", memory="exact"),
    "lowmem-lean": System("lowmem", memory="lean"),
    "lowmem-exact-adafactor": System("lowmem", memory="exact", optimizer="adafactor"),
    "lowmem-exact-cheap": System("lowmem", memory="exact", recompute="cheap"),
    "lowmem-exact-no-recompute": System("lowmem", memory="exact", recompute="off"),
    "lowmem-exact-sharded": System("lowmem", memory="exact", sharding_strategy="FULL_SHARD"),
    "lowmem-lean-sharded": System("lowmem", memory="lean", sharding_strategy="FULL_SHARD"),
    "lowmem-lean-offload": System("lowmem", memory="lean", savers=("offload_activations",)),
    "lowmem-lean-released": System("lowmem", memory="lean", savers=("release",)),
    "trainer": System("trainer"),
    "trainer-accelerate": System("trainer", launcher="accelerate"),
    "trainer-no-checkpointing": System("trainer", recompute="off"),
    "trainer-adafactor": System("trainer", optimizer="adafactor"),
    "trainer-adafactor-no-checkpointing": System("trainer", optimizer="adafactor", recompute="off"),
    "trainer-bf16-weights": System("trainer", weights="bfloat16"),
    "trainer-eager": System("trainer", attention="eager"),
    "trainer-zero2": System("trainer", zero_stage=2, launcher="accelerate"),
    "llamafactory": System("llamafactory"),
    "plain": System("plain"),
}


class Mark(NamedTuple):
    """Wall-clock seconds, CPU seconds and (if there is a counter) joules at the end of an optimizer step."""

    wall: float
    cpu: float
    joules: float | None


@dataclass
class Run:
    """What a system records while it trains."""

    imported_bytes: int
    """Resident bytes after imports, before the model is loaded."""
    losses: list[float] = field(default_factory=list)
    """Mean loss over the targets of each optimizer step, as the system reports it."""
    grad_norms: list[float | None] = field(default_factory=list)
    """Gradient norm of each optimizer step before clipping, if the loop records it."""
    marks: list[Mark] = field(default_factory=list)
    """One `Mark` for each optimizer step, taken at its end."""
    first_step_at: float = 0.0
    """When the first step ended, in seconds since the epoch."""
    peak_rss_bytes: int = 0
    """Peak resident bytes until the end of the last step."""
    peak_device_bytes: int | None = None
    """Peak bytes of tensors on a GPU until the end of the last step."""
    phases: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each phase, for each optimizer step. The loop marks phases; a GPU may run them later."""
    _seconds: Counter[str] = field(default_factory=Counter)
    _within: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`, except for phases in it."""
        outer, self._within, start = self._within, 0.0, time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[name] += seconds - self._within
        self._within = outer + seconds

    def timed(self, name: str, function: Callable) -> Callable:
        """Return `function` with each call counted as a phase."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def watch(self, optimizer) -> None:
        """Time every backward of this process, the optimizer's updates and its sums over micro-batches (lowmem)."""
        import torch

        torch.Tensor.backward = self.timed("backward", torch.Tensor.backward)
        if hasattr(optimizer, "add"):
            optimizer.add = self.timed("sums", optimizer.add)
        update = ExitStack()
        optimizer.register_step_pre_hook(lambda *_: update.enter_context(self.phase("update")))
        optimizer.register_step_post_hook(lambda *_: update.close())

    def mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak_device_bytes = torch.cuda.max_memory_allocated()
        if not self.marks:
            self.first_step_at = time.time()
        self.peak_rss_bytes = peak_resident_bytes()
        self.phases.append(dict(self._seconds))
        self._seconds.clear()
        self.marks.append(Mark(time.perf_counter(), time.process_time(), joules()))


# --- the rows
_ENCODED_ROWS = "rows.jsonl"


def open_work(settings: SimpleNamespace, tokenizer, config) -> tuple[object, Callable]:
    """Return rows and their encoder. Without `train_file`, the rows are generated and have `seq_len` random tokens."""
    from lowmem import make_encoder, open_rows

    if settings.train_file:
        rows = open_rows(settings.train_file, columns=["prompt", "response"])
        return rows, make_encoder(tokenizer, is_encoder_decoder=config.is_encoder_decoder, max_seq_len=settings.seq_len)
    generator, rows = random.Random(SEED), []
    for _ in range(settings.num_rows):
        ids, response = (generator.choices(range(3, config.vocab_size), k=settings.seq_len) for _ in range(2))
        labels = response if config.is_encoder_decoder else [-100, *ids[1:]]  # no target for the first token
        rows.append({"input_ids": ids, "labels": labels})
    return rows, dict


def open_steps(settings: SimpleNamespace, rows, encode: Callable, **options):
    """Open lowmem's stream, which sorts a step's rows by length. Every system trains on the stream's micro-batches."""
    from lowmem import open_stream

    return open_stream(
        rows,
        encode,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        seed=SEED,
        **options,
    )


def build(settings: SimpleNamespace) -> None:
    """Save what the systems load: initial weights, the byte tokenizer and, for systems other than lowmem, the
    encoded rows in the order in which lowmem trains on them."""
    import torch

    from lowmem import load_model

    torch.manual_seed(SEED)
    model, tokenizer = load_model(model_config=settings.shape)
    model.save_pretrained(settings.folder)
    tokenizer.save_pretrained(settings.folder)
    write_rows(settings, *open_work(settings, tokenizer, model.config))


def write_rows(settings: SimpleNamespace, rows, encode: Callable) -> None:
    """Save the encoded rows of `settings.steps` steps, in the order in which lowmem trains on them."""
    # a sequential distributed sampler reads the file in this order: per micro-batch, rank 0's rows, then rank 1's
    ranks = [
        open_steps(settings, rows, encode, rank=rank, world_size=settings.processes)
        for rank in range(settings.processes)
    ]
    with open(Path(settings.folder, _ENCODED_ROWS), "w", encoding="utf-8") as file:
        for _ in range(settings.steps):
            steps = [next(rank) for rank in ranks]
            for micro_batches in zip(*steps, strict=True):
                row_ids = (row_id for batch in micro_batches for row_id in batch.row_ids)
                file.writelines(json.dumps(encode(rows[row_id])) + "\n" for row_id in row_ids)


def encoded_rows(folder: str) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of each row, in the order of training."""
    with open(Path(folder, _ENCODED_ROWS), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- the machine
def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    # not ru_maxrss, because in a child process it starts at the parent's size
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def machine() -> dict[str, object]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {"cpu": cpu.partition(":")[2].strip() or platform.machine(), "cores": os.cpu_count()}


def joules() -> float | None:
    """Return the joules used so far by CPU packages (RAPL) and the run's GPUs (pynvml); None without counters."""
    counters = [Path(zone, "energy_uj") for zone in Path("/sys/class/powercap").glob("intel-rapl:*[0-9]")]
    packages = [counter for counter in counters if counter.parent.name.count(":") == 1 and os.access(counter, os.R_OK)]
    counted = [int(counter.read_text()) / 1e6 for counter in packages]
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        try:
            import pynvml
        except ModuleNotFoundError:
            return None  # without the GPUs' counters, the sum would miss most of the energy
        pynvml.nvmlInit()
        for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
            by_name = pynvml.nvmlDeviceGetHandleByUUID
            gpu = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else by_name(name)
            counted.append(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)
    return sum(counted) if counted else None
