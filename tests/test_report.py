"""Reports of runs, opened in a browser where there is one."""

import base64
import json
import os
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

from vae_scale.config import parse
from vae_scale.report import main
from vae_scale.reporting import charts, runs
from vae_scale.reporting.curve import POINTS, Curve
from vae_scale.reporting.runs import read_run
from vae_scale.training.trainer import train

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1280,900"]  # fmt: skip
EVENTS = [("started", 0), ("stopped", 120), ("resumed", 120), ("left_out", 180), ("finished", 240)]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, with the log of events of one that was stopped and went on."""
    folder = tmp_path_factory.mktemp("reported") / "first"
    words = [f"--data.shards={shards}", f"--run={folder}", *TINY, "--track.tracker=none", "--evaluate.latents=48"]
    train(parse([*words, "--train.images=240", "--evaluate.every=120", "--checkpoint.every=120"])[0])
    with (folder / "events.jsonl").open("w") as file:
        for kind, images in EVENTS:
            line = {"time": "2026-11-23T22:01:08+00:00", "images": images, "event": kind, "text": f"it {kind}"}
            file.write(json.dumps(line) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        for images in (120, 240):
            file.write(json.dumps({"images": images, "eval/kl_nats_per_channel": [images / 100, 2.0, 0.1, 1.0]}) + "\n")
    return folder


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report.html", ".lock")))


def made(folder: Path, *lines: object) -> Path:
    """A folder with nothing of a run but its metrics; lines that are no text are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return folder


def picture(folder: Path, images: int, kind: str = "samples", side: int = 8) -> Path:
    path = folder / "samples" / f"{kind}_{images:09d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((side, side, 3), images % 256, np.uint8)).save(path)
    return path


# In a browser


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
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"), condition)


def opened(browser: Any, folders: list[Path], out: Path) -> Any:
    """The browser, with the report of `folders` drawn, and with its logs empty but for what that page caused."""
    main([*map(str, folders), f"--out={out}"])
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(out.as_uri())
    wait(browser, "plots.length > 0 && plots.every((plot) => plot.querySelector('.main-svg'))")
    return browser


def requests(browser: Any) -> set[str]:
    """The URLs that the page asked for, other than data in itself."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    urls = {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith("data:")}


def shown(browser: Any, gallery: int) -> list[int | None]:
    """Of each run, the images seen at which the picture that is shown was drawn."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.gallery')[arguments[0]].querySelectorAll('figure')].map((figure) => "
        "[...figure.querySelectorAll('img')].filter((img) => img.checkVisibility()).map((img) => Number(img.dataset.images)))",
        gallery,
    )


@needs_browser
def test_a_trained_run_becomes_a_page_that_draws_everything_and_asks_nobody(run: Path, browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    opened(browser, [run], out)
    titles = browser.execute_script("return [...document.querySelectorAll('.chart b')].map((title) => title.textContent)")
    wanted = [
        "Bits per dimension",
        "PSNR of reconstructions",
        "Reconstruction term",
        "KL term",
        "Gradient norm",
        "Learning rate",
    ]
    assert {"Loss", *wanted, "Speed", "Waiting for data", "first"} <= set(titles)
    drawn = "[...plot.querySelectorAll('.trace .js-line, .trace .point path, .hm image')].filter((mark) => "
    drawn += "(mark.getAttribute('d') || mark.getAttribute('href') || mark.getAttribute('xlink:href') || '').length > 5).length"
    assert browser.execute_script(f"return plots.map((plot) => ({drawn}) >= plot.data.length)") == [True] * len(titles)
    widths = browser.execute_script("return [...document.querySelectorAll('.gallery img')].map((image) => image.naturalWidth)")
    assert len(widths) == len(list((run / "samples").glob("*.png")))
    assert len(widths) >= 4
    assert min(widths) > 0
    text = browser.find_element("tag name", "body").text
    for told in ("240", "held-out bits/dim", "1 resume", "1 stop", "it resumed", "fp32", "Finished", "optimizer.lr"):
        assert told.lower() in text.lower(), told
    assert browser.get_log("browser") == []
    assert requests(browser) == {out.as_uri()}


@needs_browser
def test_the_slider_moves_by_keyboard_and_by_itself(run: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, [run], tmp_path / "report.html")
    gallery = browser.find_element("css selector", ".gallery")
    slider, label, button = (gallery.find_element("css selector", name) for name in ("input", "output", "button"))
    places = json.loads(gallery.get_attribute("data-images"))
    assert shown(browser, 0) == [[places[-1]]]
    assert label.text == f"{places[-1]} images seen"
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(browser, 0) == [[places[-2]]]
    assert label.text == slider.get_attribute("aria-valuetext") == f"{places[-2]} images seen"
    assert f"after {places[-2]} images" in gallery.text
    assert shown(browser, 1) == [[places[-1]]]  # reconstructions have a slider of their own
    slider.send_keys(Keys.HOME)
    assert shown(browser, 0) == [[places[0]]]
    button.click()
    assert button.text == "Pause"
    wait(browser, "document.querySelector('.gallery button').textContent === 'Play'")
    assert shown(browser, 0) == [[places[-1]]]


@needs_browser
def test_two_runs_stand_side_by_side(run: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    second = copied(run, tmp_path / "second")
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("lr: 0.003", "lr: 0.001"))
    for path in (second / "samples").glob("samples_*.png"):
        path.unlink()
    for images in (130, 250):
        picture(second, images)
    opened(browser, [run, second], tmp_path / "report.html")
    assert "2 runs compared" in browser.find_element("tag name", "h1").text
    loss = "plots[0].data.map((trace) => [trace.name, trace.line.color, trace.visible !== false])"
    names, colours, _ = zip(*browser.execute_script(f"return {loss}"), strict=True)
    assert names == ("first training", "second training")
    assert colours[0] != colours[1]
    browser.find_elements("css selector", ".legend input")[0].click()
    wait(browser, f"{loss}.map((trace) => trace[2]).join() === 'false,true'")
    differing = browser.find_element("css selector", "#configuration table")
    assert [row.text for row in differing.find_elements("css selector", "tbody tr")] == ["optimizer.lr 0.003 0.001"]
    # One slider for both: each run shows its newest picture up to there, and the second has none yet at first.
    first = sorted(int(path.stem[-9:]) for path in (run / "samples").glob("samples_*.png"))
    slider = browser.find_element("css selector", ".gallery input")
    assert shown(browser, 0) == [[first[-1]], [250]]
    slider.send_keys(Keys.HOME)
    assert shown(browser, 0) == [[first[0]], []]
    for _ in range([*sorted({*first, 130, 250})].index(130)):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert shown(browser, 0) == [[max(seen for seen in first if seen <= 130)], [130]]
    assert browser.get_log("browser") == []


@needs_browser
def test_what_files_and_names_hold_is_shown_and_never_run(run: Path, browser: Any, tmp_path: Path) -> None:
    evil = "</script><script>window.owned=1</script><!--<script><img src=x onerror=window.owned=1>{{ 7*7 }}"
    theirs = copied(run, tmp_path / "<img src=x onerror=window.owned=1>&amp;\"'")
    other = copied(run, tmp_path / "<a href='javascript:window.owned=1'>x<script>window.owned=1")
    with (theirs / "config.yaml").open("a") as file:
        file.write(f"{json.dumps('evil' + evil)}: {json.dumps(evil)}\n")
    with (theirs / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"images": 250, f"train/{evil}": 1.0, "train/loss": 2.0}) + "\n")
    with (theirs / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": evil, "images": 250, "event": evil, "text": f"{evil}\ud800\0"}) + "\n")
    for state in theirs.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps({"processes": evil, "versions": {evil: evil}}))
    opened(browser, [theirs, other], tmp_path / "report.html")
    hover = "Plotly.Fx.hover(plots[0], [{curveNumber: 0, pointNumber: 0}, {curveNumber: 1, pointNumber: 0}])"
    browser.execute_script(hover)
    wait(browser, "plots[0].querySelector('.hoverlayer text')")
    assert browser.execute_script("return window.owned") is None
    assert "<" not in "".join(browser.execute_script("return plots[0].data.map((trace) => trace.name)"))  # it would be markup
    assert browser.execute_script("return document.querySelectorAll('script').length - plots.length") == 2
    assert browser.find_elements("css selector", "a, img[src=x]") == []
    text = browser.find_element("tag name", "body").text
    assert evil in text
    assert theirs.name in text
    assert browser.get_log("browser") == []


@needs_browser
def test_the_page_is_not_allowed_to_connect(run: Path, browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    opened(browser, [run], out)
    for attempt in ("new Image().src = url", "fetch(url).catch(() => 0)", "document.body.append(Object.assign("
                    "document.createElement('script'), {src: url}))"):  # fmt: skip
        blocked = browser.execute_async_script(
            "const [url, done] = arguments; document.addEventListener('securitypolicyviolation', "
            f"(event) => done(event.blockedURI), {{once: true}}); {attempt}",
            "http://127.0.0.1:9/x",
        )
        assert blocked.startswith("http://127.0.0.1:9")


@needs_browser
def test_the_page_follows_the_systems_theme_and_fits_a_phone(run: Path, browser: Any, tmp_path: Path) -> None:
    def theme(name: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": name}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def brightness() -> tuple[float, float]:
        ground, text = browser.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(plots[0].querySelector('.xtick text')).fill]"
        )
        return tuple(sum(map(int, colour[4:-1].split(","))) / 765 for colour in (ground, text))

    theme("light")
    opened(browser, [run, copied(run, tmp_path / ("long" * 20))], tmp_path / "report.html")
    ground, text = brightness()
    assert ground > 0.9 > 0.5 > text
    theme("dark")  # while it is open
    wait(browser, "getComputedStyle(document.body).backgroundColor === 'rgb(19, 19, 21)'")
    wait(browser, "getComputedStyle(plots[0].querySelector('.xtick text')).fill === 'rgb(160, 157, 150)'")
    ground, text = brightness()
    assert ground < 0.1 < 0.5 < text
    narrow = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    wait(browser, "innerWidth === 400 && document.documentElement.scrollWidth <= 400")
    wait(browser, "plots.every((plot) => plot.querySelector('.main-svg').getBoundingClientRect().right <= 400)")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    theme("light")


# Reading runs


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf")]), max_size=300), st.integers(1, 40))
def test_thinned_curves_keep_their_extremes_and_the_newest_value(values: list[float], times: int) -> None:
    curve = Curve()
    values = [value + time for time in range(times) for value in values]
    for images, value in enumerate(values):
        curve.add(images, value)
    kept = [(images, value) for images, value in enumerate(values) if np.isfinite(value)]
    points = curve.points
    assert len(points) <= POINTS + 3
    assert set(points) <= set(kept)
    assert [images for images, _ in points] == sorted(images for images, _ in points)
    assert curve.not_finite == len(values) - len(kept)
    if kept:
        assert points[-1] == kept[-1]
        assert curve.last == kept[-1][1]
        assert min(value for _, value in points) == min(value for _, value in kept)
        assert max(value for _, value in points) == max(value for _, value in kept)
    if len(kept) <= 500:
        assert sorted(set(points)) == kept


def test_a_million_values_are_thinned_evenly() -> None:
    curve = Curve()
    for images in range(1_000_000):
        curve.add(images, 1000.0 if images == 654_321 else float(images % 7))
    images, values = zip(*curve.points, strict=True)
    assert 900 <= len(images) <= POINTS + 3
    assert max(np.diff(images)) < 5000
    assert max(values) == 1000


@given(st.lists(st.integers(), max_size=200), st.integers(2, 60))
def test_spread_items_are_in_order_with_the_first_and_the_last(items: list[int], most: int) -> None:
    kept = runs.spread(list(enumerate(items)), most)
    assert len(kept) == min(len(items), most)
    assert kept == sorted(set(kept))
    if items:
        assert (kept[0][0], kept[-1][0]) == (0, len(items) - 1)


def test_torn_lines_and_strange_values_leave_the_others_alone(tmp_path: Path) -> None:
    good = {"images": 10, "train/loss": 5.0, "eval/kl_nats_per_channel": [1, 2, 3]}
    strange = ['{"images": 20, "train/lo', "[1]", "null", "", '"x"', "[" * 100_000, "\x00\xff", '{"images": "1"}',
               '{"train/loss": 1}',
               '{"images": true, "train/loss": 9}', '{"images": -5, "train/loss": 9}', '{"images": 1e400, "train/loss": 9}',
               '{"images": 15, "train/loss": ' + "9" * 400 + ', "train/text": "a", "train/null": null}']  # fmt: skip
    more = [
        '{"images": 30, "train/loss": NaN, "eval/kl_nats_per_channel": [NaN, "x", null, 4, 5]}',
        {"images": 40, "train/loss": 4.0, "eval/kl_nats_per_channel": []},
    ]
    found = read_run(made(tmp_path / "run", good, *strange, *more, '{"images": 50, "train/loss": 3'))
    assert set(found.curves) == {"train/loss"}
    assert found.curves["train/loss"].points == [(10, 5.0), (40, 4.0)]
    assert found.images_seen == 40
    assert found.left_out == ["metrics.jsonl: 2 values of train/loss are not finite"]
    assert [(images, len(values)) for images, values in found.channels] == [(10, 3), (30, 5)]
    figure = json.loads(charts.channel_chart(found, 0).figure)  # type: ignore[union-attr]
    assert figure["data"][1]["z"] == [[1, 2, 3, None, None], [None, None, None, 4, 5]]


def test_curves_and_lists_of_a_strangers_file_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"images": 1, f"train/{number}": 1.0} for number in range(300)]
    lists = [{"images": images, "eval/kl_nats_per_channel": [0.5] * 5000} for images in range(150)]
    found = read_run(made(tmp_path / "run", *many, *lists))
    assert len(found.curves) == runs.CURVES
    assert len(found.channels) == runs.PICTURES
    assert {len(values) for _, values in found.channels} == {runs.CHANNELS}
    monkeypatch.setattr(runs, "METRICS_BYTES", 1000)
    cut = read_run(tmp_path / "run")
    assert 0 < len(cut.curves) < 40
    assert cut.left_out == ["metrics.jsonl: only the first 1,000 bytes are read"]


@pytest.mark.parametrize("lines", [[], [{"images": 5, "train/loss": 1.5}], ["{}", "garbage"]])
def test_a_run_that_has_hardly_begun_has_a_page(lines: list[object], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    main([str(made(tmp_path / "run", *lines)), f"--out={out}"])
    page = out.read_text()
    assert ("No metrics yet" in page) == (len(lines) != 1)
    assert "No pictures yet" in page
    assert "kept no log of events" in page


def test_damaged_pictures_are_left_out_and_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    whole = picture(folder, 1).read_bytes()
    (folder / "samples" / "samples_000000002.png").write_bytes(whole[: len(whole) // 2])
    (folder / "samples" / "samples_000000003.png").write_text("<svg onload='alert(1)'/>")
    Image.open(folder / "samples" / "samples_000000001.png").save(folder / "samples" / "samples_000000004.png", "JPEG")
    (folder / "samples" / "samples_000000005.png").mkdir()
    (folder / "samples" / "samples_5.png").write_bytes(whole)
    os.mkfifo(folder / "samples" / "samples_000000006.png")
    found = read_run(folder)
    assert found.pictures == {"samples": {1: whole}}
    assert [text.split(":")[0] for text in found.left_out] == [
        f"samples/samples_00000000{number}.png" for number in (6, 5, 4, 3, 2)
    ]
    main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "Not shown" in page
    assert "samples/samples_000000003.png" in page
    assert base64.b64encode(whole).decode() in page
    assert "onload" not in page.split("plotly.js v")[0]


def test_of_many_pictures_some_are_embedded_and_the_newest_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    size = 0
    for images in range(1, 151):
        size = picture(folder, images).stat().st_size
    kept = list(read_run(folder).pictures["samples"])
    assert len(kept) == 60
    assert (kept[0], kept[-1]) == (1, 150)
    assert set(np.diff(kept)) == {2, 3}
    main([str(folder)])
    assert "60 of 150 pictures" in (folder / "report.html").read_text()
    monkeypatch.setattr(runs, "PICTURES_BYTES", 3 * size + 20)  # the newest go in, as far as there is room
    assert list(read_run(folder).pictures["samples"])[-1] == 150
    assert len(read_run(folder).pictures["samples"]) <= 4
    monkeypatch.setattr(runs, "PICTURE_BYTES", 10)
    found = read_run(folder)
    assert not found.pictures["samples"]
    assert "at most 10 are read" in found.left_out[0]


def test_a_picture_that_unpacks_to_gigabytes_is_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    (folder / "samples").mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "samples" / "samples_000000001.png")
    found = read_run(folder)
    assert not found.pictures["samples"]
    assert "decompression bomb" in found.left_out[0]


def test_links_out_of_the_runs_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    picture(secret, 1)
    (secret / "config.yaml").write_text("password: hunter2\n")
    (secret / "events.jsonl").write_text('{"images": 1, "event": "hunter2", "time": "", "text": "hunter2"}\n')
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    for name in ("config.yaml", "events.jsonl", "samples"):
        (folder / name).symlink_to(secret / name)
    (folder / "report.html.tmp").symlink_to(secret / "config.yaml")  # nor written through
    main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "hunter2" not in page
    assert page.count("leads out of the run") == 3
    assert (secret / "config.yaml").read_text() == "password: hunter2\n"
    within = made(tmp_path / "within", {"images": 1, "train/loss": 1.0})
    (within / "kept.yaml").write_text("seed: 7\n")
    (within / "config.yaml").symlink_to("kept.yaml")
    assert read_run(within).config == {"seed": "7"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: " + b"x" * 2**20, "bytes; at most"),
        (b"a: &a [1, 2]\nb: [*a, *a]\n", "aliases"),
        (b"a: !!python/object/apply:os.system ['touch owned']\n", "could not determine a constructor"),
        (b"- 1\n", "config.yaml: "),
        (b"[" * 2**20, "more than 8 deep"),
        (b"\xff\xfe\x00", "config.yaml: "),
        (b"", "config.yaml: "),
    ],
)
def test_a_bad_configuration_is_told_and_not_run(
    content: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    (folder / "config.yaml").write_bytes(content)
    found = read_run(folder)
    assert found.config == {}
    assert told in found.left_out[0]
    assert not (tmp_path / "owned").exists()


def test_urls_lose_what_may_be_secret(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    (folder / "config.yaml").write_text("data: {shards: 'https://anna:s3cr3t@host/x?token=t0ken'}\n")
    assert read_run(folder).config == {"data.shards": "https://host/x"}


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"versions": 5}', "[" * 100_000])
def test_a_damaged_checkpoint_does_not_stop_a_report(damage: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    checkpoint = folder / "checkpoints" / "images_000000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(damage)
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 8 + damage.encode())
    main([str(folder)])
    assert (folder / "report.html").is_file()


def test_a_real_runs_facts_are_read(run: Path) -> None:
    found = read_run(run)
    assert found.left_out == []
    assert found.images_seen == 240
    assert found.parameters
    assert found.state["processes"] == 1
    assert "torch" in found.state["versions"]
    assert found.config["train.images"] == "240"
    assert found.kinds == {kind: 1 for kind, _ in EVENTS}


# The command


def failed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    for words, told in (
        ([f"{tmp_path}/none"], f"{tmp_path}/none: no such folder"),
        ([f"{good}", f"{tmp_path}/empty"], f"{tmp_path}/empty: not the folder of a run"),
        ([f"{good}", f"{good}/../run"], "name each run once"),
        ([f"{good}", "--out=page.pdf"], "--out page.pdf: must end in .html"),
        ([f"{good}", f"--out={tmp_path}/folder.html"], "folder.html: cannot be written"),
        ([f"{good}", f"--out={good}/metrics.jsonl/x.html"], "x.html: cannot be written"),
    ):
        assert told in failed(words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.html", "run"]


def test_an_old_report_stays_where_a_new_one_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    main([str(folder)])
    before = (folder / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jinja2.environment.TemplateStream.dump", full)
    capsys.readouterr()
    assert "No space left on device" in failed([str(folder)], capsys)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "report.html"}


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [made(tmp_path / name / "run", {"images": 1, "train/loss": 1.0}) for name in "ab"]
    assert [found.name for found in runs.read_runs(folders)] == [str(folder) for folder in folders]


def test_a_missing_plotly_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert failed([str(made(tmp_path / "run"))], capsys) == "error: report needs plotly: pip install 'vae_scale[report]'\n"


def test_a_report_does_not_wait_for_torch(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {"images": 1, "train/loss": 1.0})
    code = f"import sys; from vae_scale.report import main; main([{str(folder)!r}]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
