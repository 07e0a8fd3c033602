"""Reports of runs; the page is tested in a browser if chromium is installed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vae_scale.config.parsing import parse
from vae_scale.report import main
from vae_scale.tracking.panels import CHARTS
from vae_scale.tracking.report.charts import metric_charts
from vae_scale.tracking.report.runs import evenly_spaced, read_runs
from vae_scale.training.trainer import train

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
EVENTS = [("started", 0), ("stopped", 120), ("resumed", 120), ("skipped_steps", 180), ("finished", 240)]
ONE_LINE = {"images": 1, "train/loss": 1.0}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with the events of an interrupted and resumed one."""
    folder = tmp_path_factory.mktemp("reported") / "first"
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--evaluate.prior_fit_images=48"]
    train(parse([*words, "--train.images=240", "--evaluate.every=120", "--checkpoint.every=120"])[0])
    with (folder / "events.jsonl").open("w") as file:
        for kind, images in EVENTS:
            line = {"time": "2026-11-23T22:01:08+00:00", "images": images, "event": kind, "text": f"text of {kind}"}
            file.write(json.dumps(line) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        for images in (120, 240):
            file.write(json.dumps({"images": images, "eval/kl_per_channel": [images / 100, 2.0, 0.1, 1.0]}) + "\n")
    return folder


def make_run(folder: Path, *lines: object) -> Path:
    """Creates a run folder with these lines of metrics; lines that are not strings are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").touch()
    (folder / "config.yaml").write_text("seed: 0")
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return folder


def make_image(folder: Path, images: int, kind: str = "samples") -> Path:
    path = folder / "samples" / f"{kind}_{images:09d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), images % 256, np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"), condition)


def open_report(browser: Any, folders: list[Path], out: Path) -> None:
    """Opens the report of `folders` and clears the logs of previous pages."""
    main([*map(str, folders), f"--out={out}"])
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(out.as_uri())
    wait(browser, "plots.length > 0 && plots.every((plot) => plot.querySelector('.main-svg'))")


def visible_images(browser: Any, gallery: int) -> list[list[int]]:
    """Returns, for each run, the images seen of the visible image."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.gallery')[arguments[0]].querySelectorAll('figure')].map((figure) => "
        "[...figure.querySelectorAll('img')].filter((img) => img.checkVisibility()).map((img) => Number(img.dataset.images)))",
        gallery,
    )


@needs_browser
def test_page_draws_all_content_and_requests_nothing(run: Path, browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    open_report(browser, [run], out)
    titles = browser.execute_script(
        "return [...document.querySelectorAll('.chart figcaption')].map((title) => title.textContent)"
    )
    metrics = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert titles == [title for section in CHARTS.values() for title, names in section.items() if {*names} & metrics]
    assert {"Loss", "Bits per dimension", "PSNR of reconstructions (dB)", "KL divergence per latent channel"} <= set(titles)
    marks = "[...plot.querySelectorAll('.trace .js-line, .trace .point path')].filter((mark) => "
    marks += "(mark.getAttribute('d') || '').length > 5).length"
    assert browser.execute_script(f"return plots.map((plot) => ({marks}) >= plot.data.length)") == [True] * len(titles)
    widths = browser.execute_script("return [...document.querySelectorAll('.gallery img')].map((image) => image.naturalWidth)")
    assert len(widths) == len(list((run / "samples").glob("*.png"))) >= 4
    assert min(widths) > 0
    text = browser.find_element("tag name", "body").text.lower()
    for part in ("240", "held-out bits/dim", "text of resumed", "fp32", "finished", "optimizer.lr"):
        assert part in text, part
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {out.as_uri()}


@needs_browser
def test_each_gallery_has_a_slider(run: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_report(browser, [run], tmp_path / "report.html")
    gallery = browser.find_element("css selector", ".gallery")
    slider, label = (gallery.find_element("css selector", name) for name in ("input", "output"))
    positions = sorted(int(path.stem[-9:]) for path in (run / "samples").glob("samples_*.png"))
    assert visible_images(browser, 0) == [[positions[-1]]]
    slider.send_keys(Keys.ARROW_LEFT)
    assert visible_images(browser, 0) == [[positions[-2]]]
    assert label.text == f"{positions[-2]} images seen"
    assert visible_images(browser, 1) == [[positions[-1]]]
    slider.send_keys(Keys.HOME)
    assert visible_images(browser, 0) == [[positions[0]]]


@needs_browser
def test_two_runs_are_compared(run: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    second = Path(shutil.copytree(run, tmp_path / "second"))
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("lr: 0.003", "lr: 0.001"))
    for path in (second / "samples").glob("samples_*.png"):
        path.unlink()
    make_image(second, 130), make_image(second, 250)
    open_report(browser, [run, second], tmp_path / "report.html")
    assert "2 runs compared" in browser.find_element("tag name", "h1").text
    traces = "plots[0].data.map((trace) => [trace.name, trace.line.color, trace.visible !== false])"
    names, colors, _ = zip(*browser.execute_script(f"return {traces}"), strict=True)
    assert names == ("first train", "first eval", "second train", "second eval")
    assert colors[0] == colors[1] != colors[2] == colors[3]
    browser.find_elements("css selector", ".legend input")[0].click()
    wait(browser, f"{traces}.map((trace) => trace[2]).join() === 'false,false,true,true'")
    differing = browser.find_element("css selector", "#configuration table")
    assert [row.text for row in differing.find_elements("css selector", "tr")][1:] == ["optimizer.lr 0.003 0.001"]
    # A slider for both runs shows the newest image of each run at its position; the second run has none at the first.
    first = sorted(int(path.stem[-9:]) for path in (run / "samples").glob("samples_*.png"))
    assert visible_images(browser, 0) == [[first[-1]], [250]]
    browser.find_element("css selector", ".gallery input").send_keys(Keys.HOME)
    assert visible_images(browser, 0) == [[first[0]], []]
    assert browser.get_log("browser") == []


@given(st.lists(st.integers(), max_size=200), st.integers(2, 60))
def test_evenly_spaced_items_include_the_first_and_the_last(items: list[int], max_items: int) -> None:
    kept = evenly_spaced(list(enumerate(items)), max_items)
    assert len(kept) == min(len(items), max_items)
    assert kept == sorted(set(kept))
    if items:
        assert (kept[0][0], kept[-1][0]) == (0, len(items) - 1)


def test_truncated_lines_and_non_finite_values_are_omitted(tmp_path: Path) -> None:
    lines = ['{"images": 20, "train/lo', '{"images": 30, "train/loss": NaN, "eval/kl_per_channel": [NaN, 4, 5]}']
    lines += ['{"images": 40, "train/loss": 4.0}', '{"images": 50, "train/loss": 3']
    (run,) = read_runs([make_run(tmp_path / "run", {"images": 10, "train/loss": 5.0}, *lines)])
    assert run.curves == {"train/loss": [(10, 5.0), (40, 4.0)]}
    assert run.images_seen == 40
    figure = metric_charts([run])["Loss terms (nats per image)"]["KL divergence per latent channel"]
    assert json.loads(figure)["data"][0]["y"] == [None, 4, 5]


@pytest.mark.parametrize("lines", [[], [ONE_LINE], ['{"images": 1, "trai']])
def test_a_run_that_just_started_has_a_report(lines: list[object], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    main([str(make_run(tmp_path / "run", *lines)), f"--out={out}"])
    page = out.read_text()
    assert ("No metrics yet" in page) == (lines != [ONE_LINE])
    assert "No images yet" in page


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    markup = "</script><script>alert(1)</script>"
    folder = make_run(tmp_path / "<b>&run", {"images": 1, f"train/{markup}": 1.0})
    (folder / "config.yaml").write_text(json.dumps({"name": markup}))
    event = {"time": "2026-11-23T22:01:08+00:00", "images": 1, "event": "started", "text": markup}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    main([str(folder)])
    page = (folder / "report.html").read_text()
    assert markup not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 3
    assert "<b>&run" not in page


def run_and_fail(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_user_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", ONE_LINE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    for name, file, content in (
        ("options", "config.yaml", "train: {images: ["),
        ("metrics", "metrics.jsonl", '{"images": 1, "train/loss": "x"}'),
        ("events", "events.jsonl", "[1, 2]"),
    ):
        (make_run(tmp_path / name, ONE_LINE) / file).write_text(content)
    for words, message in (
        ([f"{tmp_path}/none"], f"{tmp_path}/none: not the folder of a run"),
        ([f"{run}", f"{tmp_path}/empty"], f"{tmp_path}/empty: not the folder of a run"),
        *(([f"{tmp_path}/{name}"], f"{tmp_path}/{name}: a file is damaged") for name in ("options", "metrics", "events")),
        ([f"{run}", f"{run}/../run"], "give each run only once"),
        ([f"{run}", "--out=page.pdf"], "--out page.pdf: must end in .html"),
        ([f"{run}", f"--out={tmp_path}/folder.html"], "folder.html: cannot be written"),
        ([f"{run}", f"--out={run}/metrics.jsonl/x.html"], "x.html: cannot be written"),
    ):
        assert message in run_and_fail(words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("empty", "events", "folder.html", "metrics", "options", "run"),
    ]
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert run_and_fail([str(run)], capsys) == "error: report needs plotly: pip install 'vae_scale[report]'\n"


def test_runs_with_the_same_name_are_labeled_with_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name / "run", ONE_LINE) for name in "ab"]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_the_report_does_not_import_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ONE_LINE)
    code = f"import sys; from vae_scale.report import main; main([{str(folder)!r}]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
