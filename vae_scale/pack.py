"""`python -m vae_scale.pack`: images to WebDataset shards."""

import argparse
import os
import re
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
    what.add_argument(
        "--index",
        nargs="+",
        metavar="URLS",
        help="write the manifest of somebody else's WebDataset: files or URLs with {000..127}, or train=URLS test=URLS",
    )
    what.add_argument("--merge", type=Path, metavar="DIR", help="make one set of the parts in DIR, once all are written")
    what.add_argument("--verify", metavar="DIR", help="compare packed shards (folder or URL) with their manifest")
    what.add_argument("--inspect", metavar="DIR", help="print what packed shards (folder or URL) hold; draw some images")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="stl10: folder of the binaries, or stl10_binary.tar.gz; folder: any tree of images; "
        "photos: where the crops are written (default: OUT/stl10_binary)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the shards; of index.json, with --index; the PNG, with --inspect"
    )
    parser.add_argument("--part", metavar="I/N", help="write only part I of N, on one of N machines; then --merge")
    parser.add_argument("--splits", metavar="A,B", help="default: all of STL-10; train,test of a folder")
    parser.add_argument(
        "--encoding",
        choices=["npy", "png", "jpg", "webp"],
        default="npy",
        help="npy (default) is read without decoding; the others are smaller, for remote storage",
    )
    parser.add_argument("--images-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--resolution", type=int, metavar="R", help="side of images of a --source folder (default: 96) or an --index"
    )
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N", help="threads (default: all cores, at most 8)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="images of each split, at most")
    parser.add_argument("--download", action="store_true", help="fetch STL-10 (2.6 GB) into --data first")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    for option in ("images_per_shard", "workers", "limit", "resolution"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    if args.part and not args.source:
        raise UserError(f"--part {args.part}: goes with --source only")
    if args.source:
        _pack(args)
    elif args.index is not None:
        _index(args)
    elif args.merge is not None:
        _merge(args.merge, args.workers)
    elif args.verify is not None:
        _verify(args.verify, args.workers)
    else:
        _inspect(args.inspect, args.out)


def _pack(args: argparse.Namespace) -> None:
    from vae_scale.data.folder import open_folder
    from vae_scale.data.packing import Packing, pack
    from vae_scale.data.parts import WHOLE, Part
    from vae_scale.data.stl10 import SIDE, download, open_stl10

    if args.out is None:
        raise UserError("--out DIR is missing: the folder of the shards")
    part = Part.parse(args.part) if args.part else WHOLE
    default = "train,test" if args.source == "folder" else "train,unlabeled,test"
    splits = [name.strip() for name in (args.splits or default).split(",") if name.strip()]
    for split in splits:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", split):
            raise UserError(f"--splits {split}: a name has letters, digits, - and _, at most 64 of them")
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
            from vae_scale.data.photos import write_photos

            data = data or args.out / "stl10_binary"
            if part.number > 1 and not data.exists():
                raise UserError(
                    f"--part {part}: part 1/{part.count} cuts the photographs to {data}; run it first, or give them with --data"
                )
            write_photos(data)
        elif args.download:
            data = download(data or args.out.parent)
        elif data is None:
            raise UserError("--data PATH is missing: STL-10's folder or archive; or add --download")
        source, name = open_stl10(data, splits), args.source
    packing = Packing(name, args.encoding, args.images_per_shard, args.limit)
    done = pack(source, args.out, packing, args.workers, part)
    if part != WHOLE:
        print(f"{args.out}: part {part} {'packed' if done else 'already complete'}; once all are there: --merge {args.out}")
    else:
        _tell(args.out, "packed" if done else "already complete:")


def _index(args: argparse.Namespace) -> None:
    from vae_scale.data.indexing import index

    _tell(index(args.index, args.out, args.resolution, args.workers), "indexed")


def _merge(folder: Path, workers: int) -> None:
    from vae_scale.data.parts import merge

    state = "already complete:" if (folder / "index.json").exists() else "merged"
    problems = merge(folder, workers)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{folder}: not merged; see the lines above (problems: {len(problems):,})")
    _tell(folder, state)


def _tell(folder: Path, state: str) -> None:
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(folder)
    splits = ", ".join(f"{name} {count:,}" for name, count in shards.splits.items())
    print(f"{folder}: {state} {len(shards):,} images in {len(shards.shards)} shards ({splits})")


def _verify(location: str, workers: int) -> None:
    from vae_scale.data.checking import verify
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(location)
    problems = verify(shards, workers)
    if problems:
        raise UserError(f"{shards.location}: not what was packed; see the lines above (problems: {problems:,})")
    print(f"{shards.location}: {len(shards):,} images in {len(shards.shards)} shards are what was packed")


def _inspect(location: str, out: Path | None) -> None:
    from vae_scale.data.describing import describe, write_contact_sheet
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(location)
    sheet = out or (Path(shards.location) if shards.storage.local else Path()) / "contact_sheet.png"
    print(describe(shards))
    write_contact_sheet(shards, sheet)
    print(f"\nsome of the images: {sheet}")


if __name__ == "__main__":
    main()
