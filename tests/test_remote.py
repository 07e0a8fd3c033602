"""Shards on other machines, and everything that goes wrong on the way."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from bad_server import Server
from conftest import TINY

from launch import environment
from vae_scale import evaluate, sample
from vae_scale.config import as_yaml, parse
from vae_scale.data import remote
from vae_scale.data.remote import Patience
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError, shown
from vae_scale.training.trainer import Trainer

FIRST = "stl10-train-000000.tar"
HASTE = "from vae_scale.data import remote; remote.PATIENCE = remote.Patience(3, 0.1, 5.0)\n"


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    running = Server(shards)
    yield running
    running.stop()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, pause=0.01, silence=5.0))


def contents(found: ShardSet) -> list[bytes]:
    """Pixels of each shard, read as a stream reads them: several at a time."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda number: found.read(number).tobytes(), range(len(found.shards))))


def taken(cache: Cache) -> int:
    """Bytes in the cache, whole or not."""
    total = 0
    for folder, _, names in os.walk(cache.folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def program(code: str, *words: object, **extra: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HASTE + code, *map(str, words)]
    return subprocess.Popen(command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()  # none, for one that has ended
    except psutil.Error:
        return []


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_a_stream_over_http_gives_the_local_batches_and_fetches_each_shard_once(
    shards: Path, server: Server, cache: Cache
) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    there = ShardSet.open(f"{server.url}/", cache).select("train", "unlabeled")
    assert (local.storage.local, there.storage.local) == (True, False)
    assert there.location == server.url
    streams = [Stream(found, 16, seed=3, window=2) for found in (local, there)]
    for ours, theirs in zip(*(islice(stream, 25) for stream in streams), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert np.array_equal(ours.rows, theirs.rows)
    assert server.requests == {"index.json": 1} | {shard.url: 1 for shard in there.shards}


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "short", "short, no length", "flipped", "long", "stalled"])
def test_what_passes_is_tried_again(
    shards: Path, server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "stalled":
        monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, pause=0.01, silence=1.0))
    server.faults = {FIRST: [fault], "index.json": [] if fault == "flipped" else [fault, fault]}
    found = ShardSet.open(server.url, cache).select("train")
    assert contents(found) == contents(ShardSet.open(shards).select("train"))
    assert server.requests[FIRST] == 2
    assert server.requests["stl10-train-000001.tar"] == 1
    assert [path.name for path in cache.folder.glob("*.part*")] == []


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("500", "HTTP 500, at the last of 3 attempts", 3),
        ("404", "not found", 1),
        ("403", "HTTP 403", 1),
        ("short, no length", "bytes came, the manifest says", 3),
        ("flipped", "its sha256 is not the manifest's, at the last of 3 attempts", 3),
        ("reset", "at the last of 3 attempts", 3),
        ("silent", "silence for 0.3 s after 0 bytes, at the last of 3 attempts", 3),
        ("stalled", "silence for 0.3 s after", 3),
    ],
)
def test_what_stays_is_told_in_one_line(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str, requests: int
) -> None:
    found = ShardSet.open(server.url, cache).select("train")
    server.faults = {FIRST: [fault] * 9}
    if fault in ("silent", "stalled"):
        monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, pause=0.01, silence=0.3))
    with pytest.raises(UserError) as caught:
        found.read(0)
    told = str(caught.value)
    assert told.startswith(f"{server.url}/{FIRST}: ")
    assert reason in told
    assert told.endswith("25 images of split train cannot be read")
    assert server.requests[FIRST] == requests
    assert taken(cache) == 0
    server.faults.clear()  # and nothing stays behind
    assert len(found.read(0)) == 25


def test_a_manifest_that_cannot_be_had_is_told(server: Server, cache: Cache, tmp_path: Path) -> None:
    for faults, message in ((["404"], "not found; is this the folder"), (["503"] * 3, "HTTP 503"), (["short"] * 3, "attempts")):
        server.faults["index.json"] = faults
        with pytest.raises(UserError, match=message):
            ShardSet.open(server.url, cache)
    server.folder = tmp_path
    (tmp_path / "index.json").write_text("<html>Please log in</html>")
    with pytest.raises(UserError, match="not whole JSON"):
        ShardSet.open(server.url, cache)
    server.stop()
    with pytest.raises(UserError, match=rf"{server.url}/index.json: .*[Cc]onnect"):
        ShardSet.open(server.url, cache)
    with pytest.raises(UserError, match=r"ftp://.*not one of http, https, s3, gs, hf"):
        ShardSet.open("ftp://host/stl10", cache)


READ_ALL = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import Cache
found = ShardSet.open(sys.argv[1], Cache(Path(sys.argv[2])))
print("ready", flush=True)
sys.stdin.readline() if len(sys.argv) > 3 else None
with ThreadPoolExecutor(4) as pool:
    parts = pool.map(lambda number: found.read(number).tobytes(), range(len(found.shards)))
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_two_processes_share_a_cache_and_fetch_nothing_twice(shards: Path, server: Server, cache: Cache) -> None:
    readers = [program(READ_ALL, server.url, cache.folder) for _ in range(2)]
    server.delay = 0.3
    outputs = [reader.communicate(timeout=60) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    del server.requests["index.json"]
    assert server.requests == {shard.url: 1 for shard in ShardSet.open(shards).shards}
    assert 2 <= server.most <= 8


def test_a_cache_smaller_than_the_set_keeps_its_limit(shards: Path, server: Server, tmp_path: Path) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    largest = max(shard.filesize for shard in local.shards)
    cache = Cache(tmp_path / "cache", 2.5 * largest)
    there = ShardSet.open(server.url, cache).select("train", "unlabeled")
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], taken(cache))

    watching = threading.Thread(target=watch)
    watching.start()
    streams = [Stream(found, 30, seed=3, window=1) for found in (local, there)]
    for ours, theirs in zip(*(islice(stream, 15) for stream in streams), strict=True):
        assert torch.equal(ours.images, theirs.images)
    ended.set()
    watching.join()
    assert largest < most[0] <= cache.limit
    assert server.requests.total() > len(local.shards) + 1  # some had to be fetched again
    small = ShardSet.open(server.url, Cache(tmp_path / "small", largest - 1)).select("unlabeled")
    with pytest.raises(UserError, match=r"data\.cache_gib is 0\.\d+, but .*\.tar has"):
        small.read(0)


def test_shards_used_longest_ago_make_room(server: Server, tmp_path: Path) -> None:
    found = ShardSet.open(server.url, Cache(tmp_path / "cache")).select("unlabeled")
    limit = 2 * found.shards[0].filesize
    found = dataclasses.replace(found, storage=ShardSet.open(server.url, Cache(tmp_path / "cache", limit)).storage)
    for number in (0, 1, 0, 2, 0):
        time.sleep(0.01)
        found.read(number)
    assert [server.requests[shard.url] for shard in found.shards] == [1, 1, 1, 0]


def test_a_killed_download_leaves_a_usable_cache(shards: Path, server: Server, cache: Cache) -> None:
    server.faults = {FIRST: ["stalled"] * 3}
    reader = program(READ_ALL, server.url, cache.folder)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 300_000 for path in cache.folder.glob(".*.part*/1")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    assert list(cache.folder.glob(".*.part*"))
    server.faults.clear()
    # With no room to spare: what the dead process had begun must not count.
    tight = Cache(cache.folder, max(shard.filesize for shard in ShardSet.open(shards).shards))
    assert contents(ShardSet.open(server.url, tight)) == contents(ShardSet.open(shards))
    assert list(cache.folder.glob(".*.part*")) == []


def test_a_damaged_cache_is_mended(shards: Path, server: Server, cache: Cache) -> None:
    found = ShardSet.open(server.url, cache).select("test")
    found.read(0)
    (path,) = [path for path in cache.folder.glob("*.tar") if path.stat().st_size == found.shards[0].filesize]
    os.truncate(path, 1000)
    assert np.array_equal(found.read(0), ShardSet.open(shards).select("test").read(0))
    shutil.rmtree(cache.folder)
    found.read(0)
    assert server.requests[found.shards[0].url] == 3


def test_a_cache_that_cannot_be_written_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache: Not a directory"):
        ShardSet.open(server.url, Cache(tmp_path / "file" / "cache")).read(0)
    # A limit on the size of files stands in for a full disk.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    for location in (server.url, f"pipe:cat {server.folder}/{{}}"):
        reader = program(limited + READ_ALL, location, tmp_path / "cache")
        told = reader.communicate(timeout=60)[1]
        assert "data.cache_dir" in told.splitlines()[-1], told
        assert "free some space" in told.splitlines()[-1]
    assert server.requests.total() <= 16


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert Cache.configured(None, None) == Cache(Path("/somewhere/vae_scale/shards"), 50 * 2**30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache().folder == Path.home() / ".cache" / "vae_scale" / "shards"
    assert Cache.configured("/fast", 0.5) == Cache(Path("/fast"), 2**29)
    with pytest.raises(UserError, match=r"data\.cache_gib is 0"):
        parse(["--data.cache_gib=0"])


def test_secrets_are_sent_and_never_shown(server: Server, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    location = f"{server.url.replace('//', '//anna:secret@')}/?token=hidden"
    found = ShardSet.open(location, cache).select("train")
    found.read(0)
    path, headers = server.heard
    assert path == f"/{FIRST}?token=hidden"
    assert headers["Authorization"] == "Basic YW5uYTpzZWNyZXQ="
    server.faults = {found.shards[1].url: ["403"], found.shards[2].url: ["503"] * 3}
    told = [found.location, as_yaml(parse([f"--data.shards={location}"])[0])]
    for number in (1, 2):
        with pytest.raises(UserError) as caught:
            found.read(number)
        told.append(str(caught.value))
    server.stop()
    with pytest.raises(UserError) as caught:
        ShardSet.open(location, cache)
    out, err = capfd.readouterr()
    everything = "\n".join([*told, str(caught.value), out, err])
    assert "/stl10-train-000001.tar: HTTP 403" in everything
    for secret in ("anna", "secret", "hidden", "token"):
        assert secret not in everything
    assert shown("pipe:curl -u anna:secret https://host/{}?token=hidden") == "pipe:curl ..."
    assert shown("pipe:TOKEN=secret fetch {}") == "pipe:..."


def rewritten(shards: Path, folder: Path, url: Callable[[str], str]) -> Path:
    """A copy of the manifest alone, with other places for the shards."""
    index = json.loads((shards / "index.json").read_text())
    for entry in index["shardlist"]:
        entry["url"] = url(entry["url"])
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_a_manifest_here_may_name_shards_elsewhere(shards: Path, server: Server, cache: Cache, tmp_path: Path) -> None:
    folder = rewritten(shards, tmp_path / "index", lambda name: f"{server.url}/{name}?token=a/b")
    found = ShardSet.open(folder, cache)
    assert not found.storage.local
    assert contents(found) == contents(ShardSet.open(shards))
    assert found.location == str(folder)
    mixed = rewritten(shards, tmp_path / "mixed", lambda name: f"{server.url}/{name}" if "test" in name else name)
    for path in shards.glob("*train*.tar"):
        shutil.copy(path, mixed)
    assert contents(ShardSet.open(mixed, cache).select("test", "train")) == contents(
        ShardSet.open(shards).select("test", "train")
    )


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:cat /etc/passwd", "pipe:id", "file:///etc/passwd", "file:passwd", "../x.tar", "/etc/passwd", ".x.tar", ""),
        *("ftp://host/x.tar", "https://host/../x.tar", "https://host/.x.tar", "https://host/", "http://[x/y.tar", "a\nb.tar"),
    ],
)
def test_a_manifest_is_not_trusted_with_other_places(shards: Path, server: Server, tmp_path: Path, url: str) -> None:
    folder = rewritten(shards, tmp_path / "index", lambda name: url)
    server.folder = folder
    for location in (folder, server.url):
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            ShardSet.open(location)


def test_a_manifest_is_not_trusted_with_the_names_of_cached_files(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shardlist"][0]["sha256"] = "../../evil"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"sha256.* is no such hash"):
        ShardSet.open(tmp_path)


def test_names_are_quoted_for_servers_and_for_shells(shards: Path, server: Server, cache: Cache, tmp_path: Path) -> None:
    odd = "it's $(touch broken) a #1?; é.tar"
    folder = rewritten(shards, tmp_path / "index", lambda name: odd if name == FIRST else name)
    shutil.copy(shards / FIRST, folder / odd)
    server.folder = folder
    for number, location in enumerate((server.url, f"pipe:cd {shlex.quote(str(folder))} && cat ./{{}}")):
        found = ShardSet.open(location, Cache(tmp_path / str(number))).select("train")
        assert np.array_equal(found.read(0), ShardSet.open(shards).select("train").read(0))
    assert server.requests[odd] == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([odd, "index.json"])


def test_a_pipe_is_read_checked_and_tried_again(shards: Path, cache: Cache, tmp_path: Path) -> None:
    assert contents(ShardSet.open(f"pipe:cat {shards}/{{}}", cache)) == contents(ShardSet.open(shards))
    # Fails at first, then is too short, then right.
    script = tmp_path / "flaky"
    script.write_text(f"echo x >> {tmp_path}/$1\ncase $(wc -l < {tmp_path}/$1) in 1) exit 7;; 2) head -c 9 {shards}/$1;;\n")
    script.write_text(script.read_text() + f"*) cat {shards}/$1;; esac\n")
    found = ShardSet.open(f"pipe:sh {script} {{}}", Cache(tmp_path / "second")).select("train")
    assert contents(found) == contents(ShardSet.open(shards).select("train"))
    assert (tmp_path / FIRST).read_text() == "x\n" * 3


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo one >&2; echo no such host >&2; exit 6", "exit code 6: no such host"),
        ("kill -9 $$", "exit code -9"),
        ("true", "0 bytes came, the manifest says"),
        ("cat /dev/zero", "bytes came"),
        ("head -c 1000 /dev/zero; sleep 61.5", "silence for 0.3 s after 1,000 bytes"),
        ("exec >&-; sleep 61.5", "still running 0.3 s after the end of its output"),
    ],
)
def test_a_pipe_that_fails_is_told_and_leaves_no_process(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, pause=0.01, silence=0.3))
    cat = f"case {{}} in index.json) cat {shards}/index.json;; *) echo $$ > {tmp_path}/shell; {command};; esac"
    found = ShardSet.open(f"pipe:{cat}", Cache(tmp_path / "cache")).select("train")
    with pytest.raises(UserError) as caught:
        found.read(0)
    told = str(caught.value)
    assert reason in told
    assert told.endswith("25 images of split train cannot be read")
    assert not [process for process in psutil.process_iter() if "61.5" in words_of(process)]


def test_a_pipe_without_a_place_for_the_name_is_refused(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"pipe:cat \.\.\.: the command lacks {}"):
        ShardSet.open("pipe:cat index.json", cache)


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    hide = "import sys; sys.modules[sys.argv[1].split(':')[0] + 'fs'] = None; sys.modules['gcsfs'] = None\n"
    for place, library, extra in (("s3://bucket/x", "s3fs", "remote"), ("gs://bucket/x", "gcsfs", "gs")):
        told = program(hide + READ_ALL, place, tmp_path).communicate(timeout=60)[1]
        assert told.splitlines()[-1].endswith(f"{place[:2]}://...: needs {library}: pip install 'vae_scale[{extra}]'")


TRAIN = "from vae_scale.train import main; import sys; main(sys.argv[1:])"


def test_training_over_http_ends_well_and_without_its_server_in_one_line(shards: Path, server: Server, tmp_path: Path) -> None:
    largest = max(shard.filesize for shard in ShardSet.open(shards).shards)
    where = [
        f"--data.shards={server.url}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--data.cache_gib={6.5 * largest / 2**30}",
    ]
    where += [*TINY, "--track.tracker=none"]
    server.faults = {FIRST: ["reset"]}
    ended = program(TRAIN, *where, f"--run={tmp_path / 'ended'}", "--train.images=24")
    told = ended.communicate(timeout=120)
    assert ended.returncode == 0, told
    assert "trying again in 0.1 s" in told[1]
    run = tmp_path / "run"
    abandoned = program(
        TRAIN, *where, f"--run={run}", "--train.images=100000", "--evaluate.every=100000", "--train.log_every=1"
    )
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        assert abandoned.poll() is None, abandoned.communicate()
        time.sleep(0.05)
    server.stop()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    told = abandoned.communicate(timeout=60)
    assert abandoned.returncode == 2, told
    (error,) = errors(told[1])
    assert f"{server.url}/stl10-" in error
    assert "images of split" in error
    assert "Traceback" not in told[1]


def test_a_run_keeps_its_order_when_its_shards_move(
    shards: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By default so many are mixed of shards that are fetched, and of these seven, where they are local, all.
    monkeypatch.setattr("vae_scale.data.stream.WINDOW", 2)
    always = [*TINY, "--data.window=null", "--track.tracker=none", f"--data.cache_dir={tmp_path / 'cache'}"]
    first = parse([*always, f"--data.shards={shards}", f"--run={tmp_path / 'run'}", "--train.images=24"])[0]
    Trainer(first).run()
    moved = parse([*always, f"--data.shards={server.url}", f"--run={tmp_path / 'run'}", "--train.images=48"])[0]
    assert Trainer(moved).stream.plan.window == 7
    new = parse([*always, f"--data.shards={server.url}", f"--run={tmp_path / 'new'}"])[0]
    assert Trainer(new).stream.plan.window == 2


def test_a_model_brings_no_commands(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pipe = f"pipe:cat {shards}/{{}}"
    words = [f"--data.shards={pipe}", f"--data.cache_dir={tmp_path / 'cache'}", f"--run={run}", *TINY, "--track.tracker=none"]
    Trainer(parse([*words, "--train.images=12"])[0]).run()
    assert str(shards) not in (run / "config.yaml").read_text()
    picture = ["--reconstruct", f"--run={run}", f"--out={tmp_path / 'out.png'}", "--num=2"]
    for main, options in ((sample.main, picture), (evaluate.main, [f"--run={run}", "--features=none"])):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(options)
        assert caught.value.code == 2
        (error,) = errors(capsys.readouterr().err)
        assert error == ("error: the run's data.shards is a command (pipe:cat ...), which is not run unasked; pass --shards")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    sample.main([*picture, f"--shards={pipe}"])
    assert (tmp_path / "out.png").exists()


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """An S3 server that holds the shards under s3://bucket/stl10; the call stops it."""
    boto3 = pytest.importorskip("boto3")
    threaded = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anna")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in [shards / "index.json", *shards.glob("*.tar")]:
        client.upload_file(str(path), "bucket", f"stl10/{path.name}")
    remote._filesystem.cache_clear()
    stopped = [False]

    def stop() -> None:
        if not stopped[0]:
            stopped[0] = True
            threaded.stop()

    yield stop
    stop()
    remote._filesystem.cache_clear()


def test_a_bucket_gives_the_local_batches_until_its_server_is_gone(
    shards: Path, bucket: Callable[[], None], tmp_path: Path
) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    cache = Cache(tmp_path / "cache")
    there = ShardSet.open("s3://bucket/stl10", cache).select("train", "unlabeled")
    streams = [Stream(found, 16, seed=3, window=2) for found in (local, there)]
    for ours, theirs in zip(*(islice(stream, 12) for stream in streams), strict=True):
        assert torch.equal(ours.images, theirs.images)
    with pytest.raises(UserError, match=r"s3://bucket/nowhere/index\.json: not found"):
        ShardSet.open("s3://bucket/nowhere", cache)
    bucket()
    shutil.rmtree(cache.folder)
    with pytest.raises(UserError, match=r"s3://bucket/stl10/stl10-train-000000\.tar: .*; 25 images of split train") as caught:
        there.read(0)
    assert "\n" not in str(caught.value)
