"""Predicted scaling efficiency, compared with closed forms, and the measurement of two processes."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import scaling
import two_processes
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from scaling import Cluster, Job, Link, all_reduce_seconds, expected_maximum, main, predict

from vae_scale.config.parsing import parse

ROOT = Path(__file__).parent.parent
SCALING = ROOT / "launch" / "SCALING.md"

instant = Link(math.inf, 0.0)
links = st.builds(Link, st.floats(1e8, 1e12), st.floats(0, 1e-3))
clusters = st.builds(
    Cluster,
    st.sampled_from([1, 2, 8]),
    links,
    links,
    st.floats(0, 1),
    st.floats(10, 1e6),
    st.one_of(st.just(math.inf), st.floats(1e6, 1e12)),
)
jobs = st.builds(
    Job,
    st.floats(1e-4, 10),
    st.integers(1, 512),
    st.integers(1, 10**10),
    st.floats(0, 1e-6),
    st.floats(0, 0.3),
    st.sampled_from([1, 4, 512]),
)
numbers = st.sampled_from(scaling.GPUS)


def test_all_reduce_within_a_node_equals_the_ring_formula() -> None:
    cluster = Cluster(4, Link(1e9, 1e-5), instant)
    # 2 * 3 steps of 2 messages each, and 3/4 of 8 MB for each of reduce-scatter and all-gather: 2 * 6 * 10 us + 2 * 6 ms.
    assert all_reduce_seconds(4, 8e6, 2, cluster) == pytest.approx(2 * 6 * 1e-5 + 2 * 6e-3)


def test_all_reduce_across_nodes_takes_a_logarithmic_number_of_messages() -> None:
    cluster = Cluster(1, instant, Link(1e9, 1e-5))
    assert all_reduce_seconds(8, 8e6, 1, cluster) == pytest.approx(2 * 3 * 1e-5 + 2 * 7 / 8 * 8e-3)


def test_a_step_with_four_buckets_equals_the_closed_form() -> None:
    cluster = Cluster(2, Link(1e9, 0.0), instant, overlap=1.0)
    # Four buckets take 25 MiB / 1 GB/s each. The backward pass of 60 ms hides two buckets and part of the third.
    prediction = predict(2, Job(0.09, 16, 4 * scaling.BUCKET), cluster)
    bucket = scaling.BUCKET / 1e9
    assert prediction.exchange_seconds == pytest.approx(4 * bucket)
    assert prediction.lost["exchange"] == pytest.approx(bucket + 3 * bucket - 0.06)
    assert prediction.step_seconds == pytest.approx(0.09 + 4 * bucket - 0.06)
    assert prediction.limit == "exchange"


@given(jobs, clusters, numbers)
def test_efficiency_is_between_0_and_1(job: Job, cluster: Cluster, gpus: int) -> None:
    prediction = predict(gpus, job, cluster)
    assert 0 < prediction.efficiency <= 1 + 1e-9
    assert all(seconds >= -1e-12 for seconds in prediction.lost.values())
    assert prediction.images == gpus * job.images


@given(jobs, clusters)
def test_a_single_gpu_is_limited_only_by_data_loading(job: Job, cluster: Cluster) -> None:
    alone = predict(1, job, replace(cluster, loader=math.inf, storage=math.inf))
    assert alone.efficiency == 1.0
    assert alone.limit == "-"
    starved = predict(1, job, replace(cluster, loader=job.images / job.step_seconds / 2, storage=math.inf))
    assert starved.step_seconds == pytest.approx(2 * job.step_seconds)
    assert starved.limit == "loader"


@given(jobs, clusters, numbers, st.floats(1, 100))
def test_larger_gradients_and_slower_links_never_reduce_the_step_time(
    job: Job, cluster: Cluster, gpus: int, factor: float
) -> None:
    seconds = predict(gpus, job, cluster).step_seconds
    larger = replace(job, gradient_bytes=math.ceil(factor * job.gradient_bytes))
    assert predict(gpus, larger, cluster).step_seconds >= seconds * (1 - 1e-9)
    for name in ("link", "network"):
        link = getattr(cluster, name)
        slower = replace(cluster, **{name: Link(link.bytes_per_second / factor, link.seconds)})
        assert predict(gpus, job, slower).step_seconds >= seconds * (1 - 1e-9)


@given(jobs, numbers)
def test_efficiency_is_1_with_instant_communication(job: Job, gpus: int) -> None:
    prediction = predict(gpus, replace(job, draw_seconds=0.0, deviation=0.0), Cluster(8, instant, instant))
    assert prediction.efficiency == 1.0


def test_streams_reduce_the_data_read_by_each_node() -> None:
    cluster = Cluster(8, instant, instant, storage=1e9)
    job = Job(1e-3, 100, 1)
    read = 1024 * 100 * 96 * 96 * 3 / 1e9
    assert predict(1024, job, cluster).step_seconds == pytest.approx(128 * read)
    assert predict(1024, replace(job, streams=128), cluster).step_seconds == pytest.approx(read)
    assert predict(1024, job, cluster).limit == "storage"


def test_expected_maximum_of_normal_samples() -> None:
    assert expected_maximum(1) == 0
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)
    assert expected_maximum(1000) == pytest.approx(3.241, abs=0.02)


@pytest.mark.parametrize("name", ["demo", "small"])
def test_size_matches_the_model(name: str) -> None:
    from vae_scale.models.networks import build_model

    config = parse([f"--config={ROOT / 'configs' / name}.yaml"])[0]
    size, model = scaling.size(config), build_model(config.model, 96)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert size.latents == math.prod(model.latent_shape)
    assert size.flops > 3 * 96 * 96


def test_tables_in_the_documentation_match_the_output_of_their_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = SCALING.read_text()
    commands = re.findall(r"^    python tests/benchmarks/scaling\.py (.*--(?:tflops|step-ms).*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        main(shlex.split(command))
        printed = capsys.readouterr().out.strip()
        assert f"    python tests/benchmarks/scaling.py {command}\n\n{printed}\n" in text, command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tflops=100", "--gpus-per-node=3", "--config=configs/stl10.yaml"], "--gpus-per-node is 3; it must divide"),
        (["--step-ms=5", "--tflops=100"], "not allowed with argument"),
        (["--tflops=100", "--prior.vae=runs/x"], "prior.vae is set"),
        (["--train.batch_size=3", "--data.shards=nowhere"], "train.batch_size is 3; two processes share it"),
        (["--train.batch_size=4", "--data.shards=nowhere"], "a process ended: data.shards nowhere"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_are_measured_together_and_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vae_scale.benchmark.training.SECONDS", 0.1)
    main([f"--data.shards={shards}", *TINY, "--repeats=2", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["speeds"]) == [two_processes.ALONE, two_processes.TOGETHER]
    assert all(len(runs) == 2 and min(runs) > 0 for runs in report["speeds"].values())
    assert set(report["ratios"]) == {"two_process_efficiency", "predicted_efficiency"}
    assert report["ratios"]["two_process_efficiency"] > 0
    assert 0 < report["ratios"]["predicted_efficiency"] <= 1
    assert report["job"]["images"] == 6
    assert report["job"]["gradient_bytes"] > 0
    assert report["link"]["bytes_per_second"] > 0
    assert "predicted overhead of a step of both" in capsys.readouterr().out
