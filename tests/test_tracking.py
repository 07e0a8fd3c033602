"""What wandb and TensorBoard are told about a run, read back from what they wrote, and the workspace that shows it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from launch import command, environment
from vae_scale.config import parse
from vae_scale.dashboard import main as dashboard
from vae_scale.training.trainer import Trainer

SNAPSHOT = Path(__file__).parent / "snapshots" / "workspace.json"
# Of runs with a critic, of the second stage, and of runs that skip bad shards.
OF_OTHERS = {"train/critic_loss", "eval/velocity_error", "data/missing_images"}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run tracked offline by wandb, of two segments."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=wandb", "--track.artifacts=true"]
    for images in (48, 96):
        ran = subprocess.run(
            command(1, *words, f"--train.images={images}", "--train.log_every=1"),
            env=environment(WANDB_MODE="offline"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict[str, Any]]:
    """What wandb wrote, by its own reader; both segments."""
    found: list[dict[str, Any]] = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        read = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert read.returncode == 0, read.stderr
        found += [json.loads(line) for line in read.stdout.splitlines()]
    return found


def of(records: list[dict[str, Any]], kind: str) -> list[Any]:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["item"] for record in of(records, "history")]


def test_wandb_draws_everything_over_the_images_seen(records: list[dict[str, Any]]) -> None:
    metrics = of(records, "metric")
    assert {(each["glob_name"], each["step_metric"]) for each in metrics} == {("*", "images")}
    assert all("images" in item for item in history(records))
    assert [item["images"] for item in history(records) if "train/loss" in item] == list(range(12, 97, 12))


def test_names_of_metrics_are_grouped(records: list[dict[str, Any]]) -> None:
    own = ("_step", "_runtime", "_timestamp", "images")
    groups = {name.split("/")[0] for item in history(records) for name in item if name not in own}
    assert groups == {"train", "eval", "speed", "data", "samples"}


def test_kl_per_channel_is_a_histogram_of_each_evaluation(records: list[dict[str, Any]], run: Path) -> None:
    evaluations = [item for item in history(records) if "eval/kl_nats" in item]
    assert [item["images"] for item in evaluations] == [48, 96]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    channels = [line["eval/kl_nats_per_channel"] for line in lines if "eval/kl_nats" in line]
    for item, found, line in zip(evaluations, channels, (line for line in lines if "eval/kl_nats" in line), strict=True):
        assert item["eval/kl_nats_per_channel._type"] == "histogram"
        assert sum(item["eval/kl_nats_per_channel.values"]) == len(found) == 4
        assert sum(found) == pytest.approx(line["eval/kl_nats"])


def test_configuration_code_and_shards_are_recorded(records: list[dict[str, Any]], shards: Path) -> None:
    first, second = (each["config"]["update"] for each in of(records, "run"))
    assert first["optimizer"]["lr"] == 0.003
    assert first["train"]["images"] == 48
    assert second["train"]["images"] == 96
    assert {"vae_scale", "torch"} <= set(first["versions"])
    assert first["shards"] == json.loads((shards / "index.json").read_text())["vae_scale"]["fingerprint"]
    assert first["parameters"] > 10_000


def test_both_segments_are_one_run(records: list[dict[str, Any]]) -> None:
    first, second = (each["run_id"] for each in of(records, "run"))
    assert first == second


def test_checkpoints_and_the_shards_manifest_are_artifacts_where_wanted(records: list[dict[str, Any]]) -> None:
    kept = [(each["type"], sorted(each["aliases"])) for each in of(records, "artifact")]
    assert ("model", ["images_000000048", "latest"]) in kept
    assert ("model", ["images_000000096", "latest"]) in kept
    assert ("dataset", ["index.json", "latest"]) in kept


def test_the_end_of_a_run_is_an_alert(records: list[dict[str, Any]]) -> None:
    assert [(each["level"], each["text"]) for each in of(records, "alert")] == [
        ("INFO", "48 images: finished"),
        ("INFO", "96 images: finished"),
    ]


def test_events_tell_the_story_of_a_run(run: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["images"]) for line in events] == [
        ("started", 0),
        ("finished", 48),
        ("resumed", 48),
        ("finished", 96),
    ]


def test_tensorboard_gets_curves_histograms_pictures_and_events(shards: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [f"--data.shards={shards}", f"--run={tmp_path}", *TINY, "--track.tracker=tensorboard", "--train.log_every=1"]
    for images in (24, 48):
        Trainer(parse([*words, f"--train.images={images}"])[0]).run()
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "images"), 0))
    found.Reload()
    tags = found.Tags()
    assert [event.step for event in found.Scalars("train/loss")] == [12, 24, 36, 48]
    assert [event.step for event in found.Scalars("eval/psnr_db")] == [24, 48]
    assert "eval/kl_nats_per_channel" in tags["histograms"]
    assert [event.step for event in found.Images("samples/samples")] == [24, 48]
    assert {"events/started/text_summary", "events/finished/text_summary"} <= set(tags["tensors"])


def reduced(content: dict[str, Any]) -> list[Any]:
    """What a reader sees of a workspace: sections and panels in order, with what they show."""
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return [
        {
            "section": section["name"],
            "open": section["isOpen"],
            "panels": [{"kind": panel["viewType"], **panel["config"]} for panel in section["panels"]],
        }
        for section in sections
    ]


def test_the_workspace_is_the_one_of_the_snapshot(run: Path, tmp_path: Path) -> None:
    dashboard([f"--run={run}", f"--json={tmp_path / 'sent.json'}"])
    sent = json.loads((tmp_path / "sent.json").read_text())
    assert sent["project"] == "vae_scale"
    assert reduced(sent) == json.loads(SNAPSHOT.read_text())


def test_every_panel_shows_something_that_is_logged(run: Path) -> None:
    panels = [panel for section in json.loads(SNAPSHOT.read_text()) for panel in section["panels"]]
    shown = {name for panel in panels for name in (*panel.get("metrics", []), *panel.get("mediaKeys", []))}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line} | {"samples/samples", "samples/reconstructions"}
    assert shown - logged <= OF_OTHERS
    assert logged - shown <= {"images", "train/loss", "train/nats", "eval/nats"}
    assert all(panel["xAxis"] == "images" for panel in panels if "metrics" in panel)


def test_without_a_key_the_workspace_is_not_saved_and_one_line_says_why(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "vae_scale.dashboard", f"--run={run}"]
    extra = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    ran = subprocess.run(words, env=environment(**extra), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: wandb: No API key configured")
    assert "--json" in ran.stderr
    with pytest.raises(SystemExit):
        dashboard([f"--run={tmp_path}"])
    assert "holds no config.yaml" in capsys.readouterr().err
