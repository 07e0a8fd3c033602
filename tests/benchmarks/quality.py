"""Compares generative models trained with equal compute on the same photographs (`make quality PHOTOS=DIR`).

Each method is trained in separate processes for the same number of CPU seconds (wall-clock seconds on a GPU), including
start-up and fitting its prior. The number of training images is estimated from short runs beforehand, since schedules depend
on it. The Frechet distance is computed between the held-out photographs and equally many samples of each method.
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
BATCH = 64  # batch size of evaluation
NUM_PICTURED = 10  # samples per row of the figure

# ---- Methods ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One training run: `options` of `vae_scale.train`, or () for pythae's trainer; {folder} is the folder of the method."""

    name: str
    options: tuple[str, ...] = ()
    share: float = 1.0  # of the budget


@dataclass(frozen=True)
class Row:
    """A row of the table: samples from a prior of a stage."""

    name: str
    method: str
    prior: str
    stage: int = -1
    temperature: float = 1.0


# Options of all methods: the same photographs, no tracking, and little evaluation.
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

PYTHAE_LATENT = 64  # as in its CelebA benchmark
PYTHAE_BATCH = 64  # its default
# Its CelebA configuration uses 1e-4 for 50 epochs of 160,000 images. With few steps, 1e-3 is better: after 1,280 photographs
# the loss was 910 instead of 923 nats, and the latents did not collapse.
PYTHAE_LR = 1e-3


def pythae_model(side: int) -> Any:
    """Builds pythae's VAE with the ResNet of its CelebA benchmark, for images of `side` pixels instead of 64."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn.benchmarks.celeba import Decoder_ResNet_AE_CELEBA, Encoder_ResNet_VAE_CELEBA

    coarse = side // 16

    class Decoder(Decoder_ResNet_AE_CELEBA):  # whose forward hard-codes a side of 4
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
    """Trains on `images` images with pythae's trainer and fits its sampler. Runs in a separate process."""
    from pythae.data.preprocessors import DataProcessor
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    torch.manual_seed(seed)
    np.random.seed(seed)  # used by scikit-learn
    photos = torch.from_numpy(pixels(ShardSet.open(shards).select("train", "unlabeled"))).permute(0, 3, 1, 2) / 255
    model = pythae_model(photos.shape[-1])
    # One epoch over several permutations, so that the number of images need not be a multiple of the set.
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
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, run / "model.safetensors")
    mixture = {name: getattr(sampler.gmm, name) for name in ("weights_", "means_", "covariances_")}
    save_file({name: torch.from_numpy(array) for name, array in mixture.items()}, run / "mixture.safetensors")


# ---- Training within a budget ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Settings common to all methods."""

    out: Path
    seed: int
    budget: float  # seconds
    jobs: int

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    def folder(self, method: str, stage: int = -1) -> Path:
        """Returns the run folder of a stage, by default the last."""
        return self.out / method / METHODS[method][stage].name


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run_command(command: list[str], log: Path) -> float:
    """Runs a command and returns the CPU seconds of all its processes; on a GPU, wall-clock seconds.

    Raises:
        UserError: if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Spinning OpenMP threads would count as CPU time.
    threads = {} if DEVICE == "cuda" else {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line.strip() for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise UserError(f"exit code {process.returncode}, see {log}: {' | '.join(lines[-3:])}")
    return time.perf_counter() - begin if DEVICE == "cuda" else usage.ru_utime + usage.ru_stime


class Training:
    """The training of one stage of a method."""

    def __init__(self, study: Study, method: str, number: int) -> None:
        self.study, self.method, self.stage = study, method, METHODS[method][number]
        self.run = study.folder(method, number)
        self.later_stages = METHODS[method][number + 1 :]
        self.options = [option.format(folder=self.run.parent) for option in self.stage.options]
        self.batch = PYTHAE_BATCH if not self.options else parse(self.options)[0].train.batch_size

    def command(self, run: Path, images: int) -> list[str]:
        """Returns the command that trains on `images` images."""
        shards, seed = self.study.shards, self.study.seed
        if not self.options:
            return [sys.executable, str(Path(__file__).resolve()), "pythae", str(shards), str(run), str(images), str(seed)]
        paths = [f"--data.shards={shards}", f"--run={run}", f"--seed={seed}"]
        duration = [f"--train.images={images}", f"--evaluate.every={images}", f"--checkpoint.every={images}"]
        return [sys.executable, "-m", "vae_scale.train", *self.options, *COMMON, *paths, *duration]

    def calibrate(self, budget: float) -> tuple[float, float]:
        """Estimates the fixed seconds of a run and the seconds per image from a few short runs."""
        folder = self.run.with_name(f"{self.run.name}_calibration")

        def cost(images: int) -> float:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return run_command(self.command(folder, images), folder.with_suffix(".log"))

        few, many = self.batch, 3 * self.batch
        first, min_difference = cost(few), min(30.0, budget / 20)
        while True:
            second = cost(many)
            per_image = (second - first) / (many - few)
            if second - first >= min_difference:
                shutil.rmtree(folder)
                return max(0.0, first - few * per_image), per_image
            # Increase the number of images until the difference exceeds the noise.
            required = 1.3 * min_difference / per_image if per_image > 0 else math.inf
            many = self.batch * math.ceil(min(max(required, 2 * many), 16 * many) / self.batch)

    def train(self) -> None:
        """Trains the stage within its share of the budget, unless it is already trained."""
        budget = self.stage.share * self.study.budget
        settings = {"options": self.options, "seed": self.study.seed, "budget_seconds": budget, "device": DEVICE}
        name, record = f"{self.method}/{self.stage.name}", self.run / "stage.json"
        if record.exists():
            saved = json.loads(record.read_text())
            if {key: saved.get(key) for key in settings} == settings:
                log(f"{name}: already trained on {saved['images']:,} images")
                return
        log(f"{name}: measuring the time per image")
        fixed, per_image = self.calibrate(budget)
        images = int((budget - fixed) / per_image) // self.batch * self.batch
        if images < self.batch:
            raise UserError(f"{name}: a budget of {budget:,.0f} s is too small; start-up and evaluation take {fixed:,.0f} s")
        log(f"{name}: {per_image * 1000:.1f} ms per image and {fixed:.0f} s overhead; training on {images:,} images")
        shutil.rmtree(self.run, ignore_errors=True)  # the cost of an interrupted run is unknown
        self.run.mkdir(parents=True)
        for stage in self.later_stages:
            (self.run.with_name(stage.name) / "stage.json").unlink(missing_ok=True)  # they depend on this stage
        seconds = run_command(self.command(self.run, images), self.run.with_suffix(".log"))
        measured = {"images": images, "seconds": seconds, "seconds_per_image": per_image, "fixed_seconds": fixed}
        record.write_text(json.dumps(settings | measured, indent=2))
        log(f"{name}: took {seconds / 60:.1f} of {budget / 60:.1f} minutes")


def train_methods(study: Study, methods: list[str]) -> list[str]:
    """Trains methods, `jobs` at a time, and returns those whose stages all succeeded."""
    prepared: dict[str, list[Training]] = {}
    for method in methods:
        try:
            prepared[method] = [Training(study, method, number) for number in range(len(METHODS[method]))]
        except UserError as error:
            log(f"{method} is skipped: {error}")

    def train_stages(trainings: list[Training]) -> bool:
        try:
            for training in trainings:
                training.train()
        except UserError as error:
            log(f"{trainings[0].method} is skipped: {error}")
            return False
        return True

    pool = ThreadPoolExecutor(study.jobs)
    try:
        succeeded = pool.map(train_stages, prepared.values())
        return [method for method, success in zip(prepared, succeeded, strict=True) if success]
    finally:
        pool.shutdown(cancel_futures=True)


# ---- Trained models --------------------------------------------------------------------------------------------------


class TrainedRun:
    """The EMA weights of a run, for images in [-1, 1]."""

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
    """pythae's VAE and its sampler, for images in [-1, 1]."""

    def __init__(self, run: Path, side: int) -> None:
        from pythae.samplers import GaussianMixtureSampler
        from sklearn.mixture import GaussianMixture

        self.model = pythae_model(side)
        self.model.load_state_dict(load_file(run / "model.safetensors"))
        self.sampler = GaussianMixtureSampler(self.model)  # moves the model to the GPU, in evaluation mode
        self.sampler.gmm = GaussianMixture()
        for name, tensor in load_file(run / "mixture.safetensors").items():
            setattr(self.sampler.gmm, name, tensor.numpy())
        self.sampler.is_fitted = True

    def sample(self, num: int, row: Row, seed: int) -> Tensor:
        self.sampler.gmm.random_state = np.random.RandomState(seed)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))  # scikit-learn sorts by component
        return self.sampler.sample(num, batch_size=BATCH).cpu()[order] * 2 - 1

    def reconstruct(self, images: Tensor) -> Tensor:
        encoded = self.model.encoder((images + 1) / 2)
        return self.model.decoder(encoded.embedding).reconstruction * 2 - 1

    def bits_per_dim(self, held_out: ShardSet, seed: int) -> float | None:
        """Adds the normalizing constant, in grey levels, to its loss, the energy of N(x; y, 1) for images in [0, 1]."""
        torch.manual_seed(seed)
        photos = pixels(held_out)
        dimensions = photos[0].size
        nats = dimensions * (0.5 * math.log(2 * math.pi) + math.log(LEVELS - 1))
        for part in batches(photos):
            nats += float(self.model({"data": (part + 1) / 2}).loss) * len(part) / len(photos)
        return bits_per_dim(nats, dimensions)


def pixels(shards: ShardSet) -> Images:
    """Returns all images of a set, uint8 [n, h, w, 3]."""
    return np.concatenate([shards.read(number) for number in range(len(shards.shards))])


def batches(images: Images) -> list[Tensor]:
    """Returns batches in [-1, 1] on the device."""
    return [normalize_images(part).to(DEVICE) for part in torch.from_numpy(images).split(BATCH)]


# ---- Metrics ---------------------------------------------------------------------------------------------------------

# Columns of the table: key of a row: (title, format).
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
    """The Frechet distance to the held-out photographs, with features of EfficientNet-Lite0."""

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
    """Returns the rows of the table, starting with the training photographs, and the images of the figure."""
    shards = ShardSet.open(study.shards)
    held_out_set, train_set = shards.select("test"), shards.select("train", "unlabeled")
    held_out = pixels(held_out_set)
    distance, count = DistanceTo(held_out), len(held_out)
    train_images = train_set.load_images(np.linspace(0, len(train_set) - 1, count).astype(np.int64))
    rows: Rows = [{"name": "training photographs", "method": None, "distance": distance(train_images)}]
    pictures = [("held-out photographs", held_out[:NUM_PICTURED])]
    for method in methods:
        log(f"{method}: evaluating")
        folder = study.folder(method)
        model = Pythae(folder, held_out.shape[1]) if method == "pythae" else TrainedRun(folder)
        pairs = [(batch, model.reconstruct(batch)) for batch in batches(held_out)]
        records = [json.loads((study.folder(method, n) / "stage.json").read_text()) for n in range(len(METHODS[method]))]
        measured = {
            "psnr": float(torch.cat([psnr(images, reconstructions) for images, reconstructions in pairs]).mean()),
            "bits_per_dim": model.bits_per_dim(held_out_set, study.seed),
            "distance_of_reconstructions": distance(
                np.concatenate([to_uint8(reconstructions) for _, reconstructions in pairs])
            ),
        }
        for row in ROWS:
            if row.method == method:
                samples = to_uint8(model.sample(count, row, study.seed))
                stages = records[: row.stage + 1] if row.stage >= 0 else records
                minutes = sum(stage["seconds"] for stage in stages) / 60
                cost = {"minutes": minutes, "images": sum(stage["images"] for stage in stages)}
                rows.append({"name": row.name, "method": method, **cost, **measured, "distance": distance(samples)})
                pictures.append((row.name, samples[:NUM_PICTURED]))
    if notebook := min_distance(rows, "notebook"):
        for row in rows:
            row["over_notebook"] = row["distance"] / notebook
    return rows, pictures


def min_distance(rows: Rows, *methods: str) -> float | None:
    """Returns the smallest distance of the given methods, or None."""
    return min((row["distance"] for row in rows if row["method"] in methods), default=None)


# ---- Table and figure ------------------------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    """Returns the table in Markdown."""
    lines = [[title for title, _ in COLUMNS.values()], ["---", *["---:"] * (len(COLUMNS) - 1)]]
    for row in rows:
        lines.append(["-" if row.get(key) is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(rows: Rows) -> list[str]:
    """Returns lines with the best distance of vae_scale relative to each peer."""
    best, lines = min_distance(rows, *(set(METHODS) - set(PEERS))), []
    for peer in PEERS:
        distance = min_distance(rows, peer)
        ratio = "not measured" if best is None or distance is None else f"{best / distance:.2f}"
        lines.append(f"best of vae_scale / {peer}: {ratio}")
    return lines


def draw(pictures: list[tuple[str, Images]], path: Path) -> None:
    """Saves a figure with one row of images per name."""
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
    """Returns hardware, versions and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "date": date.today().isoformat()}


@cli_main
def main(argv: Any = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Compare generative models trained with equal compute.")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="in STL-10's binary layout")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="default: runs/quality")
    parser.add_argument(
        "--cpu-minutes",
        type=float,
        default=30,
        metavar="M",
        help="CPU minutes per method, or wall-clock minutes on a GPU (default: 30)",
    )
    parser.add_argument("--only", default=",".join(METHODS), metavar="NAME,...", help="methods (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="methods trained in parallel (default: number of cores)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    args = parser.parse_args(argv)
    methods = args.only.split(",")
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"--only {','.join(sorted(unknown))}: unknown; choose from {', '.join(METHODS)}")
    photos, out = args.photos.resolve(), args.out.resolve()
    os.chdir(ROOT)  # paths of configurations are relative to it
    # On a GPU, wall-clock time is measured, so methods are trained one at a time.
    study = Study(out, args.seed, 60 * args.cpu_minutes, 1 if DEVICE == "cuda" else args.jobs)
    if not (study.shards / "index.json").exists():
        pack = ["-m", "vae_scale.pack", "--source=stl10", f"--data={photos}", f"--out={study.shards}"]
        run_command([sys.executable, *pack], study.out / "pack.log")
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
