"""Count the files, lines and imports of the library, and the lines of its main functions.

    python benchmarks/house.py [--root=CHECKOUT]

Blank lines count. An `__init__.py` is not counted as a file, but its lines are. A file that a function imports counts
as imported.
"""

import argparse
import ast
from pathlib import Path

FUNCTIONS = [("train.py", "train"), ("step.py", "train_step")]
CLOSURES = ["step.py", "train.py"]


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def imports_of(path: Path, root: Path) -> set[Path]:
    """Return the files of lowmem that `path` imports directly."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowmem":
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                file = root.joinpath(*name.split(".")).with_suffix(".py")
                found |= {file} if file.is_file() else set()
    return found


def closure(path: Path, root: Path) -> set[Path]:
    """Return `path` and every file of lowmem that it imports, directly or not."""
    seen, left = set(), {path}
    while left:
        seen |= left
        left = set().union(*(imports_of(each, root) for each in left)) - seen
    return seen


def function_lines(path: Path, name: str) -> int:
    node = next(x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef) and x.name == name)
    return node.end_lineno - node.lineno + 1


def import_lines(path: Path) -> int:
    """Count the lines of import statements at the top level."""
    body = ast.parse(path.read_text()).body
    return sum(x.end_lineno - x.lineno + 1 for x in body if isinstance(x, ast.Import | ast.ImportFrom))


def figures(root: Path) -> dict[str, int]:
    package = root / "lowmem"
    files = [path for path in sorted(package.rglob("*.py")) if path.name != "__init__.py"]
    found = {
        "files of lowmem": len(files),
        "files directly under lowmem/": sum(path.parent == package for path in files),
        "folders": len({path.parent for path in files} - {package}),
        "lines of lowmem": sum(map(line_count, package.rglob("*.py"))),
        "lines of the longest file": max(map(line_count, files)),
    }
    for name in CLOSURES:
        reached = closure(package / name, root)
        found |= {f"files that {name} imports": len(reached), "their lines": sum(map(line_count, reached))}
        found[f"lines of the files that {name} imports"] = found.pop("their lines")
    found |= {f"lines of {name}()": function_lines(package / file, name) for file, name in FUNCTIONS}
    found["import lines of train.py"] = import_lines(package / "train.py")
    found["lines of tests"] = sum(map(line_count, (root / "tests").rglob("*.py")))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    for name, count in figures(parser.parse_args().root.resolve()).items():
        print(f"{name:<44}{count:>8,}")
