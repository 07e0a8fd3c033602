"""Logging to wandb and TensorBoard, read back from the files they write, and the wandb workspace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from launch import command, environment
from vae_scale.config.parsing import parse
from vae_scale.dashboard import main as dashboard
from vae_scale.training.trainer import Trainer

SNAPSHOT = Path(__file__).parent / "snapshots" / "workspace.json"
# Metrics of the second stage, and of runs that skip corrupt shards.
NOT_LOGGED_METRICS = {"eval/velocity_error", "data/replaced_images"}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run logged offline by wandb, in two segments."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=wandb", "--track.artifacts=true"]
    for images in (48, 96):
        completed = subprocess.run(
            command(1, *words, f"--train.images={images}", "--train.log_every=1"),
            env=environment(WANDB_MODE="offline"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert completed.returncode == 0, completed.stderr
    return folder


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    """The records of both segments, read by wandb."""
    records: list[dict[str, Any]] = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        read = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert read.returncode == 0, read.stderr
        records += [json.loads(line) for line in read.stdout.splitlines()]
    return records


def records_of(records: list[dict[str, Any]], kind: str) -> list[Any]:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["item"] for record in records_of(records, "history")]


def test_wandb_uses_images_seen_as_step(records: list[dict[str, Any]]) -> None:
    metrics = records_of(records, "metric")
    assert {(metric["glob_name"], metric["step_metric"]) for metric in metrics} == {("*", "images")}
    assert all("images" in item for item in history(records))
    assert [item["images"] for item in history(records) if "train/loss" in item] == list(range(12, 97, 12))


def test_metrics_are_grouped(records: list[dict[str, Any]]) -> None:
    ungrouped = ("_step", "_runtime", "_timestamp", "images")
    groups = {name.split("/")[0] for item in history(records) for name in item if name not in ungrouped}
    assert groups == {"train", "eval", "perf", "samples"}


def test_kl_per_channel_is_logged_as_histogram(records: list[dict[str, Any]], run: Path) -> None:
    evaluations = [item for item in history(records) if "eval/kl" in item]
    assert [item["images"] for item in evaluations] == [48, 96]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    channels = [line["eval/kl_per_channel"] for line in lines if "eval/kl" in line]
    for item, values, line in zip(evaluations, channels, (line for line in lines if "eval/kl" in line), strict=True):
        assert item["eval/kl_per_channel._type"] == "histogram"
        assert sum(item["eval/kl_per_channel.values"]) == len(values) == 4
        assert sum(values) == pytest.approx(line["eval/kl"])


def test_configuration_versions_and_shards_are_recorded(records: list[dict[str, Any]], shards: Path) -> None:
    first, second = (record["config"]["update"] for record in records_of(records, "run"))
    assert first["optimizer"]["lr"] == 0.003
    assert first["train"]["images"] == 48
    assert second["train"]["images"] == 96
    assert {"vae_scale", "torch"} <= set(first["versions"])
    assert first["shards"] == json.loads((shards / "index.json").read_text())["vae_scale"]["fingerprint"]
    assert first["parameters"] > 10_000


def test_a_resumed_run_continues_the_wandb_run(records: list[dict[str, Any]]) -> None:
    first, second = (record["run_id"] for record in records_of(records, "run"))
    assert first == second


def test_checkpoints_and_the_manifest_of_the_shards_are_artifacts(records: list[dict[str, Any]]) -> None:
    artifacts = [(record["type"], sorted(record["aliases"])) for record in records_of(records, "artifact")]
    assert ("model", ["images_000000048", "latest"]) in artifacts
    assert ("model", ["images_000000096", "latest"]) in artifacts
    assert ("dataset", ["index.json", "latest"]) in artifacts


def test_wandb_sends_an_alert_when_a_run_finishes(records: list[dict[str, Any]]) -> None:
    assert [(record["level"], record["text"]) for record in records_of(records, "alert")] == [
        ("INFO", "48 images: finished"),
        ("INFO", "96 images: finished"),
    ]


def test_events_of_a_resumed_run(run: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["images"]) for line in events] == [
        ("started", 0),
        ("finished", 48),
        ("resumed", 48),
        ("finished", 96),
    ]


def test_tensorboard_has_scalars_histograms_images_and_events(shards: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=tensorboard", "--train.log_every=1"]
    for images in (24, 48):
        Trainer(parse([*words, f"--train.images={images}"])[0]).run()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "images"), 0))
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("train/loss")] == [12, 24, 36, 48]
    assert [event.step for event in events.Scalars("eval/psnr")] == [24, 48]
    assert "eval/kl_per_channel" in tags["histograms"]
    assert [event.step for event in events.Images("samples/samples")] == [24, 48]
    assert {"events/started/text_summary", "events/finished/text_summary"} <= set(tags["tensors"])


def visible_content(content: dict[str, Any]) -> list[Any]:
    """Returns the sections and panels of a workspace, in order, with their metrics."""
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return [
        {
            "section": section["name"],
            "open": section["isOpen"],
            "panels": [{"kind": panel["viewType"], **panel["config"]} for panel in section["panels"]],
        }
        for section in sections
    ]


def test_the_workspace_equals_the_snapshot(run: Path, tmp_path: Path) -> None:
    dashboard([f"--run={run}", f"--json={tmp_path / 'workspace.json'}"])
    workspace = json.loads((tmp_path / "workspace.json").read_text())
    assert workspace["project"] == "vae_scale"
    assert visible_content(workspace) == json.loads(SNAPSHOT.read_text())


def test_panels_show_all_logged_metrics(run: Path) -> None:
    panels = [panel for section in json.loads(SNAPSHOT.read_text()) for panel in section["panels"]]
    displayed = {name for panel in panels for name in (*panel.get("metrics", []), *panel.get("mediaKeys", []))}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line} | {"samples/samples", "samples/reconstructions"}
    assert displayed - logged <= NOT_LOGGED_METRICS
    assert logged - displayed == {"images"}
    assert all(panel["xAxis"] == "images" for panel in panels if "metrics" in panel)


def test_saving_a_workspace_without_an_api_key_is_a_user_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "vae_scale.dashboard", f"--run={run}"]
    extra = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    completed = subprocess.run(
        words, env=environment(**extra), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert completed.returncode == 2
    assert completed.stderr.splitlines()[-1].startswith("error: wandb: No API key configured")
    assert "--json" in completed.stderr
    with pytest.raises(SystemExit):
        dashboard([f"--run={tmp_path}"])
    assert "holds no config.yaml" in capsys.readouterr().err
