"""A copy of train.py with a config class of its own runs as `train_low_mem.py` does, under any launcher."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import make_dataclass
from typing import Optional

import pytest

from lowmem import TrainConfig, UsageError, resolve, setting
from lowmem.config.help import help_text
from tests.forked import started_ranks, train_ranks
from tests.processes import ROOT, finish, run_program, started_function, started_train, train, wait_until
from tests.runs import assert_same_run, flags, records, write_files

OF_LOWMEM = ", for lowmem's own train(), which yours replaces\n"

OWN = '''
@dataclasses.dataclass(frozen=True, kw_only=True)
class MyConfig(TrainConfig):
    batch_size: int = 4
    max_steps: int | None = 6
    lr_factor: float = setting(1.0, above=0, on_resume="fixed")
    """Multiply the learning rate by this. It is of this test alone."""
    note: str | None = None


if __name__ == "__main__":
    import sys

    from lowmem import main

    sys.exit(main(train, config_class=MyConfig))
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with rows, a model's config and own/mytrain.py, which is a copy of lowmem/train.py with changes."""
    folder = write_files(tmp_path_factory.mktemp("work"), num_rows=60, dropout_rate=0.1)
    text = (ROOT / "lowmem" / "train.py").read_text()
    for old, new in {
        "learning_rate=schedule(step),": "learning_rate=schedule(step) * config.lr_factor,",
        "import torch\n": "import torch\n\nfrom lowmem import setting\n",
        "    # --- processes\n": "    print(f'my loop, note={config.note}')\n",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "own").mkdir()
    (folder / "own" / "mytrain.py").write_text(f"from __future__ import annotations\n{text}{OWN}")
    return folder


def mine(work, *words, **options):
    return train(*words, program=work / "own" / "mytrain.py", **options)


@pytest.fixture(scope="module")
def whole(work):
    result = mine(work, "train", *flags(work, "whole", lr_factor=0.5, note="x"))
    assert result.returncode == 0, result.stderr
    assert "my loop, note=x" in result.stdout
    return work


def test_the_programs_own_flags_and_defaults_reach_its_loop_and_the_files_of_the_run(whole):
    of_run = json.loads((whole / "whole" / "config.json").read_text())
    assert (of_run["lr_factor"], of_run["note"], of_run["batch_size"], of_run["epochs"]) == (0.5, "x", 4, None)
    assert records(whole, "whole")[-1]["steps"] == 6
    lowmems = train("train", *flags(whole, "lowmem", batch_size=4, max_steps=6, learning_rate=0.005))
    assert lowmems.returncode == 0, lowmems.stderr
    assert_same_run(whole, "whole", "lowmem")  # half the learning rate


def test_a_resumed_run_must_keep_its_own_fixed_flag_and_continues_exactly(whole):
    same = flags(whole, "parts", lr_factor=0.5, save_steps=3, max_steps=3, lr_scheduler_type="constant")
    whole_run = flags(whole, "constant", lr_factor=0.5, lr_scheduler_type="constant")
    assert [mine(whole, "train", *each).returncode for each in (same, whole_run)] == [0, 0]
    more = [word for word in same if "max_steps" not in word] + ["--resume=auto"]
    refused = mine(whole, "train", *(word.replace("=0.5", "=0.25") for word in more))
    assert refused.returncode == 2 and "--lr_factor=0.25 (was 0.5)" in refused.stderr
    resumed = mine(whole, "train", *more, "--note=later")
    assert resumed.returncode == 0 and "--note=later (was None)" in resumed.stdout, resumed.stderr
    assert_same_run(whole, "constant", "parts")


def test_each_process_that_a_launcher_starts_runs_the_programs_own_loop(whole):
    shared = {"batch_size": 2, "lr_factor": 0.5}
    ranks = train_ranks(2, "train", *flags(whole, "launched", **shared), program=whole / "own" / "mytrain.py")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert all("my loop" in rank.stdout for rank in ranks)


def test_processes_that_a_module_starts_run_the_same_module(work):
    words = flags(work, "module", batch_size=2, num_processes=2)
    with started_function(run_module, "own.mytrain", "train", *words, cwd=work) as process:
        result = finish(process)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("my loop") == 2


def test_ranks_that_run_other_programs_are_refused(work):
    own = work / "own" / "mytrain.py"
    (work / "own" / "mytrain-1.py").write_text(f"{own.read_text()}# a change\n")
    with started_ranks(2, run_program_of_rank, own, "train", *flags(work, "other"), stderr=subprocess.PIPE) as ranks:
        results = [finish(rank) for rank in ranks]
    for result in results:
        assert result.returncode == 2 and "rank 1 on " in result.stderr and "has the program's code " in result.stderr


def run_program_of_rank(path, *words):
    rank = os.environ["RANK"]
    run_program(path if rank == "0" else path.with_stem(f"{path.stem}-{rank}"), *words)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_prediction_says_that_it_is_of_lowmems_own_loop(work, command):
    words = flags(work, "planned", device_memory="1GB", num_processes=1)
    with started_train(command, *words, program=work / "own" / "mytrain.py") as process:
        lines = iter(process.stdout.readline, None)
        wait_until(lambda: (line := next(lines)).startswith("predicted for") and line.endswith(OF_LOWMEM), process)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--lr_factor=0"], "--lr_factor=0.0 must be above 0"),
        (["train", "--lr_factor=x", "--seed=y"], "--lr_factor=x is not a float; --seed=y is not an int"),
        (["train", "--lr_facto=1"], "unknown flag --lr_facto: did you mean --lr_factor?"),
        (["train", "--config=CONFIG"], "--lr_factor=-1.0 must be above 0"),
        (["evaluate", "--lr_factor=1"], "--lr_factor: `evaluate` has no such flag"),
    ],
)
def test_wrong_values_of_own_flags_are_refused(work, words, message, tmp_path):
    (work / "own.yaml").write_text("lr_factor: -1\n")
    result = mine(work, *(word.replace("CONFIG", str(work / "own.yaml")) for word in words), cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_lists_own_flags_and_defaults_under_the_programs_name(work):
    lines = mine(work, "--help").stdout.splitlines()
    assert lines[0].startswith("usage: mytrain.py train|plan")
    at = lines.index("MyConfig:")
    assert lines[at + 1].split(maxsplit=1) == ["--lr_factor=1.0", "Multiply the learning rate by this"]
    assert lines[at + 2].strip() == "--note=STR"
    assert any(line.startswith("  --batch_size=4 ") for line in lines[:at])
    preset = next(line for line in lines if line.startswith("  with neither a preset nor a model: "))
    assert "epochs=4" in preset and "batch_size" not in preset  # the program's own default replaces the preset's
    with started_function(run_module, "own.mytrain", "--help", cwd=work) as process:
        assert finish(process).stdout.startswith("usage: python -m own.mytrain train|plan")


def run_module(name, *words):
    """Run `python -m name ...` within this process."""
    sys.path.insert(0, "")
    sys.argv = ["", *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def own(**fields):
    """Return a config class with these fields: a type, or a pair of type and default."""
    pairs = [(name, *(value if isinstance(value, tuple) else (value,))) for name, value in fields.items()]
    return make_dataclass("Own", pairs, bases=(TrainConfig,), frozen=True, kw_only=True)


def test_defaults_of_a_derived_class_yield_to_flags_presets_and_alternatives():
    def resolved(config_class, **flags):
        return resolve({"model_config": "t5-tiny"} | flags, config_class=config_class)

    kind = own(batch_size=(int, 64), max_steps=(Optional[int], 9), prompt_column=(str | None, "question"))  # noqa: UP045
    config = resolved(kind)
    assert (config.batch_size, config.max_steps, config.epochs, config.prompt_column) == (64, 9, None, "question")
    config = resolved(kind, epochs="2", text_column="text", model_config=str(ROOT / "setup.py"))
    assert (config.max_steps, config.epochs, config.prompt_column) == (None, 2.0, None)
    assert resolve({"use_large_config": True}, config_class=kind).batch_size == 2
    assert resolve({}, config_class=kind).batch_size == 64 != resolve({}).batch_size  # the preset `tiny`
    config = resolve({}, config_class=own(model_config=(str | None, "t5-small")))
    assert (config.model_config, config.batch_size) == ("t5-small", TrainConfig.batch_size)
    with pytest.raises(UsageError, match="--batch_size=0 must be at least 1"):  # the rules of TrainConfig hold
        resolved(own(batch_size=(int, 0)))
    pair = own(alpha=(float | None, setting(above=0)), beta=(float, setting(instead_of=["alpha"])))
    with pytest.raises(UsageError, match="--beta and --alpha were both set"):
        resolved(pair, alpha=1, beta=2)
    assert resolved(own(num_epochs=(int, 3)), num_epochs="5").num_epochs == 5  # another trainer's flag elsewhere


def test_a_config_class_that_cannot_work_is_refused_with_all_its_problems():
    class Undecorated(TrainConfig):
        own: int = 3

    for kind, message in {
        own(sizes=(list[int], None)): r"Own.sizes has the type list\[int\]: use str, int, float or bool",
        own(size=int): "Own.size has no default",
        own(size=(int, 1.5), name=(str, 3)): "Own.size has the default 1.5, but the type int: .*; Own.name has .* str",
        own(size=(int, setting(3, on_resume="fxied"))): "Own.size has on_resume='fxied': use one of may change, fixed",
        own(size=(int, setting(3, instead_of=["batch"]))): "Own.size has instead_of=batch, which is no field: correct",
        own(schedule=(str, "x"), config=(str, "x")): "Own.schedule has .* rename it; Own.config has the name",
        Undecorated: "Undecorated is not a dataclass: put @dataclass",
    }.items():
        with pytest.raises(UsageError, match=message):
            resolve({}, config_class=kind)


def test_help_of_a_class_without_source_lists_its_fields():
    assert "\nOwn:\n  --size=3" in help_text(own(size=(int, 3)))
