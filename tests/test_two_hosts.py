"""Training on two simulated hosts: one loses power, or the link between them is cut."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import TINY
from hosts import Host, skip_reason

from launch import ACCELERATE, MULTI_NODE, environment, wait_for
from vae_scale.runtime import checkpoint

pytestmark = pytest.mark.cluster
PROGRAM = str(Path(__file__).parent / "programs" / "record_rows.py")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 10  # train.timeout, in seconds
MAX_WAIT = 100  # seconds, on a busy machine


class Pair:
    """Two connected hosts. Each resolves the other's name, and its own to a loopback address, as on Debian."""

    def __init__(self, folder: Path, hosts: list[Host]) -> None:
        self.folder, self.run, self.hosts = folder, folder / "run", hosts
        ends = [["eth0", "netns", str(host.pid)] for host in self.hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for host, address in zip(self.hosts, ADDRESSES, strict=True):
            host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def train(self, rank: int, shards: Path, *more: str) -> "subprocess.Popen[bytes]":
        """Starts the launcher on a host. `more` are the launcher's options, then a dash, then the trainer's options."""
        launcher, trainer = more[: more.index("-")], more[more.index("-") + 1 :]
        command = [*ACCELERATE, f"--config_file={MULTI_NODE}", "--num_machines=2", "--num_processes=2"]
        command += [f"--machine_rank={rank}", f"--main_process_ip={ADDRESSES[0]}", *launcher, PROGRAM]
        command += [f"--data.shards={shards}", f"--run={self.run}", *TINY, "--track.tracker=none", *trainer]
        # gloo would use the loopback address of the host's name.
        extra = {"RECORD_DIR": str(self.hosts[rank].folder), "GLOO_SOCKET_IFNAME": "eth0"}
        # A restarted launcher obtains the address of rank 0.
        extra |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return self.hosts[rank].start(command, environment(**extra), self.folder / f"log{rank}")

    def log(self, rank: int) -> str:
        return (self.folder / f"log{rank}").read_text()

    def logs(self) -> str:
        return f"{self.log(0)}\n--- host1:\n{self.log(1)}"

    def wait_for_checkpoints(self, programs: list["subprocess.Popen[bytes]"], count: int) -> None:
        def are_written() -> bool:
            assert all(program.poll() is None for program in programs), self.logs()
            return len(checkpoint.list_checkpoints(self.run)) >= count

        wait_for(are_written, MAX_WAIT, self.logs)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    if reason := skip_reason():
        pytest.skip(reason)
    with ExitStack() as stack:
        names = [f"{ADDRESSES[1 - rank]} host{1 - rank}\n" for rank in (0, 1)]
        hosts = [Host(f"host{rank}", tmp_path / f"host{rank}", names[rank]) for rank in (0, 1)]
        for host in hosts:
            stack.callback(host.close)
        yield Pair(tmp_path, hosts)


def test_training_resumes_after_a_host_lost_power(shards: Path, pair: Pair) -> None:
    def start(rank: int) -> "subprocess.Popen[bytes]":
        elastic = ["--rdzv_backend=c10d", f"--rdzv_conf=is_host={int(rank == 0)}", "--max_restarts=3"]
        return pair.train(rank, shards, *elastic, "-", "--train.images=2400", "--checkpoint.every=60", "--checkpoint.keep=100")

    first, second = start(0), start(1)
    pair.wait_for_checkpoints([first, second], 2)
    second.kill()
    second.wait()
    saved_images = checkpoint.images_seen_at(checkpoint.list_checkpoints(pair.run)[-1])
    assert saved_images < 2400
    second = start(1)
    wait_for(lambda: first.poll() is not None and second.poll() is not None, MAX_WAIT, pair.logs)
    assert (first.returncode, second.returncode) == (0, 0), pair.logs()
    resumed = [line for line in pair.log(0).splitlines() if line.startswith(f"resuming {pair.run} at ")]
    assert len(resumed) == 1, pair.logs()
    assert saved_images <= int(resumed[0].split()[-2].replace(",", "")) < 2400
    assert checkpoint.images_seen_at(checkpoint.list_checkpoints(pair.run)[-1]) == 2400
    records = [[path.name for path in host.folder.glob("rank_*")] for host in pair.hosts]
    assert records == [["rank_0_of_2.jsonl"], ["rank_1_of_2.jsonl"]]


def test_both_hosts_exit_with_a_reason_if_the_link_is_cut(shards: Path, pair: Pair) -> None:
    options = ["-", "--train.images=1000000", "--checkpoint.every=60", f"--train.timeout={TIMEOUT}"]
    programs = [pair.train(rank, shards, *options) for rank in (0, 1)]
    pair.wait_for_checkpoints(programs, 2)
    pair.hosts[1].run("ip", "link", "set", "eth0", "down")
    wait_for(lambda: all(program.poll() is not None for program in programs), 3 * TIMEOUT + 30, pair.logs)
    assert all(program.returncode != 0 for program in programs)
    prefix = f"error: no progress for {TIMEOUT} s (train.timeout): "
    assert f"{prefix}rank 1 (process " in pair.log(0), pair.logs()
    assert f"{prefix}the launcher's store does not respond" in pair.log(1), pair.logs()
