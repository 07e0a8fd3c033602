"""What launch/ holds starts what it says, on this CPU. What needs a cluster or a cloud is checked against its schema."""

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
from vae_scale.config import parse

ROOT = LAUNCH.parent
PROGRAM = str(Path(__file__).parent / "programs" / "launched.py")
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kubernetes.json").read_text())
SECONDS = 120  # for a short training, on a machine that others use, too


def told_by(*launches: list[str]) -> list[list[str]]:
    """How the processes of some launches that train at the same time were launched, as they tell."""
    launchers = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words in launches
    ]
    told = []
    try:
        for launcher in launchers:
            printed, _ = launcher.communicate(timeout=SECONDS)
            assert launcher.returncode == 0, printed
            told.append(sorted(re.findall("rank . of .*", printed)))
    finally:
        for launcher in launchers:
            launcher.kill()
    return told


def launch(config: Path, shards: Path, run: Path, *more: str) -> list[str]:
    words = [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", "--train.images=12"]
    return [*ACCELERATE, f"--config_file={config}", *more, PROGRAM, *words]


def test_cpu_and_single_gpu_start_one_process(shards: Path, tmp_path: Path) -> None:
    launches = [launch(LAUNCH / f"{name}.yaml", shards, tmp_path / name) for name in ("cpu", "single_gpu")]
    assert told_by(*launches) == [["rank 0 of 1, ELBO, cpu"], ["rank 0 of 1, ELBO, cpu"]]


def test_fsdp2_starts_processes_that_share_the_weights(shards: Path, tmp_path: Path) -> None:
    found = told_by(launch(FSDP2, shards, tmp_path, "--num_processes=2"))
    assert found == [["rank 0 of 2, FSDP2, cpu", "rank 1 of 2, FSDP2, cpu"]]


def test_multi_node_lets_two_launchers_train_together(shards: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launches = [launch(MULTI_NODE, shards, tmp_path, *more, f"--machine_rank={rank}") for rank in (0, 1)]
    assert told_by(*launches) == [[f"rank {rank} of 2, DistributedDataParallel, cpu"] for rank in (0, 1)]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_every_training_command_of_a_manifest_is_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\?\n\s*", " ", path.read_text())
    for words in re.findall(r"-m vae_scale\.train ((?:--[\w.]+ \S+ ?)+)", text):
        parse(shlex.split(words))
        assert "--config configs/" in words


@pytest.mark.parametrize(("name", "kinds"), [("jobset", ["JobSet"]), ("trainjob", ["TrainingRuntime", "TrainJob"])])
def test_kubernetes_manifests_are_of_their_schemas(name: str, kinds: list[str]) -> None:
    manifests = list(yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text()))
    assert [manifest["kind"] for manifest in manifests] == kinds
    for manifest in manifests:
        jsonschema.validate(manifest, SCHEMA | {"$ref": f"#/$defs/{manifest['kind']}"})
    with pytest.raises(jsonschema.ValidationError):  # a mistyped name is found
        jsonschema.validate(manifest | {"spek": 1}, SCHEMA | {"$ref": f"#/$defs/{manifest['kind']}"})


def test_the_jobset_asks_for_as_many_machines_and_gpus_as_its_command() -> None:
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    machines, processes = re.findall(r"--num_(?:machines|processes) (\d+)", container["args"][0])
    assert int(machines) == spec["parallelism"] == spec["completions"]
    assert int(processes) == int(machines) * container["resources"]["limits"]["nvidia.com/gpu"]


def test_the_sky_task_has_only_keys_that_skypilot_documents() -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["resources"].keys() <= {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["use_spot"] is True  # what is taken away is rented anew
    (mount,) = task["file_mounts"].values()
    assert mount == {"source": "${BUCKET}", "mode": "MOUNT_CACHED"}
    assert "--run /runs/" in task["run"]  # the bucket
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)
    script = (LAUNCH / "slurm.sbatch").read_text()
    (nodes,) = re.findall(r"bash -c '(.*?)' vae_scale", script, re.DOTALL)  # what each node runs
    subprocess.run(["bash", "-n"], input=nodes, text=True, check=True)


def test_the_dockerfile_copies_what_is_there_and_runs_as_nobody_special() -> None:
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
