"""Configuration: preset < YAML file < command line, and one clear line for each mistake."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from options_table import described

from vae_scale.config import Config, VAEConfig, as_dict, as_yaml, check_processes, model_from_dict, parse
from vae_scale.errors import UserError
from vae_scale.train import main

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_command_line_is_stronger_than_the_file_and_the_file_than_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {preset: tiny, width: 48, blocks: 3}\n")
    config, dry_run = parse(["--config", str(file), "--model.blocks", "2"])
    assert (config.model.preset, config.model.patch, config.model.width, config.model.blocks) == ("tiny", 4, 48, 2)
    assert config.run == "runs/mine"
    assert not dry_run


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_accepted_and_reads_back_from_its_own_dump(file: Path, tmp_path: Path) -> None:
    config, _ = parse(["--config", str(file)])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(as_yaml(config))
    again, _ = parse(["--config", str(resolved)])
    assert again == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.imags", "5"], "--train.imags"),
        (["--train.images", "many"], "train.images"),
        (["--train.images", "1.5"], "train.images"),
        (["--train.images", "0"], "train.images"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--model.preset", "huge"], "model.preset"),
        (["--model.scale", "-1"], "model.scale"),
        (["--model.multipliers", "[]"], "model.multipliers"),
        (["--data.test", "train"], "data.test"),
        (["--data.train", ","], "data.train"),
        (["--train.ema", "1"], "train.ema"),
        (["--optimizer.clip", "0"], "optimizer.clip"),
        (["--model.preset", "seed_notebook", "--model.likelihood", "gaussian"], "seed_notebook"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error:")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {imags: 5}", "imags"),
        ("trian: {images: 5}", "trian"),
        ("train: 7", "train"),
        ("train: {images: five}", "train.images"),
        ("seed: !!python/object/apply:os.system ['touch /tmp/owned']", "python/object"),
        ("a: [", "config"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_and_nothing_in_it_runs(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse(["--config", str(file)])
    assert not Path("/tmp/owned").exists()


def test_a_batch_must_divide_among_processes_and_pieces() -> None:
    config = Config()
    config.train.batch_size, config.train.accumulation = 30, 2
    check_processes(config, 5)
    with pytest.raises(UserError, match=r"train\.batch_size is 30; it must be a multiple of 8"):
        check_processes(config, 4)


def test_a_resolution_that_does_not_divide_is_named_before_anything_is_loaded(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dry_run in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            main([f"--data.shards={shards}", "--model.patch=5", *dry_run])
        assert "model.multipliers the shards' images are 96x96, not divisible by f = 20" in capsys.readouterr().err


def test_a_dry_run_tells_and_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["--dry-run", f"--data.shards={shards}", f"--run={run}", "--model.preset=tiny", "--train.batch_size=30"])
    told = capsys.readouterr().out
    assert yaml.safe_load(told.split("\nmodel  ")[0])["train"]["batch_size"] == 30
    assert "150 to train on, 30 held out" in told
    assert "5.0 per epoch" in told
    assert "325," in told  # thousand parameters
    assert str(run) in told
    assert not run.exists()


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = "import sys; from vae_scale.config import parse; parse([]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "False"


def test_help_says_what_every_option_means_and_names_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "<class" not in told
    for kind in (Config, *(part.type for part in dataclasses.fields(Config) if dataclasses.is_dataclass(part.type))):
        for name, text in described(kind).items():
            if kind is not Config or not dataclasses.is_dataclass(Config.__annotations__[name]):  # sections have titles
                assert text.replace("\\|", "|")[:50] in told, name


def test_a_networks_configuration_survives_json_and_is_checked() -> None:
    config = VAEConfig(preset="small", scale=0.1, multipliers=[1, 2])
    assert model_from_dict(as_dict(config), "config.json") == config
    with pytest.raises(UserError, match=r"config\.json.*widht"):
        model_from_dict(as_dict(config) | {"widht": 3}, "config.json")
    with pytest.raises(UserError, match=r"config\.json.*width"):
        model_from_dict(as_dict(config) | {"width": "wide"}, "config.json")
