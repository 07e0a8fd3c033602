"""torch.compile: persistent cache, progress reports, and no recompilation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from launch import DDP, FSDP2, train
from vae_scale.runtime import compiling

PROGRAM = str(Path(__file__).parent / "programs" / "count_graphs.py")

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
STEP = """
import json
import torch
from torch._dynamo.utils import counters
from vae_scale.runtime.compiling import compile_function

def loss(x, weight):
    return (x @ weight).tanh().square().sum()

weight = torch.ones(4, 4, requires_grad=True)
compile_function(loss)(torch.ones(3, 4), weight).backward()
names = ("fxgraph_cache_hit", "fxgraph_cache_miss")
print(json.dumps([counters["inductor"][name] for name in names]))
"""


def run_step(home: Path) -> tuple[int, int]:
    """Returns the cache hits and misses of a small forward and backward pass in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    environment |= {"XDG_CACHE_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hits, misses = json.loads(done.stdout)
    return hits, misses


@NEEDS_COMPILER
def test_second_process_uses_the_cache(tmp_path: Path) -> None:
    assert run_step(tmp_path) == (0, 2)
    assert list((tmp_path / "vae_scale" / "compiled").glob("**/*.so"))
    assert run_step(tmp_path) == (2, 0)


def test_cache_folder_of_the_user_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for before, after in (("/custom", "/custom"), (default_cache_dir(), str(compiling.cache_folder()))):
        monkeypatch.setenv(compiling.CACHE_VARIABLE, before)
        compiling.enable_persistent_cache()
        assert os.environ[compiling.CACHE_VARIABLE] == after


def test_default_cache_folder_is_used_if_home_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv(compiling.CACHE_VARIABLE, default_cache_dir())
    compiling.enable_persistent_cache()
    assert os.environ[compiling.CACHE_VARIABLE] == default_cache_dir()


def test_compilation_is_reported() -> None:
    messages: list[object] = []
    step = torch.compile(lambda x: x + 1, backend="eager")
    with compiling.report_compilation(messages.append, messages.append):
        step(torch.ones(3))
        step(torch.ones(3))  # already compiled
    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))  # outside of the context
    assert messages == [True, "compiling", False, "compiled in 0 s"]


def test_cache_folder_depends_on_the_instruction_set() -> None:
    """Code compiled for AVX-512 gives wrong results with AVX2 only."""
    program = "from vae_scale.runtime.compiling import cache_folder; print(cache_folder())"
    limits = ({}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"})
    arguments = [sys.executable, "-c", program]
    folders = {subprocess.run(arguments, env=os.environ | limit, capture_output=True, check=True).stdout for limit in limits}
    assert len(folders) == len(limits)


DEFAULT_RECOMPILE_LIMIT = 8  # torch's default


@pytest.mark.parametrize(
    ("processes", "config", "options", "graphs"),
    [
        (1, DDP, (), 1),
        (1, DDP, ("--train.gradient_accumulation_steps=2", "--data.random_crop=0.2"), 1),
        (2, DDP, ("--train.gradient_accumulation_steps=2",), 1),
        (2, FSDP2, ("--train.gradient_accumulation_steps=2",), None),
    ],
    ids=["one process", "accumulation", "DDP", "FSDP2"],
)
def test_first_step_compiles_all_graphs_without_eager_fallback(
    shards: Path, tmp_path: Path, processes: int, config: Path, options: tuple[str, ...], graphs: int | None
) -> None:
    arguments = [f"--data.shards={shards}", f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none", "--train.compile=on"]
    arguments += ["--train.images=24", "--evaluate.every=12", "--checkpoint.every=12", *options]
    train(processes, tmp_path / "graphs", *arguments, program=PROGRAM, config=config)
    for rank in range(processes):
        first, *others = json.loads((tmp_path / f"graphs.{rank}").read_text())
        assert first == graphs or (graphs is None and first > DEFAULT_RECOMPILE_LIMIT)
        assert others == [first]  # evaluation and checkpoints included
