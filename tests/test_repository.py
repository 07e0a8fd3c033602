"""Promises about the code itself."""

import ast
import graphlib
import re
from pathlib import Path

import options_table
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "vae_scale").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read_or_written(path: Path) -> None:
    text = path.read_text()
    for forbidden in (r"torch\.save", r"torch\.load\b", r"import pickle", r"pickle\.", r"allow_pickle=True", r"yaml\.load\("):
        assert not re.search(forbidden, text), forbidden


MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if path.name != "__init__.py")


def source_path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_modules(module: str) -> set[str]:
    """Returns the modules of the package that `module` imports, also within functions."""
    imports = set()
    for node in ast.walk(ast.parse(source_path(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vae_scale"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                imports.add(name if source_path(name).exists() else node.module)
    return imports


def test_no_file_is_part_of_an_import_cycle() -> None:
    graphlib.TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()


ALLOWED_IMPORTS = {  # by each folder, in addition to itself and the shared modules of the top level
    "config": set(),
    "data": set(),
    "models": {"config"},
    "runtime": {"config", "data", "models"},
    "evaluation": {"config", "data", "models", "runtime"},
    "tracking": {"config", "runtime"},
    "training": {"config", "data", "models", "runtime", "evaluation", "tracking"},
    "benchmark": {"config", "data", "models", "runtime", "evaluation", "training"},
}
SHARED = {"errors", "files", "randomness", "vae_scale"}


@pytest.mark.parametrize("folder", ALLOWED_IMPORTS)
def test_imports_point_one_way(folder: str) -> None:
    for name in MODULES:
        if name.split(".")[1] == folder:
            imported = {[*module.split("."), "vae_scale"][1] for module in imported_modules(name)}
            assert imported <= ALLOWED_IMPORTS[folder] | SHARED | {folder}, name


def test_the_table_of_options_is_up_to_date() -> None:
    text = options_table.README.read_text()
    assert text == options_table.insert_table(text), "run python tests/options_table.py"
