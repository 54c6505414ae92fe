"""Steps on fake CUDA tensors: no mix of devices, few syncs and launches, the bytes of the tiers, the peak of `plan`.

Also a run on GPUs whose driver torch cannot use.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import measured
from tests.models import FAMILIES, LLAMA, T5
from tests.processes import PROGRAM, run

pytestmark = pytest.mark.cuda_build

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 16384}
MEDIUM = LLAMA | WIDE | {"num_attention_heads": 8}
WIDE_T5 = T5 | {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1024, "vocab_size": 16384, "dropout_rate": 0.1}
TIERS = {
    "off": {"memory": "off"},
    "exact": {},
    "lean": {"memory": "lean"},
    "bf16 moments": {"optimizer": "adamw_bf16"},
    "lean, bf16 moments": {"memory": "lean", "optimizer": "adamw_bf16"},
    "lean, adafactor": {"memory": "lean", "optimizer": "adafactor"},
}
WAYS = {
    "recompute": {"savers": ["recompute"]},
    "recompute_cheap": {"savers": ["recompute_cheap"], "micro_batches": 3},
    "offload": {"savers": ["offload_activations"]},
    "offload layers": {"savers": ["recompute", "offload_activations"], "micro_batches": 2},
    "release": {"savers": ["release"], "memory": "lean"},
    "packed": {"packed": True},
    "plain": {"loss": "plain"},
    "replicated": {"ranks": 4},
    "full shard": {"sharding": "FULL_SHARD", "ranks": 4, "savers": ["recompute"]},
    "full shard, lean": {"sharding": "FULL_SHARD", "ranks": 4, "memory": "lean", "micro_batches": 2},
    "full shard, off": {"sharding": "FULL_SHARD", "ranks": 4, "memory": "off", "savers": ["offload_activations"]},
    "gradient shard": {"sharding": "SHARD_GRAD_OP", "ranks": 4, "micro_batches": 2},
}
STEPS = {f"llama, {name}": {"shape": LLAMA} | case for name, case in {**TIERS, **WAYS}.items()}
STEPS |= {
    "t5": {"shape": T5},
    "t5, dropout": {"shape": T5 | {"dropout_rate": 0.1}, "savers": ["recompute_cheap"], "memory": "lean"},
    "t5, equal lengths": {"shape": T5, "lengths": [24, 24], "savers": ["recompute", "offload_activations"]},
    "t5, full shard": {"shape": T5, "sharding": "FULL_SHARD", "ranks": 4},
    "qwen2": {"shape": FAMILIES["qwen2"]},
}
TIER_BYTES = {"off": 32, "exact": 26, "lean": 10, "bf16 moments": 18, "lean, bf16 moments": 14}
LOSS = {"shape": FAMILIES["qwen2"] | {"vocab_size": 151_936}, "memory": "lean", "savers": ["recompute"]}
LOSSES = {"loss, 5 slices": LOSS | {"lengths": [513]}, "loss, 1 slice": LOSS | {"lengths": [97]}}
UPDATES = {f"update, {tier}": {"shape": MEDIUM} | TIERS[tier] for tier in TIER_BYTES}
PLANS = {
    f"plan, {name}, {tier}, {' '.join(savers)}": {
        "shape": shape,
        **TIERS[tier],
        "savers": savers,
        "lengths": lengths,
        "micro_batches": 2,
        "is_planned": True,
    }
    for name, shape, lengths in (("llama", MEDIUM, [256] * 4), ("t5", WIDE_T5, [256, *[255] * 3]))
    for tier, savers in (("exact", ["recompute"]), ("lean", []), ("off", ["recompute"]))
}


OWN_SYNC = {"norm": {"_local_scalar_dense in lowmem/memory/gradients.py update": 1}}


@pytest.fixture(scope="module")
def found():
    return measured(STEPS | LOSSES | UPDATES | PLANS)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_one_sync(found, name):
    assert found[name]["syncs"] == OWN_SYNC


@pytest.mark.parametrize("tier", TIER_BYTES)
def test_an_update_reads_and_writes_each_tensor_once(found, tier):
    """One launch updates all parameters of the same formats, here large and small ones; each copies its table."""
    step = found[f"update, {tier}"]
    assert TIER_BYTES[tier] <= step["bytes"]["update"] / step["weights"] < TIER_BYTES[tier] + 0.1
    assert step["launches"]["update"] <= 4


@pytest.mark.parametrize("name", [name for name in STEPS if "adafactor" not in name])  # which has no kernel
def test_a_shard_is_updated_in_as_few_launches(found, name):
    """Shards may also differ in alignment, which makes a third launch. A released parameter is updated alone."""
    step = found[name]
    assert step["launches"]["update"] <= (3 * step["parameters"] if "release" in name else 6)


def test_a_slice_of_the_loss_takes_one_kernel_in_each_direction(found):
    """512 rows x 151,936 logits are 5 slices of at most 2**24; in a slice, forward and backward launch 7 operations."""
    loss, without = found["loss, 5 slices"], found["loss, 1 slice"]
    assert [loss["kernels"].get(name) for name in ("sums_kernel", "gradient_kernel")] == [5, 5]
    launches = [step["launches"]["forward and backward"] for step in (loss, without)]
    assert launches[0] - launches[1] <= 4 * 7


@pytest.mark.parametrize("name", PLANS)
def test_plan_predicts_the_peak(found, name):
    step = found[name]
    assert step["peak_bytes"] == pytest.approx(step["predicted_bytes"], rel=0.002)


def test_gpus_that_torch_cannot_use_are_named_and_nothing_trains_on_cpus(tmp_path):
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", source], check=True)
    flags = ["--max_steps=1", "--max_predict_samples=0", "--eval_on_start=False", f"--output_dir={tmp_path}/out"]
    gpus = {"LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(8)))}
    for processes in ([], ["--num_processes=1"]):
        result = run(sys.executable, PROGRAM, "train", *flags, *processes, **gpus)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("error: the NVIDIA driver lists 8 GPUs, but torch ")
        assert line.endswith("set CUDA_VISIBLE_DEVICES= to train on CPUs")
