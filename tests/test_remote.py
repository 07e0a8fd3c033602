"""Remote shards: downloads, faults, and the cache."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import READ_ALL, Server, cache_bytes, read_pixels, start
from conftest import TINY

from vae_scale.config.options import to_yaml
from vae_scale.config.parsing import parse
from vae_scale.data import remote
from vae_scale.data.cache import Cache
from vae_scale.data.remote import RetryPolicy
from vae_scale.data.shards import ShardSet
from vae_scale.data.stream import Stream
from vae_scale.errors import UserError
from vae_scale.training.trainer import Trainer

FIRST = "stl10-train-000000.tar"
pytestmark = pytest.mark.usefixtures("fast_retries")


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_http_stream_equals_local_stream_and_downloads_each_shard_once(shards: Path, server: Server, cache: Cache) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    remote_set = ShardSet.open(f"{server.url}/", cache).select("train", "unlabeled")
    assert (local.is_local, remote_set.is_local) == (True, False)
    assert remote_set.location == server.url
    streams = [Stream(shard_set, 16, seed=3, window=2) for shard_set in (local, remote_set)]
    for expected, actual in zip(*(islice(stream, 25) for stream in streams), strict=True):
        assert torch.equal(actual.images, expected.images)
        assert np.array_equal(actual.rows, expected.rows)
    assert server.requests == {"index.json": 1} | {shard.url: 1 for shard in remote_set.shards}


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "reset", "truncated", "truncated, no length", "bit flip", "too long", "stalled"]
)
def test_transient_faults_are_retried(
    shards: Path, server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "stalled":
        monkeypatch.setattr(remote, "RETRY_POLICY", RetryPolicy(3, 0.01, 1.0))
    server.faults = {FIRST: [fault], "index.json": [] if fault == "bit flip" else [fault, fault]}
    remote_set = ShardSet.open(server.url, cache).select("train")
    assert read_pixels(remote_set) == read_pixels(ShardSet.open(shards).select("train"))
    assert server.requests[FIRST] == 2
    assert server.requests["stl10-train-000001.tar"] == 1
    assert [path.name for path in cache.folder.glob("*.part*")] == []


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("500", "HTTP 500, after 3 attempts", 3),
        ("404", "not found", 1),
        ("403", "HTTP 403", 1),
        ("truncated, no length", "bytes, expected", 3),
        ("bit flip", "its sha256 differs from the manifest, after 3 attempts", 3),
        ("reset", "after 3 attempts", 3),
        ("no data", "no data for 0.3 s after 0 bytes, after 3 attempts", 3),
        ("stalled", "no data for 0.3 s after", 3),
    ],
)
def test_permanent_faults_are_reported_in_one_line(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str, requests: int
) -> None:
    remote_set = ShardSet.open(server.url, cache).select("train")
    server.faults = {FIRST: [fault] * 9}
    if fault in ("no data", "stalled"):
        monkeypatch.setattr(remote, "RETRY_POLICY", RetryPolicy(3, 0.01, 0.3))
    with pytest.raises(UserError) as caught:
        remote_set.read(0)
    message = str(caught.value)
    assert message.startswith(f"{server.url}/{FIRST}: ")
    assert reason in message
    assert message.endswith("25 images of split train cannot be read")
    assert server.requests[FIRST] == requests
    assert cache_bytes(cache) == 0
    server.faults.clear()
    assert len(remote_set.read(0)) == 25


def test_unavailable_manifests_are_reported(server: Server, cache: Cache, tmp_path: Path) -> None:
    cases = ((["404"], "not found; check that this is"), (["503"] * 3, "HTTP 503"), (["truncated"] * 3, "attempts"))
    for faults, message in cases:
        server.faults["index.json"] = faults
        with pytest.raises(UserError, match=message):
            ShardSet.open(server.url, cache)
    server.folder = tmp_path
    (tmp_path / "index.json").write_text("<html>Please log in</html>")
    with pytest.raises(UserError, match="invalid JSON"):
        ShardSet.open(server.url, cache)
    server.stop()
    with pytest.raises(UserError, match=rf"{server.url}/index.json: .*[Cc]onnect"):
        ShardSet.open(server.url, cache)
    with pytest.raises(UserError, match=r"ftp://.*not one of http, https, s3, gs, hf"):
        ShardSet.open("ftp://host/stl10", cache)


def test_secrets_are_sent_but_not_printed(server: Server, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    location = f"{server.url.replace('//', '//anna:secret@')}/?token=hidden"
    shard_set = ShardSet.open(location, cache).select("train")
    shard_set.read(0)
    path, headers = server.last_request
    assert path == f"/{FIRST}?token=hidden"
    assert headers["Authorization"] == "Basic YW5uYTpzZWNyZXQ="
    server.faults = {shard_set.shards[1].url: ["403"], shard_set.shards[2].url: ["503"] * 3}
    texts = [shard_set.location, to_yaml(parse([f"--data.shards={location}"])[0])]
    for index in (1, 2):
        with pytest.raises(UserError) as caught:
            shard_set.read(index)
        texts.append(str(caught.value))
    server.stop()
    with pytest.raises(UserError) as caught:
        ShardSet.open(location, cache)
    out, err = capfd.readouterr()
    output = "\n".join([*texts, str(caught.value), out, err])
    assert "/stl10-train-000001.tar: HTTP 403" in output
    for secret in ("anna", "secret", "hidden", "token"):
        assert secret not in output


def write_manifest(shards: Path, folder: Path, url: Callable[[str], str]) -> Path:
    """Writes a copy of the manifest with modified shard URLs."""
    index = json.loads((shards / "index.json").read_text())
    for entry in index["shardlist"]:
        entry["url"] = url(entry["url"])
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_a_local_manifest_can_refer_to_remote_shards(shards: Path, server: Server, cache: Cache, tmp_path: Path) -> None:
    folder = write_manifest(shards, tmp_path / "index", lambda name: f"{server.url}/{name}?token=a/b")
    shard_set = ShardSet.open(folder, cache)
    assert not shard_set.is_local
    assert read_pixels(shard_set) == read_pixels(ShardSet.open(shards))
    assert shard_set.location == str(folder)
    mixed = write_manifest(shards, tmp_path / "mixed", lambda name: f"{server.url}/{name}" if "test" in name else name)
    for path in shards.glob("*train*.tar"):
        shutil.copy(path, mixed)
    expected = read_pixels(ShardSet.open(shards).select("test", "train"))
    assert read_pixels(ShardSet.open(mixed, cache).select("test", "train")) == expected


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:cat /etc/passwd", "pipe:id", "file:///etc/passwd", "file:passwd", "../x.tar", "/etc/passwd", ".x.tar", ""),
        *("ftp://host/x.tar", "https://host/../x.tar", "https://host/.x.tar", "https://host/", "http://[x/y.tar", "a\nb.tar"),
    ],
)
def test_a_manifest_cannot_refer_to_other_locations(shards: Path, server: Server, tmp_path: Path, url: str) -> None:
    folder = write_manifest(shards, tmp_path / "index", lambda name: url)
    server.folder = folder
    for location in (folder, server.url):
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            ShardSet.open(location)


def test_a_manifest_cannot_set_the_path_of_a_cache_file(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shardlist"][0]["sha256"] = "../../evil"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"invalid md5sum, sha256 or pixels_sha256"):
        ShardSet.open(tmp_path)


def test_file_names_are_quoted_in_urls(shards: Path, server: Server, cache: Cache, tmp_path: Path) -> None:
    special_name = "it's $(touch broken) a #1?; é.tar"
    folder = write_manifest(shards, tmp_path / "index", lambda name: special_name if name == FIRST else name)
    shutil.copy(shards / FIRST, folder / special_name)
    server.folder = folder
    shard_set = ShardSet.open(server.url, cache).select("train")
    assert np.array_equal(shard_set.read(0), ShardSet.open(shards).select("train").read(0))
    assert server.requests[special_name] == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([special_name, "index.json"])


def test_error_names_a_missing_library(tmp_path: Path) -> None:
    hide = "import sys; sys.modules[sys.argv[1].split(':')[0] + 'fs'] = None; sys.modules['gcsfs'] = None\n"
    for location, library, extra in (("s3://bucket/x", "s3fs", "remote"), ("gs://bucket/x", "gcsfs", "gs")):
        stderr = start(hide + READ_ALL, location, tmp_path).communicate(timeout=60)[1]
        expected = f"{location[:2]}://...: requires {library}: pip install 'vae_scale[{extra}]'"
        assert stderr.splitlines()[-1].endswith(expected)


TRAIN = "from vae_scale.train import main; import sys; main(sys.argv[1:])"


def test_training_over_http_stops_if_the_server_is_lost(shards: Path, server: Server, tmp_path: Path) -> None:
    largest = max(shard.filesize for shard in ShardSet.open(shards).shards)
    options = [
        f"--data.shards={server.url}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--data.cache_size_gib={6.5 * largest / 2**30}",
        *TINY,
        "--track.tracker=none",
    ]
    server.faults = {FIRST: ["reset"]}
    process = start(TRAIN, *options, f"--run={tmp_path / 'complete'}", "--train.images=24")
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "retrying in 0.1 s" in output[1]
    run = tmp_path / "run"
    long_run = ["--train.images=100000", "--evaluate.every=100000", "--train.log_every=1"]
    process = start(TRAIN, *options, f"--run={run}", *long_run)
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    server.stop()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    (error,) = error_lines(stderr)
    assert f"{server.url}/stl10-" in error
    assert "images of split" in error
    assert "Traceback" not in stderr


def test_a_run_keeps_its_order_when_its_shards_are_moved(
    shards: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default window is 2 for remote shards, and all seven for local ones.
    monkeypatch.setattr("vae_scale.data.stream.DEFAULT_WINDOW", 2)
    options = [*TINY, "--data.shuffle_window=null", "--track.tracker=none", f"--data.cache_dir={tmp_path / 'cache'}"]
    first = parse([*options, f"--data.shards={shards}", f"--run={tmp_path / 'run'}", "--train.images=24"])[0]
    Trainer(first).run()
    moved = parse([*options, f"--data.shards={server.url}", f"--run={tmp_path / 'run'}", "--train.images=48"])[0]
    assert Trainer(moved).stream.plan.window == 7
    new = parse([*options, f"--data.shards={server.url}", f"--run={tmp_path / 'new'}"])[0]
    assert Trainer(new).stream.plan.window == 2


@pytest.fixture
def stop_s3_server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Starts an S3 server with the shards at s3://bucket/stl10. Returns a function that stops it."""
    boto3 = pytest.importorskip("boto3")
    s3_server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    s3_server.start()
    host, port = s3_server.get_host_and_port()
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
            s3_server.stop()

    yield stop
    stop()
    remote._filesystem.cache_clear()


def test_s3_stream_equals_local_stream_and_a_lost_server_is_reported(
    shards: Path, stop_s3_server: Callable[[], None], tmp_path: Path
) -> None:
    local = ShardSet.open(shards).select("train", "unlabeled")
    cache = Cache(tmp_path / "cache")
    remote_set = ShardSet.open("s3://bucket/stl10", cache).select("train", "unlabeled")
    streams = [Stream(shard_set, 16, seed=3, window=2) for shard_set in (local, remote_set)]
    for expected, actual in zip(*(islice(stream, 12) for stream in streams), strict=True):
        assert torch.equal(actual.images, expected.images)
    with pytest.raises(UserError, match=r"s3://bucket/nowhere/index\.json: not found"):
        ShardSet.open("s3://bucket/nowhere", cache)
    stop_s3_server()
    shutil.rmtree(cache.folder)
    with pytest.raises(UserError, match=r"s3://bucket/stl10/stl10-train-000000\.tar: .*; 25 images of split train") as caught:
        remote_set.read(0)
    assert "\n" not in str(caught.value)
