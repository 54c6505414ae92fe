"""Time the memory tiers' updates, sums and norms of gradients; or compile the Triton kernels, without a GPU.

    python benchmarks/kernels.py --output=benchmarks/results/kernels.jsonl
    python benchmarks/kernels.py --compile

Appends a JSON line to --output, and writes a table to the .md file of the same name. See README.md.
"""

import argparse
import itertools
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from records import Record, append
from systems import machine
from torch import nn

SHAPE = (4096, 1024)
ARCHITECTURES = (75, 80, 86, 90)
BASE = "torch's fused AdamW, fp32"


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="only compile the Triton kernels, for several GPUs")
    parser.add_argument("--output", type=Path, help="JSON lines to append to; NAME.jsonl also writes NAME.md")
    return parser.parse_args()


def works() -> dict[str, Callable[[], object]]:
    """Return what is timed, each on one matrix of SHAPE."""
    from lowmem.optim.make import make_optimizer
    from lowmem.optim.norms import gradient_norms

    source = torch.Generator().manual_seed(0)

    def stepper(dtype: torch.dtype, **options: object) -> Callable[[], None]:
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(SHAPE, generator=source) * 0.02)
        optimizer = make_optimizer(layer, weight_decay=0.01, **options)
        layer.weight.grad_dtype = None
        layer.weight.grad = (torch.randn(SHAPE, generator=source) * 1e-3).to(dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        return optimizer.step

    def adder(memory: str, **options: object) -> Callable[[], None]:
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(SHAPE, generator=source))
        optimizer = make_optimizer(layer, memory=memory, **options)
        total = torch.zeros(SHAPE, dtype=torch.float32 if memory == "exact" else torch.bfloat16)
        gradient = torch.randn(SHAPE, generator=source).bfloat16()
        return lambda: optimizer.add(layer.weight, total, gradient, 1)

    half = torch.randn(SHAPE, generator=source).bfloat16()
    found: dict[str, Callable[[], object]] = {BASE: stepper(torch.float32, memory="off")}
    for memory in ("exact", "lean"):
        for kind, fused in (("kernel", True), ("tensor operations", False)):
            found[f"update, {memory}, {kind}"] = stepper(torch.bfloat16, memory=memory, fused=fused)
    for memory in ("exact", "lean"):
        for kind, fused in (("kernel", True), ("tensor operations", False)):
            found[f"sum, {memory}, {kind}"] = adder(memory, fused=fused)
    found["norm of a bf16 gradient, kernel"] = lambda: gradient_norms([half])
    found["norm of a bf16 gradient, torch"] = lambda: torch.linalg.vector_norm(half, dtype=torch.float32)
    return found


def measure(flags: argparse.Namespace) -> Record:
    torch.set_num_threads(flags.threads)
    timed, seconds = works(), {}
    for index in range(flags.rounds + 1):
        for name, work in timed.items():
            started = time.perf_counter()
            work()
            if index:  # the first round allocates
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {"seconds": seconds, "threads": flags.threads, "shape": SHAPE}


def table(records: list[Record]) -> str:
    """Return Markdown for the last record of a command."""
    record = records[-1]
    base = record["seconds"][BASE]
    where, shape = record["machine"], " x ".join(map(str, record["shape"]))
    lines = [f"    {record['command']}", "", f"{record['date']}; {where['cpu']}; torch {record['torch']}."]
    lines.append(f"One matrix, {shape}; threads: {record['threads']}; {len(base)} interleaved rounds, medians.")
    lines += ["", "| work | ms | ratio to torch's update, quartiles |", "|---|---:|---:|"]
    for name, times in record["seconds"].items():
        ratios = sorted(mine / theirs for mine, theirs in zip(times, base, strict=True))
        low, middle, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
        lines.append(f"| {name} | {median(times) * 1e3:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join([*lines, ""])


# --- Triton, without a GPU
def variants() -> Iterator[tuple[str, object, dict[str, str], dict[str, object]]]:
    """Yield each kernel in each form: a name, the kernel, the types of its arguments and its constants."""
    from lowmem.kernels.cross_entropy_cuda import TILE, gradient_kernel, sums_kernel
    from lowmem.optim import kernels_cuda

    for is_split, moment_bytes in ((True, 4), (False, 1), (True, 2), (False, 2)):
        for gradient_bytes, is_aligned in itertools.product((2, 4), (True, False)):
            constants = {"IS_SPLIT": is_split, "MOMENT_BYTES": moment_bytes, "GRADIENT_BYTES": gradient_bytes}
            constants |= {"IS_ALIGNED": is_aligned, "SEGMENTS": kernels_cuda.SEGMENTS}
            types = {"table": "*i64", "clip_factor": "*fp32", "num_parameters": "i32"}
            yield "adamw", kernels_cuda.adamw_kernel, types, constants
    integers = dict.fromkeys(("segments", "columns", "offset", "first", "stride", "key"), "i64")
    types = {"total": "*bf16", "gradient": "*bf16"} | integers
    yield "add", kernels_cuda.add_kernel, types, {"SEGMENTS": kernels_cuda.SEGMENTS}

    shared = {"targets": "*i64", "num_rows": "i32", "num_columns": "i32", "first": "i32"}
    shared |= dict.fromkeys(("scale", "shift", "factor", "offset", "on_target", "on_others"), "fp32")
    for dtype, columns, has_all in itertools.product(("bf16", "fp32"), (TILE, 256), (False, True)):
        types = shared | {"logits": f"*{dtype}", "shift": "*fp32" if has_all else "fp32"}  # a bias, or a number
        constants = {"IS_CAPPED": has_all, "ROWS": TILE // columns, "COLUMNS": columns}
        sums = types | {"log_sums": "*fp32", "expected": "*fp32"}
        yield f"sums of {dtype}", sums_kernel, sums, constants | {"IS_SMOOTHED": has_all}
        gradient = types | {"log_sum": "*fp32", "grad_losses": "*fp32"}
        yield f"gradient of {dtype}", gradient_kernel, gradient, constants


def compiled() -> Iterator[str]:
    """Compile each kernel for each architecture; yield a line with its registers and spilled bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for architecture, (name, kernel, types, constants) in itertools.product(ARCHITECTURES, list(variants())):
        names = kernel.arg_names
        signature = {argument: types.get(argument, "constexpr") for argument in names}
        values = {(names.index(argument),): value for argument, value in constants.items()}
        aligned = [argument for argument, kind in types.items() if argument != "key" and kind != "fp32"]
        divisible = {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=divisible)
        target, options = GPUTarget("cuda", architecture, 32), {"num_warps": 4, "enable_fp_fusion": False}
        code = triton.compile(source, target=target, options=options).asm["ptx"]
        yield f"sm_{architecture} {name} {constants}: {_assembled(assembler, code)}"


def _assembled(assembler: Path, code: str) -> str:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(code)
        target = re.search(r"\.target (\w+)", code)[1]
        words = [assembler, "-v", "--fmad=false", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")]
        report = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+)", report)[1], re.search(r"(\d+) bytes spill stores", report)[1]
    return f"{registers} registers, {spilled} bytes spilled, {code.count('fma.rn.f32')} fused operations"


def main() -> None:
    flags = parse_flags()
    if flags.compile:
        for line in compiled():
            print(line, flush=True)
        return
    record = measure(flags) | {"command": shlex.join(["python", *sys.argv]), "machine": machine()}
    record |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": version("torch")}
    print(table([record]))
    if flags.output:
        append(flags.output, [record], table, "kernels.py")


if __name__ == "__main__":
    main()
