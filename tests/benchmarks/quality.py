"""Compares methods of generating images after equal compute, on the same photographs (`make quality PHOTOS=DIR`).

Every method is trained in processes of its own for the same number of CPU seconds (on a GPU, seconds), including start-up and
fitting its prior. The number of training images that this allows is measured first in short runs, since schedules depend on it.
Each method then draws as many samples as there are held-out photographs, and the Frechet distance between the two is computed.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset

from vae_scale.config.parsing import parse
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError, cli_main
from vae_scale.evaluation.evaluator import evaluate
from vae_scale.evaluation.features import load_extractor
from vae_scale.evaluation.frechet import Moments, frechet_distance
from vae_scale.evaluation.image_grids import to_uint8
from vae_scale.evaluation.reconstruction import psnr
from vae_scale.models.likelihoods import LEVELS, bits_per_dim
from vae_scale.models.vae import VAE
from vae_scale.runtime import checkpoint

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64  # images at a time while measuring
NUM_PICTURED = 10  # samples per row of the picture

# ---- Methods ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One training run: `options` of `vae_scale.train`, or () for pythae's own trainer. {folder} is the method's folder."""

    name: str
    options: tuple[str, ...] = ()
    share: float = 1.0  # of the budget


@dataclass(frozen=True)
class Row:
    """Samples of a method, drawn from the prior of one of its stages."""

    name: str
    method: str
    prior: str
    stage: int = -1
    temperature: float = 1.0


# All methods train on the same photographs, without tracking and with little evaluation.
COMMON = ("--data.train=train,unlabeled", "--evaluate.images=64", "--evaluate.samples=16", "--track.tracker=none")
NOTEBOOK = ("--config=configs/seed_notebook.yaml",)
RESNET = ("--config=configs/small.yaml",)
PRIOR = ("--config=configs/small_prior.yaml", "--prior.vae={folder}/vae")
HIERARCHICAL = ("--config=configs/small_hierarchical.yaml",)

METHODS: dict[str, tuple[Stage, ...]] = {
    "notebook": (Stage("vae", NOTEBOOK),),
    "resnet": (Stage("vae", RESNET, 0.35), Stage("flow", PRIOR, 0.65)),
    "pythae": (Stage("vae"),),
    "hierarchical": (Stage("vae", HIERARCHICAL),),
}
ROWS = (
    Row("seed notebook, N(0,I)", "notebook", "normal"),
    Row("pythae VAE, its GMM sampler", "pythae", "gmm"),
    Row("ResNet VAE, N(0,I)", "resnet", "normal", stage=0),
    Row("ResNet VAE, mixture", "resnet", "gmm", stage=0),
    Row("ResNet VAE, flow", "resnet", "flow"),
    Row("hierarchical VAE", "hierarchical", "normal"),
    Row("hierarchical VAE, temperature 0.8", "hierarchical", "normal", temperature=0.8),
)
PEERS = ("notebook", "pythae")

# ---- pythae ----------------------------------------------------------------------------------------------------------

PYTHAE_LATENT = 64  # as in its own CelebA benchmark
PYTHAE_BATCH = 64  # its default
# Its CelebA configuration has 1e-4 for 50 epochs of 160,000 images. With so few steps as here 1e-3 goes further: after 1,280
# photographs its loss was 910 instead of 923 nats, and the latents were in use.
PYTHAE_LR = 1e-3


def pythae_model(side: int) -> Any:
    """pythae's VAE with the ResNet of its CelebA benchmark, whose linear layers are fitted to `side` instead of 64."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn.benchmarks.celeba import Decoder_ResNet_AE_CELEBA, Encoder_ResNet_VAE_CELEBA

    coarse = side // 16

    class Decoder(Decoder_ResNet_AE_CELEBA):  # its forward has 4 x 4 written into it
        def forward(self, z: Tensor, output_layer_levels: None = None) -> Any:
            hidden = self.layers[0](z).reshape(len(z), 128, coarse, coarse)
            for layer in self.layers[1:]:
                hidden = layer(hidden)
            return ModelOutput(reconstruction=hidden)

    config = VAEConfig(input_dim=(3, side, side), latent_dim=PYTHAE_LATENT)
    encoder, decoder = Encoder_ResNet_VAE_CELEBA(config), Decoder(config)
    features = 128 * coarse**2
    encoder.embedding, encoder.log_var = nn.Linear(features, PYTHAE_LATENT), nn.Linear(features, PYTHAE_LATENT)
    decoder.layers[0] = nn.Linear(PYTHAE_LATENT, features)
    return PythaeVAE(config, encoder=encoder, decoder=decoder)


def train_pythae(shards: Path, run: Path, images: int, seed: int) -> None:
    """Trains on so many images with pythae's trainer, and fits its sampler. Runs in a process of its own."""
    from pythae.data.preprocessors import DataProcessor
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    torch.manual_seed(seed)
    np.random.seed(seed)  # scikit-learn draws from it
    photos = torch.from_numpy(pixels(ShardSet.open(shards).select("train", "unlabeled"))).permute(0, 3, 1, 2) / 255
    model = pythae_model(photos.shape[-1])
    # One long epoch that holds every photograph equally often, so that the budget can end between two epochs.
    repeats = -(-images // len(photos))
    rows = torch.cat([torch.randperm(len(photos)) for _ in range(repeats)])[:images]
    config = BaseTrainerConfig(
        output_dir=str(run / "pythae"),
        num_epochs=1,
        learning_rate=PYTHAE_LR,
        per_device_train_batch_size=PYTHAE_BATCH,
        seed=seed,
    )
    BaseTrainer(model, Subset(DataProcessor.to_dataset(photos), rows.tolist()), training_config=config).train()
    sampler = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=10))
    sampler.fit(photos)
    save_file({name: part.contiguous() for name, part in model.state_dict().items()}, run / "model.safetensors")
    mixture = {name: getattr(sampler.gmm, name) for name in ("weights_", "means_", "covariances_")}
    save_file({name: torch.from_numpy(part) for name, part in mixture.items()}, run / "mixture.safetensors")


# ---- Training within a budget ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What all methods share."""

    out: Path
    seed: int
    budget: float  # seconds
    jobs: int

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    def folder(self, method: str, stage: int = -1) -> Path:
        """The run of a stage, by default of the last."""
        return self.out / method / METHODS[method][stage].name


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def spend(words: list[str], log: Path) -> float:
    """Runs a command to its end and returns the CPU seconds it took, with all its processes; on a GPU, seconds.

    Raises:
        UserError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Spinning threads would count as work; one thread per process wastes nothing.
    threads = {} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise UserError(f"exit code {process.returncode}, see {log}: {' | '.join(lines[-3:])}")
    return time.perf_counter() - began if DEVICE == "cuda" else usage.ru_utime + usage.ru_stime


class Training:
    """The training of one stage of a method."""

    def __init__(self, study: Study, method: str, number: int) -> None:
        self.study, self.method, self.stage = study, method, METHODS[method][number]
        self.run = study.folder(method, number)
        self.later = METHODS[method][number + 1 :]
        self.options = [option.format(folder=self.run.parent) for option in self.stage.options]
        self.batch = PYTHAE_BATCH if not self.options else parse(self.options)[0].train.batch_size

    def words(self, run: Path, images: int) -> list[str]:
        """The command that trains on so many images."""
        shards, seed = self.study.shards, self.study.seed
        if not self.options:
            return [sys.executable, str(Path(__file__).resolve()), "pythae", str(shards), str(run), str(images), str(seed)]
        where = [f"--data.shards={shards}", f"--run={run}", f"--seed={seed}"]
        length = [f"--train.images={images}", f"--evaluate.every={images}", f"--checkpoint.every={images}"]
        return [sys.executable, "-m", "vae_scale.train", *self.options, *COMMON, *where, *length]

    def calibrate(self, budget: float) -> tuple[float, float]:
        """Seconds that any run takes, and seconds per image, from a few short runs."""
        folder = self.run.with_name(f"{self.run.name}_calibration")

        def cost(images: int) -> float:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return spend(self.words(folder, images), folder.with_suffix(".log"))

        few, many = self.batch, 3 * self.batch
        first, min_difference = cost(few), min(30.0, budget / 20)
        while True:
            second = cost(many)
            each = (second - first) / (many - few)
            if second - first >= min_difference:
                shutil.rmtree(folder)
                return max(0.0, first - few * each), each
            # Far enough for the difference to stand out from noise, by what is known so far.
            further = 1.3 * min_difference / each if each > 0 else math.inf
            many = self.batch * math.ceil(min(max(further, 2 * many), 16 * many) / self.batch)

    def train(self) -> None:
        """Trains within its share of the budget, unless that was done."""
        budget = self.stage.share * self.study.budget
        settings = {"options": self.options, "seed": self.study.seed, "budget_seconds": budget, "device": DEVICE}
        name, note = f"{self.method}/{self.stage.name}", self.run / "stage.json"
        if note.exists():
            saved = json.loads(note.read_text())
            if {key: saved.get(key) for key in settings} == settings:
                log(f"{name}: is already trained, on {saved['images']:,} images")
                return
        log(f"{name}: measuring what an image costs")
        fixed, each = self.calibrate(budget)
        images = int((budget - fixed) / each) // self.batch * self.batch
        if images < self.batch:
            raise UserError(f"{name}: {budget:,.0f} seconds are too few; {fixed:,.0f} pass besides training")
        log(f"{name}: {each * 1000:.1f} ms per image and {fixed:.0f} s besides; trains on {images:,} images")
        shutil.rmtree(self.run, ignore_errors=True)  # half a run has no known cost
        self.run.mkdir(parents=True)
        for stage in self.later:
            (self.run.with_name(stage.name) / "stage.json").unlink(missing_ok=True)  # they built upon what goes now
        seconds = spend(self.words(self.run, images), self.run.with_suffix(".log"))
        measured = {"images": images, "seconds": seconds, "seconds_per_image": each, "fixed_seconds": fixed}
        note.write_text(json.dumps(settings | measured, indent=2))
        log(f"{name}: took {seconds / 60:.1f} of {budget / 60:.1f} minutes")


def train_methods(study: Study, methods: list[str]) -> list[str]:
    """Trains all, `jobs` at a time; returns those that have all their stages."""
    prepared: dict[str, list[Training]] = {}
    for method in methods:
        try:
            prepared[method] = [Training(study, method, number) for number in range(len(METHODS[method]))]
        except UserError as error:
            log(f"{method} is skipped: {error}")

    def all_stages(trainings: list[Training]) -> bool:
        try:
            for training in trainings:
                training.train()
        except UserError as error:
            log(f"{trainings[0].method} is skipped: {error}")
            return False
        return True

    pool = ThreadPoolExecutor(study.jobs)
    try:
        return [method for method, done in zip(prepared, pool.map(all_stages, prepared.values()), strict=True) if done]
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Trained models --------------------------------------------------------------------------------------------------


class TrainedRun:
    """The EMA weights of a run. Images are in [-1, 1] here and below."""

    def __init__(self, run: Path) -> None:
        folder = checkpoint.newest_checkpoint(run)
        if folder is None:
            raise UserError(f"{run}: has no checkpoint")
        self.model = VAE.from_pretrained(folder, "ema.safetensors").to(DEVICE)

    def sample(self, num: int, row: Row, seed: int) -> Tensor:
        return self.model.sample(num, seed, row.temperature, BATCH, row.prior)  # type: ignore[arg-type]

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.model.reconstruct(images)

    def bits_per_dim(self, held_out: ShardSet, seed: int) -> float | None:
        return evaluate(self.model, held_out, len(held_out), BATCH, seed).get("bits_per_dim")


class Pythae:
    """pythae's VAE and its sampler."""

    def __init__(self, run: Path, side: int) -> None:
        from pythae.samplers import GaussianMixtureSampler
        from sklearn.mixture import GaussianMixture

        self.model = pythae_model(side)
        self.model.load_state_dict(load_file(run / "model.safetensors"))
        self.sampler = GaussianMixtureSampler(self.model)  # moves the model to the GPU, and to evaluation
        self.sampler.gmm = GaussianMixture()
        for name, part in load_file(run / "mixture.safetensors").items():
            setattr(self.sampler.gmm, name, part.numpy())
        self.sampler.is_fitted = True

    def sample(self, num: int, row: Row, seed: int) -> Tensor:
        self.sampler.gmm.random_state = np.random.RandomState(seed)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))  # scikit-learn sorts by component
        return self.sampler.sample(num, batch_size=BATCH).cpu()[order] * 2 - 1

    def reconstruct(self, images: Tensor) -> Tensor:
        encoded = self.model.encoder((images + 1) / 2)
        return self.model.decoder(encoded.embedding).reconstruction * 2 - 1

    def bits_per_dim(self, held_out: ShardSet, seed: int) -> float | None:
        """Its loss is that of the density N(x; y, 1) of images in [0, 1], without the constant; counted per grey level."""
        torch.manual_seed(seed)
        photos = pixels(held_out)
        dimensions = photos[0].size
        nats = dimensions * (0.5 * math.log(2 * math.pi) + math.log(LEVELS - 1))
        for part in batches(photos):
            nats += float(self.model({"data": (part + 1) / 2}).loss) * len(part) / len(photos)
        return bits_per_dim(nats, dimensions)


def pixels(shards: ShardSet) -> Images:
    """All images of a set: uint8 [n, h, w, 3]."""
    return np.concatenate([shards.read(number) for number in range(len(shards.shards))])


def batches(images: Images) -> list[Tensor]:
    """In [-1, 1], on the device."""
    return [normalize_images(part).to(DEVICE) for part in torch.from_numpy(images).split(BATCH)]


# ---- Measures --------------------------------------------------------------------------------------------------------

# What the table shows of a row, under which title and in which form.
COLUMNS = {
    "name": ("", "{}"),
    "minutes": ("GPU-min" if DEVICE == "cuda" else "CPU-min", "{:.1f}"),
    "images": ("images", "{:,}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "bits_per_dim": ("bits/dim", "{:.3f}"),
    "distance": ("Frechet distance", "{:.2f}"),
    "distance_of_reconstructions": ("of reconstructions", "{:.2f}"),
    "over_notebook": ("ratio to the notebook's", "{:.2f}"),
}
Rows = list[dict[str, Any]]


class DistanceTo:
    """The Frechet distance of images from the held-out photographs, in features that need no download."""

    def __init__(self, held_out: Images) -> None:
        self.extractor = load_extractor("efficientnet_lite0", DEVICE)
        self.moments = self._moments(held_out)

    def _moments(self, images: Images) -> Moments:
        return Moments.from_features(
            torch.cat([self.extractor(part.to(DEVICE)) for part in torch.from_numpy(images).split(BATCH)])
        )

    def __call__(self, images: Images) -> float:
        return frechet_distance(self._moments(images), self.moments)


@torch.inference_mode()
def measure(study: Study, methods: list[str]) -> tuple[Rows, list[tuple[str, Images]]]:
    """Returns all rows and their pictures; the first row is of training photographs."""
    shards = ShardSet.open(study.shards)
    held_out_set, train_set = shards.select("test"), shards.select("train", "unlabeled")
    held_out = pixels(held_out_set)
    distance, count = DistanceTo(held_out), len(held_out)
    evenly = train_set.load_images(np.linspace(0, len(train_set) - 1, count).astype(np.int64))
    rows: Rows = [{"name": "training photographs", "method": None, "distance": distance(evenly)}]
    pictures = [("held-out photographs", held_out[:NUM_PICTURED])]
    for method in methods:
        log(f"{method}: measuring")
        folder = study.folder(method)
        model = Pythae(folder, held_out.shape[1]) if method == "pythae" else TrainedRun(folder)
        pairs = [(part, model.reconstruct(part)) for part in batches(held_out)]
        notes = [json.loads((study.folder(method, n) / "stage.json").read_text()) for n in range(len(METHODS[method]))]
        measured = {
            "psnr": float(torch.cat([psnr(part, rebuilt) for part, rebuilt in pairs]).mean()),
            "bits_per_dim": model.bits_per_dim(held_out_set, study.seed),
            "distance_of_reconstructions": distance(np.concatenate([to_uint8(rebuilt) for _, rebuilt in pairs])),
        }
        for row in ROWS:
            if row.method == method:
                drawn = to_uint8(model.sample(count, row, study.seed))
                stages = notes[: row.stage + 1] if row.stage >= 0 else notes
                spent = {"minutes": sum(note["seconds"] for note in stages) / 60, "images": sum(n["images"] for n in stages)}
                rows.append({"name": row.name, "method": method, **spent, **measured, "distance": distance(drawn)})
                pictures.append((row.name, drawn[:NUM_PICTURED]))
    if notebook := least(rows, "notebook"):
        for row in rows:
            row["over_notebook"] = row["distance"] / notebook
    return rows, pictures


def least(rows: Rows, *methods: str) -> float | None:
    """The smallest distance of some methods."""
    return min((row["distance"] for row in rows if row["method"] in methods), default=None)


# ---- Table and picture -----------------------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """Markdown."""
    lines = [[title for title, _ in COLUMNS.values()], ["---", *["---:"] * (len(COLUMNS) - 1)]]
    for row in rows:
        lines.append(["-" if row.get(key) is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(rows: Rows) -> list[str]:
    """The best distance of this package over those of the others, a line each."""
    best, lines = least(rows, *(set(METHODS) - set(PEERS))), []
    for peer in PEERS:
        distance = least(rows, peer)
        ratio = "not measured" if best is None or distance is None else f"{best / distance:.2f}"
        lines.append(f"best of vae_scale / {peer}: {ratio}")
    return lines


def draw(pictures: list[tuple[str, Images]], path: Path) -> None:
    """Rows of images, each with its name to the left."""
    side, margin = pictures[0][1].shape[1], 190
    step = side + 2
    canvas = Image.new("RGB", (margin + NUM_PICTURED * step, len(pictures) * step), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (name, images) in enumerate(pictures):
        pen.text((6, number * step + side // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (margin + column * step, number * step))
    canvas.save(path)


def hardware() -> dict[str, Any]:
    """Hardware, versions and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "date": date.today().isoformat()}


@cli_main
def main(argv: Any = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description="Compare methods of generating images after equal compute.")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="in STL-10's binary layout")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="default: runs/quality")
    parser.add_argument("--cpu-minutes", type=float, default=30, metavar="M", help="of each method; on a GPU, its minutes")
    parser.add_argument("--only", default=",".join(METHODS), metavar="NAME,...", help="methods (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="methods trained at a time")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    args = parser.parse_args(argv)
    methods = args.only.split(",")
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"--only {','.join(sorted(unknown))}: unknown; there are {', '.join(METHODS)}")
    photos, out = args.photos.resolve(), args.out.resolve()
    os.chdir(ROOT)  # where the configurations are
    # On a GPU seconds are those of the clock, so a method needs it for itself.
    study = Study(out, args.seed, 60 * args.cpu_minutes, 1 if DEVICE == "cuda" else args.jobs)
    if not (study.shards / "index.json").exists():
        pack = ["-m", "vae_scale.pack", "--source=stl10", f"--data={photos}", f"--out={study.shards}"]
        spend([sys.executable, *pack], study.out / "pack.log")
    rows, pictures = measure(study, train_methods(study, methods))

    host, lines = hardware(), ratios(rows)
    content = {"hardware": host, "seed": args.seed, "budget_minutes": args.cpu_minutes, "rows": rows, "ratios": lines}
    (study.out / "quality.json").write_text(json.dumps(content, indent=2))
    parts = [table(rows), "\n".join(lines), ", ".join(f"{key} {value}" for key, value in host.items() if value)]
    (study.out / "quality.md").write_text("\n\n".join(parts) + "\n")
    draw(pictures, study.out / "quality.png")
    print(f"\n{parts[0]}\n\n{parts[2]}\n{study.out}/quality.md, quality.json, quality.png\n\n{parts[1]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["pythae"]:
        train_pythae(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
