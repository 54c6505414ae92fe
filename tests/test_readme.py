"""Code and commands of README.md run; flags and links in README.md and docs/ are valid."""

import json
import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import ByT5Tokenizer

from lowmem.config.parse import resolve
from lowmem.config.presets import PRESETS
from lowmem.config.train_config import FIELDS
from tests.forked import train_ranks
from tests.models import build, qa_rows
from tests.processes import ROOT, train

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "docs" / "zh" / "README.md").read_text()
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def commands(text):
    """Return the words of each indented command; a line that ends in a backslash continues on the next."""
    lines = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("wrapping", ["", "model = accelerator.prepare(model)\n"])
def test_the_python_loop_of_the_readme_trains_saves_and_resumes(processes, wrapping, tmp_path):
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 20 <= len([line for line in loop.splitlines() if line.strip()]) <= 27
    (making,) = re.findall(r"optimizer = make_optimizer.*\n", loop)
    loop = loop.replace(making, making + wrapping)
    # free a DDP reducer before its process group ends; tests/test_step.py explains why
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


def test_the_commands_for_your_own_rows_run(tmp_path):
    pq.write_table(pa.Table.from_pylist(qa_rows(540)), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(qa_rows(20)), tmp_path / "test.parquet")
    build("t5").save_pretrained(tmp_path / "path/to/t5")
    ByT5Tokenizer().save_pretrained(tmp_path / "path/to/t5")
    section = README[README.index("## Train on your rows") :]
    first, *others = (words for words in commands(section[: section.index("Start several")]) if words[2] != "plan")
    assert [words[2] for words in (first, *others)] == ["train", "evaluate", "plot"]
    for words in ([*first, "--max_steps=2", "--max_predict_samples=0"], *others):
        result = train(*words[2:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "my-run" / "plot.png").exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_flags_of_train_and_plan_commands_are_accepted(document, tmp_path, monkeypatch):
    (tmp_path / "path/to/t5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for words in commands(DOCUMENTS[document].read_text()):
        at = next((words.index(name) for name in ("train", "plan") if name in words), None)
        if at is not None:
            flags = [word.removeprefix("--").split("=") for word in words[at + 1 :] if word.startswith("--")]
            resolve(dict(flags))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_links_and_accelerate_configs_exist(document):
    of_others = (
        "multi_gpu nproc_per_node config_file help dtype signal requeue open nnodes rdzv_backend rdzv_id rdzv_endpoint "
        "max_restarts signals_to_handle shutdown_timeout node_rank master_addr master_port num_machines machine_rank "
        "main_process_ip main_process_port ntasks debug rdzv_conf num_gpus flag is_keep_training merge my_flag"
    )
    text = DOCUMENTS[document].read_text()
    without_benchmarks = re.sub(r"`python benchmarks/[^`]*`", "", text)
    flags = set(re.findall(r"--(\w+)", without_benchmarks)) - set(of_others.split())
    assert flags <= FIELDS.keys() | PRESETS.keys() | {"config"}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = DOCUMENTS[document].parent / path if path else DOCUMENTS[document]
        assert path.startswith("http") or target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {title.lower().replace(" ", "-") for title in headings}, link
    for path in re.findall(r"accelerate_configs/\w+\.yaml", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_its_first_commands_train_and_test():
    assert re.findall(r"^    (\S.*)$", README, re.MULTILINE)[:2] == [
        "pip install -e . && python train_low_mem.py train",
        "pip install -e '.[test]' && python -m pytest",
    ]
    assert README.count("\n") <= 170


def test_all_commands_of_the_chinese_readme_are_in_the_english_one():
    shown = commands(CHINESE)
    assert len(shown) >= 7
    assert all(words in commands(README) for words in shown)
