"""AdamW's three forms (tensor operations, C++, Triton) have equal bits, which no slice, shard or thread changes."""

import hashlib
import math
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.kernel_states import FORMS, ODD, bits, differing, drawn, module, states
from lowmem import init_distributed
from lowmem.distributed.dtensor import local_part
from lowmem.optim import kernels_cpu
from lowmem.optim.formats import round_stochastically
from lowmem.optim.make import make_optimizer
from lowmem.optim.philox import BLOCK, Origin, philox, random_halves
from tests.forked import fork_ranks
from tests.processes import ROOT, run

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(kernels_cpu.library() is None, reason="lowmem was installed without a C++ compiler")


@needs_kernels
@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "memory"), FORMS)
def test_kernels_have_the_bits_of_tensor_operations(name, memory, gradients):
    steps = 100 if (name, gradients) == ("adamw", torch.bfloat16) else 10
    expected = states(name, memory, None, steps=steps, dtype=gradients)
    assert not differing(states(name, memory, kernels_cpu, steps=steps, dtype=gradients), expected)


def test_triton_kernels_have_the_bits_of_tensor_operations():
    """Run them on CPU tensors in Triton's interpreter, which Triton chooses when it is imported."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    result = run(sys.executable, __file__, "triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-len(FORMS) - 1 :] == ["differing: []"] * (len(FORMS) + 1)


@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bits_do_not_depend_on_the_instruction_set(capability):
    result = run(sys.executable, __file__, "digests", ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-2:] == digests()


def changed_by_a_skipped_step(kernels, model):
    """Return the names of the weights and state that differ after a step with a clip factor of NaN."""
    optimizer = make_optimizer(model, memory="lean")
    optimizer.kernels, optimizer.clip_factor = kernels, torch.tensor(math.nan)
    held = [{"weight": x.detach()} | optimizer.state[x] for x in model.parameters()]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in held]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.undo()
    pairs = zip(before, held, strict=True)
    return [name for old, new in pairs for name, tensor in old.items() if not torch.equal(tensor, new[name])]


def digests():
    """Return one line for tensor operations and one for kernels."""
    found = [states("adamw", "lean", kernels, steps=5).values() for kernels in (None, kernels_cpu)]
    return [hashlib.sha256(b"".join(bits(x).numpy().tobytes() for x in tensors)).hexdigest() for tensors in found]


def test_philox_gives_the_published_words():
    """The words are from the file kat_vectors of Random123: philox4x32 with 10 rounds."""
    words = philox(0, torch.zeros(1, dtype=torch.int64))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_random_halves_are_uniform_and_differ_between_elements_rows_and_keys():
    of_keys = [random_halves(key, Origin(0, 0, 5000), slice(0, 40), 5000, CPU) for key in (1, 2)]
    halves, spread = torch.stack(of_keys).double(), 65536 / math.sqrt(12)
    assert halves.min() >= 0 and halves.max() < 65536
    assert abs(halves.mean() - 32767.5) < 4 * spread / math.sqrt(halves.numel())
    assert halves.std() == pytest.approx(spread, rel=0.01)
    pairs = [(halves[0], halves[1]), (halves[0, 1:], halves[0, :-1])]
    pairs += [(halves[..., shift:], halves[..., :-shift]) for shift in (1, 32, 64, BLOCK)]
    for mine, other in pairs:
        correlation = torch.corrcoef(torch.stack([mine.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(mine.numel())


@needs_kernels
@pytest.mark.parametrize("offset", [0, 100, 256, 300])
def test_a_part_of_a_matrix_has_the_random_bits_of_the_whole(offset):
    whole = random_halves(7, Origin(0, 0, 1000), slice(0, 9), 1000, CPU)
    part = random_halves(7, Origin(2, offset, 1000), slice(1, 4), 600, CPU)
    assert torch.equal(part, whole[3:6, offset : offset + 600])
    source = torch.Generator().manual_seed(0)
    total, gradient = (drawn((9, 1000), source).bfloat16() for _ in range(2))
    mine, term = (tensor[3:6, offset : offset + 600].clone() for tensor in (total, gradient))
    far = 2**28  # rows before it, so that counters take more than 32 bits
    kernels_cpu.add(total, gradient, 7, Origin(far, 0, 1000))
    before = mine.float()
    kernels_cpu.add(mine, term, 7, Origin(far + 3, offset, 1000))
    assert torch.equal(mine, total[3:6, offset : offset + 600])
    random = random_halves(7, Origin(far + 3, offset, 1000), slice(0, 3), 600, CPU)
    assert torch.equal(mine, round_stochastically(before + term.float(), random))


@needs_kernels
def test_several_threads_give_the_bits_of_one():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(states("adamw", "lean", kernels_cpu, steps=3, model=module({"large": (700, 1500)})))
    finally:
        torch.set_num_threads(threads)
    assert not differing(*found)


@needs_kernels
@pytest.mark.parametrize("memory", ["exact", "lean"])
def test_shards_by_rows_and_by_columns_have_the_bits_of_whole_parameters(memory):
    assert fork_ranks(2, update_shards, memory) == [0, 0]


def update_shards(memory):
    accelerator = init_distributed()
    shapes, mesh = {"rows": (37, 1024), "columns": (37, 1024)}, init_device_mesh("cpu", (2,))
    sharded = module(shapes)
    for dim, name in enumerate(shapes):
        whole = sharded.get_parameter(name).detach()
        sharded.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)])))
    expected = states("adamw", memory, kernels_cpu, steps=5, model=module(shapes))
    for name, tensor in states("adamw", memory, kernels_cpu, steps=5, model=sharded).items():
        if isinstance(tensor, DTensor):  # not the number of steps
            local, row, column = local_part(tensor)
            part = expected[name][row : row + local.shape[0], column : column + local.shape[1]]
            assert local.numel() and torch.equal(bits(local), bits(part)), name
    accelerator.end_training()


@needs_kernels
def test_a_library_of_another_source_is_not_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "optim"
    shutil.copytree(ROOT / "lowmem" / "optim", folder)
    monkeypatch.setattr(kernels_cpu, "__file__", str(folder / "kernels_cpu.py"))
    kernels_cpu.library.cache_clear()
    try:
        assert kernels_cpu.library() is not None
        kernels_cpu.library.cache_clear()
        with open(folder / "kernels.cpp", "a") as file:
            file.write("// changed\n")
        assert kernels_cpu.library() is None
    finally:
        kernels_cpu.library.cache_clear()


def test_without_kernels_a_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernels_cpu, "library", lambda: None)
    make_optimizer(module(ODD), memory="lean")
    line = "updates use tensor operations, several times slower than lowmem's kernels: install a C++ compiler"
    assert capsys.readouterr().out.startswith(line)


def test_setup_without_a_compiler_builds_no_library_and_succeeds(tmp_path):
    options = ("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    result = run(sys.executable, "setup.py", *options, CC="/nonexistent", CXX="/nonexistent")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


if __name__ == "__main__":
    if sys.argv[1] == "digests":
        print(*digests(), sep="\n")
    else:
        from lowmem.optim import kernels_cuda

        few = {name: ODD[name] for name in ("wide", "bias", "deep", "even")}  # because the interpreter is slow
        for name, memory in FORMS:
            found, expected = (states(name, memory, x, steps=2, model=module(few)) for x in (kernels_cuda, None))
            print("differing:", differing(found, expected))
        print("differing:", changed_by_a_skipped_step(kernels_cuda, module(few)))
