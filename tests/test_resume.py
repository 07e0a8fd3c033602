"""A killed run resumes without loss, with the same or another number of processes."""

import json
import subprocess
from pathlib import Path

import pytest
from soak import BATCH, Soak

from launch import command, environment, losses, train, train_in_process, train_options
from vae_scale.errors import UserError
from vae_scale.runtime import checkpoint

PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.parametrize(("processes", "precision", "kills"), [(1, "fp32", 2), (1, "bf16", 1), (2, "fp32", 1)])
def test_run_killed_at_any_time_is_bit_identical_to_an_uninterrupted_run(
    shards: Path, tmp_path: Path, processes: int, precision: str, kills: int
) -> None:
    report = Soak(tmp_path, shards, processes, precision, 360, seed=kills).soak(kills)
    assert report.passed, report.table()
    assert report.kills == report.restarts == kills


def read_rows(record_dir: Path, ranks: int) -> list[list[int]]:
    """Returns the rows of each global batch of `ranks` processes."""
    paths = [record_dir / f"rank_{rank}_of_{ranks}.jsonl" for rank in range(ranks)]
    rank_rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return [[row for rows in batch for row in rows] for batch in zip(*rank_rows, strict=True)]


def test_resume_with_another_number_of_processes_keeps_batches_and_losses(shards: Path, tmp_path: Path) -> None:
    world_sizes, segment = (2, 1, 3, 4, 2), 2 * BATCH
    starts = range(0, segment * len(world_sizes), BATCH)
    common = ("--train.log_every=1", "--optimizer.schedule=constant")
    uninterrupted = train_in_process(
        *train_options(shards, tmp_path / "uninterrupted", *common, f"--train.images={starts.stop}")
    )
    expected_rows = {start: uninterrupted.stream.plan.rows(start).tolist() for start in starts}

    for begin, ranks in zip(starts[::2], world_sizes, strict=True):
        options = train_options(shards, tmp_path / "resumed", *common, f"--train.images={begin + segment}")
        if ranks == 1:
            train_in_process(*options)
            continue
        record_dir = tmp_path / str(begin)
        record_dir.mkdir()
        train(ranks, *options, program=str(PROGRAMS / "record_rows.py"), RECORD_DIR=str(record_dir))
        assert read_rows(record_dir, ranks) == [expected_rows[begin], expected_rows[begin + BATCH]]
    expected, actual = losses(tmp_path / "uninterrupted"), losses(tmp_path / "resumed")
    assert list(expected) == list(actual) == [start + BATCH for start in starts]
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_changed_options_are_reported_or_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in_process(*train_options(shards, tmp_path, "--train.images=12"))
    with pytest.raises(UserError, match=r"was trained with another model.num_res_blocks, seed; choose another --run"):
        train_in_process(
            *train_options(
                shards, tmp_path, "--train.images=12", "--seed=1", "--model.num_res_blocks=2", "--optimizer.lr=0.001"
            )
        )
    capsys.readouterr()
    train_in_process(*train_options(shards, tmp_path, "--train.images=12", "--train.log_every=1", "--optimizer.lr=0.001"))
    assert "resuming with optimizer.lr 0.003 -> 0.001, train.log_every 5 -> 1\n" in capsys.readouterr().out
    train_in_process(*train_options(shards, tmp_path, "--train.images=12"))
    assert "resuming with" not in capsys.readouterr().out


def test_flipped_bit_on_one_rank_stops_training_before_the_checkpoint(shards: Path, tmp_path: Path) -> None:
    options = train_options(shards, tmp_path, "--train.images=120", "--checkpoint.every=12")
    launch = command(2, *options, program=str(PROGRAMS / "flip_bit.py"))
    run = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "ranks differ in their weights after 36 images" in run.stderr, run.stderr
    newest = checkpoint.newest_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoint.images_seen_at(newest) == 24
