"""What a run's folder holds. It may come from strangers, and its run may go on, or have died in the middle of a line."""

import json
import math
import re
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from PIL import Image

from vae_scale.errors import UserError, one_line, shown
from vae_scale.reporting.curve import Curve

METRICS_BYTES = 2**30  # read of a file of metrics or events, at most
PICTURE_BYTES, PICTURES_BYTES = 64 * 2**20, 256 * 2**20  # of a picture, and of all pictures of a run
TEXT_BYTES = 2**20  # of a configuration, of a checkpoint's state, and of a line
CONFIG_DEPTH = 8  # of a configuration
CURVES = 100  # of a run
PICTURES = 60  # of a kind, and evaluations whose KL per channel is shown
CHANNELS, EVALUATIONS = 1024, 10_000  # kept of KL per channel
EVENTS = 200  # newest, told in full
KINDS = ("samples", "reconstructions", "interpolations")
KL = "eval/kl_nats_per_channel"

UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SyntaxError, yaml.YAMLError)
HUGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)
T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """A line of `events.jsonl`."""

    time: str
    images: int
    kind: str
    text: str


@dataclass
class Run:
    """A run, as far as its folder tells.

    Attributes:
        folder: As the user named it.
        name: Short, and unlike those of the other runs.
        config: Resolved options, by dotted name.
        curves: By their key in `metrics.jsonl`.
        channels: Images seen, and nats of KL per latent channel; NaN where there was no number.
        pictures: By kind, PNG files by images seen.
        found: By kind, how many pictures there are.
        events: The newest; None if the run kept no log of them.
        kinds: How many events of each kind there are.
        started: Time of the first event.
        state: What the newest checkpoint tells about itself.
        parameters: In that checkpoint.
        left_out: What of the folder is not shown, and why.
    """

    folder: Path
    name: str
    config: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    channels: list[tuple[int, "array[float]"]] = field(default_factory=list)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    events: list[Event] | None = None
    kinds: Counter[str] = field(default_factory=Counter)
    started: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def images_seen(self) -> int:
        """The furthest that the metrics tell of."""
        return max((curve.points[-1][0] for curve in self.curves.values()), default=0)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs, and gives each a name of its own.

    Raises:
        UserError: a folder is named twice, or holds no run.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: name each run once")
    runs = [read_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = run.name if names[run.name] == 1 else str(run.folder)
    return runs


def read_run(folder: Path) -> Run:
    """Reads all that a report shows of a run.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a run")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: not the folder of a run, as it holds no metrics.jsonl")
    run = Run(folder, folder.resolve().name or str(folder))
    _read_metrics(run)
    _read_events(run)
    _read_config(run)
    _read_checkpoint(run)
    _read_pictures(run)
    return run


@contextmanager
def _told(run: Run, name: str) -> Iterator[None]:
    """Notes why a file is not shown. One that is missing is no fault."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (*UNREADABLE, *HUGE) as error:
        run.left_out.append(f"{name}: {one_line(error):.200}")


def _open(run: Run, name: str, limit: float = math.inf) -> BinaryIO:
    """Opens a file of a run's folder.

    Raises:
        ValueError: it lies elsewhere, is none, or is larger than `limit` bytes.
    """
    path = (run.folder / name).resolve(strict=True)
    if not path.is_relative_to(run.folder.resolve()):
        raise ValueError("leads out of the run's folder")
    if not path.is_file():  # to open a pipe would be to wait for its writer
        raise ValueError("is not a file")
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"has {size:,} bytes; at most {limit:,} are read")
    return path.open("rb")


def _read(run: Run, name: str, limit: int) -> bytes:
    with _open(run, name, limit) as file:
        return file.read(limit)


def _objects(run: Run, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects among the lines of a file that say how many images were seen, with that number."""
    with _told(run, name), _open(run, name) as file:
        while (line := file.readline(TEXT_BYTES)) and file.tell() <= METRICS_BYTES:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue  # torn, as its run was killed
            images = values.get("images") if isinstance(values, dict) else None
            if type(images) is int and 0 <= images < 2**53:  # what a browser counts exactly
                yield images, values
        if line:
            run.left_out.append(f"{name}: only the first {METRICS_BYTES:,} bytes are read")


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.inf


def _read_metrics(run: Run) -> None:
    channels: deque[tuple[int, array[float]]] = deque(maxlen=EVALUATIONS)
    for images, values in _objects(run, "metrics.jsonl"):
        for key, value in values.items():
            if key == KL and isinstance(value, list) and value:
                channels.append((images, array("d", map(_number, value[:CHANNELS]))))
            if key != "images" and isinstance(value, int | float) and (key in run.curves or len(run.curves) < CURVES):
                run.curves.setdefault(key, Curve()).add(images, _number(value))
    run.channels = spread(sorted(channels, key=lambda entry: entry[0]), PICTURES)
    for key, curve in run.curves.items():
        if curve.not_finite:
            run.left_out.append(f"metrics.jsonl: {curve.not_finite:,} values of {key:.100} are not finite")
    run.curves = {key: curve for key, curve in run.curves.items() if curve.points}


def _read_events(run: Run) -> None:
    if not (run.folder / "events.jsonl").is_file():
        return
    newest: deque[Event] = deque(maxlen=EVENTS)
    for images, values in _objects(run, "events.jsonl"):
        time, kind, text = (shown(str(values.get(key, ""))[:500]) for key in ("time", "event", "text"))
        run.started = run.started or time
        run.kinds[kind if len(run.kinds) < CURVES or kind in run.kinds else "other"] += 1
        newest.append(Event(time, images, kind, text))
    run.events = list(newest)


def _read_config(run: Run) -> None:
    with _told(run, "config.yaml"):
        content, depth = _read(run, "config.yaml", TEXT_BYTES), 0
        for event in yaml.parse(content):
            if isinstance(event, yaml.AliasEvent):  # a few of them hold a billion values
                raise ValueError("holds aliases, which no run writes")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > CONFIG_DEPTH:  # the parser takes hours for thousands
                raise ValueError(f"its values lie in each other more than {CONFIG_DEPTH} deep")
        run.config = dict(_options(yaml.safe_load(content)))


def _options(values: Any, above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _options(value, f"{above}{key}.")
        else:
            told = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{above}{key}", shown(told[:1000])


def _read_checkpoint(run: Run) -> None:
    """What the newest checkpoint says about itself, and the number of its parameters."""
    folders = [path for path in (run.folder / "checkpoints").glob("images_*") if re.fullmatch(r"images_\d{9,18}", path.name)]
    if not folders:
        return
    name = f"checkpoints/{max(folders, key=lambda path: int(path.name.removeprefix('images_'))).name}"
    with _told(run, f"{name}/state.json"):
        state = json.loads(_read(run, f"{name}/state.json", TEXT_BYTES))
        run.state = {key: state[key] for key in ("processes", "versions") if state.get(key)}
    with _told(run, f"{name}/model.safetensors"), _open(run, f"{name}/model.safetensors") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(min(length, TEXT_BYTES)))
        run.parameters = sum(math.prod(tensor["shape"]) for key, tensor in tensors.items() if key != "__metadata__")


def _read_pictures(run: Run) -> None:
    """Pictures spread over each kind's, the newest first, as many as fit."""
    left = PICTURES_BYTES
    for kind in KINDS:
        matches = (re.fullmatch(rf"{kind}_(\d{{9,15}})\.png", path.name) for path in (run.folder / "samples").glob("*.png"))
        found = sorted((int(match[1]), match[0]) for match in matches if match)
        whole: dict[int, bytes] = {}
        for images, name in reversed(spread(found, PICTURES)):
            with _told(run, f"samples/{name}"), warnings.catch_warnings():
                content = _read(run, f"samples/{name}", PICTURE_BYTES)
                if len(content) > left:
                    raise ValueError(f"the pictures of a run may have {PICTURES_BYTES:,} bytes in all")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(BytesIO(content), formats=["PNG"]) as picture:
                    picture.load()
                whole[images] = content
                left -= len(content)
        if found:
            run.pictures[kind], run.found[kind] = dict(sorted(whole.items())), len(found)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
