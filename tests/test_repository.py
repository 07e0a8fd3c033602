"""Promises about the code itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "vae_scale").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read_or_written(path: Path) -> None:
    text = path.read_text()
    for forbidden in (r"torch\.save", r"torch\.load\b", r"import pickle", r"pickle\.", r"allow_pickle=True", r"yaml\.load\("):
        assert not re.search(forbidden, text), forbidden


def imports(path: Path) -> set[str]:
    """The parts of the package that a file names in its imports."""
    return set(re.findall(r"(?:from|import) vae_scale\.(\w+)", path.read_text()))


@pytest.mark.parametrize(
    ("part", "below"),
    [
        ("data", {"data", "errors", "randomness"}),
        ("models", {"models", "config", "errors", "randomness"}),
        ("training", {"training", "data", "models", "config", "errors", "randomness"}),
    ],
)
def test_imports_point_one_way(part: str, below: set[str]) -> None:
    for path in (ROOT / "vae_scale" / part).glob("*.py"):
        assert imports(path) <= below, path
