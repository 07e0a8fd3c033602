"""Configuration: preset < YAML file < command line, and one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vae_scale.config.help import SECTIONS, list_options
from vae_scale.config.options import Config, VAEConfig, to_dict, to_yaml
from vae_scale.config.parsing import check_batch_size, parse, vae_config_from_dict
from vae_scale.errors import UserError
from vae_scale.train import main

CONFIGS = Path(__file__).parent.parent / "configs"


def test_precedence_is_preset_then_files_then_command_line(tmp_path: Path) -> None:
    first, last = tmp_path / "first.yaml", tmp_path / "last.yaml"
    first.write_text("model: {preset: tiny, width: 48, num_res_blocks: 3}\nseed: 1\n")
    last.write_text("seed: 2\n")
    config, dry_run = parse(["--model.num_res_blocks", "2", "--config", str(first), "--config", str(last)])
    assert (config.model.preset, config.model.patch_size, config.model.width, config.model.num_res_blocks) == ("tiny", 4, 48, 2)
    assert (config.seed, config.run) == (2, "runs/last")
    assert not dry_run


def test_values_are_plain_python_types() -> None:
    config, _ = parse(
        ["--optimizer.betas=[0, 0.5]", "--model.channel_mult=[1, 2]", "--optimizer.max_grad_norm=1", "--run=null"]
    )
    assert config.optimizer.betas == (0.0, 0.5)
    values = [*config.optimizer.betas, *config.model.channel_mult, config.optimizer.max_grad_norm, config.seed, config.run]
    assert [type(value) for value in values] == [float, float, int, int, float, int, type(None)]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_file_is_valid_and_is_restored_from_yaml(file: Path, tmp_path: Path) -> None:
    config, _ = parse(["--config", str(file)])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    restored, _ = parse(["--config", str(resolved)])
    assert restored == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train.imags 5", "unknown option train.imags; did you mean train.images?"),
        ("--lr 1e-3", "unknown option lr; did you mean optimizer.lr?"),
        ("--lr=1e-3", "unknown option lr; did you mean optimizer.lr?"),
        ("--train.lr 1e-3", "unknown option train.lr; did you mean optimizer.lr?"),
        ("--quantum 7", "unknown option quantum; see --help-all for the options"),
        ("--train 7", "train is a section; set its options, such as --train.images"),
        ("7", "unexpected argument '7'; options are given as --NAME VALUE"),
        ("--train.images", "--train.images: expected one argument"),
        ("--train.batch_size many", "train.batch_size: expected a positive integer or 'auto', got 'many'"),
        ("--train.images 1.5", "train.images: expected a positive integer, got 1.5"),
        ("--train.images 0", "train.images: expected a positive integer, got 0"),
        ("--train.images 1e30", "train.images: expected a positive integer, got 1e30; numbers must be below 2^63"),
        (f"--train.images {2**63}", f"train.images: expected a positive integer, got {2**63}; numbers must be below 2^63"),
        (f"--optimizer.lr {10**400}", "numbers must be below 2^63"),
        ("--optimizer.lr nan", "optimizer.lr: expected a positive number, got nan"),
        ("--seed -1", "seed: expected a non-negative integer, got -1"),
        ("--train.precision fp8", "train.precision: expected one of 'auto', 'bf16', 'fp16', 'tf32', 'fp32', got 'fp8'"),
        ("--model.preset huge", "model.preset: expected one of 'tiny', 'small'"),
        ("--model.num_res_blocks 1001", "model.num_res_blocks: expected an integer from 1 to 1000, got 1001"),
        ("--optimizer.max_grad_norm -1", "optimizer.max_grad_norm: expected a positive number or null, got -1"),
        ("--model.channel_mult [1,0]", "model.channel_mult: expected a list, each value a positive integer, got '[1,0]'"),
        ("--model.channel_mult []", "model.channel_mult has 0 values; it must have 1 to 16"),
        ("--optimizer.betas [1]", "optimizer.betas: expected a list of 2, each value a number from 0 to below 1"),
        ("--data.random_crop 0.95", "data.random_crop: expected a number from 0 to 0.9, got 0.95"),
        ("--data.horizontal_flip maybe", "data.horizontal_flip: expected true or false, got 'maybe'"),
        ("--data.test train", "data.test"),
        ("--data.train ,", "data.train"),
        ("--data.streams 3", "data.streams is 3; it must divide train.batch_size (256)"),
        ("--train.ema_decay 1", "train.ema_decay: expected a number from 0 to below 1, got 1"),
        ("--optimizer.max_grad_norm 0", "optimizer.max_grad_norm: expected a positive number or null, got 0"),
        ("--prior.width 100", "prior.width is 100; it must be a multiple of 32"),
        ("--model.preset seed_notebook --model.likelihood gaussian", "seed_notebook requires"),
        ("--config /nowhere.yaml", "--config /nowhere.yaml: No such file or directory"),
    ],
)
def test_user_errors_name_the_option_in_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options.split())
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error:")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {imags: 5}", r"unknown option train.imags; did you mean train.images\?"),
        ("lr: 5", r"unknown option lr; did you mean optimizer.lr\?"),
        ("trian: {images: 5}", "unknown option trian"),
        ("config: other.yaml", "unknown option config"),
        ("train: 7", "train: expected a section with options below it, got 7"),
        ("train: {images: five}", "train.images: expected a positive integer, got 'five'"),
        ("train: {images: null}", "train.images: expected a positive integer, got null"),
        ("train: {images: true}", "train.images: expected a positive integer"),
        ("7: 7", "unknown option 7"),
        ("seed: !!python/object/apply:os.system ['touch /tmp/owned']", "python/object"),
        ("a: [", "bad.yaml"),
    ],
)
def test_errors_in_files_are_one_line_and_no_code_is_executed(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", str(file)])
    assert str(caught.value).startswith(f"--config {file}: ")
    assert not Path("/tmp/owned").exists()


def test_batch_size_must_be_divisible_by_processes_times_accumulation_steps() -> None:
    config = Config()
    config.train.batch_size, config.train.gradient_accumulation_steps = 30, 2
    check_batch_size(config, 5)
    with pytest.raises(UserError, match=r"train\.batch_size is 30; it must be a multiple of 8"):
        check_batch_size(config, 4)


def test_an_indivisible_resolution_is_rejected_before_training(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dry_run in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            main([f"--data.shards={shards}", "--model.patch_size=5", *dry_run])
        assert "model.channel_mult the images of the shards are 96x96, not divisible by f = 20" in capsys.readouterr().err


def test_dry_run_prints_a_description_and_writes_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(["--dry-run", f"--data.shards={shards}", f"--run={run}", "--model.preset=tiny", "--train.batch_size=30"])
    output = capsys.readouterr().out
    assert yaml.safe_load(output.split("\nmodel  ")[0])["train"]["batch_size"] == 30
    assert "150 for training, 30 held out" in output
    assert "5.0 per epoch" in output
    assert "325," in output  # thousand parameters
    assert str(run) in output
    assert not run.exists()


def test_parsing_and_help_do_not_import_torch() -> None:
    code = """if True:
        import sys
        from vae_scale.config.parsing import parse
        parse(["--config", "configs/demo.yaml"])
        try: parse(["--help"])
        except SystemExit: print("torch" in sys.modules)"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ, cwd=CONFIGS.parent
    )
    assert run.stdout.splitlines()[-1] == "False"


def test_help_is_short_and_help_all_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            main(["--config", "/nowhere.yaml", flag])
        assert caught.value.code == 0
        texts[flag] = capsys.readouterr().out
        assert "print_config" not in texts[flag]
        assert "<class" not in texts[flag]
    assert len(texts["--help"].splitlines()) < 60
    assert all(f"  {section} " in texts["--help"] for section in SECTIONS)
    help_text = " ".join(texts["--help-all"].split())
    assert len(list_options()) > 50
    for name, option in list_options().items():
        assert f"--{name} (" in help_text
        assert option.description in help_text


def test_network_configuration_is_restored_from_json_and_validated() -> None:
    config = VAEConfig(preset="small", patch_size=2, channel_mult=[1, 2])
    assert vae_config_from_dict(to_dict(config), "config.json") == config
    for change, message in {"widht": 3, "width": "wide", "num_res_blocks": 10**400, "latent": None}.items():
        with pytest.raises(UserError, match=rf"config\.json: .*{change}"):
            vae_config_from_dict(to_dict(config) | {change: message}, "config.json")
    with pytest.raises(UserError, match=r"config\.json: expected an object"):
        vae_config_from_dict([], "config.json")
