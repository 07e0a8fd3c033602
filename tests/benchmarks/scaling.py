"""Efficiency of data-parallel training on many GPUs, predicted from the step of one GPU, or measured on two CPU cores.

    python tests/benchmarks/scaling.py --config configs/stl10.yaml --tflops 396
    python tests/benchmarks/scaling.py --config configs/small.yaml --data.shards DIR

With --step-ms or --tflops it predicts; without, it measures two processes together and alone. All other options are those of
vae_scale.train.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from vae_scale.bench import add_measuring_options, check_positive, parse_training_options
from vae_scale.benchmark.measuring import markdown
from vae_scale.benchmark.training import count_flops
from vae_scale.config.options import Config
from vae_scale.errors import UserError, cli_main
from vae_scale.files import write_json
from vae_scale.models.discriminator import Discriminator
from vae_scale.models.networks import build_model
from vae_scale.training.objectives import ELBO

GPUS = (1, 8, 16, 64, 256, 1024, 4096)
SIDE = 96  # pixels of an image of STL-10
IMAGE_BYTES = 3 * SIDE**2
BUCKET = 25 * 2**20  # bytes that DDP exchanges at once, by default
BACKWARD = 2 / 3  # of a step: gradients of weights and of activations, each as costly as the forward pass
SMALL = 2  # exchanges of a few bytes in a step: the model's buffers, and what is logged


@dataclass(frozen=True)
class Link:
    """What a message takes: `seconds` and its size over `bytes_per_second` (each way)."""

    bytes_per_second: float
    seconds: float


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs.

    Attributes:
        node: GPUs of a machine.
        link: Of a GPU to the others of its machine.
        network: Of a machine to the others, all of its adapters together.
        overlap: Share of the backward pass during which gradients are exchanged without slowing it: 1 on GPUs, whose copies
            go on beside, 0 where the cores that compute also copy.
        loader: Images per second that a process gets ready.
        storage: Bytes per second that all machines together read; infinite where each holds the set.
    """

    node: int
    link: Link
    network: Link
    overlap: float = 1.0
    loader: float = math.inf
    storage: float = math.inf


@dataclass(frozen=True)
class Job:
    """The share of a GPU in a training.

    Attributes:
        step_seconds: Of a step of one GPU alone.
        images: Per step.
        gradient_bytes: That each GPU exchanges in a step.
        draw_seconds: For the random numbers of one image. Each process draws those of the global batch.
        deviation: Standard deviation of a step's time, over the time.
        streams: Parts of a batch that come from different shards (`data.streams`).
    """

    step_seconds: float
    images: int
    gradient_bytes: int
    draw_seconds: float = 0.0
    deviation: float = 0.0
    streams: int = 1


@dataclass(frozen=True)
class Prediction:
    """A step on `gpus` GPUs.

    Attributes:
        gpus: Processes, one for each GPU.
        images: Of a step, on all of them.
        exchange_seconds: For the gradients, hidden or not.
        lost: Seconds by which a step is longer than that of one GPU alone, by what causes them.
        step_seconds: Of a step.
    """

    gpus: int
    images: int
    exchange_seconds: float
    lost: dict[str, float]
    step_seconds: float

    @property
    def efficiency(self) -> float:
        """A step of one GPU alone over this one, for as many images per GPU."""
        return 1 - sum(self.lost.values()) / self.step_seconds

    @property
    def limit(self) -> str:
        """What costs the most time."""
        worst = max(self.lost, key=self.lost.__getitem__)
        return worst if self.lost[worst] > 0 else "-"


def exchange(gpus: int, size: float, messages: int, cluster: Cluster) -> float:
    """Seconds in which `gpus` GPUs sum `size` bytes, in `messages` parts one after the other.

    Within a machine of g GPUs each part is reduced and scattered in a ring and, at the end, gathered in a ring: 2 (g - 1)
    messages, 2 (g - 1) / g of the bytes through each link (Patarasuk & Yuan, 2009). In between, each GPU sums its part with
    its like on m machines in 2 log2(m) messages, by which 2 (m - 1) / m of the bytes pass each machine's adapters (halving and
    doubling, Thakur, Rabenseifner & Gropp, 2005; two trees, Sanders, Speck & Traeff, 2009).
    """
    local = min(gpus, cluster.node)
    machines = -(-gpus // local)
    ring = 2 * (local - 1) * (messages * cluster.link.seconds + size / local / cluster.link.bytes_per_second)
    rounds = 2 * math.ceil(math.log2(machines)) * messages * cluster.network.seconds
    return ring + rounds + 2 * (machines - 1) / machines * size / cluster.network.bytes_per_second


def latest(gpus: int) -> float:
    """Expected greatest of `gpus` numbers from N(0, 1), nearly (Blom, 1958, with alpha = 3/8)."""
    return NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def predict(gpus: int, job: Job, cluster: Cluster) -> Prediction:
    """A step of `gpus` GPUs that take `job.images` images each.

    What DDP exchanges goes in buckets, the first as soon as the backward pass has filled it. So the last one is waited for, and
    what of the others takes longer than the backward pass. Images come meanwhile: only a slower loader is waited for.
    """
    buckets = max(1, math.ceil(job.gradient_bytes / BUCKET))
    whole = exchange(gpus, job.gradient_bytes, buckets, cluster)
    last = exchange(gpus, min(job.gradient_bytes, BUCKET), 1, cluster)
    small = exchange(gpus, 0, SMALL, cluster)
    hidden = min(whole - last, cluster.overlap * BACKWARD * job.step_seconds) if cluster.overlap else 0.0
    images = gpus * job.images
    machines = -(-gpus // cluster.node)
    lost = {
        "exchange": whole - hidden + small,
        "random numbers": (images - job.images) * job.draw_seconds,
        "stragglers": job.step_seconds * job.deviation * latest(gpus),
    }
    busy = job.step_seconds + sum(lost.values())
    # With one stream each machine needs images of all shards in turn, and so reads the whole set.
    read = images * IMAGE_BYTES * machines / min(job.streams, machines) / cluster.storage
    loaded = job.images / cluster.loader
    lost["storage" if read > loaded else "loader"] = max(0.0, max(read, loaded) - busy)
    return Prediction(gpus, images, whole + small, lost, job.step_seconds + sum(lost.values()))


def weak(job: Job, cluster: Cluster) -> list[Prediction]:
    """From one GPU to thousands, each with as many images."""
    return [predict(gpus, job, cluster) for gpus in GPUS]


def strong(job: Job, batch: int, cluster: Cluster) -> list[Prediction]:
    """From one GPU to as many as a batch of `batch` images can be shared by, if a step takes as long as it has images."""
    shares = [(gpus, batch // gpus) for gpus in GPUS if batch % gpus == 0]
    return [
        predict(gpus, replace(job, images=share, step_seconds=job.step_seconds * share / job.images), cluster)
        for gpus, share in shares
    ]


def table(predictions: list[Prediction]) -> list[list[str]]:
    """Lines of cells, the first of which is the heading."""
    times = ["step (ms)", "exchange (ms)", "not hidden (ms)"]
    lines = [["GPUs", "images per step", *times, "images/s", "efficiency", "most lost to"]]
    for prediction in predictions:
        durations = [prediction.step_seconds, prediction.exchange_seconds, prediction.lost["exchange"]]
        cells = [f"{1e3 * seconds:,.2f}" for seconds in durations]
        speed = f"{prediction.images / prediction.step_seconds:,.0f}"
        lines.append(
            [f"{prediction.gpus:,}", f"{prediction.images:,}", *cells, speed, f"{prediction.efficiency:.3f}", prediction.limit]
        )
    return lines


@dataclass(frozen=True)
class Size:
    """Of what is trained.

    Attributes:
        parameters: All of them.
        gradient_bytes: As processes exchange them, whatever the precision of the step.
        latents: Numbers of an image's latent.
        flops: Floating-point operations of an image's gradients.
    """

    parameters: int
    gradient_bytes: int
    latents: int
    flops: int


def size(config: Config) -> Size:
    """Counted on a network without weights, for images of STL-10's size.

    Raises:
        UserError: the configuration is one of the second stage.
    """
    if config.prior.vae is not None:
        raise UserError("prior.vae is set; bench scaling knows the first stage only")
    with torch.device("meta"):
        model = build_model(config.model, SIDE)
        if config.objective.uses_discriminator:
            model.discriminator = Discriminator(config.objective.discriminator_width)
        images = torch.empty(1, SIDE, SIDE, 3, dtype=torch.uint8)
        draws = {"noise": torch.empty(1, *model.latent_shape)}
        objective, one = ELBO(model, config), torch.ones(())

        def loss() -> Tensor:
            return objective(images, draws, one, one)[0]

        flops = count_flops(loss)
    parameters = sum(part.numel() for part in model.parameters())
    each = 2 if config.train.grad_reduce_dtype == "bf16" else 4
    return Size(parameters, each * parameters, math.prod(model.latent_shape), flops)


HOP_SECONDS, ROUND_SECONDS = 3.4e-6, 10e-6  # latency within a node and between nodes (NCCL's tuning.cc, Hopper's NVLink)
LINK_UTILIZATION = 0.8  # of a link's bandwidth, by large messages
NORMALS_PER_SECOND = 1e11  # drawn by a GPU
CLUSTER_OPTIONS = [
    ("--gpus-per-node", 8, "GPUs per node, which share the configured batch (default: 8)"),
    ("--link-gbps", 3600.0, "Gbit/s from a GPU to the others of its node, each way (default: 3600, NVLink 4)"),
    ("--node-gbps", 3200.0, "Gbit/s from a node to the others, each way, all adapters (default: 3200, eight of 400)"),
    ("--storage-gbps", math.inf, "Gbit/s that all nodes read together (default: no limit, each holds the set)"),
    ("--loader-images-per-second", math.inf, "per process, as bench data measures it (default: no limit)"),
    ("--jitter", 0.0, "standard deviation of a step's time on one GPU, in percent (default: 0)"),
]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to the process's own."""
    parser = argparse.ArgumentParser(description="Predict or measure scaling efficiency.", allow_abbrev=False)
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--step-ms", type=float, metavar="MS", help="predict for GPUs whose step takes MS")
    time.add_argument("--tflops", type=float, metavar="N", help="predict for GPUs that reach N TFLOP/s in a step")
    for name, default, text in CLUSTER_OPTIONS:
        parser.add_argument(name, type=type(default), default=default, metavar="N", help=text)
    add_measuring_options(parser)
    args, training_options = parser.parse_known_args(argv)
    check_positive(args, "repeats")
    config = parse_training_options(training_options)
    if args.step_ms is None and args.tflops is None:
        import two_processes

        two_processes.run(config, training_options, args.repeats, args.json)
    else:
        print_predictions(args, config)


def print_predictions(args: argparse.Namespace, config: Config) -> None:
    """Prints predictions for a batch that grows with the number of GPUs, and for a fixed batch."""
    job_size, batch = size(config), config.train.global_batch_size
    if batch % args.gpus_per_node:
        raise UserError(f"--gpus-per-node is {args.gpus_per_node}; it must divide train.batch_size, {batch}")
    images = batch // args.gpus_per_node
    seconds = images * job_size.flops / (args.tflops * 1e12) if args.tflops else args.step_ms / 1e3
    link, network = (
        Link(LINK_UTILIZATION * gbps * 1e9 / 8, latency)
        for gbps, latency in ((args.link_gbps, HOP_SECONDS), (args.node_gbps, ROUND_SECONDS))
    )
    storage, loader = args.storage_gbps * 1e9 / 8, args.loader_images_per_second
    cluster = Cluster(args.gpus_per_node, link, network, loader=loader, storage=storage)
    draw_seconds = job_size.latents / NORMALS_PER_SECOND
    job = Job(seconds, images, job_size.gradient_bytes, draw_seconds, args.jitter / 100, config.data.streams)
    growing, fixed = weak(job, cluster), strong(job, batch, cluster)
    print(
        f"{job_size.parameters:,} parameters, {job_size.flops / 1e9:,.2f} GFLOP per image, {images} images per GPU in ", end=""
    )
    print(f"{1e3 * seconds:,.2f} ms; {job_size.gradient_bytes / 1e6:,.1f} MB of gradients\n")
    print(markdown(table(growing)))
    print(f"\nThe same batch of {batch} on all:\n")
    print(markdown(table(fixed)))
    if args.json:
        ratios = {f"efficiency_{prediction.gpus}": prediction.efficiency for prediction in growing}
        rows = {"growing_batch": growing, "fixed_batch": fixed}
        write_json(args.json, {"ratios": ratios} | {name: [asdict(each) for each in row] for name, row in rows.items()})


if __name__ == "__main__":
    main()
