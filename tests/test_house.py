"""Test the code's structure: import order; `import lowmem` loads no torch; public names and listed slow tests exist."""

import ast
import sys
from graphlib import TopologicalSorter
from importlib import import_module

import lowmem
from tests.processes import ROOT, run
from tests.slow import SECONDS

# A module imports only from its own folder, and from folders and modules that are before it in this list.
ORDER = (
    "errors kernels storage config distributed adapters data model optim memory cross_entropy loss step "
    "deepspeed_step recover evaluation checkpoint run_output report train plan job plot cli"
).split()
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "lowmem").rglob("*.py")
    if path.name != "__init__.py"
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lowmem"):
            for imported in (f"{node.module}.{alias.name}" for alias in node.names):  # a module, or a name in it
                yield imported if imported in MODULES else node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lowmem"))


def layer(module):
    """Return the index in ORDER of a module's folder, or of the module itself if it is directly in lowmem/."""
    return ORDER.index(module.split(".")[1])


def test_modules_import_only_from_their_own_and_earlier_folders():
    assert {module.split(".")[1] for module in MODULES} == set(ORDER)
    graph = {module: set(imports_of(path)) for module, path in MODULES.items()}
    for module, imported in graph.items():
        assert imported <= MODULES.keys(), f"{module} imports {imported - MODULES.keys()}"
        later = [other for other in imported if layer(other) > layer(module)]
        assert not later, f"{module} imports {later}"
    list(TopologicalSorter(graph).static_order())  # raises CycleError if modules import each other in a circle


def test_no_module_between_config_and_train_mentions_train_config():
    for module, path in MODULES.items():
        if ORDER.index("config") < layer(module) < ORDER.index("train"):
            assert "TrainConfig" not in path.read_text(), module


def test_no_module_hides_a_public_name():
    for module in MODULES:
        if not module.endswith("_cuda"):  # they import Triton, which not every machine has
            import_module(module)
    for name in lowmem.__all__:
        assert getattr(lowmem, name).__name__ == name


def test_importing_the_package_imports_no_torch():
    result = run(
        sys.executable, "-c", "import lowmem, sys; assert 'torch' not in sys.modules and 'fire' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_the_slow_tests_are_few_and_exist():
    assert len(SECONDS) <= 40
    for node in SECONDS:
        file, _, name = node.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), node


def test_the_tree_is_lint_free():
    for words in (["check", "."], ["format", "--check", "."]):
        result = run(sys.executable, "-m", "ruff", *words)
        assert result.returncode == 0, result.stdout + result.stderr
