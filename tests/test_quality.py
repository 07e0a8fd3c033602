"""`tests/benchmarks/quality.py`: metrics, the cache of trained stages, budgets, and a small comparison."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import quality_stages
import torch
from conftest import discs
from PIL import Image
from quality_methods import Stage, select_methods
from quality_metrics import kernel_distance, nearest_distances, probability_nearer, squared_mmd
from quality_report import add_above_floor, compare_with_peers, format_table
from quality_stages import StageRun, Study, affordable_images, calibrate, correct_images, plan_runs, train_within

from vae_scale import train
from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.models.vae import DEFAULT_GUIDANCE, SamplingConfig
from vae_scale.pack import main as pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training and 40 held-out images of 32 pixels."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("packed")
    for seed, (split, count) in enumerate({"train": 160, "test": 40}.items()):
        (folder / split).mkdir()
        for number, image in enumerate(discs(count, seed)):
            Image.fromarray(image[::3, ::3]).save(folder / split / f"{number}.png")
    pack(["--source=folder", f"--data={folder}", "--resolution=32", f"--out={out / 'shards'}", "--workers=1"])
    return out / "shards"


@pytest.fixture
def study(packed: Path, tmp_path: Path) -> Study:
    return Study(ShardSet.open(packed), tmp_path, budget=60.0)


def features(count: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def test_squared_mmd_is_the_direct_formula() -> None:
    x, y = features(4, seed=1), features(4, 0.5, seed=2)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / 8 + 1) ** 3

    pairs = [(i, j) for i in range(4) for j in range(4)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 12
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 16
    assert squared_mmd(x, y) == pytest.approx(within - 2 * across, rel=1e-5)


def test_kernel_distance_is_zero_for_equal_distributions_and_grows_with_a_shift() -> None:
    held_out = features(400)
    same, near, far = (kernel_distance(features(400, shift, seed=1), held_out) for shift in (0.0, 0.5, 1.0))
    assert abs(same[0]) < 0.05
    assert same[1] > 0
    assert same[0] < near[0] < far[0]


def test_copies_are_nearer_to_the_training_images_than_held_out_images() -> None:
    training, held_out = features(500), nearest_distances(features(500, seed=1), features(500))
    assert probability_nearer(nearest_distances(features(500, seed=2), training), held_out) == pytest.approx(0.5, abs=0.06)
    assert probability_nearer(nearest_distances(training, training), held_out) == 1
    assert probability_nearer(nearest_distances(features(500, 5.0, seed=2), training), held_out) < 0.01
    assert probability_nearer(held_out, held_out) == 0.5  # a tie counts one half


def test_hash_of_a_stage_depends_on_everything_that_affects_its_weights(
    study: Study, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("train: {batch_size: 16}\n")
    vae = StageRun(study, Stage("vae", (f"--config={config}",)), 10.0, 0)
    flow = StageRun(study, Stage("flow"), 20.0, 0, vae)
    other_shards = dataclasses.replace(study, shards=dataclasses.replace(study.shards, fingerprint="f"))
    runs = [
        vae,
        flow,
        dataclasses.replace(flow, earlier=dataclasses.replace(vae, seed=1)),
        dataclasses.replace(vae, stage=Stage("vae", (f"--config={config}", "--optimizer.lr=0.1"))),
        dataclasses.replace(vae, seed=1),
        dataclasses.replace(vae, budget=11.0),
        dataclasses.replace(vae, study=other_shards),
    ]
    hashes = [run.hash for run in runs]
    config.write_text("train: {batch_size: 32}\n")
    hashes.append(dataclasses.replace(vae).hash)
    monkeypatch.setattr(quality_stages, "DEVICE", "other")
    hashes.append(dataclasses.replace(vae).hash)
    assert len(set(hashes)) == len(hashes)
    config.write_text("# a comment\ntrain: {batch_size: 16}\n")
    monkeypatch.undo()
    same = dataclasses.replace(vae, study=dataclasses.replace(study, out=Path("/elsewhere"), jobs=7))
    assert same.hash == vae.hash


def test_methods_share_the_stages_that_they_have_in_common(study: Study) -> None:
    variants = ["flow --prior.depth=2", "vae --objective.beta=2", "sample --steps=3 --guidance=1"]
    ours, flow, vae, sample = (plan_runs(study, method, 0) for method in select_methods(["ours"], variants, 32))
    assert ours[0].hash == flow[0].hash == sample[0].hash != vae[0].hash
    assert len({ours[1].hash, flow[1].hash, vae[1].hash}) == 3
    assert sample[1].hash == ours[1].hash
    assert [run.budget for run in ours] == pytest.approx([15, 45])


def test_variants_have_one_row_each() -> None:
    ours, variant, sample = select_methods(["ours"], ["vae --objective.beta=2", "sample --steps=3"], 32)
    assert [row.name for row in ours.rows] == ["ours, mixture", "ours, flow without guidance", "ours, flow"]
    assert [(row.name, row.prior) for row in variant.rows] == [("vae --objective.beta=2", "flow")]
    assert sample.rows[0].sampling == SamplingConfig(steps=3, guidance=DEFAULT_GUIDANCE)


def test_a_variant_changes_the_share_of_a_stage(study: Study) -> None:
    variants = ["vae --share=0.4", "flow --share=0.9 --prior.depth=2"]
    budgets = [[run.budget for run in plan_runs(study, method, 0)] for method in select_methods([], variants, 32)]
    assert budgets == [pytest.approx([24, 36]), pytest.approx([6, 54])]


def test_first_stage_gets_the_whole_budget_if_it_is_the_only_one(study: Study) -> None:
    ours, variant = select_methods(["ours"], ["vae --objective.beta=2"], 32, ["vae"])
    assert [run.budget for run in plan_runs(study, ours, 0)] == [study.budget]
    assert [(row.name, row.prior) for row in variant.rows] == [("vae --objective.beta=2", "gmm")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["best"], []), "--methods best"),
        (([], []), "names no method"),
        (([], ["decoder --a=1"]), "unknown stage 'decoder'"),
        (([], ["flow --prior.dept=4"]), "did you mean prior.depth"),
        (([], ["sample --speed=4"]), "unrecognized arguments: --speed=4"),
        (([], ["sample --steps=0"]), "at least 1"),
        (([], ["sample --steps=2"], ["vae"]), "requires the stage flow"),
        (([], ["flow --prior.depth=4"], ["vae"]), "unknown stage 'flow'"),
        (([], ["vae --share=2"]), "must be between 0 and 1"),
        (([], ["vae --share=0.5"], ["vae"]), "requires several stages"),
        ((["ours"], [], ["flow"]), "must be the first of vae,flow"),
        (([], ["vae --seed=1", "vae --seed=1"]), "twice"),
    ],
)
def test_wrong_methods_are_user_errors(arguments: Any, message: str) -> None:
    names, variants, *stages = arguments
    with pytest.raises(UserError, match=message):
        select_methods(names, variants, 32, *stages)


@pytest.mark.parametrize("estimate", [0.2, 0.9, 1.1, 4.0])
def test_correction_converges_to_the_budget(estimate: float) -> None:
    def cost(images: int) -> float:
        return 5 + 0.01 * images

    # The calibration was wrong: the fixed seconds by 20%, the seconds per image by the factor `estimate`.
    images = affordable_images(100, 6, 0.01 * estimate, 16)
    attempts = train_within(100, cost, images, 6, 16)
    assert len(attempts) <= 3
    assert attempts[-1][1] == pytest.approx(100, rel=0.05)
    assert all(images % 16 == 0 for images, _ in attempts)


def test_a_cost_within_the_tolerance_is_not_corrected() -> None:
    assert train_within(100, lambda images: 104.0, 1600, 5, 16) == [(1600, 104.0)]
    assert len(train_within(100, lambda images: 150.0, 1600, 5, 16)) == 3  # the true cost is kept
    assert correct_images(1600, 200, 100, 0, 16) == 800


def test_calibration_increases_the_images_until_the_difference_is_measurable() -> None:
    fixed, per_image = calibrate(lambda images: 5 + 0.001 * images, 16, 100)
    assert (fixed, per_image) == (pytest.approx(5), pytest.approx(0.001))


def test_a_budget_that_is_too_small_is_one_line(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality_stages, "run_command", lambda command, log: 7.0)
    options = [f"--shards={packed}", f"--out={tmp_path}", "--minutes=0.1", "--methods=notebook", "--samples=6"]
    with pytest.raises(SystemExit):
        quality.main(options)
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if "skipped" in line]
    assert line.endswith("skipped: a budget of 6.0 s is too small; start-up and evaluation take 7.0 s")
    assert captured.err == "error: no method was trained; the lines above give the reasons\n"


def test_tables_have_the_mean_and_the_standard_deviation_over_seeds() -> None:
    def result(name: str, method: str | None, seed: int | None, gfd: float) -> dict[str, Any]:
        return {"name": name, "method": method, "seed": seed, "side": 32, "gfd": gfd}

    results = [result("training images", None, None, 100)]
    results += [result("notebook, N(0, I)", "notebook", seed, gfd) for seed, gfd in enumerate((290, 310))]
    results += [result("ours, flow", "ours", seed, gfd) for seed, gfd in enumerate((149, 151))]
    results += [result("ours, mixture", "ours", 0, 180)]
    add_above_floor(results)
    assert [result["above_floor"] for result in results] == [0, 0.95, 1.05, 0.245, 0.255, 0.4]
    heading, _, *lines = [[cell.strip() for cell in line.split("|")] for line in format_table(results).splitlines()]
    columns = [heading.index("gFD"), heading.index("above floor"), heading.index("nearer")]
    assert [[line[column] for column in columns] for line in lines] == [
        ["100.00", "0.000", "-"],
        ["300.00 ± 14.14", "1.000 ± 0.071", "-"],
        ["150.00 ± 1.41", "0.250 ± 0.007", "-"],
        ["180.00", "0.400", "-"],
    ]
    assert compare_with_peers(results) == [
        "best of ours / notebook: 0.250 above the floor (ours, flow)",
        "best of ours / pythae: not measured",
    ]


class SerialExecutor(Executor):
    """Runs calls in the main thread, the only one in which training can handle signals."""

    def __init__(self, workers: int) -> None:
        super().__init__()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def run_in_process(command: list[str], log: Path) -> float:
    """Trains in this process, without the seconds in which a new one imports its packages."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert command[:3] == [sys.executable, "-m", "vae_scale.train"]
    begin = time.process_time()
    train.main([*command[3:], "--evaluate.prior_fit_images=50"])
    return time.process_time() - begin


def test_comparison_writes_table_json_and_figure_and_trains_nothing_twice(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(quality_stages, "ThreadPoolExecutor", SerialExecutor)
    monkeypatch.setattr(quality_stages, "run_command", run_in_process)
    variants = ["flow --prior.depth=2 --optimizer.lr=0.002", "sample --steps=2"]
    options = [f"--shards={packed}", f"--out={tmp_path}", "--minutes=0.1", "--methods=notebook,ours", "--samples=12"]
    options += [f"--variant={text}" for text in variants]
    quality.main(options)
    report = json.loads((tmp_path / "quality.json").read_text())
    names = [
        "training images",
        "seed notebook, N(0, I)",
        "ours, mixture",
        "ours, flow without guidance",
        "ours, flow",
        *variants,
    ]
    assert [result["name"] for result in report["results"]] == names
    for result in report["results"]:
        assert result["gfd"] >= 0
        assert 0 <= result["precision"] <= 1
        assert result["side"] == 32
        if result["method"]:
            assert 0 <= result["nearer"] <= 1
            assert result["rfd"] > 0
            assert result["minutes"] > 0
    assert report["results"][0]["above_floor"] == 0
    assert report["results"][1]["above_floor"] == 1
    assert report["results"][3]["images"] > report["results"][2]["images"]  # both stages
    table = (tmp_path / "quality.md").read_text()
    assert all(f"| {name} " in table for name in names)
    assert "best of ours / notebook" in table
    assert "±" not in table  # one seed
    figure = np.asarray(Image.open(tmp_path / "quality.png"))
    assert figure.shape[0] == len(names) * 66  # enlarged to 64 pixels
    assert len(list((tmp_path / "stages").glob("*/stage.json"))) == 4

    monkeypatch.setattr(quality_stages, "run_command", None)
    capsys.readouterr()
    quality.main(options)
    assert (tmp_path / "quality.md").read_text() == table
    assert capsys.readouterr().out.count("already trained") == 4
