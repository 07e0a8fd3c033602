"""A killed run resumes without loss, with the same or another number of processes."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import TINY
from soak import BATCH, Soak

from launch import command, environment, losses, train
from vae_scale.config.parsing import parse
from vae_scale.errors import UserError
from vae_scale.runtime import checkpoint
from vae_scale.training.trainer import Trainer

PROGRAMS = Path(__file__).parent / "programs"


def options(shards: Path, run: Path, *more: object) -> list[str]:
    return [f"--data.shards={shards}", f"--run={run}", *TINY, "--track.tracker=none", *map(str, more)]


def train_in_process(*words: str) -> Trainer:
    trainer = Trainer(parse(list(words))[0])
    trainer.run()
    return trainer


@pytest.mark.parametrize(("processes", "precision", "kills"), [(1, "fp32", 2), (1, "bf16", 1), (2, "fp32", 1)])
def test_a_run_killed_at_any_time_ends_bit_identical_to_an_uninterrupted_run(
    shards: Path, tmp_path: Path, processes: int, precision: str, kills: int
) -> None:
    report = Soak(tmp_path, shards, processes, precision, 360, seed=kills).soak(kills)
    assert report.passed, report.table()
    assert report.kills == report.restarts == kills


def rows_of(diary: Path, ranks: int) -> list[list[int]]:
    """Returns the rows of each global batch of `ranks` processes."""
    paths = [diary / f"rank_{rank}_of_{ranks}.jsonl" for rank in range(ranks)]
    shares = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return [[row for share in step for row in share] for step in zip(*shares, strict=True)]


def test_resuming_with_more_or_fewer_processes_does_not_change_batches_or_losses(shards: Path, tmp_path: Path) -> None:
    chain, leg = (2, 1, 3, 4, 2), 2 * BATCH
    places = range(0, leg * len(chain), BATCH)
    common = ("--train.log_every=1", "--optimizer.schedule=constant")
    whole = train_in_process(*options(shards, tmp_path / "whole", *common, f"--train.images={places.stop}"))
    planned = {place: whole.stream.plan.rows(place).tolist() for place in places}

    for begin, ranks in zip(places[::2], chain, strict=True):
        words = options(shards, tmp_path / "parts", *common, f"--train.images={begin + leg}")
        if ranks == 1:
            train_in_process(*words)
            continue
        diary = tmp_path / str(begin)
        diary.mkdir()
        train(ranks, *words, program=str(PROGRAMS / "record_rows.py"), RECORD_DIR=str(diary))
        assert rows_of(diary, ranks) == [planned[begin], planned[begin + BATCH]]
    one, many = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(one) == list(many) == [place + BATCH for place in places]
    assert list(many.values()) == pytest.approx(list(one.values()), rel=1e-4)


def test_changed_options_are_refused_or_reported(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in_process(*options(shards, tmp_path, "--train.images=12"))
    with pytest.raises(UserError, match=r"was trained with another model.num_res_blocks, seed; choose another --run"):
        train_in_process(
            *options(shards, tmp_path, "--train.images=12", "--seed=1", "--model.num_res_blocks=2", "--optimizer.lr=0.001")
        )
    capsys.readouterr()
    train_in_process(*options(shards, tmp_path, "--train.images=12", "--train.log_every=1", "--optimizer.lr=0.001"))
    assert "resuming with optimizer.lr 0.003 -> 0.001, train.log_every 5 -> 1\n" in capsys.readouterr().out
    train_in_process(*options(shards, tmp_path, "--train.images=12"))
    assert "resuming with" not in capsys.readouterr().out


def test_one_flipped_bit_on_one_of_two_processes_stops_training_before_it_is_saved(shards: Path, tmp_path: Path) -> None:
    words = options(shards, tmp_path, "--train.images=120", "--checkpoint.every=12")
    launch = command(2, *words, program=str(PROGRAMS / "flip_bit.py"))
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "ranks differ in their weights after 36 images" in run.stderr, run.stderr
    newest = checkpoint.newest_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoint.images_seen_at(newest) == 24
