"""strategies <- worker <- backend <- demo, benchmarks: held by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "strategies": set(),
    "worker": {"strategies"},
    "backend": {"strategies", "worker"},
    "demo": {"strategies", "worker", "backend"},
    "benchmarks": {"strategies", "worker", "backend", "demo"},
}
PACKAGES = set(MAY_IMPORT) | {"tests"}
MODULES = sorted(path for name in MAY_IMPORT for path in (REPOSITORY / name).rglob("*.py"))
MAY_IMPORT_TORCH = {"detector", "training", "model"}
HEAVY = {"torch", "torchvision", "ultralytics", "label_studio_ml"}
STRATEGIES_MAY_IMPORT = {"numpy", "scipy", "sklearn", "threadpoolctl"}


def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """First names of what the module imports; with `at_import_only`, without what its functions or type checkers do."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module).partition(".")[0])
        waiting.extend(ast.iter_child_nodes(node))
    return found


def test_there_is_something_to_hold_the_rule_on() -> None:
    assert {path.parent.name for path in MODULES} >= {"strategies", "worker", "backend", "demo"}
    assert "worker" in imports(REPOSITORY / "backend" / "app.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_module_imports_only_from_below(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    ours = imports(path) & PACKAGES
    assert ours <= MAY_IMPORT[package] | {package}, f"{path.name} imports {sorted(ours)}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[-2] == "worker"], ids=lambda path: path.stem)
def test_only_some_modules_of_the_worker_load_torch(path: Path) -> None:
    heavy = imports(path, at_import_only=True) & HEAVY
    assert not heavy or path.stem in MAY_IMPORT_TORCH, f"{path.name} loads {sorted(heavy)} when it is imported"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parts[-2] in ("strategies", "backend")], ids=lambda path: path.stem
)
def test_strategies_and_the_backend_know_no_torch_at_all(path: Path) -> None:
    # label-studio-ml's own server is a process of its own, and predicts in it: nothing else of the backend imports it
    allowed = {"label_studio_ml"} if path.stem == "stock_server" else set()
    assert imports(path) & HEAVY == allowed


def test_nothing_imports_the_stock_server() -> None:
    others = [path for path in MODULES if path.stem != "stock_server"]
    assert [path for path in others if "stock_server" in path.read_text()] == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "strategies").glob("*.py")), ids=lambda path: path.stem)
def test_strategies_need_only_arithmetic(path: Path) -> None:
    import sys

    others = imports(path) - set(sys.stdlib_module_names) - {"strategies"}
    assert others <= STRATEGIES_MAY_IMPORT
    assert not imports(path) & {"time", "datetime", "random", "os", "io", "pathlib", "socket", "subprocess"}
