"""What strangers write is not run, and what is secret is not written down."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server
from conftest import TINY

from launch import command, environment
from vae_scale import encode, evaluate, sample
from vae_scale.errors import UserError, shown
from vae_scale.pack import main as pack
from vae_scale.training import checkpoint

SECRETS = ("anna", "s3cr3t", "h1dden", "t0ken", "X-Amz-Signature")
KEYS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef",
    "HF_TOKEN": "hf_averysecrettoken",
    "AWS_SECRET_ACCESS_KEY": "aws0secret0",
}


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    running = Server(shards)
    yield running
    running.stop()


def secretive(server: Server) -> str:
    return f"{server.url.replace('//', '//anna:s3cr3t@')}/?X-Amz-Signature=h1dden&token=t0ken"


@pytest.fixture
def trained(server: Server, tmp_path: Path) -> tuple[Path, str]:
    """A run on shards behind a URL full of secrets, with keys in the environment, tracked by wandb; and all that it printed."""
    run = tmp_path / "run"
    words = [f"--data.shards={secretive(server)}", f"--data.cache_dir={tmp_path / 'cache'}", f"--run={run}", *TINY]
    more = KEYS | {"WANDB_MODE": "offline", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    ran = subprocess.run(
        command(1, *words, "--train.images=24", "--track.tracker=wandb"),
        env=environment(**more),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 0, ran.stderr
    return run, ran.stdout + ran.stderr


def test_secrets_are_in_no_file_of_a_run_and_not_on_the_screen(trained: tuple[Path, str], server: Server) -> None:
    run, told = trained
    assert server.heard[0].endswith("X-Amz-Signature=h1dden&token=t0ken")  # they are sent
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "state.json"} < {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (*SECRETS, *KEYS.values()):
        assert secret not in told
        assert not [path for path, content in files.items() if secret.encode() in content], secret


def test_secrets_are_in_no_error(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    location, words = secretive(server), [f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none"]
    server.faults = {"index.json": ["403", "404", "403"], "stl10-train-000000.tar": ["403"]}
    for options in (
        ["-m", "vae_scale.train", f"--data.shards={location}", *words],
        ["-m", "vae_scale.train", "--dry-run", f"--data.shards={location}", *words],
        ["-m", "vae_scale.pack", f"--verify={location}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('/?', '/stl10-train-000000.tar?')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('/?', '/{a,b.tar?')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('http', 'ftp')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.train", f"--data.shards={location.replace('http', 'ftp')}", *words],
    ):
        ran = subprocess.run([command(1)[0], *options], env=environment(), capture_output=True, text=True)
        assert ran.returncode == 2, ran
        assert ran.stderr.splitlines()[-1].startswith("error: "), ran
        for secret in SECRETS:
            assert secret not in ran.stdout + ran.stderr, options
    assert shown("failed: https://u:p@h/x?sig=1#2") == "failed: https://h/x"


def test_nothing_in_a_checkpoint_is_run(trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(trained[0], tmp_path / "theirs"))
    folder = checkpoint.newest(run)
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    for place in ("pipe:touch owned; cat {}", "pipe: touch owned #{}", "file:///etc", "/dev/null", "!!python/object:os.system"):
        state["config"]["data"]["shards"] = place
        (folder / "state.json").write_text(json.dumps(state))
        files = {
            path.name: {"size": path.stat().st_size, "sha256": checkpoint._sha256(path)}
            for path in folder.iterdir()
            if path.name != "manifest.json"
        }
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
        for main, more in (
            (sample.main, ["--reconstruct", f"--out={tmp_path / 'x.png'}", "--num=1"]),
            (evaluate.main, ["--features=none"]),
            (encode.main, [f"--out={tmp_path / 'latents'}"]),
        ):
            with pytest.raises(SystemExit) as caught:
                main([f"--run={run}", *more])
            assert caught.value.code == 2
        assert not (tmp_path / "owned").exists()
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")  # a pickle
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(folder, "model")
    assert not (tmp_path / "owned").exists()


def test_nothing_in_a_shard_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset would unpickle the first member; here it is none of the kinds that are read."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    pickled = b"cos\nsystem\n(S'touch owned'\ntR."
    with tarfile.open("theirs.tar", "w") as tar:
        for name, content in (("a.pyd", pickled), ("a.pickle", pickled), ("a.pth", pickled), ("a.png", picture.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pack(["--index", "theirs.tar"])
    pack(["--verify", "."])
    assert {path.name for path in tmp_path.iterdir()} == {"theirs.tar", "index.json"}
