"""Terminal output of a run: messages and a progress bar, or JSON, and errors with their rank."""

import json
import os
import pty
import re
import subprocess
import termios
from datetime import datetime
from pathlib import Path

import pytest
from conftest import TINY

from launch import command, environment

MORE = ["--train.images=48", "--train.log_every=1", "--track.tracker=none", "--evaluate.every=36"]


def test_json_output_holds_all_records_of_the_files(shards: Path, tmp_path: Path) -> None:
    words = command(1, f"--data.shards={shards}", f"--run={tmp_path}", *TINY, *MORE, "--log=json")
    completed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert not completed.stderr
    printed = [json.loads(line) for line in completed.stdout.splitlines()]
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert lines
        assert all(line in printed for line in lines)
    assert [line["event"] for line in printed if "event" in line] == ["started", "finished"]
    assert [line["images"] for line in printed if "train/loss" in line] == [12, 24, 36, 48]
    assert any("held-out " in line.get("message", "") for line in printed)
    times = [datetime.fromisoformat(line["time"]) for line in printed if "event" in line]
    assert times[0] <= times[1]


def test_progress_bar_shows_loss_throughput_loading_and_remaining_time(shards: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 240))
    words = command(1, f"--data.shards={shards}", f"--run={tmp_path}", *TINY, *MORE)
    process = subprocess.Popen(words, env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    while True:
        try:
            output += os.read(controller, 4096)
        except OSError:  # the terminal is closed
            break
    os.close(controller)
    assert process.wait() == 0, output
    bar = re.compile(r"\d+%\|.*\| [\d.]+/48\.0 \[\d\d:\d\d<\d\d:\d\d], [\d.]+ bits/dim, \d+ images/s, loading [\d.]+%")
    assert bar.search(output.decode()), output


def test_status_lines_replace_the_bar_if_the_output_is_a_file(shards: Path, tmp_path: Path) -> None:
    words = command(1, f"--data.shards={shards}", f"--run={tmp_path}", *TINY, *MORE)
    completed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert "\r" not in completed.stdout + completed.stderr
    assert f"{tmp_path} 12 of 48 images, " in completed.stderr
    assert re.search(r"images/s, loading [\d.]+%, \d\d:\d\d left\n", completed.stderr)


def test_each_rank_prints_its_errors_with_its_rank(shards: Path, tmp_path: Path) -> None:
    words = command(2, f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--train.batch_size=13")
    completed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert completed.returncode != 0
    errors = [line for line in completed.stderr.splitlines() if line.startswith(("error:", "rank "))]
    assert errors
    assert all(re.match(r"rank [01]: error: train\.batch_size is 13; it must be a multiple of 2", line) for line in errors)
    assert len(errors) == len(set(errors))


def test_samples_are_written_at_powers_of_two_until_the_first_evaluation(shards: Path, tmp_path: Path) -> None:
    from vae_scale.config.parsing import parse
    from vae_scale.training.trainer import Trainer

    words = [f"--data.shards={shards}", *TINY, "--track.tracker=none", "--train.images=600", "--evaluate.every=540"]
    words += ["--checkpoint.every=540"]
    for run, option, images in (("a", "true", [264, 516, 540, 600]), ("b", "false", [540, 600])):
        Trainer(parse([*words, f"--run={tmp_path / run}", f"--evaluate.early={option}"])[0]).run()
        paths = sorted((tmp_path / run / "samples").glob("samples_*.png"))
        assert [int(path.stem.split("_")[1]) for path in paths] == images


@pytest.mark.parametrize("value", ["text", "true", "null"])
def test_invalid_values_of_log_are_user_errors(value: str) -> None:
    from vae_scale.config.parsing import parse
    from vae_scale.errors import UserError

    with pytest.raises(UserError, match="log"):
        parse([f"--log={value}"])
