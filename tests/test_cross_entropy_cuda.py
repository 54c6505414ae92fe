"""The Triton kernels of the cross-entropy give the losses and gradients of tensor operations and of torch."""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from lowmem.cross_entropy import chunked_cross_entropy
from lowmem.plan.fakes import fake_tensors
from lowmem.plan.meter import MemoryMeter
from tests.processes import run

SOFT_CAP = [("div", 2.0), ("tanh", None), ("mul", 2.0)]
NUMBERS = torch.arange(1, 38) / 20
MASKED = torch.where(NUMBERS < 1, -math.inf, 0)  # the first 19 columns, so all of the first slices
CASES = {
    "one slice": {},
    "wide": {"num_rows": 3, "vocabulary": 5001},
    "many rows": {"num_rows": 70, "vocabulary": 100},
    "one row": {"num_rows": 1},
    "no row": {"num_rows": 0},
    "slices": {"elements": 5 * 9},
    "columns": {"elements": 1},
    "bias": {"has_bias": True, "elements": 5 * 9},
    "smoothing": {"label_smoothing": 0.1, "elements": 5 * 9},
    "wide, smoothing and bias": {"num_rows": 3, "vocabulary": 5001, "label_smoothing": 0.1, "has_bias": True},
    "soft-capping": {"changes": SOFT_CAP, "elements": 5 * 9},
    "soft-capping, smoothing and bias": {"changes": SOFT_CAP, "label_smoothing": 0.1, "has_bias": True},
    "scale": {"changes": [("mul", 0.5), ("sub", 1), ("mul", torch.tensor([[0.7]]))], "elements": 5 * 9},
    "constants per column": {"changes": [("div", NUMBERS), ("add", NUMBERS.double())], "elements": 5 * 9},
    "all": {
        "changes": [("add", NUMBERS), ("mul", NUMBERS), *SOFT_CAP, ("sub", NUMBERS[None]), ("div", NUMBERS)],
        "elements": 5 * 9,
        "label_smoothing": 0.1,
        "has_bias": True,
    },
    "factors": {"factors": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]), "elements": 5 * 9, "label_smoothing": 0.1},
    "masked": {"changes": [("add", MASKED)], "elements": 5 * 9},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(hidden, weight, bias, targets, *, changes, label_smoothing, factors=1):
    logits = F.linear(hidden, weight, bias)
    for operation, constant in changes:
        constant = constant.flatten().to(logits.device) if isinstance(constant, torch.Tensor) else constant
        logits = logits.tanh() if operation == "tanh" else getattr(torch, operation)(logits, constant)
    if label_smoothing == 0:  # torch multiplies all logits by their probabilities, also -inf by 0
        losses = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    else:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return (losses * factors).sum()


def results(case, compute_dtype, fused, device):
    """Return the loss and the gradients, of `plain` in fp64 if `fused` is "plain"."""
    case = {"num_rows": 5, "vocabulary": 37, "changes": [], "label_smoothing": 0.0, **case}
    num_rows, vocabulary, source = case.pop("num_rows"), case.pop("vocabulary"), torch.Generator().manual_seed(0)
    if "factors" in case:
        case["factors"] = case["factors"].to(device)
    elements, has_bias = case.pop("elements", None), case.pop("has_bias", False)
    shapes = [(num_rows, 8), (vocabulary, 8), (vocabulary,)]
    inputs = [torch.randn(shape, generator=source).to(compute_dtype).float().to(device) for shape in shapes]
    inputs = [(x.double() if fused == "plain" else x).requires_grad_() for x in inputs[: 2 + has_bias]]
    targets = torch.randint(vocabulary // 2 + 1, vocabulary, (num_rows,), generator=source).to(device)
    given = [*inputs, targets] if has_bias else [*inputs, None, targets]
    if fused == "plain":
        loss = plain(*given, **case)
    else:
        options = {"compute_dtype": compute_dtype, "slice_elements": elements, "fused": fused}
        loss = chunked_cross_entropy(*given, **options, **case)
    (0.7 * loss).backward()
    return [loss.detach(), *(x.grad for x in inputs)]


def compare_all(device):
    """Compare the kernels with fp64: they are equal within one rounding, or as accurate as tensor operations."""
    ratio = 1.2 if device == "cuda" else 2.5  # because Triton's interpreter truncates to bf16 and fp16
    for name, case in CASES.items():
        for dtype in DTYPES:
            exact = results(case, dtype, "plain", device)
            found, reference = (results(case, dtype, fused, device) for fused in (True, False))
            for mine, other, expected in zip(found, reference, exact, strict=True):
                rounding = max(2e-6, torch.finfo(dtype).eps) * expected.norm()
                error, largest = (mine - expected).norm(), max(ratio * (other - expected).norm(), rounding)
                assert error <= largest, f"{name}, {dtype}: {error} > {largest}"
        print("equal:", name, flush=True)


def compare_tiles(device):
    """Check that each tile has its own sums. (The interpreter runs one program at a time, so it shows no race.)"""
    from lowmem.kernels.cross_entropy_cuda import TILE, add_slice, tiles_in

    source = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, TILE + 905, generator=source).to(device), torch.tensor([0, TILE, 7], device=device)
    log_sums, expected = torch.full((2, tiles_in(TILE + 905), 3), -math.inf, device=device).unbind()
    add_slice(logits, targets, log_sums, expected.zero_(), 0, [(1.0, 0.0)], 0.0, TILE + 905)
    torch.testing.assert_close(log_sums, torch.stack([part.logsumexp(1) for part in logits.split(TILE, 1)]))
    assert expected.tolist() == [[logits[0, 0], 0, logits[2, 7]], [0, logits[1, TILE], 0]]


def test_in_tritons_interpreter_losses_and_gradients_are_those_of_torch():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    result = run(sys.executable, __file__, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"equal: {name}" for name in CASES]


@pytest.mark.gpu
def test_on_a_gpu_losses_and_gradients_are_those_of_torch():
    compare_all("cuda")
    compare_tiles("cuda")


@pytest.mark.parametrize(
    ("dtype", "changes"), [(torch.float64, []), (torch.float32, [("tanh", None), ("mul", 2.0), ("tanh", None)])]
)
def test_what_no_kernel_supports_is_computed_by_tensor_operations(dtype, changes):
    torch.manual_seed(0)
    tensors = torch.randn(6, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype), None, torch.tensor([0, 8, 4, 3, 3, 1])
    losses = [chunked_cross_entropy(*tensors, changes=changes, fused=fused) for fused in (True, False)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("changes", [[], SOFT_CAP], ids=["none", "soft-capping"])
def test_kernels_take_no_more_memory_than_one_slice_of_logits_in_the_compute_dtype(changes):
    with fake_tensors():
        hidden, weight = (torch.empty(size, 16, requires_grad=True) for size in (480, 151_936))
        with MemoryMeter() as meter:
            options = {"compute_dtype": torch.bfloat16, "changes": changes, "slice_elements": 2**22, "fused": True}
            loss = chunked_cross_entropy(hidden, weight, None, torch.zeros(480, dtype=torch.int64), **options)
            assert 2**23 < meter.peak_bytes < 2**23 + 2**20
            meter.reset_peak()
            loss.backward()
            in_bf16 = weight.nbytes // 2
            assert 2**23 + in_bf16 < meter.peak_bytes < 2**23 + in_bf16 + weight.nbytes + 2**20


if __name__ == "__main__":
    compare_all("cpu")
    compare_tiles("cpu")
