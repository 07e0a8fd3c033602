"""`python -m vae_scale.pack`: packs images into WebDataset shards."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, cli_main

if TYPE_CHECKING:
    from vae_scale.data.packing import Source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.pack",
        description="Pack images into WebDataset shards for training. To resume, run the same command again.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--source", choices=["stl10", "folder", "photos"], help="images to pack")
    action.add_argument(
        "--index",
        nargs="+",
        metavar="URLS",
        help="write the manifest of an existing WebDataset: files or URLs such as x-{000..127}.tar, or train=URLS test=URLS",
    )
    action.add_argument("--merge", type=Path, metavar="DIR", help="combine the parts in DIR into one set")
    action.add_argument("--verify", metavar="DIR", help="compare packed shards (folder or URL) with their manifest")
    action.add_argument("--inspect", metavar="DIR", help="describe packed shards (folder or URL) and write a contact sheet")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="stl10: folder of the binaries, or stl10_binary.tar.gz, which is extracted beside it; folder: tree of images",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards or of index.json; for --inspect, the PNG")
    parser.add_argument(
        "--part", metavar="I/N", help="write only part I of N, to pack on N machines; merge the parts with --merge"
    )
    parser.add_argument("--splits", metavar="A,B", help="default: all of STL-10; train,test of a folder")
    parser.add_argument(
        "--encoding",
        choices=["npy", "png", "jpg", "webp"],
        default="npy",
        help="npy (default) needs no decoding; png, jpg and webp are smaller, for remote storage",
    )
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--resolution", type=int, metavar="R", help="image size for --source folder (default: 96) and --index, in pixels"
    )
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N", help="threads (default: all cores, at most 8)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="maximum number of images per split")
    parser.add_argument("--download", action="store_true", help="download STL-10 (2.6 GB) to --data first")
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    for option in ("images_per_shard", "workers", "limit", "resolution"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    if args.part and not args.source:
        raise UserError(f"--part {args.part}: requires --source")
    if args.source:
        _pack(args)
    elif args.index is not None:
        from vae_scale.data.indexing import index

        _print_summary(index(args.index, args.out, args.resolution, args.workers), "indexed")
    elif args.merge is not None:
        _merge(args.merge, args.workers)
    elif args.verify is not None:
        _verify(args.verify, args.workers)
    else:
        _inspect(args.inspect, args.out)


def _pack(args: argparse.Namespace) -> None:
    from vae_scale.data.packing import PackOptions, pack
    from vae_scale.data.parts import Part

    if args.out is None:
        raise UserError("--out DIR is missing: the folder of the shards")
    part = Part.parse(args.part) if args.part else Part()
    source = _open_source(args)
    name = args.source
    if args.source == "folder":
        name = re.sub(r"[\W_]", "-", args.data.resolve().name.lower()) or "folder"
    options = PackOptions(name, args.encoding, args.images_per_shard, args.limit)
    written = pack(source, args.out, options, args.workers, part)
    if part.count > 1:
        print(f"{args.out}: part {part} {'packed' if written else 'already complete'}; after the last part: --merge {args.out}")
    else:
        _print_summary(args.out, "packed" if written else "already complete:")


def _open_source(args: argparse.Namespace) -> "Source":
    default = "train,test" if args.source == "folder" else "train,unlabeled,test"
    splits = [name.strip() for name in (args.splits or default).split(",") if name.strip()]
    for split in splits:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", split):
            raise UserError(f"--splits {split}: a name consists of at most 64 letters, digits, - and _")
    if args.source == "folder":
        from vae_scale.data.folder import open_folder

        if args.data is None:
            raise UserError("--data PATH is missing: the folder of images")
        return open_folder(args.data, splits, args.resolution or 96)
    if args.resolution not in (None, 96):
        raise UserError(f"--resolution {args.resolution}: {args.source} is 96x96; use --source folder for other sizes")
    if args.source == "photos":
        from vae_scale.data.photos import open_photos

        if args.data is not None:
            raise UserError(f"--data {args.data}: --source photos reads the photographs of scikit-image; omit --data")
        return open_photos(splits)
    from vae_scale.data.stl10 import download, open_stl10

    data = args.data
    if args.download:
        data = download(data or args.out.parent)
    if data is None:
        raise UserError("--data PATH is missing: STL-10's folder or archive; or add --download")
    return open_stl10(data, splits)


def _merge(folder: Path, workers: int) -> None:
    from vae_scale.data.parts import merge

    status = "already complete:" if (folder / "index.json").exists() else "merged"
    merge(folder, workers)
    _print_summary(folder, status)


def _print_summary(folder: Path, status: str) -> None:
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(folder)
    splits = ", ".join(f"{name} {count:,}" for name, count in shards.splits.items())
    print(f"{folder}: {status} {len(shards):,} images in {len(shards.shards)} shards ({splits})")


def _verify(location: str, workers: int) -> None:
    from vae_scale.data.shards import ShardSet
    from vae_scale.data.verification import verify

    shards = ShardSet.open(location)
    if problems := verify(shards, workers):
        raise UserError(f"{shards.location}: does not match its manifest; see the lines above (problems: {problems:,})")
    print(f"{shards.location}: {len(shards):,} images in {len(shards.shards)} shards match the manifest")


def _inspect(location: str, out: Path | None) -> None:
    from vae_scale.data.inspection import describe, write_contact_sheet
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(location)
    sheet = out or (Path(shards.location) if shards.is_local else Path()) / "contact_sheet.png"
    print(describe(shards))
    write_contact_sheet(shards, sheet)
    print(f"\ncontact sheet: {sheet}")


if __name__ == "__main__":
    main()
