"""Every command of every README is run, each as a test of its own, in the order in which they stand.

A new command of `vae_scale` is run without further ado. Where it is too large for a test, or names what is not there, add a
line to SMALLER or GIVEN. Where no test here can run it, add it to ELSEWHERE, with the test that proves it.
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

# What a README takes for granted: names in the folder where its commands are run, and what is there. See `given`.
EVERYWHERE = {"DIR": "shards", "PATH": "binaries", "RUN": "run", "Pictures": "photographs", "A.jpg": "a.jpg", "B.jpg": "b.jpg"}
GIVEN = {
    "README.md": {"data/demo": "shards", "runs/demo": "run"},
    "launch/README.md": {"data/demo": "shards", "data/stl10": "shards"},
    "shards/README.md": {"stl10_binary": "binaries", "runs/stl10": "run"},
    "configs/README.md": {"data/demo": "shards", "data/mine": "shards"},
}

# How a command is made small enough for a test, or finds there what it needs.
SMALLER = [
    (r"--download --data data", "--data PATH"),  # 2.6 GB
    (r"--source folder --data PATH", "--source folder --data ~/Pictures"),
    (r"--(out|save-images) DIR", r"--\1 OUT"),  # all other DIRs are read
    (r"https://(HOST/NAME|host/photos)-\{000000\.\.000127\}", "SERVER/stl10-train-{000000..000002}"),
    (r"--part 1/4", "--part 1/2"),
    (r"--part 4/4", "--part 2/2"),  # the others are not written out
    (r"--num_processes (8|N)\b", "--num_processes 2"),
    (r"--num 50000", "--num 6"),
    (r"report RUN RUN", "report RUN runs/small"),
    (r"(vae_scale\.bench .*)", r"\1 --repeats 1"),
    (r"(vae_scale\.bench data .*)", r"\1 --batch 16"),
    (r"(vae_scale\.(train|bench (train|step)) .*)", r"\1 SMALL"),
]
SMALL = [*TINY, "--train.images=24", "--evaluate.images=12", "--evaluate.prior_fit_images=24", "--track.tracker=none",
         "--prior.width=64", "--prior.depth=1"]  # fmt: skip

# Commands (as patterns) that are not run here: the file that proves them, words that stand in it, and why.
ELSEWHERE = {
    r"accelerate launch --cpu --num_processes 2":
        ("tests/test_training.py", "test_the_silent_single_process_launch_is_refused", "starts one process, which refuses"),
    r"python tests/benchmarks/compare_loaders\.py .*":
        ("tests/test_bench.py", "compare_loaders.main(", "takes minutes"),
    r"python tests/benchmarks/compare_trainers\.py .*":
        ("tests/test_trainer_peers.py", "from compare_trainers import main", "takes minutes"),
    r"python tests/benchmarks/soak\.py --kills 50 --processes 1 --precision fp32":
        ("tests/test_resume.py", "Soak(", "takes half an hour"),
    r"sbatch .* launch/slurm\.sbatch --config configs/stl10\.yaml":
        ("tests/test_slurm.py", "slurm.sbatch", "needs SLURM"),
}  # fmt: skip
# Launchers whose processes other tests start. What they are to run is run here, in this process.
LAUNCHED_ELSEWHERE = {
    "launch/cpu.yaml": ("tests/test_launch.py", "test_cpu_and_single_gpu_start_one_process"),
    "launch/single_gpu.yaml": ("tests/test_launch.py", "test_cpu_and_single_gpu_start_one_process"),
    "launch/multi_node.yaml": ("tests/test_launch.py", "test_multi_node_connects_two_launchers"),
    "launch/fsdp2.yaml": ("tests/test_launch.py", "test_fsdp2_starts_two_processes"),
}

# Files that are named, but are not of this repository: the reader writes them, or a run.
NOT_IN_REPOSITORY = {"vae_scale/models/mine.py", "vae_scale/data/mine.py", "config.yaml"}

# Fenced code, an indented line, or inline code, maybe in the first cell of a table.
CODE = re.compile(
    r"^```\w*\n(.*?)^```|^(?: {4}|\t)([^\n]+)|(^\| *(?=`[^`\n]+` *\|))?`((?:[^`\n]|\n(?!\s*\n))+)`", re.MULTILINE | re.DOTALL
)
PROGRAMS = r"python -m vae_scale\.|python tests/|(?:accelerate launch|make|pip install|sbatch|kubectl|sky|docker)(?:\s|$)"
COMMAND = re.compile(rf"(?:\w+=\S+ +)*(?:{PROGRAMS})")
MENTION = re.compile(r"python -m \S+|[\w-]+( [\w./-]+)?")  # nothing but a name: in a sentence, it stands for the command


class Command(NamedTuple):
    """A command of a README, in a line."""

    readme: str
    text: str

    def __str__(self) -> str:
        return f"{self.readme}: {self.text}"


def find_commands(path: Path) -> tuple[list[Command], list[Command]]:
    """The commands of a Markdown file, in order and each once, and those that sentences mention by name."""
    commands, mentions = [], []
    for fenced, indented, cell, inline in CODE.findall(re.sub(r"\s*\\\n\s*", " ", path.read_text())):
        for line in (fenced or indented or inline.replace("\n", " ")).splitlines():
            text = re.sub(r"\s+#.*", "", line).strip()
            if COMMAND.match(text):
                mentioned = inline and not cell and MENTION.fullmatch(text)
                (mentions if mentioned else commands).append(Command(str(path.relative_to(ROOT)), text))
    return list(dict.fromkeys(commands)), list(dict.fromkeys(mentions))


COMMANDS = [command for path in READMES for command in find_commands(path)[0]]
RUN_HERE = [command for command in COMMANDS if not any(re.fullmatch(pattern, command.text) for pattern in ELSEWHERE)]
MENTIONS = [command for path in READMES for command in find_commands(path)[1]]


def output_paths(verb: str, words: list[str]) -> list[Path]:
    """What a vae_scale command writes, by its options."""
    options = ("--out", "--json", "--gif", "--save-images")
    paths = [Path(after) for word, after in itertools.pairwise(words) if word in options]
    if verb == "train" and "--dry-run" not in words:
        paths.append(parse(words)[0].run_dir)
    if verb == "report" and not paths:
        paths.append(Path(words[0]) / "report.html")
    return paths


class Place:
    """A folder in which the commands of a README are run, from the first to the last."""

    def __init__(self, folder: Path, readme: str, given: dict[str, Path], server: Server, launched: set[str]) -> None:
        self.folder, self.server, self.launched = folder, server, launched
        self.waiting = [command for command in RUN_HERE if command.readme == readme]
        self.ended: dict[Command, BaseException | None] = {}
        there = {name: given[what] for name, what in (EVERYWHERE | GIVEN.get(readme, {})).items()}
        for name, target in (there | {name: ROOT / name for name in ("configs", "launch", "tests")}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(target)

    def run(self, command: Command) -> None:
        """Runs a command, after all that stand before it and were not run yet; raises what it ends with."""
        while command not in self.ended:
            first = self.waiting.pop(0)
            try:
                self.ended[first] = self.run_now(first.text)
            except (Exception, SystemExit) as error:
                error.add_note(f"{first}\nWhat to do: see the top of tests/test_readmes.py.")
                self.ended[first] = error
        if error := self.ended[command]:
            raise error

    def run_now(self, text: str) -> None:
        for pattern, smaller in SMALLER:
            text = re.sub(pattern, smaller, text)
        text = text.replace("SERVER", self.server.url).replace("SMALL", shlex.join(SMALL))
        command = re.search(r"-m vae_scale\.(.*)", text)
        if text.startswith("make "):
            check_make(text)
        elif text.startswith("pip install "):
            check_pip(text)
        elif text.startswith("python tests/"):
            in_a_shell(text)
        else:
            assert command, "not a command of vae_scale, and not in ELSEWHERE"
            verb, *words = (re.sub("^~", str(self.folder), word) for word in shlex.split(command[1]))
            self.run_module(text, verb, words)

    def run_module(self, text: str, verb: str, words: list[str]) -> None:
        """Runs a command of vae_scale: in this process, which takes less time, or by a launcher that was not tried yet."""
        paths = output_paths(verb, words)
        self.remove_outputs(paths, keep="--part" in words)
        launcher = re.search(r"accelerate launch (.*--config_file (\S+).*)", text)
        if launcher:
            launch_command_parser().parse_args(shlex.split(launcher[1]))
        if launcher and launcher[2] not in self.launched:
            self.launched.add(launcher[2])
            in_a_shell(text)
        else:
            module = importlib.import_module(f"vae_scale.{verb}")
            module.main(words)
            assert inspect.getsource(module).endswith('if __name__ == "__main__":\n    main()\n')
        for path in paths:
            assert any(path.iterdir()) if path.is_dir() else path.read_bytes(), f"{path}: nothing was written"
            assert verb != "train" or checkpoint.newest_checkpoint(path), f"{path}: no checkpoint"

    def remove_outputs(self, paths: list[Path], keep: bool) -> None:
        """Removes what stands where a command is to write; folders not if they are to be kept."""
        for path in paths:
            assert path.resolve().is_relative_to(self.folder.parent), f"{path}: not below the test's folder"
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif not keep:
                shutil.rmtree(path, ignore_errors=True)


def in_a_shell(text: str) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(text, shell=True, env=environment(PATH=programs), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def check_make(text: str) -> None:
    """The target is there, and so is all that it names."""
    done = subprocess.run(["make", "-n", *shlex.split(text)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"-m (vae_scale\.\w+)", done.stdout):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"\b(?:tests|launch|configs)/[\w./]+", done.stdout):
        assert (ROOT / path).exists(), path


def check_pip(text: str) -> None:
    """It installs this project, with extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirement = re.fullmatch(r"(?:\.|vae_scale)(?:\[([\w,]+)\])?", shlex.split(text)[-1])
    assert requirement, "installs something else: add it to ELSEWHERE"
    assert set((requirement[1] or "").split(",")) <= {"", *extras}


@pytest.fixture(scope="module")
def given(shards: Path, binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands find, by the names of EVERYWHERE and GIVEN."""
    folder = tmp_path_factory.mktemp("given")
    for number, image in enumerate(discs(40, 7)):
        path = folder / "photographs" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    words = [*SMALL, f"--data.shards={shards}", f"--run={folder / 'run'}", "--model.latent=vector"]
    importlib.import_module("vae_scale.train").main(words)
    words = ["--source=stl10", f"--data={binaries}", f"--out={folder / 'others'}", "--encoding=png", "--images-per-shard=25"]
    importlib.import_module("vae_scale.pack").main(words)
    photographs = folder / "photographs"
    pictures = {"photographs": photographs, "a.jpg": photographs / "0" / "0.jpg", "b.jpg": photographs / "1" / "1.jpg"}
    return {"shards": shards, "binaries": binaries, "run": folder / "run", "others": folder / "others"} | pictures


@pytest.fixture(scope="module")
def places(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Place]]:
    server, launched = Server(given["others"]), set(LAUNCHED_ELSEWHERE)  # each launcher starts processes once: it takes long
    names = [str(path.relative_to(ROOT)) for path in READMES]
    yield {name: Place(tmp_path_factory.mktemp("place"), name, given, server, launched) for name in names}
    server.stop()


@pytest.mark.parametrize("command", RUN_HERE, ids=str)
def test_a_command_of_a_readme_works(command: Command, places: dict[str, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    place = places[command.readme]
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("HOME", str(place.folder))
    for what in ("data", "training"):
        monkeypatch.setattr(f"vae_scale.benchmark.{what}.SECONDS", 0.1)
    monkeypatch.setattr("vae_scale.benchmark.measuring.CEILING_SECONDS", 0.02)
    monkeypatch.setattr("vae_scale.benchmark.measuring.SIZES", {"cpu": (256, 512)})
    place.run(command)


@pytest.mark.parametrize("command", MENTIONS, ids=str)
def test_a_command_that_a_sentence_mentions_is_there(command: Command) -> None:
    program, *words = command.text.split()
    if program == "make":
        check_make(command.text)
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif program == "python":
        assert (ROOT / words[0]).exists()


@pytest.mark.parametrize("pattern", [*ELSEWHERE, *LAUNCHED_ELSEWHERE])
def test_what_is_not_run_here_is_in_a_readme_and_in_the_test_that_proves_it(pattern: str) -> None:
    path, words = (ELSEWHERE | LAUNCHED_ELSEWHERE)[pattern][:2]
    assert words in (ROOT / path).read_text()
    texts = [command.text for command in COMMANDS if re.fullmatch(pattern, command.text) or pattern in command.text.split()]
    assert texts, "no README has it: remove it"
    for name in re.findall(r"\b(?:tests|launch|configs)/[\w./]+", " ".join(texts)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in SMALLER])
def test_what_is_made_smaller_is_in_a_readme(pattern: str) -> None:
    assert any(re.search(pattern, command.text) for command in COMMANDS), "no README has it: remove it"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_names_of_files_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)|<img[^>]* src=\"([^\"]+)\"", text):
        assert (path.parent / "".join(link)).exists(), "".join(link)
    file_names = {each.name for folder in FOLDERS for each in (ROOT / folder).rglob("*.*")}
    for name in set(re.findall(r"`([\w./-]+)`", text)) - NOT_IN_REPOSITORY:
        if name.startswith(("tests/", "launch/", "configs/", "vae_scale/")):
            assert (ROOT / name).exists(), name
        elif Path(name).suffix in (".py", ".yaml", ".sbatch"):
            assert name in file_names, name
