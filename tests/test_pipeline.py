"""A model that is split into stages trains, evaluates, answers and saves as it does on one process."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from lowmem.adapters.lora import add_lora
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import data_place
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.memory.pipeline import pipeline_of
from lowmem.memory.savers import offload_activations, recompute
from lowmem.model.build import freeze
from tests.forked import fork_ranks
from tests.models import build
from tests.test_layered import batches_of, packed_batches, trained

STEPS, RATE = 2, 0.1


@dataclass(frozen=True)
class Run:
    """Two steps of a model, in stages or, with the layout {}, on one process."""

    layout: dict[str, object] = field(default_factory=lambda: {"pp_size": 2})
    family: str = "llama"
    changes: dict[str, object] = field(default_factory=dict)
    counts: tuple[int, ...] = (4,)
    """The number of micro-batches of each data-parallel rank."""
    memory: str = "off"
    precision: str = "no"
    savers: tuple = ()
    lora: bool = False
    packed: bool = False
    frozen: tuple[str, ...] = ()
    cut: int | None = None
    """The index of the first layer of the last stage."""
    same_as: str | None = None
    """The name of the run whose bits this one has; None: that of one process, nearly."""
    tolerance: float = 1e-6

    def model(self):
        sizes = {"num_layers": 3, "num_decoder_layers": 2} if self.family == "t5" else {"num_hidden_layers": 5}
        model = build(self.family, **sizes | self.changes)
        if self.lora:
            torch.manual_seed(1)
            add_lora(model, rank=4)
        freeze(model, parts=self.frozen)
        return model

    def batches(self, rank):
        """Return the micro-batches of a data-parallel rank."""
        if self.packed:
            return packed_batches(self.family == "t5")
        return batches_of(self.family == "t5", self.counts[rank], first=sum(self.counts[:rank]))

    def train(self, model, batches, accelerator):
        rate = RATE if self.memory == "off" else 1e-3
        options = {"memory": self.memory, "learning_rate": rate, "max_grad_norm": 1.0, "accelerator": accelerator}
        return trained(model, self.savers, batches, steps=STEPS, **options)


PP4, DATA, TENSOR = {"pp_size": 4}, (4, 4), {"pp_size": 2, "tp_size": 2}
DROPOUT = {"attention_dropout": 0.2}
UNTIED = {"tie_word_embeddings": False}
FULL = {"pp_size": 2, "sharding_strategy": "FULL_SHARD"}
ROUNDED = {"savers": (), "tolerance": 2e-2}

# by the number of processes
RUNS = {
    2: {
        "llama": Run(),
        "tied": Run(family="qwen2"),
        "in the encoder": Run(family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, cut=3),
        "between the stacks": Run(family="t5", changes={"num_layers": 3, "num_decoder_layers": 2}, cut=3),
        "in the decoder": Run(family="t5", changes={"num_layers": 1, "num_decoder_layers": 3, **UNTIED}, cut=2),
        "untied t5": Run(family="t5", changes=UNTIED),
        "frozen encoder": Run(family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, frozen=("encoder",)),
        "lora": Run(lora=True),
        "packed": Run(packed=True),
        "exact": Run(memory="exact", **ROUNDED),
        "lean": Run(memory="lean", **ROUNDED),
        "bf16": Run(precision="bf16", **ROUNDED),
        "fp16": Run(precision="fp16", **ROUNDED),
        "dropout": Run(changes=DROPOUT),
        "dropout again": Run(changes=DROPOUT, same_as="dropout"),
        "recomputed": Run(changes=DROPOUT, savers=(recompute,), same_as="dropout"),
        "offloaded": Run(changes=DROPOUT, savers=(offload_activations,), same_as="dropout"),
        "t5 dropout": Run(family="t5", changes={"dropout_rate": 0.1}),
    },
    4: {
        "llama 4": Run(PP4),
        "t5 4": Run(PP4, family="t5"),
        "tied 4": Run(PP4, family="qwen2"),
        "dropout 4": Run(PP4, changes=DROPOUT, same_as="dropout"),
        "t5 dropout 4": Run(PP4, family="t5", changes={"dropout_rate": 0.1}, same_as="t5 dropout"),
        "data": Run(counts=DATA),
        "t5 data": Run(family="t5", counts=DATA),
        "uneven data": Run(counts=(3, 5)),
        "sharded": Run(FULL, counts=DATA, family="qwen2"),
        "t5 sharded": Run(FULL, counts=DATA, family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, cut=3),
        "sharded gradients": Run(FULL | {"sharding_strategy": "SHARD_GRAD_OP"}, counts=DATA),
        "sharded on the host": Run(FULL | {"cpu_offload": True}, counts=(3, 5)),
        "tensor": Run(TENSOR, family="qwen2"),
    },
    8: {"three dimensions": Run(TENSOR, counts=DATA)},
}


import time


def train_on_a_rank(folder, world_size):
    """Do all runs of `RUNS`, save their models, and write down what each rank has."""
    precision = "no"
    accelerator = init_distributed()
    for name, run in RUNS[world_size].items():
        if run.precision != precision:
            AcceleratorState._reset_state()
            accelerator, precision = Accelerator(cpu=True, mixed_precision=run.precision), run.precision
        print(name, time.time(), flush=True)
        model = parallelize(run.model(), accelerator, **run.layout)
        rank = data_place(model).rank
        losses, norms, weights = run.train(model, run.batches(rank), accelerator)
        whole = {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach() for name, x in weights.items()}
        save_file(whole, folder / f"{name} {accelerator.process_index}.safetensors")
        stages = stages_of(model)
        found = {"losses": [x.item() for x in losses], "norms": [x.item() for x in norms], "data_rank": rank}
        found |= {"stage": stages.index, "own": [*stages.own], "most_alive": pipeline_of(model).most_alive}
        found |= {"sent_bytes": stages.links.sent_bytes}
        found |= {"bytes": sum(local_of(x).nbytes for x in model.parameters())}
        (folder / f"{name} {accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


def found_on(folder, world_size, name):
    """Return what each rank has written down, with its weights."""
    ranks = [(folder / f"{name} {rank}.json", folder / f"{name} {rank}.safetensors") for rank in range(world_size)]
    return [json.loads(text.read_text()) | {"weights": load_file(weights)} for text, weights in ranks]


def on_one_process(run):
    if run.precision == "no":
        accelerator = Accelerator(cpu=True)
    batches = [batch for rank in range(len(run.counts)) for batch in run.batches(rank)]
    return run.train(run.model(), batches, accelerator)
