"""`python -m vae_scale.bench data|step|train|scaling`: how fast images get ready, how fast training is, here and elsewhere."""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, command

if TYPE_CHECKING:
    from vae_scale.config import Config

WINDOWS = (1, 4, 16)
REACHED = 0.8  # of a link's speed, by large messages
HOP, ROUND = 3.4e-6, 10e-6  # seconds of a message within a machine and between machines (NCCL's tuning.cc, Hopper's NVLink)
NORMALS = 1e11  # random numbers that a GPU draws in a second
OPTIONS = "all other options are those of python -m vae_scale.train, such as --config FILE"
SCALING = "two processes here beside two that train alone; or, with --step-ms or --tflops, what to expect of thousands of GPUs"
BESIDE = "also the same training by others' means (extra: bench): notebook,torch,lightning,diffusers,pythae (default: all)"
PREDICTING = [
    ("--gpus-per-node", 8, "GPUs of a machine, which take the configured batch (default: 8)"),
    ("--link-gbps", 3600.0, "Gbit/s from a GPU to the others of its machine, each way (default: 3600, NVLink 4)"),
    ("--node-gbps", 3200.0, "Gbit/s from a machine to the others, each way, by all adapters (default: 3200, eight of 400)"),
    ("--storage-gbps", math.inf, "Gbit/s that all machines read together (default: no limit, each holds the set)"),
    ("--loader-images-per-second", math.inf, "of a process, as bench data measures it (default: no limit)"),
    ("--jitter", 0.0, "standard deviation of a step's time on one GPU, in percent (default: 0)"),
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.bench",
        description="Measure how fast this machine is, and how near to its limits.",
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    data = verbs.add_parser("data", help="images per second from shards into batches")
    data.add_argument("--shards", required=True, metavar="DIR", help="what python -m vae_scale.pack wrote")
    data.add_argument("--batch", type=int, default=256, metavar="N", help="images of a batch (default: 256)")
    data.add_argument("--peers", action="store_true", help="also other loaders on the same images (extra: bench)")
    data.add_argument("--scratch", type=Path, metavar="DIR", help="where --peers keeps other formats (default: deleted after)")
    training = {"step": "images per second of the bare training step", "train": "the whole trainer beside the bare step"}
    for name, told in training.items():
        verb = verbs.add_parser(name, help=told, epilog=OPTIONS, allow_abbrev=False)
        verb.add_argument("--peers", nargs="?", const="", metavar="NAMES", help=BESIDE)
        verb.add_argument("--profile", type=Path, metavar="DIR", help="write a profiler's trace of a few steps there")
    scaling = verbs.add_parser("scaling", help=SCALING, description=SCALING, epilog=OPTIONS, allow_abbrev=False)
    time = scaling.add_mutually_exclusive_group()
    time.add_argument("--step-ms", type=float, metavar="MS", help="predict for GPUs that take so long for a step alone")
    time.add_argument("--tflops", type=float, metavar="N", help="predict for GPUs that reach so many TFLOP/s in a step")
    for name, default, told in PREDICTING:
        scaling.add_argument(name, type=type(default), default=default, metavar="N", help=told)
    for verb in verbs.choices.values():
        verb.add_argument("--repeats", type=int, default=5, metavar="N", help="runs, of which the median counts (default: 5)")
        verb.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def read(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, "Config | None"]:
    """The command line, and the configuration of the training that it names.

    Raises:
        UserError: naming the option of training that is unknown, of a wrong type or impossible.
    """
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if args.what == "data":
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        return args, None
    from vae_scale.config import parse

    args.words = others
    config, dry_run = parse(others)
    if dry_run:
        raise UserError("--dry-run goes with python -m vae_scale.train")
    return args, config


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args, config = read(argv)
    for option in ("batch", "repeats"):
        if getattr(args, option, 1) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; it must be at least 1")
    if config and args.what == "scaling":
        (_two_processes if args.step_ms is None and args.tflops is None else _predict)(args, config)
        return
    if config:
        _training(args, config)
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (args.scratch or Path(temporary)) if args.peers else None
        _data(args, scratch)


def _data(args: argparse.Namespace, scratch: Path | None) -> None:
    from vae_scale.benchmark.data import measure, shuffle_quality
    from vae_scale.benchmark.measuring import machine, markdown, table, write_json
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(args.shards)
    found = measure(shards, args.batch, args.repeats, scratch)
    sizes = [shard.samples for shard in shards.shards]
    shuffles = shuffle_quality(sizes, args.batch, [*(w for w in WINDOWS if w < len(sizes)), len(sizes)])
    where = machine()

    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{args.shards}: {len(shards):,} images, {len(sizes)} shards, {shards.encoding}; batches of {args.batch}\n")
    print(table(found.rows))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:,.2f}"] for name, ratio in found.ratios.items())]))
    print(f"\nfirst batch after {found.first_batch_seconds:.2f} s; ", end="")
    print(f"memory grew by {found.memory_bytes / 2**20:,.0f} MiB while windows of two shards were streamed\n")
    lines = [["window (shards)", "displacement", "neighbours", "same shard"]]
    for shuffle in shuffles:
        window = "all" if shuffle.window == len(sizes) else str(shuffle.window or "random permutation")
        lines.append([window, f"{shuffle.displacement:.3f}", f"{shuffle.neighbours:.5f}", f"{shuffle.same_shard:.3f}"])
    print(markdown(lines))
    for family, reason in found.missing.items():
        print(f"left out: {family}: {reason}")
    if args.json:
        write_json(
            args.json, {"machine": where, **dataclasses.asdict(found), "shuffle": list(map(dataclasses.asdict, shuffles))}
        )


def _training(args: argparse.Namespace, config: "Config") -> None:
    from vae_scale.benchmark.measuring import COPY, MATRIX, machine, markdown, write_json
    from vae_scale.benchmark.training import measure

    peers = None if args.peers is None else [name for name in args.peers.split(",") if name]
    found = measure(config, args.what == "train", args.repeats, args.profile, peers)
    where = machine()
    units = {MATRIX: (1e12, "TFLOP/s"), COPY: (1e9, "GB/s")}

    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{found.parameters:,} parameters, {found.flops_per_image / 1e9:,.2f} GFLOP per image; ", end="")
    print(f"batches of {found.batch}, {found.precision}; {found.steps} steps a run, without evaluation\n")
    lines = [["", "median", "lowest", "highest", ""]]
    for row in found.rows:
        size, unit = units.get(row.name, (1.0, "images/s"))
        speeds = [f"{speed / size:,.{2 if size > 1 else 1}f}" for speed in (row.median, min(row.runs), max(row.runs))]
        lines.append([row.name, *speeds, unit])
    print(markdown(lines))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:.4f}"] for name, ratio in found.ratios.items())]))
    print(f"\nat most {found.peak_memory_bytes / 2**20:,.0f} MiB of memory")
    if found.parts:
        step = sum(part.ms_per_step for part in found.parts)
        lines = [["timed by itself", "ms each", "ms per step", "share"]]
        for part in found.parts:
            lines.append([part.name, f"{part.ms_each:,.3f}", f"{part.ms_per_step:,.3f}", f"{part.ms_per_step / step:.2%}"])
        print()
        print(markdown(lines))
    for family, reason in found.missing.items():
        print(f"left out: {family}: {reason}")
    if args.json:
        write_json(args.json, {"machine": where, **dataclasses.asdict(found)})


def _two_processes(args: argparse.Namespace, config: "Config") -> None:
    from vae_scale.benchmark.measuring import machine, markdown, table, write_json
    from vae_scale.benchmark.scaling import size
    from vae_scale.benchmark.two_processes import measure

    found = measure(args.words, config.train.batch, size(config).gradient_bytes, args.repeats)
    where, job, predicted = machine(), found.job, found.predicted

    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{job.images} images per step and process; {found.steps} steps a run\n")
    print(table(found.rows))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:.3f}"] for name, ratio in found.ratios.items())]))
    print(f"\na step alone takes {1e3 * job.step_seconds:,.1f} ms, with a deviation of {job.deviation:.1%}; ", end="")
    print(f"{job.gradient_bytes / 2**20:,.1f} MiB of gradients at {found.link.bytes_per_second / 1e9:,.2f} GB/s, ", end="")
    print(f"a message {1e6 * found.link.seconds:,.0f} us")
    lost = ", ".join(f"{1e3 * seconds:,.1f} ms ({name})" for name, seconds in predicted.lost.items())
    print(f"together it should be longer by {lost}")
    if args.json:
        write_json(args.json, {"machine": where, **dataclasses.asdict(found)})


def _predict(args: argparse.Namespace, config: "Config") -> None:
    from vae_scale.benchmark.measuring import markdown, write_json
    from vae_scale.benchmark.scaling import Cluster, Job, Link, size, strong, table, weak

    found, batch = size(config), config.train.batch
    if batch % args.gpus_per_node:
        raise UserError(f"--gpus-per-node is {args.gpus_per_node}; it must divide train.batch_size, {batch}")
    images = batch // args.gpus_per_node
    seconds = images * found.flops / (args.tflops * 1e12) if args.tflops else args.step_ms / 1e3
    link, network = (
        Link(REACHED * gbps * 1e9 / 8, latency) for gbps, latency in ((args.link_gbps, HOP), (args.node_gbps, ROUND))
    )
    storage, loader = args.storage_gbps * 1e9 / 8, args.loader_images_per_second
    cluster = Cluster(args.gpus_per_node, link, network, loader=loader, storage=storage)
    drawing = found.latents / NORMALS
    job = Job(seconds, images, found.gradient_bytes, drawing, args.jitter / 100, config.data.streams)
    growing, fixed = weak(job, cluster), strong(job, batch, cluster)

    print(f"{found.parameters:,} parameters, {found.flops / 1e9:,.2f} GFLOP per image, {images} images per GPU in ", end="")
    print(f"{1e3 * seconds:,.2f} ms; {found.gradient_bytes / 1e6:,.1f} MB of gradients\n")
    print(markdown(table(growing)))
    print(f"\nThe same batch of {batch} on all:\n")
    print(markdown(table(fixed)))
    if args.json:
        ratios = {f"efficiency_{found.gpus}": found.efficiency for found in growing}
        predictions = {"growing_batch": growing, "fixed_batch": fixed}
        write_json(
            args.json,
            {"ratios": ratios} | {name: [dataclasses.asdict(found) for found in row] for name, row in predictions.items()},
        )


if __name__ == "__main__":
    main()
