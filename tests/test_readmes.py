"""Runs every command of every README as a separate test, in order.

New commands of `vae_scale` are run automatically. If a command is too expensive or refers to missing files, add a line to
SUBSTITUTIONS or PATHS. If it cannot be run here, add it to TESTED_ELSEWHERE with the test that covers it.
"""

import importlib
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from bad_server import Server
from conftest import TINY, discs
from PIL import Image

from launch import environment
from vae_scale.config.parsing import parse
from vae_scale.runtime import checkpoint

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "configs", "launch", "shards", "tests", "vae_scale")
MARKDOWN = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
READMES = [path for path in MARKDOWN if path.name in ("README.md", "CONTRIBUTING.md")]

# Names in the working directory of the commands, and the fixtures they link to. See `fixture_paths`.
COMMON_PATHS = {
    "DIR": "shards",
    "PATH": "binaries",
    "RUN": "run",
    "Pictures": "photographs",
    "A.jpg": "a.jpg",
    "B.jpg": "b.jpg",
}
PATHS = {
    "README.md": {"data/demo": "shards", "runs/demo": "run"},
    "launch/README.md": {"data/demo": "shards", "data/stl10": "shards"},
    "shards/README.md": {"stl10_binary": "binaries", "runs/stl10": "run"},
    "configs/README.md": {"data/demo": "shards", "data/mine": "shards"},
}

# Replacements that reduce the cost of commands or point them to fixtures.
SUBSTITUTIONS = [
    (r"--download --data data", "--data PATH"),  # 2.6 GB
    (r"--source folder --data PATH", "--source folder --data ~/Pictures"),
    (r"--(out|save-images) DIR", r"--\1 OUT"),  # outputs; all other DIRs are inputs
    (r"https://(HOST/NAME|host/photos)-\{000000\.\.000127\}", "SERVER/stl10-train-{000000..000002}"),
    (r"--part 1/4", "--part 1/2"),
    (r"--part 4/4", "--part 2/2"),  # the README omits parts 2 and 3
    (r"--num_processes (8|N)\b", "--num_processes 2"),
    (r"--num 50000", "--num 6"),
    (r"report RUN RUN", "report RUN runs/small"),
    (r"(vae_scale\.bench .*)", r"\1 --repeats 1"),
    (r"(vae_scale\.bench data .*)", r"\1 --batch 16"),
    (r"(vae_scale\.(train|bench (train|step)) .*)", r"\1 SMALL"),
]
SMALL = [*TINY, "--train.images=24", "--evaluate.images=12", "--evaluate.prior_fit_images=24", "--track.tracker=none",
         "--prior.width=32", "--prior.depth=1", "--prior.clusters=2"]  # fmt: skip

# Patterns of commands that are not run here: test file, text in it, and reason.
TESTED_ELSEWHERE = {
    r"accelerate launch --cpu --num_processes 2":
        ("tests/test_training.py", "test_the_silent_single_process_launch_is_refused", "raises an error"),
    r"python tests/benchmarks/compare_loaders\.py .*":
        ("tests/test_bench.py", "compare_loaders.main(", "takes minutes"),
    r"python tests/benchmarks/compare_trainers\.py .*":
        ("tests/test_trainer_peers.py", "from compare_trainers import main", "takes minutes"),
    r"python tests/benchmarks/quality\.py .*":
        ("tests/test_quality.py", "quality.main(", "takes minutes"),
    r"python tests/benchmarks/step_parts\.py .*":
        ("tests/test_bench.py", "step_parts.main(", "takes a minute"),
    r"python tests/benchmarks/soak\.py --kills 50 --processes 1 --precision fp32":
        ("tests/test_resume.py", "Soak(", "takes half an hour"),
    r"python tests/gpu/run\.py .*":
        ("tests/test_gpu_kit.py", "--rehearse", "needs a GPU"),
    r"sbatch .* launch/slurm\.sbatch --config configs/stl10\.yaml":
        ("tests/test_slurm.py", "slurm.sbatch", "needs SLURM"),
}  # fmt: skip
# Launcher configurations tested elsewhere. Their commands are run in this process.
LAUNCHERS_TESTED_ELSEWHERE = {
    "launch/cpu.yaml": ("tests/test_launch.py", "test_cpu_and_single_gpu_start_one_process"),
    "launch/single_gpu.yaml": ("tests/test_launch.py", "test_cpu_and_single_gpu_start_one_process"),
    "launch/multi_node.yaml": ("tests/test_launch.py", "test_multi_node_connects_two_launchers"),
    "launch/fsdp2.yaml": ("tests/test_launch.py", "test_fsdp2_starts_two_processes"),
}

# Files that are named but created by users or by runs.
NOT_IN_REPOSITORY = {"vae_scale/models/mine.py", "vae_scale/data/mine.py", "config.yaml"}

# Fenced code, an indented line, or inline code, optionally in the first cell of a table.
CODE = re.compile(
    r"^```\w*\n(.*?)^```|^(?: {4}|\t)([^\n]+)|(^\| *(?=`[^`\n]+` *\|))?`((?:[^`\n]|\n(?!\s*\n))+)`", re.MULTILINE | re.DOTALL
)
PROGRAMS = r"python -m vae_scale\.|python tests/|(?:accelerate launch|make|pip install|sbatch|kubectl|sky|docker)(?:\s|$)"
COMMAND = re.compile(rf"(?:\w+=\S+ +)*(?:{PROGRAMS})")
MENTION = re.compile(r"python -m \S+|[\w-]+( [\w./-]+)?")  # only the name of a command


class Command(NamedTuple):
    """A command of a README, on one line."""

    readme: str
    text: str

    def __str__(self) -> str:
        return f"{self.readme}: {self.text}"


def find_commands(path: Path) -> tuple[list[Command], list[Command]]:
    """Returns the unique commands of a Markdown file, in order, and the commands mentioned by name only."""
    commands, mentions = [], []
    for fenced, indented, cell, inline in CODE.findall(re.sub(r"\s*\\\n\s*", " ", path.read_text())):
        for line in (fenced or indented or inline.replace("\n", " ")).splitlines():
            text = re.sub(r"\s+#.*", "", line).strip()
            if COMMAND.match(text):
                mentioned = inline and not cell and MENTION.fullmatch(text)
                (mentions if mentioned else commands).append(Command(str(path.relative_to(ROOT)), text))
    return list(dict.fromkeys(commands)), list(dict.fromkeys(mentions))


COMMANDS = [command for path in READMES for command in find_commands(path)[0]]
RUN_HERE = [command for command in COMMANDS if not any(re.fullmatch(pattern, command.text) for pattern in TESTED_ELSEWHERE)]
MENTIONS = [command for path in READMES for command in find_commands(path)[1]]


def output_paths(verb: str, words: list[str]) -> list[Path]:
    """Returns the output paths of a vae_scale command."""
    options = ("--out", "--json", "--gif", "--save-images")
    paths = [Path(after) for word, after in itertools.pairwise(words) if word in options]
    if verb == "train" and "--dry-run" not in words:
        paths.append(parse(words)[0].run_dir)
    if verb == "report" and not paths:
        paths.append(Path(words[0]) / "report.html")
    return paths


class Workspace:
    """A working directory in which the commands of a README are run in order."""

    def __init__(self, folder: Path, readme: str, fixture_paths: dict[str, Path], server: Server, launched: set[str]) -> None:
        self.folder, self.server, self.launched = folder, server, launched
        self.pending = [command for command in RUN_HERE if command.readme == readme]
        self.results: dict[Command, BaseException | None] = {}
        links = {name: fixture_paths[fixture] for name, fixture in (COMMON_PATHS | PATHS.get(readme, {})).items()}
        for name, target in (links | {name: ROOT / name for name in ("configs", "launch", "tests")}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(target)

    def run(self, command: Command) -> None:
        """Runs a command after all preceding ones that have not been run, and raises its exception."""
        while command not in self.results:
            first = self.pending.pop(0)
            try:
                self.results[first] = self.run_now(first.text)
            except (Exception, SystemExit) as error:
                error.add_note(f"{first}\nSee the docstring of tests/test_readmes.py.")
                self.results[first] = error
        if error := self.results[command]:
            raise error

    def run_now(self, text: str) -> None:
        for pattern, replacement in SUBSTITUTIONS:
            text = re.sub(pattern, replacement, text)
        text = text.replace("SERVER", self.server.url).replace("SMALL", shlex.join(SMALL))
        command = re.search(r"-m vae_scale\.(.*)", text)
        if text.startswith("make "):
            check_make(text)
        elif text.startswith("pip install "):
            check_pip(text)
        elif text.startswith("python tests/"):
            run_in_shell(text)
        else:
            assert command, "not a command of vae_scale, and not in TESTED_ELSEWHERE"
            verb, *words = (re.sub("^~", str(self.folder), word) for word in shlex.split(command[1]))
            self.run_module(text, verb, words)

    def run_module(self, text: str, verb: str, words: list[str]) -> None:
        """Runs a command of vae_scale in this process, or in a shell if its launcher has not been tested yet."""
        paths = output_paths(verb, words)
        self.remove_outputs(paths, keep="--part" in words)
        launcher = re.search(r"accelerate launch (.*--config_file (\S+).*)", text)
        if launcher:
            launch_command_parser().parse_args(shlex.split(launcher[1]))
        if launcher and launcher[2] not in self.launched:
            self.launched.add(launcher[2])
            run_in_shell(text)
        else:
            module = importlib.import_module(f"vae_scale.{verb}")
            module.main(words)
            assert inspect.getsource(module).endswith('if __name__ == "__main__":\n    main()\n')
        for path in paths:
            assert any(path.iterdir()) if path.is_dir() else path.read_bytes(), f"{path}: nothing was written"
            assert verb != "train" or checkpoint.newest_checkpoint(path), f"{path}: no checkpoint"

    def remove_outputs(self, paths: list[Path], keep: bool) -> None:
        """Removes existing outputs of a command; folders only if `keep` is false."""
        for path in paths:
            assert path.resolve().is_relative_to(self.folder.parent), f"{path}: outside of the temporary folder"
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif not keep:
                shutil.rmtree(path, ignore_errors=True)


def run_in_shell(text: str) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(text, shell=True, env=environment(PATH=programs), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def check_make(text: str) -> None:
    """Checks that the target, its modules and its files exist."""
    done = subprocess.run(["make", "-n", *shlex.split(text)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"-m (vae_scale\.\w+)", done.stdout):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"\b(?:tests|launch|configs)/[\w./]+", done.stdout):
        assert (ROOT / path).exists(), path


def check_pip(text: str) -> None:
    """Checks that a command installs this project with existing extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirement = re.fullmatch(r"(?:\.|vae_scale)(?:\[([\w,]+)\])?", shlex.split(text)[-1])
    assert requirement, "installs another package: add it to TESTED_ELSEWHERE"
    assert set((requirement[1] or "").split(",")) <= {"", *extras}


@pytest.fixture(scope="module")
def fixture_paths(shards: Path, binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files used by the commands, by the names in COMMON_PATHS and PATHS."""
    folder = tmp_path_factory.mktemp("fixtures")
    for number, image in enumerate(discs(40, 7)):
        path = folder / "photographs" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    shards = shutil.copytree(shards, folder / "shards")  # commands write a contact sheet into it
    words = [*SMALL, f"--data.shards={shards}", f"--run={folder / 'run'}", "--model.latent=vector"]
    importlib.import_module("vae_scale.train").main(words)
    words = ["--source=stl10", f"--data={binaries}", f"--out={folder / 'others'}", "--encoding=png", "--images-per-shard=25"]
    importlib.import_module("vae_scale.pack").main(words)
    photographs = folder / "photographs"
    pictures = {"photographs": photographs, "a.jpg": photographs / "0" / "0.jpg", "b.jpg": photographs / "1" / "1.jpg"}
    return {"shards": shards, "binaries": binaries, "run": folder / "run", "others": folder / "others"} | pictures


@pytest.fixture(scope="module")
def workspaces(fixture_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Workspace]]:
    server, launched = (
        Server(fixture_paths["others"]),
        set(LAUNCHERS_TESTED_ELSEWHERE),
    )  # each launcher is started only once to save time
    names = [str(path.relative_to(ROOT)) for path in READMES]
    yield {name: Workspace(tmp_path_factory.mktemp("workspace"), name, fixture_paths, server, launched) for name in names}
    server.stop()


@pytest.mark.parametrize("command", RUN_HERE, ids=str)
def test_readme_commands_run(command: Command, workspaces: dict[str, Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = workspaces[command.readme]
    monkeypatch.chdir(workspace.folder)
    monkeypatch.setenv("HOME", str(workspace.folder))
    for module in ("data", "training"):
        monkeypatch.setattr(f"vae_scale.benchmark.{module}.SECONDS", 0.1)
    monkeypatch.setattr("vae_scale.benchmark.measuring.SIDES", {"cpu": 256})
    workspace.run(command)


@pytest.mark.parametrize("command", MENTIONS, ids=str)
def test_mentioned_commands_exist(command: Command) -> None:
    program, *words = command.text.split()
    if program == "make":
        check_make(command.text)
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif program == "python":
        assert (ROOT / words[0]).exists()


@pytest.mark.parametrize("pattern", [*TESTED_ELSEWHERE, *LAUNCHERS_TESTED_ELSEWHERE])
def test_commands_tested_elsewhere_are_in_a_readme_and_in_their_test(pattern: str) -> None:
    path, text = (TESTED_ELSEWHERE | LAUNCHERS_TESTED_ELSEWHERE)[pattern][:2]
    assert text in (ROOT / path).read_text()
    texts = [command.text for command in COMMANDS if re.fullmatch(pattern, command.text) or pattern in command.text.split()]
    assert texts, "not in any README: remove it"
    for name in re.findall(r"\b(?:tests|launch|configs)/[\w./]+", " ".join(texts)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in SUBSTITUTIONS])
def test_substitutions_match_a_readme_command(pattern: str) -> None:
    assert any(re.search(pattern, command.text) for command in COMMANDS), "not in any README: remove it"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_file_names_exist(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)|<img[^>]* src=\"([^\"]+)\"", text):
        assert (path.parent / "".join(link)).exists(), "".join(link)
    file_names = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")}
    for name in set(re.findall(r"`([\w./-]+)`", text)) - NOT_IN_REPOSITORY:
        if name.startswith(("tests/", "launch/", "configs/", "vae_scale/")):
            assert (ROOT / name).exists(), name
        elif Path(name).suffix in (".py", ".yaml", ".sbatch"):
            assert name in file_names, name
