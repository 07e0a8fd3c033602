"""The script that checks and measures everything on a GPU, rehearsed on this CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

KIT = Path(__file__).parent / "gpu"
BLOCKED = ("wandb", "webdataset", "braceexpand")  # not everywhere where there are GPUs
TASKS = """
import json, sys, time
from pathlib import Path
from processes import Runner, Settings, Task
from report import Results

scratch = Path(sys.argv[1])
programs = {
    "hangs": "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], "
    "start_new_session=True); print('pid', p.pid, flush=True); time.sleep(99)",
    "crashes": "import os; print('the last words', flush=True); os.abort()",
    "fails": "raise SystemExit('error: no such thing')",
    "works": "pass",
}
tasks = [Task([name], [sys.executable, "-c", text], 3.0, writes_results=False) for name, text in programs.items()]
tasks.append(Task(["comes too late"], ["true"], 3.0, least=1000.0))
results = Results(scratch, "command", {"rehearsal": True})
runner = Runner(Settings(scratch, scratch, scratch, True), scratch / "log.txt")
runner.run_all(tasks, 2, time.monotonic() + 60, lambda entry: results.add("correctness", entry))
sys.exit(results.has_failures)
"""


def environment(folder: Path) -> dict[str, str]:
    """One in which some packages cannot be imported."""
    for name in BLOCKED:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')\n")
    return os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def run(*words: object, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(KIT / "run.py"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(300)
def test_a_rehearsal_passes_every_check_without_optional_packages(tmp_path: Path) -> None:
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    done = run("--rehearse", "--minutes", 4.5, "--out", out, environment=environment(packages))
    results = json.loads((out / "results.json").read_text())
    text = (out / "RESULTS.md").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{text}"
    for stage, statuses in {
        "environment": {"passed"},
        "correctness": {"passed", "needs a GPU"},
        "speed": {"measured", "skipped: needs a GPU", "skipped: too slow for a rehearsal"},
        "quality": {"passed"},
    }.items():
        assert results[stage], stage
        assert {entry["status"] for entry in results[stage]} <= statuses, text
    names = {entry["name"] for entry in results["correctness"] if entry["status"] == "passed"}
    assert {"train and resume, fp32", "FSDP2, one process", "DDP, one process", "flow, sample, encode"} <= names
    assert (out / "samples.png").stat().st_size > 0
    assert len(list(out.iterdir())) <= 8
    assert "## Correctness" in text


def test_without_a_gpu_it_ends_with_one_line(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "out", environment=environment(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_check_that_hangs_or_crashes_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TASKS, str(tmp_path)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(KIT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "results.json").read_text())["correctness"]}
    statuses = {name: (entry["status"], entry["detail"]) for name, entry in entries.items()}
    assert statuses == {
        "hangs": ("failed", "no result within 3 s"),
        "crashes": ("failed", "ended with exit status -6"),
        "fails": ("failed", "ended with exit status 1"),
        "works": ("passed", ""),
        "comes too late": ("skipped: no time left", ""),
    }
    assert "the last words" in entries["crashes"]["output"]
    assert entries["fails"]["output"] == ["error: no such thing"]
    assert not is_running(int(entries["hangs"]["output"][0].removeprefix("pid ")))
    assert "the last words" in (tmp_path / "RESULTS.md").read_text()
