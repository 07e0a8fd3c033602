"""Configuration files that are damaged or malicious: they are read, or one line names the option."""

from pathlib import Path

import pytest
from fuzzing import allow_user_error, corrupted, expect_user_error, fuzz_settings, limit_memory, list_files
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_scale.config.options import Config
from vae_scale.config.parsing import parse

YAML = (
    "seed: 3\nmodel: {preset: tiny, channel_mult: [1, 2]}\ndata:\n  shards: data/x\n  random_crop: 0.1\n"
    "train: {images: 10, ema_decay: 0.9}\n"
)


@settings(fuzz_settings, max_examples=150)
@given(st.one_of(corrupted(YAML.encode()), st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))))
def test_corrupted_configurations_are_read_or_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with allow_user_error(path, *(f"{part}." for part in ("model", "data", "train", "optimizer")), "seed"):
        assert isinstance(parse(["--config", str(path)])[0], Config)


ALIAS_BOMB = (
    "data: {train: [&a [x,x], "
    + ", ".join(f"&{b} [*{a},*{a}]" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True))
    + "]}"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ALIAS_BOMB, "aliases"),
        ("data: &a {shards: *a}", "aliases"),
        ("data: " + "{a: " * 3000 + "1" + "}" * 3000, "deep"),
        ("a: " + "[" * 100_000, "deep"),
        (b"seed: \xff", "utf-8"),
        ("seed: \0", "not allowed"),
        ('run: "a\\0b"', "NUL"),
        ("seed: 1" + "0" * 5000, "digits"),
        ("seed: 1" + "0" * 400, "2^63"),
        ("optimizer: {lr: .inf}", "optimizer.lr"),
        ("optimizer: {lr: .nan}", "optimizer.lr"),
        ("train: {images: 1e999}", "train.images"),
        ("model: {channel_mult: [" + "1," * 999 + "1]}", "channel_mult has 1,000 values"),
        ("data: null", "data"),
        ("seed: ~", "seed: expected a non-negative integer, got null"),
        ("train: {images: null}", "train.images: expected a positive integer, got null"),
        ("model: {channel_mult: [1, null]}", "channel_mult"),
        ("data: {shards: ~}", "data.shards: expected a string, got null"),
        ("model: /etc/passwd", "section"),
        ("config: /etc/passwd", "unknown option config"),
        ("run: !!python/name:os.system", "python/name"),
        ("run: !!python/object/new:os.system ['touch owned']", "python/object"),
        ("run: !!python/module:os", "python/module"),
        ("", "contains no options"),
        ("- a", "contains no options"),
        ("x: 1\n" * 300_000, "1,048,576 bytes"),
    ],
)
def test_malicious_configurations_are_rejected(
    tmp_path: Path, content: str | bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with limit_memory():
        message = expect_user_error(lambda: parse(["--config", str(path)]), reason)
    assert "root:" not in message
    assert list_files(tmp_path) == {path}
    expect_user_error(lambda: parse(["--config", str(tmp_path)]), tmp_path, "Is a directory")
