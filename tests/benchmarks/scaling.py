"""Efficiency of data-parallel training on many GPUs, predicted from the step time of one GPU, or measured on two CPU cores.

    python tests/benchmarks/scaling.py --config configs/stl10.yaml --tflops 396
    python tests/benchmarks/scaling.py --config configs/small.yaml --data.shards DIR

With --step-ms or --tflops the efficiency is predicted; otherwise two data-parallel processes are measured against two
independent ones. All other options are those of vae_scale.train.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from vae_scale.bench import add_measuring_options, parse_training_options
from vae_scale.benchmark.measuring import markdown
from vae_scale.benchmark.training import count_flops
from vae_scale.config.options import Config
from vae_scale.errors import UserError, cli_main
from vae_scale.files import write_json
from vae_scale.models.networks import build_model
from vae_scale.training.objectives import ELBO

GPUS = (1, 8, 16, 64, 256, 1024, 4096)
SIDE = 96  # height and width of STL-10 images
IMAGE_BYTES = 3 * SIDE**2
BUCKET = 25 * 2**20  # bytes of a DDP gradient bucket, by default
BACKWARD = 2 / 3  # fraction of a step: gradients of weights and of activations each cost as much as the forward pass
SMALL = 2  # collectives of a few bytes per step: the buffers of the model, and the logged metrics


@dataclass(frozen=True)
class Link:
    """A connection on which a message takes `seconds` plus its size over `bytes_per_second` (per direction)."""

    bytes_per_second: float
    seconds: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of identical GPUs.

    Attributes:
        node: GPUs per node.
        link: Connection of a GPU to the other GPUs of its node.
        network: Connection of a node to the other nodes, with all of its adapters.
        overlap: Fraction of the backward pass that can overlap with communication: 1 on GPUs, 0 if computation and
            communication use the same cores.
        loader: Images per second loaded by a process.
        storage: Bytes per second read by all nodes together; infinite if each node holds the data.
    """

    node: int
    link: Link
    network: Link
    overlap: float = 1.0
    loader: float = math.inf
    storage: float = math.inf


@dataclass(frozen=True)
class Job:
    """The work of one GPU.

    Attributes:
        step_seconds: Duration of a step on a single GPU.
        images: Images per step.
        gradient_bytes: Bytes of gradients all-reduced per step.
        draw_seconds: Time to draw the random inputs of one image. Each process draws those of the global batch.
        deviation: Relative standard deviation of the step time.
        streams: Number of streams of shards in a batch (`data.streams`).
    """

    step_seconds: float
    images: int
    gradient_bytes: int
    draw_seconds: float = 0.0
    deviation: float = 0.0
    streams: int = 1


@dataclass(frozen=True)
class Prediction:
    """The predicted step on `gpus` GPUs.

    Attributes:
        gpus: Number of processes, one per GPU.
        images: Global batch size.
        exchange_seconds: Time of gradient communication, including the part hidden by the backward pass.
        lost: Seconds by which a step is longer than on a single GPU, by cause.
        step_seconds: Duration of a step.
    """

    gpus: int
    images: int
    exchange_seconds: float
    lost: dict[str, float]
    step_seconds: float

    @property
    def efficiency(self) -> float:
        """Step time of a single GPU over this step time, for the same number of images per GPU."""
        return 1 - sum(self.lost.values()) / self.step_seconds

    @property
    def limit(self) -> str:
        """The cause of the largest loss of time, or "-"."""
        cause = max(self.lost, key=self.lost.__getitem__)
        return cause if self.lost[cause] > 0 else "-"


def all_reduce_seconds(gpus: int, size: float, messages: int, cluster: Cluster) -> float:
    """Returns the time in which `gpus` GPUs all-reduce `size` bytes, in `messages` sequential messages.

    Within a node of g GPUs, a ring reduce-scatter and a ring all-gather take 2 (g - 1) messages and send 2 (g - 1) / g of the
    bytes through each link (Patarasuk & Yuan, 2009). Between them, an all-reduce across m nodes takes 2 log2(m) messages and
    sends 2 (m - 1) / m of the bytes through the adapters of each node (halving and doubling, Thakur, Rabenseifner & Gropp,
    2005; two trees, Sanders, Speck & Traeff, 2009).
    """
    local = min(gpus, cluster.node)
    nodes = -(-gpus // local)
    ring = 2 * (local - 1) * (messages * cluster.link.seconds + size / local / cluster.link.bytes_per_second)
    rounds = 2 * math.ceil(math.log2(nodes)) * messages * cluster.network.seconds
    return ring + rounds + 2 * (nodes - 1) / nodes * size / cluster.network.bytes_per_second


def expected_maximum(gpus: int) -> float:
    """Returns the approximate expected maximum of `gpus` samples of N(0, 1) (Blom, 1958, with alpha = 3/8)."""
    return NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def predict(gpus: int, job: Job, cluster: Cluster) -> Prediction:
    """Predicts a step of `gpus` GPUs with `job.images` images each.

    DDP all-reduces gradients in buckets during the backward pass. The last bucket is never hidden; the others are, up to the
    duration of the backward pass. Data loading is hidden unless it takes longer than the step.
    """
    buckets = max(1, math.ceil(job.gradient_bytes / BUCKET))
    total = all_reduce_seconds(gpus, job.gradient_bytes, buckets, cluster)
    last = all_reduce_seconds(gpus, min(job.gradient_bytes, BUCKET), 1, cluster)
    small = all_reduce_seconds(gpus, 0, SMALL, cluster)
    hidden = min(total - last, cluster.overlap * BACKWARD * job.step_seconds) if cluster.overlap else 0.0
    images = gpus * job.images
    nodes = -(-gpus // cluster.node)
    lost = {
        "exchange": total - hidden + small,
        "random numbers": (images - job.images) * job.draw_seconds,
        "stragglers": job.step_seconds * job.deviation * expected_maximum(gpus),
    }
    busy = job.step_seconds + sum(lost.values())
    # With a single stream, the images of each node come from all shards, so each node reads the full data set.
    read_seconds = images * IMAGE_BYTES * nodes / min(job.streams, nodes) / cluster.storage
    load_seconds = job.images / cluster.loader
    lost["storage" if read_seconds > load_seconds else "loader"] = max(0.0, max(read_seconds, load_seconds) - busy)
    return Prediction(gpus, images, total + small, lost, job.step_seconds + sum(lost.values()))


def weak_scaling(job: Job, cluster: Cluster) -> list[Prediction]:
    """Returns predictions with a constant number of images per GPU."""
    return [predict(gpus, job, cluster) for gpus in GPUS]


def strong_scaling(job: Job, batch: int, cluster: Cluster) -> list[Prediction]:
    """Returns predictions with a constant global batch size, for step times proportional to the images per GPU."""
    return [
        predict(gpus, replace(job, images=batch // gpus, step_seconds=job.step_seconds * (batch // gpus) / job.images), cluster)
        for gpus in GPUS
        if batch % gpus == 0
    ]


def table(predictions: list[Prediction]) -> list[list[str]]:
    """Returns the rows of a table, header first."""
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
    """The size of a model.

    Attributes:
        parameters: Number of parameters.
        gradient_bytes: Bytes of gradients in `train.grad_reduce_dtype`.
        latents: Number of values in the latent of an image.
        flops: Floating-point operations of forward and backward pass per image.
    """

    parameters: int
    gradient_bytes: int
    latents: int
    flops: int


def size(config: Config) -> Size:
    """Returns the size of a configured model, counted on the meta device for images of STL-10's size.

    Raises:
        UserError: `prior.vae` is set.
    """
    if config.prior.vae is not None:
        raise UserError("prior.vae is set; scaling.py supports only the first stage")
    with torch.device("meta"):
        model = build_model(config.model, SIDE)
        images = torch.empty(1, SIDE, SIDE, 3, dtype=torch.uint8)
        random_inputs = {"noise": torch.empty(1, *model.latent_shape)}
        objective = ELBO(model, config)

        def loss() -> Tensor:
            return objective(images, random_inputs)[0]

        flops = count_flops(loss)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    itemsize = 2 if config.train.grad_reduce_dtype == "bf16" else 4
    return Size(parameters, itemsize * parameters, math.prod(model.latent_shape), flops)


HOP_SECONDS, ROUND_SECONDS = 3.4e-6, 10e-6  # latency within a node and between nodes (NCCL's tuning.cc, Hopper's NVLink)
LINK_UTILIZATION = 0.8  # achieved fraction of the bandwidth of a link, for large messages
NORMALS_PER_SECOND = 1e11  # normal random numbers generated by a GPU
CLUSTER_OPTIONS = [
    ("--gpus-per-node", 8, "GPUs per node, which share the configured batch (default: 8)"),
    ("--link-gbps", 3600.0, "Gbit/s per direction between a GPU and the others of its node (default: 3600, NVLink 4)"),
    ("--node-gbps", 3200.0, "Gbit/s per direction of all adapters of a node (default: 3200, eight of 400)"),
    ("--storage-gbps", math.inf, "Gbit/s read by all nodes together (default: no limit, each node holds the data)"),
    ("--loader-images-per-second", math.inf, "loading speed per process, as measured by bench data (default: no limit)"),
    ("--jitter", 0.0, "standard deviation of the step time of a GPU, in percent (default: 0)"),
]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Predict or measure scaling efficiency.", allow_abbrev=False)
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--step-ms", type=float, metavar="MS", help="predict for GPUs with a step time of MS")
    time.add_argument("--tflops", type=float, metavar="N", help="predict for GPUs with N TFLOP/s in a step")
    for name, default, text in CLUSTER_OPTIONS:
        parser.add_argument(name, type=type(default), default=default, metavar="N", help=text)
    add_measuring_options(parser)
    args, training_options = parser.parse_known_args(argv)
    config = parse_training_options(training_options)
    if args.step_ms is None and args.tflops is None:
        import two_processes

        two_processes.run(config, training_options, args.repeats, args.json)
    else:
        print_predictions(args, config)


def print_predictions(args: argparse.Namespace, config: Config) -> None:
    """Prints predictions of weak and strong scaling."""
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
    growing, fixed = weak_scaling(job, cluster), strong_scaling(job, batch, cluster)
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
        write_json(
            args.json, {"ratios": ratios} | {name: [asdict(prediction) for prediction in row] for name, row in rows.items()}
        )


if __name__ == "__main__":
    main()
