"""Two hosts with a link of their own train together: one loses power, or the link is cut."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import TINY
from hosts import Host, missing, wait_for

from launch import ACCELERATE, MULTI_NODE, environment
from vae_scale.training import checkpoint

pytestmark = pytest.mark.cluster
RECORD = str(Path(__file__).parent / "programs" / "record_rows.py")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 10  # seconds that processes wait for each other where the link is cut
PATIENCE = 100  # seconds for anything, on a machine that others use, too


class Pair:
    """Two hosts at the ends of a cable. Each knows the other's name, and its own as one of the loopback, as on Debian."""

    def __init__(self, folder: Path, hosts: list[Host]) -> None:
        self.folder, self.run, self.hosts = folder, folder / "run", hosts
        ends = [["eth0", "netns", str(host.pid)] for host in self.hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for host, address in zip(self.hosts, ADDRESSES, strict=True):
            host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def train(self, place: int, shards: Path, *more: str) -> "subprocess.Popen[bytes]":
        """Starts what a user starts on each host. `more` are the launcher's options, then a dash, then the trainer's."""
        launcher, trainer = more[: more.index("-")], more[more.index("-") + 1 :]
        words = [*ACCELERATE, f"--config_file={MULTI_NODE}", "--num_machines=2", "--num_processes=2"]
        words += [f"--machine_rank={place}", f"--main_process_ip={ADDRESSES[0]}", *launcher, RECORD]
        words += [f"--data.shards={shards}", f"--run={self.run}", *TINY, "--track.tracker=none", *trainer]
        # On CPUs: gloo would take the address of the host's own name.
        extra = {"DIARY": str(self.hosts[place].folder), "GLOO_SOCKET_IFNAME": "eth0"}
        # A launcher that was started anew learns where rank 0 is.
        extra |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return self.hosts[place].start(words, environment(**extra), self.folder / f"told{place}")

    def told(self, place: int) -> str:
        return (self.folder / f"told{place}").read_text()

    def both(self) -> str:
        return f"{self.told(0)}\n--- host1:\n{self.told(1)}"

    def trained(self, programs: list["subprocess.Popen[bytes]"], checkpoints: int) -> None:
        """Waits until there are so many checkpoints."""

        def there() -> bool:
            assert all(program.poll() is None for program in programs), self.both()
            return len(checkpoint.checkpoints(self.run)) >= checkpoints

        wait_for(there, PATIENCE, self.both)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    if reason := missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        names = [f"{ADDRESSES[1 - place]} host{1 - place}\n" for place in (0, 1)]
        hosts = [Host(f"host{place}", tmp_path / f"host{place}", names[place]) for place in (0, 1)]
        for host in hosts:
            stack.callback(host.close)
        yield Pair(tmp_path, hosts)


def test_a_host_that_loses_power_joins_again_and_training_goes_on_from_the_last_checkpoint(shards: Path, pair: Pair) -> None:
    def start(place: int) -> "subprocess.Popen[bytes]":
        elastic = ["--rdzv_backend=c10d", f"--rdzv_conf=is_host={int(place == 0)}", "--max_restarts=3"]
        return pair.train(place, shards, *elastic, "-", "--train.images=2400", "--checkpoint.every=60", "--checkpoint.keep=100")

    first, second = start(0), start(1)
    pair.trained([first, second], 2)
    second.kill()
    second.wait()
    reached = checkpoint.images_of(checkpoint.checkpoints(pair.run)[-1])
    assert reached < 2400
    second = start(1)  # the first host still waits for it
    wait_for(lambda: first.poll() is not None and second.poll() is not None, PATIENCE, pair.both)
    assert (first.returncode, second.returncode) == (0, 0), pair.both()
    resumed = [line for line in pair.told(0).splitlines() if line.startswith(f"resuming {pair.run} at ")]
    assert len(resumed) == 1, pair.both()
    assert reached <= int(resumed[0].split()[-2].replace(",", "")) < 2400
    assert checkpoint.images_of(checkpoint.checkpoints(pair.run)[-1]) == 2400
    diaries = [[path.name for path in host.folder.glob("rank_*")] for host in pair.hosts]
    assert diaries == [["rank_0_of_2.jsonl"], ["rank_1_of_2.jsonl"]]


def test_where_the_link_between_hosts_is_cut_both_end_and_say_why(shards: Path, pair: Pair) -> None:
    words = ["-", "--train.images=1000000", "--checkpoint.every=60", f"--train.timeout={TIMEOUT}"]
    programs = [pair.train(place, shards, *words) for place in (0, 1)]
    pair.trained(programs, 2)
    pair.hosts[1].run("ip", "link", "set", "eth0", "down")
    wait_for(lambda: all(program.poll() is not None for program in programs), 3 * TIMEOUT + 30, pair.both)
    assert all(program.returncode != 0 for program in programs)
    said = f"error: no process got any further for {TIMEOUT} s (train.timeout): "
    assert f"{said}rank 1 (process " in pair.told(0), pair.both()
    assert f"{said}the launcher's store does not answer" in pair.told(1), pair.both()
