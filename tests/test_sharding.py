"""What processes hold and exchange: with DDP, and with FSDP2, where each holds a share."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from launch import DDP, FSDP2, train

INSPECTED = str(Path(__file__).parent / "programs" / "inspected.py")


def inspect(shards: Path, folder: Path, config: Path, slow: int, *more: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What each of two processes reports, and the kinds and texts of the run's events."""
    words = [f"--data.shards={shards}", f"--run={folder / 'run'}", *TINY, "--track.tracker=none", "--train.images=144", *more]
    train(2, folder / "report", slow, *words, program=INSPECTED, config=config)
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    reports = [json.loads((folder / f"report.{rank}").read_text()) for rank in (0, 1)]
    return reports, [f"{event['event']}: {event['text']}" for event in events]


@pytest.fixture(scope="module")
def with_fsdp2(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str]]:
    """Training in which rank 1 is slow."""
    return inspect(shards, tmp_path_factory.mktemp("fsdp2"), FSDP2, 1, "--train.log_every=3")


def test_with_fsdp2_no_process_keeps_all_averaged_weights_and_rank_0_alone_gathers_a_checkpoint(
    with_fsdp2: tuple[list[dict[str, Any]], list[str]],
) -> None:
    first, second = with_fsdp2[0]
    for report in (first, second):
        assert report["averaged"] == 0
        assert report["own share"] < 0.6 * report["weights"]
    assert first["staged"] > 4 * first["weights"]  # weights, average, two moments
    assert second["staged"] == 0


def test_with_fsdp2_a_slow_process_is_named_though_all_wait_for_it(
    with_fsdp2: tuple[list[dict[str, Any]], list[str]],
) -> None:
    stragglers = [event for event in with_fsdp2[1] if event.startswith("straggler: ")]
    assert stragglers
    assert all(event.startswith("straggler: rank 1 takes ") for event in stragglers)


def test_with_ddp_metrics_are_reduced_before_the_optimizers_step_and_buffers_are_not_sent(shards: Path, tmp_path: Path) -> None:
    (report, _), _ = inspect(shards, tmp_path, DDP, -1, "--evaluate.every=144", "--train.log_every=100")
    began = report["began"]
    steps = began["aten::_fused_adamw_"]
    assert len(steps) == 12
    # Before the first step of the optimizer: the gradients, which fit into one bucket, and the metrics.
    assert sum(start < steps[0] for start in began["c10d::allreduce_"]) == 2
    # DDP tells the order of its buckets once, after the first step; buffers would be sent in every step.
    assert sum(start > steps[0] for start in began["c10d::broadcast_"]) <= 2
