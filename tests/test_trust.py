"""Code in data is not executed, and secrets are not written or printed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from bad_server import Server
from conftest import TINY

from launch import command, environment
from vae_scale import encode, evaluate, sample
from vae_scale.errors import UserError, redact
from vae_scale.files import sha256_of
from vae_scale.pack import main as pack
from vae_scale.runtime import checkpoint

SECRETS = ("anna", "s3cr3t", "h1dden", "t0ken", "X-Amz-Signature")
KEYS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef",
    "HF_TOKEN": "hf_averysecrettoken",
    "AWS_SECRET_ACCESS_KEY": "aws0secret0",
}


def secret_url(server: Server) -> str:
    return f"{server.url.replace('//', '//anna:s3cr3t@')}/?X-Amz-Signature=h1dden&token=t0ken"


@pytest.fixture
def trained(server: Server, tmp_path: Path) -> tuple[Path, str]:
    """A run tracked by wandb, with secrets in the URL of its shards and in the environment, and its output."""
    run = tmp_path / "run"
    options = [f"--data.shards={secret_url(server)}", f"--data.cache_dir={tmp_path / 'cache'}", f"--run={run}", *TINY]
    variables = KEYS | {"WANDB_MODE": "offline", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    process = subprocess.run(
        command(1, *options, "--train.images=24", "--track.tracker=wandb"),
        env=environment(**variables),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr
    return run, process.stdout + process.stderr


def test_secrets_are_neither_in_files_of_a_run_nor_in_its_output(trained: tuple[Path, str], server: Server) -> None:
    run, output = trained
    assert server.last_request[0].endswith("X-Amz-Signature=h1dden&token=t0ken")  # secrets are sent
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "state.json"} < {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (*SECRETS, *KEYS.values()):
        assert secret not in output
        assert not [path for path, content in files.items() if secret.encode() in content], secret


def test_secrets_are_not_in_error_messages(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    location, run_options = secret_url(server), [f"--run={tmp_path / 'run'}", *TINY, "--track.tracker=none"]
    server.faults = {"index.json": ["403", "404", "403"], "stl10-train-000000.tar": ["403"]}
    for options in (
        ["-m", "vae_scale.train", f"--data.shards={location}", *run_options],
        ["-m", "vae_scale.train", "--dry-run", f"--data.shards={location}", *run_options],
        ["-m", "vae_scale.pack", f"--verify={location}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('/?', '/stl10-train-000000.tar?')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('/?', '/{a,b.tar?')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.pack", f"--index={location.replace('http', 'ftp')}", f"--out={tmp_path / 'out'}"],
        ["-m", "vae_scale.train", f"--data.shards={location.replace('http', 'ftp')}", *run_options],
    ):
        process = subprocess.run([command(1)[0], *options], env=environment(), capture_output=True, text=True)
        assert process.returncode == 2, process
        assert process.stderr.splitlines()[-1].startswith("error: "), process
        for secret in SECRETS:
            assert secret not in process.stdout + process.stderr, options
    assert redact("failed: https://u:p@h/x?sig=1#2") == "failed: https://h/x"


def test_code_in_a_checkpoint_is_not_executed(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(trained[0], tmp_path / "copy"))
    folder = checkpoint.newest_checkpoint(run)
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    for location in (
        "pipe:touch owned; cat {}",
        "pipe: touch owned #{}",
        "file:///etc",
        "/dev/null",
        "!!python/object:os.system",
    ):
        state["config"]["data"]["shards"] = location
        (folder / "state.json").write_text(json.dumps(state))
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in folder.iterdir()
            if path.name != "manifest.json"
        }
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
        for main, options in (
            (sample.main, ["--reconstruct", f"--out={tmp_path / 'x.png'}", "--num=1"]),
            (evaluate.main, ["--features=none"]),
            (encode.main, [f"--out={tmp_path / 'latents'}"]),
        ):
            with pytest.raises(SystemExit) as caught:
                main([f"--run={run}", *options])
            assert caught.value.code == 2
        assert not (tmp_path / "owned").exists()
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")  # a pickle
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_checkpoint(folder, "model")
    assert not (tmp_path / "owned").exists()


def test_code_in_a_shard_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The members are of types that webdataset would unpickle."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    image = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "PNG")
    pickled = b"cos\nsystem\n(S'touch owned'\ntR."
    with tarfile.open("foreign.tar", "w") as tar:
        for name, content in (("a.pyd", pickled), ("a.pickle", pickled), ("a.pth", pickled), ("a.png", image.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pack(["--index", "foreign.tar"])
    pack(["--verify", "."])
    assert {path.name for path in tmp_path.iterdir()} == {"foreign.tar", "index.json"}
