"""Preemption and cancellation of a job on a SLURM cluster with two nodes on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hosts import Host, skip_reason

from launch import LAUNCH, environment, train, wait_for
from vae_scale.runtime import checkpoint

pytestmark = pytest.mark.cluster
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
MAX_WAIT = 150  # seconds, on a busy machine
ADMIN_PATH = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))

CONFIGURATION = """
ClusterName=test
SlurmctldHost=cluster(127.0.0.1)
SlurmUser=root
SlurmctldPort=17000
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool_%n
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SchedulerParameters=sched_interval=2
ReturnToService=2
NodeName=n[0-1] NodeHostname=cluster NodeAddr=127.0.0.1 Port=[17010-17011] State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """SLURM with two nodes on a simulated host. All files are in the host's folder."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = folder = host.folder
        self.run = folder / "run"
        (folder / "launch").symlink_to(LAUNCH)
        # SLURM requires a network interface besides the loopback.
        self.host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        self.host.run("ip", "addr", "add", "10.78.0.1/24", "dev", "eth0")
        for end in ("eth0", "eth1"):
            self.host.run("ip", "link", "set", end, "up")
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], ADMIN_PATH))
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.daemons = [self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)]
        self.wait_for((folder / "munge.socket").exists)
        self.daemons += [self._start("slurmctld", "-D"), *(self._start("slurmd", "-D", "-N", node) for node in ("n0", "n1"))]
        self.wait_for(self.is_idle)

    def _start(self, *command: str) -> "subprocess.Popen[bytes]":
        return self.host.start(list(command), self.environment, self.folder / "daemons.log")

    def is_idle(self) -> bool:
        return self.command("sinfo", "-h", "-o", "%D %t").stdout == "2 idle\n"

    def wait_for(self, condition: Callable[[], object]) -> None:
        def holds() -> object:
            assert all(daemon.poll() is None for daemon in self.daemons), self.logs()
            return condition()

        wait_for(holds, MAX_WAIT, self.logs)

    def command(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Runs a SLURM command in the folder of a checkout."""
        prefix = [*self.host.command_prefix, f"--wd={self.folder}"]
        return subprocess.run([*prefix, *command], env=self.environment, capture_output=True, text=True)

    def submit(self, *training: str) -> str:
        """Submits launch/slurm.sbatch to train in the folder `run` and returns the job id."""
        arguments = ["--parsable", "--partition=main", "--nodes=2", "launch/slurm.sbatch", "--run=run", *training]
        result = self.command("sbatch", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Returns the properties of a job, which must not have failed."""
        properties = dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", job_id).stdout))
        assert properties["JobState"] != "FAILED", self.logs()
        return properties

    def saved(self, job_id: str) -> list[Path]:
        """Returns the checkpoints of a job, which must not have failed."""
        self.job(job_id)
        return checkpoint.list_checkpoints(self.run)

    def logs(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("slurm-*.out"), *self.folder.glob("run/logs/*.log")]
        return "\n".join(f"--- {log}:\n{log.read_text()[-4000:]}" for log in logs)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + os.pathsep + ADMIN_PATH)]:
        pytest.skip(f"needs {', '.join(missing)} (Debian's slurm-wlm and munge)")
    if reason := skip_reason():
        pytest.skip(reason)
    with closing(Host("cluster", tmp_path / "cluster", "127.0.0.1 n0 n1\n")) as host:
        yield Cluster(host)


def test_preempted_job_requeues_itself_and_ends_bit_identical(shards: Path, tmp_path: Path, cluster: Cluster) -> None:
    options = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.images=3600", "--checkpoint.every=600"]
    marker, logs = cluster.run / "requeue.json", cluster.run / "logs"
    job = cluster.submit(*options)
    cluster.wait_for(lambda: cluster.saved(job))
    cluster.command("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    cluster.wait_for(marker.exists)
    stopped = json.loads(marker.read_text())["images_seen"]
    assert stopped < 3600
    assert checkpoint.images_seen_at(cluster.saved(job)[-1]) == stopped
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1" and cluster.is_idle())
    # By default, a requeued job starts after two minutes. Within a few seconds, nodes confuse it with the first start.
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    train(2, *options, f"--run={tmp_path / 'uninterrupted'}")
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED")

    assert cluster.job(job)["Restarts"] == "1"
    assert not marker.exists()
    assert {path.name for path in logs.iterdir()} == {f"{job}-0.log", f"{job}-1.log"}
    output = "".join(path.read_text() for path in logs.iterdir())
    assert "stopped by a signal" in output
    assert f"resuming run at {stopped:,} images" in output
    folders = [checkpoint.list_checkpoints(run)[-1] for run in (cluster.run, tmp_path / "uninterrupted")]
    assert [checkpoint.images_seen_at(folder) for folder in folders] == [3600, 3600]
    assert json.loads((folders[0] / "state.json").read_text())["processes"] == 2
    for part in ("model", "ema", "optimizer"):
        actual, expected = (checkpoint.load_checkpoint(folder, part)[1][part] for folder in folders)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in actual), part


def test_cancelled_job_is_not_requeued(shards: Path, cluster: Cluster) -> None:
    options = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.images=1000000", "--checkpoint.every=120"]
    job = cluster.submit(*options)
    cluster.wait_for(lambda: cluster.saved(job))
    cluster.command("scancel", job)
    cluster.wait_for(cluster.is_idle)
    properties = cluster.job(job)
    assert (properties["JobState"], properties["Restarts"]) == ("CANCELLED", "0"), cluster.logs()
