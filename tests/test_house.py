"""The house: data flows one way, imports are lean, and what is named is there."""

import ast
import sys
from importlib import import_module

import lowmem
from tests.processes import ROOT, run

# A module imports only modules above it.
ORDER = (
    "config zero_config conflicts flags disk weights parallel.signals parallel.heartbeat parallel.elastic "
    "parallel.agree parallel.rendezvous parallel.ahead parallel.launched parallel.deepspeed parallel.launch "
    "parallel.pieces parallel.fill parallel.same parallel.tensor parallel.sharding data.order data.bundled data.source "
    "data.derived data.line_index data.lines data.batches data.tables data.rows data.chat data.encode data.batch "
    "data.packing data.quarantine data.steps data.stream data.finite model memory.parts memory.meter memory.loss "
    "memory.forms memory.tiers memory.adafactor memory.optim memory.full memory.offload memory.pretend memory.savers "
    "step recover evaluation checkpoint.commit checkpoint.verify checkpoint.export checkpoint.tensors rehearsal "
    "checkpoint.together checkpoint.save checkpoint.load checkpoint.resume report train plan choice plan_command "
    "evaluate_command run_folder exit_file supervise plot cli"
).split()


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lowmem"):
            for imported in (f"{node.module}.{alias.name}" for alias in node.names):  # a module, or a name in one
                yield imported if imported.removeprefix("lowmem.") in ORDER else node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lowmem"))


def test_modules_import_only_those_above_them():
    files = [path for path in (ROOT / "lowmem").rglob("*.py") if path.name != "__init__.py"]
    found = {".".join(path.relative_to(ROOT / "lowmem").with_suffix("").parts): path for path in files}
    assert found.keys() == set(ORDER)
    for place, name in enumerate(ORDER):
        for imported in imports_of(found[name]):
            assert imported.removeprefix("lowmem.") in ORDER[:place], f"{name} imports {imported}"


def test_no_module_below_train_sees_the_config():
    for name in ORDER[ORDER.index("flags") + 1 : ORDER.index("train")]:
        source = (ROOT / "lowmem" / f"{name.replace('.', '/')}.py").read_text()
        assert "TrainConfig" not in source, name


def test_every_public_name_is_what_it_says_even_when_all_modules_are_loaded():
    for name in ORDER:
        import_module(f"lowmem.{name}")
    for name in lowmem.__all__:
        assert getattr(lowmem, name).__name__ == name


def test_importing_the_package_imports_no_torch():
    result = run(
        sys.executable, "-c", "import lowmem, sys; assert 'torch' not in sys.modules and 'fire' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_the_tree_is_lint_free():
    for words in (["check", "."], ["format", "--check", "."]):
        result = run(sys.executable, "-m", "ruff", *words)
        assert result.returncode == 0, result.stdout + result.stderr
