"""What torch compiles is kept for later runs, and shown while it is under way."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from launch import DDP, FSDP2, train
from vae_scale.training import compiling

COUNTED = str(Path(__file__).parent / "programs" / "compiled.py")

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
STEP = """
import json
import torch
from torch._dynamo.utils import counters
from vae_scale.training.compiling import compiled

def loss(x, weight):
    return (x @ weight).tanh().square().sum()

weight = torch.ones(4, 4, requires_grad=True)
compiled(loss)(torch.ones(3, 4), weight).backward()
names = ("fxgraph_cache_hit", "fxgraph_cache_miss")
print(json.dumps([counters["inductor"][name] for name in names]))
"""


def step(home: Path) -> tuple[int, int]:
    """Parts of a small step, forward and backward, that a new process finds compiled, and that it compiles."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    environment |= {"XDG_CACHE_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, made = json.loads(done.stdout)
    return found, made


@NEEDS_COMPILER
def test_a_second_process_compiles_nothing_anew(tmp_path: Path) -> None:
    assert step(tmp_path) == (0, 2)
    assert list((tmp_path / "vae_scale" / "compiled").glob("**/*.so"))
    assert step(tmp_path) == (2, 0)


def test_another_place_that_the_user_names_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for place, kept in (("/my/own", "/my/own"), (default_cache_dir(), str(compiling.folder()))):
        monkeypatch.setenv(compiling.FOLDER, place)
        compiling.keep()
        assert os.environ[compiling.FOLDER] == kept


def test_where_the_home_cannot_be_written_torch_keeps_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv(compiling.FOLDER, default_cache_dir())
    compiling.keep()
    assert os.environ[compiling.FOLDER] == default_cache_dir()


@NEEDS_COMPILER
def test_slow_compiling_is_told_while_it_lasts_and_nothing_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path))
    monkeypatch.setattr(compiling, "PATIENCE", 0.3)
    monkeypatch.setattr(compiling, "INTERVAL", 0.1)
    told: list[str] = []

    def loss(x: Tensor) -> Tensor:
        return (x @ x).sin().softmax(1).square().sum()

    step, x = compiling.compiled(loss), torch.ones(5, 5, requires_grad=True)
    with compiling.shown(told.append):
        result = step(x)
        forward = len(told)
        result.backward()
        told_then = list(told)
        step(x).backward()  # compiled by now
    assert 0 < forward < len(told_then)
    assert told == told_then
    assert all(re.fullmatch(r"compiling: \d+ s|compiled in \d+ s", line) for line in told)
    assert [told[0][:9], told[-1][:9]] == ["compiling", "compiled "]


def test_quick_compiling_is_not_told() -> None:
    told: list[str] = []
    with compiling.shown(told.append):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))  # nobody listens any more
    assert told == []


def test_code_for_other_instructions_has_a_folder_of_its_own() -> None:
    """What was compiled for AVX-512 gives wrong numbers where only AVX2 may be used."""
    program = "from vae_scale.training.compiling import folder; print(folder())"
    limits = ({}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"})
    words = [sys.executable, "-c", program]
    folders = {subprocess.run(words, env=os.environ | limit, capture_output=True, check=True).stdout for limit in limits}
    assert len(folders) == len(limits)


LADDER = ("--model.preset=ladder", "--model.patch=4")
HIGHEST_DEFAULT = 8  # graphs of a function, by torch's own limit


@pytest.mark.parametrize(
    ("processes", "config", "options", "graphs"),
    [
        (1, DDP, (), 1),
        (1, DDP, ("--train.accumulation=2", "--data.crop=0.2"), 1),
        (2, DDP, ("--train.accumulation=2",), 1),
        (2, FSDP2, ("--train.accumulation=2",), None),
        (2, FSDP2, LADDER, None),
    ],
    ids=["one process", "accumulation", "DDP", "FSDP2", "FSDP2 ladder"],
)
def test_the_first_step_compiles_all_graphs_and_nothing_falls_back_to_eager(
    shards: Path, tmp_path: Path, processes: int, config: Path, options: tuple[str, ...], graphs: int | None
) -> None:
    words = [f"--data.shards={shards}", f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none", "--train.compile=on"]
    words += ["--train.images=24", "--evaluate.every=12", "--checkpoint.every=12", *options]
    train(processes, tmp_path / "graphs", *words, program=COUNTED, config=config)
    for rank in range(processes):
        first, *others = json.loads((tmp_path / f"graphs.{rank}").read_text())
        assert first == graphs or (graphs is None and first > HIGHEST_DEFAULT)
        assert others == [first]  # evaluation and checkpoints included
