"""Run `plan` for a few example configs; save its text to `results/plan-NAME.txt`, and some figures as `.png`.

    python benchmarks/shown_plans.py
    python benchmarks/shown_plans.py t5-base

See README.md.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_SHAPES = "benchmarks/shapes"
_BF16 = ["--text_column=text", "--mixed_precision=bf16"]
LLAMA_8B = [f"--model_config={_SHAPES}/llama-3.1-8b/config.json", *_BF16, "--max_seq_len=4096", "--batch_size=1"]
# folders with a config.json alone: fine-tuning is planned without the weights
FINE_TUNED = {
    "qwen-0.5b": [f"--model_name_or_path={_SHAPES}/qwen2.5-0.5b", *_BF16, "--max_seq_len=2048"],
    "llama-8b": [f"--model_name_or_path={_SHAPES}/llama-3.1-8b", *_BF16, "--max_seq_len=4096", "--batch_size=1"],
}
MACHINES = {
    "1x8gb": ["--num_processes=1", "--device_memory=8GB"],
    "1x24gb": ["--num_processes=1", "--device_memory=24GB"],
    "2x24gb": ["--num_processes=2", "--device_memory=24GB"],
    "3x20gb": ["--num_processes=3", "--device_memory=20GB", "--host_memory=12GB"],
}
WITH_FIGURES = {
    "t5-base": ["--use_large_config=True", "--num_processes=3", "--device_memory=20GB", "--host_memory=12GB"],
    "llama-8b": [*LLAMA_8B, "--num_processes=4", "--device_memory=80GB"],
    "llama-8b-24gb": [*LLAMA_8B, "--num_processes=4", "--device_memory=24GB"],
}
PLANS = WITH_FIGURES | {
    f"{model}-{machine}": [*flags, *limits]
    for model, flags in FINE_TUNED.items()
    for machine, limits in MACHINES.items()
}


def plan(name: str) -> str:
    """Run `plan`, save its text and figure, and return the text. Raises SystemExit if `plan` fails."""
    command = ["train_low_mem.py", "plan", *PLANS[name]]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *command, f"--output_dir={folder}"]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{shlex.join(command)} failed with exit code {result.returncode}: {result.stderr}")
        if name in WITH_FIGURES:
            shutil.move(Path(folder, "plan.png"), RESULTS / f"plan-{name}.png")
    lines = result.stdout.replace(folder, "out").splitlines()[:-1]  # the last line is the path of the figure
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate"))
    head = [f"$ {shlex.join(['python', *command])}", f"# {datetime.now(UTC):%Y-%m-%d}; {versions}"]
    text = "\n".join([*head, *lines, ""])
    (RESULTS / f"plan-{name}.txt").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PLANS)}; default: all")
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(PLANS)):
        parser.error(f"unknown name {', '.join(unknown)}: choose from {', '.join(PLANS)}")
    for name in names or PLANS:
        print(plan(name), flush=True)


if __name__ == "__main__":
    main()
