"""Memory and communication of DDP and FSDP2."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from launch import DDP, FSDP2, train

PROGRAM = str(Path(__file__).parent / "programs" / "profile_training.py")


def profile_training(
    shards: Path, folder: Path, config: Path, slow_rank: int, *more: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the report of each of two ranks, and the kinds and texts of the run's events."""
    options = [f"--data.shards={shards}", f"--run={folder / 'run'}", *TINY, "--track.tracker=none", "--train.images=144", *more]
    train(2, folder / "report", slow_rank, *options, program=PROGRAM, config=config)
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    reports = [json.loads((folder / f"report.{rank}").read_text()) for rank in (0, 1)]
    return reports, [f"{event['event']}: {event['text']}" for event in events]


@pytest.fixture(scope="module")
def fsdp2_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """A run in which rank 1 is slow."""
    return profile_training(shards, tmp_path_factory.mktemp("fsdp2"), FSDP2, 1, "--train.log_every=3")


def test_fsdp2_shards_the_average_and_only_rank_0_stages_checkpoints(
    fsdp2_run: tuple[list[dict[str, Any]], list[str]],
) -> None:
    first, second = fsdp2_run[0]
    for report in (first, second):
        assert report["averaged"] == 0
        assert report["local average"] < 0.6 * report["weights"]
    assert first["staged"] > 4 * first["weights"]  # weights, average, two moments
    assert second["staged"] == 0


def test_fsdp2_reports_the_straggler(
    fsdp2_run: tuple[list[dict[str, Any]], list[str]],
) -> None:
    stragglers = [event for event in fsdp2_run[1] if event.startswith("straggler: ")]
    assert stragglers
    assert all(event.startswith("straggler: rank 1 takes ") for event in stragglers)


def test_ddp_reduces_metrics_before_the_optimizer_step_and_does_not_broadcast_buffers(shards: Path, tmp_path: Path) -> None:
    (report, _), _ = profile_training(shards, tmp_path, DDP, -1, "--evaluate.every=144", "--train.log_every=100")
    start_times = report["start_times"]
    steps = start_times["aten::_fused_adamw_"]
    assert len(steps) == 12
    # The gradients, which fit into one bucket, and the metrics are reduced before the first optimizer step.
    assert sum(start < steps[0] for start in start_times["c10d::allreduce_"]) == 2
    # DDP broadcasts the order of its buckets once, after the first step; buffers would be broadcast in every step.
    assert sum(start > steps[0] for start in start_times["c10d::broadcast_"]) <= 2
