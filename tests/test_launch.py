"""The files in launch/: launch configurations are run on this CPU, manifests are checked against their schemas."""

import json
import re
import shlex
import socket
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import TINY

from launch import ACCELERATE, FSDP2, LAUNCH, MULTI_NODE, environment
from vae_scale.config.parsing import parse

ROOT = LAUNCH.parent
PROGRAM = str(Path(__file__).parent / "programs" / "print_rank.py")
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kubernetes.json").read_text())
TIMEOUT = 120  # seconds for a short training on a busy machine


def run_launches(*launches: list[str]) -> list[list[str]]:
    """Runs launches concurrently and returns the lines that `print_rank.py` prints in each."""
    launchers = [
        subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for arguments in launches
    ]
    lines = []
    try:
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=TIMEOUT)
            assert launcher.returncode == 0, output
            lines.append(sorted(re.findall("rank . of .*", output)))
    finally:
        for launcher in launchers:
            launcher.kill()
    return lines


def launch(config: Path, shards: Path, run: Path, *more: str) -> list[str]:
    options = [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", "--train.images=12"]
    return [*ACCELERATE, f"--config_file={config}", *more, PROGRAM, *options]


def test_cpu_and_single_gpu_start_one_process(shards: Path, tmp_path: Path) -> None:
    launches = [launch(LAUNCH / f"{name}.yaml", shards, tmp_path / name) for name in ("cpu", "single_gpu")]
    assert run_launches(*launches) == [["rank 0 of 1, ELBO, cpu"], ["rank 0 of 1, ELBO, cpu"]]


def test_fsdp2_starts_two_processes(shards: Path, tmp_path: Path) -> None:
    lines = run_launches(launch(FSDP2, shards, tmp_path, "--num_processes=2"))
    assert lines == [["rank 0 of 2, FSDP2, cpu", "rank 1 of 2, FSDP2, cpu"]]


def test_multi_node_connects_two_launchers(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launches = [launch(MULTI_NODE, shards, tmp_path, *more, f"--machine_rank={rank}") for rank in (0, 1)]
    assert run_launches(*launches) == [[f"rank {rank} of 2, DistributedDataParallel, cpu"] for rank in (0, 1)]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_training_commands_in_manifests_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\?\n\s*", " ", path.read_text())
    for arguments in re.findall(r"-m vae_scale\.train ((?:--[\w.]+ \S+ ?)+)", text):
        parse(shlex.split(arguments))
        assert "--config configs/" in arguments


@pytest.mark.parametrize(("name", "kinds"), [("jobset", ["JobSet"]), ("trainjob", ["TrainingRuntime", "TrainJob"])])
def test_kubernetes_manifests_match_their_schemas(name: str, kinds: list[str]) -> None:
    manifests = list(yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text()))
    assert [manifest["kind"] for manifest in manifests] == kinds
    for manifest in manifests:
        jsonschema.validate(manifest, SCHEMA | {"$ref": f"#/$defs/{manifest['kind']}"})
    with pytest.raises(jsonschema.ValidationError):  # unknown keys are rejected
        jsonschema.validate(manifest | {"spek": 1}, SCHEMA | {"$ref": f"#/$defs/{manifest['kind']}"})


def test_jobset_resources_match_its_command() -> None:
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    machines, processes = re.findall(r"--num_(?:machines|processes) (\d+)", container["args"][0])
    assert int(machines) == spec["parallelism"] == spec["completions"]
    assert int(processes) == int(machines) * container["resources"]["limits"]["nvidia.com/gpu"]


def test_sky_task_uses_documented_keys() -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["resources"].keys() <= {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["use_spot"] is True  # SkyPilot recovers preempted machines
    (mount,) = task["file_mounts"].values()
    assert mount == {"source": "${BUCKET}", "mode": "MOUNT_CACHED"}
    assert "--run /runs/" in task["run"]  # the bucket
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)
    script = (LAUNCH / "slurm.sbatch").read_text()
    (nodes,) = re.findall(r"bash -c '(.*?)' vae_scale", script, re.DOTALL)  # the script of each node
    subprocess.run(["bash", "-n"], input=nodes, text=True, check=True)


def test_dockerfile_copies_existing_files_and_runs_unprivileged() -> None:
    lines = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    (base,) = [rest for step, rest in steps if step == "FROM"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    for step, rest in steps:
        if step == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
    *_, (last, user), (entry, program) = [step for step in steps if step[0] in ("USER", "ENTRYPOINT")]
    assert (last, entry) == ("USER", "ENTRYPOINT")
    assert int(user) > 0
    assert json.loads(program) == ["accelerate", "launch"]
