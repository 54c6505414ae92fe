"""What the README shows runs as it stands."""

import json
import re
import shlex

import pytest

from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS
from tests.forked import train_ranks
from tests.models import qa_rows
from tests.processes import ROOT, train

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("wrapping", ["", "model = accelerator.prepare(model)\n"])
def test_the_loop_in_your_own_code_runs_saves_and_resumes(processes, wrapping, tmp_path):
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 20 <= len([line for line in loop.splitlines() if line.strip()]) <= 27
    (making,) = re.findall(r"optimizer = make_optimizer.*\n", loop)
    loop = loop.replace(making, making + wrapping)
    # see tests/test_step.py: a DDP reducer must go before its group
    loop = loop.replace(
        "accelerator.end_training()", "del model, state\naccelerator.free_memory(); accelerator.end_training()"
    )
    for name, rows in {"rows.jsonl": qa_rows(40), "held_out.jsonl": qa_rows(50)[40:]}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = []
    for steps in ("10", "20"):
        (tmp_path / "loop.py").write_text(
            f"import os\nos.chdir({str(tmp_path)!r})\n" + loop.replace("20)", f"{steps})")
        )
        program = {"program": tmp_path / "loop.py"}
        ranks = [train(**program)] if processes == 1 else train_ranks(processes, **program)
        assert all(rank.returncode == 0 for rank in ranks), ranks
        printed += [line.split() for rank in ranks for line in rank.stdout.splitlines()]
    assert [int(step) for step, _, _ in printed] == [10, 20]
    assert float(printed[1][1]) < float(printed[0][1])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000010", "step-00000020"]


def test_every_flag_and_file_that_is_named_exists():
    of_others = (
        "multi_gpu nproc_per_node config_file help dtype signal requeue open nnodes rdzv_backend rdzv_id rdzv_endpoint "
        "max_restarts signals_to_handle shutdown_timeout node_rank master_addr master_port num_machines machine_rank "
        "main_process_ip main_process_port ntasks debug rdzv_conf num_gpus"
    )
    without_benchmarks = re.sub(r"`python benchmarks/[^`]*`", "", README)
    flags = set(re.findall(r"--(\w+)", without_benchmarks)) - set(of_others.split())
    assert flags <= FIELDS.keys() | PRESETS.keys() | {"config"}
    for path in re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"accelerate_configs/\w+\.yaml", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_the_two_commands_are_the_first_that_are_shown():
    commands = re.findall(r"^    (\S.*)$", README, re.MULTILINE)
    assert commands[:2] == [
        "pip install -e . && python train_low_mem.py train",
        "pip install -e '.[test]' && python -m pytest",
    ]
    assert [shlex.split(command)[0] for command in commands[:2]] == ["pip", "pip"]
