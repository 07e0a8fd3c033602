"""`python -m vae_scale.pack`: images to WebDataset shards."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vae_scale.errors import UserError, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.pack",
        description="Pack images into WebDataset shards that train at memory speed. Run it again to carry on.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", choices=["stl10", "folder", "photos"], help="what to pack")
    what.add_argument("--verify", type=Path, metavar="DIR", help="compare packed shards with their hashes")
    what.add_argument("--inspect", type=Path, metavar="DIR", help="print what packed shards hold")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="stl10: folder of the binaries, or stl10_binary.tar.gz; folder: any tree of images; "
        "photos: where the crops are written (default: OUT/stl10_binary)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument("--splits", metavar="A,B", help="default: all of STL-10; train,test of a folder")
    parser.add_argument(
        "--encoding",
        choices=["npy", "png", "jpg", "webp"],
        default="npy",
        help="npy (default) is read without decoding; the others are smaller, for remote storage",
    )
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--resolution", type=int, metavar="R", help="side of a folder's images (default: 96)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: all cores)")
    parser.add_argument("--limit", type=int, metavar="N", help="images of each split, at most")
    parser.add_argument("--download", action="store_true", help="fetch STL-10 (2.6 GB) into --data first")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    if args.verify or args.inspect:
        _verify(args.verify) if args.verify else _inspect(args.inspect)
        return
    if args.out is None:
        raise UserError("--out DIR is missing: the folder of the shards")
    for option in ("images_per_shard", "workers", "limit", "resolution"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    _pack(args)


def _pack(args: argparse.Namespace) -> None:
    from vae_scale.data.folder import open_folder
    from vae_scale.data.packing import Packing, pack
    from vae_scale.data.photos import write_photos
    from vae_scale.data.shards import ShardSet
    from vae_scale.data.stl10 import SIDE, download, open_stl10

    default = "train,test" if args.source == "folder" else "train,unlabeled,test"
    splits = [name.strip() for name in (args.splits or default).split(",") if name.strip()]
    if args.source == "folder":
        if args.data is None:
            raise UserError("--data PATH is missing: the folder of images")
        source = open_folder(args.data, splits, args.resolution or SIDE)
        name = "".join(letter if letter.isalnum() else "-" for letter in args.data.resolve().name.lower()) or "folder"
    else:
        if args.resolution not in (None, SIDE):
            raise UserError(f"--resolution {args.resolution}: STL-10 is {SIDE}x{SIDE}; other sizes go with --source folder")
        data = args.data
        if args.source == "photos":
            data = data or args.out / "stl10_binary"
            write_photos(data)
        elif args.download:
            data = download(data or args.out.parent)
        elif data is None:
            raise UserError("--data PATH is missing: STL-10's folder or archive; or add --download")
        source, name = open_stl10(data, splits), args.source
    packing = Packing(name, args.encoding, args.images_per_shard, args.limit)
    done = pack(source, args.out, packing, args.workers)
    shards = ShardSet.open(args.out)
    state = "packed" if done else "already complete:"
    print(f"{args.out}: {state} {len(shards):,} images in {len(shards.shards)} shards ({_counts(shards.splits)})")


def _verify(folder: Path) -> None:
    from tqdm import tqdm

    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(folder)
    for number in tqdm(range(len(shards.shards)), unit=" shards", desc=f"verifying {folder}"):
        shards.verify(number)
    print(f"{folder}: {len(shards):,} images in {len(shards.shards)} shards are what was packed")


def _inspect(folder: Path) -> None:
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(folder)
    size = sum(shard.filesize for shard in shards.shards)
    height, width, _ = shards.image_shape
    print(f"{folder}: {len(shards):,} images of {height}x{width} in {len(shards.shards)} shards")
    print(f"splits    {_counts(shards.splits)}")
    print(f"encoding  {shards.encoding}, {size / 2**20:,.1f} MiB")
    print(f"classes   {', '.join(shards.class_names) or 'none'}")


def _counts(splits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in splits.items())


if __name__ == "__main__":
    main()
