"""`python -m vae_scale.bench data --shards DIR`: measures how fast this machine gets images ready for training."""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vae_scale.errors import UserError, command

WINDOWS = (1, 4, 16)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.bench",
        description="Measure how fast this machine is, and how near to its limits.",
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    data = verbs.add_parser("data", help="images per second from shards into batches")
    data.add_argument("--shards", required=True, metavar="DIR", help="what python -m vae_scale.pack wrote")
    data.add_argument("--batch", type=int, default=256, metavar="N", help="images of a batch (default: 256)")
    data.add_argument("--repeats", type=int, default=5, metavar="N", help="runs, of which the median counts (default: 5)")
    data.add_argument("--peers", action="store_true", help="also other loaders on the same images (extra: bench)")
    data.add_argument("--scratch", type=Path, metavar="DIR", help="where --peers keeps other formats (default: deleted after)")
    data.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    for option in ("batch", "repeats"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}; it must be at least 1")
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


if __name__ == "__main__":
    main()
