"""A real SLURM of two nodes on this machine: a job that is pre-empted goes on as if nothing had been."""

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
from hosts import Host, missing, wait_for

from launch import LAUNCH, environment, train
from vae_scale.training import checkpoint

pytestmark = pytest.mark.cluster
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PATIENCE = 150  # seconds for anything, on a machine that others use, too
ADMINISTRATION = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))

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
    """SLURM with two nodes on a host of its own, which nothing outlives. Everything it writes is in the host's folder."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = folder = host.folder
        self.run = folder / "run"
        (folder / "launch").symlink_to(LAUNCH)
        # Without a network besides the loopback, SLURM resolves no address.
        self.host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        self.host.run("ip", "addr", "add", "10.78.0.1/24", "dev", "eth0")
        for end in ("eth0", "eth1"):
            self.host.run("ip", "link", "set", end, "up")
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # Where they are run, and the jobs, too.
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], ADMINISTRATION))
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.daemons = [self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)]
        self.wait_for((folder / "munge.socket").exists)
        self.daemons += [self._start("slurmctld", "-D"), *(self._start("slurmd", "-D", "-N", node) for node in ("n0", "n1"))]
        self.wait_for(self.idle)

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return self.host.start(list(words), self.environment, self.folder / "daemons.log")

    def idle(self) -> bool:
        return self.command("sinfo", "-h", "-o", "%D %t").stdout == "2 idle\n"

    def wait_for(self, condition: Callable[[], object]) -> None:
        def holds() -> object:
            assert all(daemon.poll() is None for daemon in self.daemons), self.told()
            return condition()

        wait_for(holds, PATIENCE, self.told)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Runs one of SLURM's commands as a user does, in a checkout."""
        within = [*self.host.within, f"--wd={self.folder}"]
        return subprocess.run([*within, *words], env=self.environment, capture_output=True, text=True)

    def submit(self, *training: str) -> str:
        """Submits launch/slurm.sbatch from a checkout, to train in the folder `run`; returns the job's number."""
        words = ["--parsable", "--partition=main", "--nodes=2", "launch/slurm.sbatch", "--run=run", *training]
        ran = self.command("sbatch", *words)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM tells about a job, which has not failed."""
        told = dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", number).stdout))
        assert told["JobState"] != "FAILED", self.told()
        return told

    def saved(self, number: str) -> list[Path]:
        """The checkpoints that a job wrote up to now."""
        self.job(number)
        return checkpoint.checkpoints(self.run)

    def told(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("slurm-*.out"), *self.folder.glob("run/logs/*.log")]
        return "\n".join(f"--- {log}:\n{log.read_text()[-4000:]}" for log in logs)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if lacking := [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + os.pathsep + ADMINISTRATION)]:
        pytest.skip(f"needs {', '.join(lacking)} (Debian's slurm-wlm and munge)")
    if reason := missing():
        pytest.skip(reason)
    with closing(Host("cluster", tmp_path / "cluster", "127.0.0.1 n0 n1\n")) as host:
        yield Cluster(host)


def test_a_job_that_is_preempted_saves_requeues_itself_and_ends_bit_for_bit_as_one_without_a_break(
    shards: Path, tmp_path: Path, cluster: Cluster
) -> None:
    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.images=3600", "--checkpoint.every=600"]
    marker, logs = cluster.run / "requeue.json", cluster.run / "logs"
    job = cluster.submit(*words)
    cluster.wait_for(lambda: cluster.saved(job))
    cluster.command("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time is up
    cluster.wait_for(marker.exists)
    stopped = json.loads(marker.read_text())["images_seen"]
    assert stopped < 3600
    assert checkpoint.images_of(cluster.saved(job)[-1]) == stopped
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1" and cluster.idle())
    # SLURM would wait for two minutes; a few seconds it needs, or nodes take the new start for the old one, which is over.
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    train(2, *words, f"--run={tmp_path / 'whole'}")  # meanwhile
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED")

    assert cluster.job(job)["Restarts"] == "1"
    assert not marker.exists()
    assert {path.name for path in logs.iterdir()} == {f"{job}-0.log", f"{job}-1.log"}
    told = "".join(path.read_text() for path in logs.iterdir())
    assert "stopped by a signal" in told
    assert f"resuming run at {stopped:,} images" in told
    folders = [checkpoint.checkpoints(run)[-1] for run in (cluster.run, tmp_path / "whole")]
    assert [checkpoint.images_of(folder) for folder in folders] == [3600, 3600]
    assert json.loads((folders[0] / "state.json").read_text())["processes"] == 2
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (checkpoint.load(folder, part)[1][part] for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


def test_a_job_that_is_cancelled_does_not_come_back(shards: Path, cluster: Cluster) -> None:
    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.images=1000000", "--checkpoint.every=120"]
    job = cluster.submit(*words)
    cluster.wait_for(lambda: cluster.saved(job))
    cluster.command("scancel", job)
    cluster.wait_for(cluster.idle)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), cluster.told()
