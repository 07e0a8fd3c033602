"""Promises about the code itself."""

import importlib
import re
import shlex
from pathlib import Path

import options_table
import pytest

from vae_scale import bench, config

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
        ("metrics", {"metrics", "errors", "randomness"}),
        ("models", {"models", "config", "errors", "randomness"}),
        ("benchmark", {"benchmark", "training", "models", "data", "config", "errors", "__version__"}),
        ("reporting", {"reporting", "errors", "__version__"}),
        ("training", {"training", "data", "models", "metrics", "config", "errors", "randomness"}),
    ],
)
def test_imports_point_one_way(part: str, below: set[str]) -> None:
    for path in (ROOT / "vae_scale" / part).glob("*.py"):
        assert imports(path) <= below, path


def test_the_table_of_options_is_what_the_dataclasses_say() -> None:
    assert options_table.README.read_text() == options_table.with_table(options_table.README.read_text()), (
        "run python tests/options_table.py"
    )


def commands(path: Path) -> list[list[str]]:
    """The vae_scale commands in a README, one list of words each; a trailing backslash continues a line."""
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(r"(?:python -m |-m )vae_scale\.(\w+) ([^\n`|]*)", text)
    return [[verb, *shlex.split(rest, comments=True)] for verb, rest in lines]


READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("launch", "shards", "configs"))]


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_readme_is_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for verb, *words in commands(path):
        if verb == "train":
            config.parse(words)
        elif verb == "bench":
            bench.read(words)
        else:
            importlib.import_module(f"vae_scale.{verb}")._parser().parse_args(words)
