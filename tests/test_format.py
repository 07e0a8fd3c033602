"""shards/README.md specifies the format completely: a reader and a writer that use only the specification."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, discs
from PIL import Image


def manifest(folder: Path) -> dict:
    index = json.loads((folder / "index.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1"
    assert index["wids_version"] == 1
    assert index["vae_scale"]["version"] == 1
    return index


def field(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def member(name: str, content: bytes) -> bytes:
    """Returns a member as section "A shard" specifies it."""
    header = bytearray(512)
    header[: len(name)] = name.encode("ascii")
    header[100:124] = field(0o444, 8) + field(0, 8) + field(0, 8)
    header[124:148] = field(len(content), 12) + field(0, 12)
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def npy(image: np.ndarray) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {image.shape}, }}".encode()
    text += b" " * (128 - 10 - len(text) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + image.tobytes()


def test_writer_from_the_specification_writes_the_same_bytes(shards: Path) -> None:
    index = manifest(shards)
    rows = dict.fromkeys(COUNTS, 0)
    images = {split: discs(count, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    for entry in index["shardlist"]:
        split, content = entry["split"], b""
        for label in entry["labels"]:
            key = f"{split}-{rows[split]:08d}"
            content += member(f"{key}.cls", str(label).encode()) + member(f"{key}.npy", npy(images[split][rows[split]]))
            rows[split] += 1
        content += bytes(1024)
        content += bytes(-len(content) % 10_240)
        assert content == (shards / entry["url"]).read_bytes()
    assert rows == COUNTS


def test_reader_from_the_specification_reads_arrays(binaries: Path, shards: Path) -> None:
    index = manifest(shards)
    header = index["vae_scale"]
    assert (header["encoding"], header["image_shape"], header["class_names"]) == ("npy", [96, 96, 3], CLASSES)
    height, width, channels = header["image_shape"]
    images_by_split: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for entry in index["shardlist"]:
        content = (shards / entry["url"]).read_bytes()
        assert len(content) == entry["filesize"]
        assert hashlib.md5(content).hexdigest() == entry["md5sum"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        count, stride, offset = entry["nsamples"], header["stride"], header["offset"]
        strides = (stride, width * channels, channels, 1)
        images = np.ndarray((count, height, width, channels), "u1", content, offset, strides)
        assert hashlib.sha256(images.tobytes()).hexdigest() == entry["pixels_sha256"]
        first = sum(map(len, images_by_split.get(entry["split"], [])))
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = tar.getmembers()
        for row in range(count):
            key = f"{entry['split']}-{first + row:08d}"
            cls, image = members[2 * row : 2 * row + 2]
            assert (cls.name, image.name) == (f"{key}.cls", f"{key}.npy")
            assert image.offset_data + 128 == offset + row * stride
            assert content[cls.offset_data : cls.offset_data + cls.size] == str(entry["labels"][row]).encode()
            for info in (cls, image):
                assert (info.mode, info.uid, info.gid, info.mtime, info.uname, info.gname) == (0o444, 0, 0, 0, "", "")
        images_by_split.setdefault(entry["split"], []).append(images)
        labels.setdefault(entry["split"], []).extend(entry["labels"])
    for seed, (split, count) in enumerate(COUNTS.items()):
        assert np.array_equal(np.concatenate(images_by_split[split]), discs(count, seed))
        assert labels[split] == ([-1] * count if split == "unlabeled" else [row % 10 for row in range(count)])


def test_other_files_follow_the_specification(binaries: Path, shards: Path) -> None:
    index = manifest(shards)
    header, entries = index["vae_scale"], index["shardlist"]
    assert json.loads((shards / "sizes.json").read_text()) == {entry["url"]: entry["nsamples"] for entry in entries}
    info = json.loads((shards / "_info.json").read_text())
    assert info["name"] == index["name"] == "stl10"
    assert list(info["splits"]) == list(header["splits"])
    for split, images in header["splits"].items():
        shards_of_split = [entry for entry in entries if entry["split"] == split]
        assert [entry["url"] for entry in shards_of_split] == [
            f"stl10-{split}-{number:06d}.tar" for number in range(len(shards_of_split))
        ]
        assert info["splits"][split] == {
            "name": split,
            "num_samples": images,
            "filenames": [entry["url"] for entry in shards_of_split],
            "shard_lengths": [entry["nsamples"] for entry in shards_of_split],
        }
    for name, sha256 in header["sources"].items():
        assert hashlib.sha256((binaries / name).read_bytes()).hexdigest() == sha256
    assert header["folds"] == [[int(row) for row in line.split()] for line in (binaries / "fold_indices.txt").open()]
    packing = {"name": "stl10", "encoding": "npy", "images_per_shard": 25, "limit": None}
    identity = {"format_version": 1, "packing": packing, "splits": header["splits"], "sources": header["sources"]}
    assert header["fingerprint"] == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(("encoding", "begin"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_reader_from_the_specification_reads_encoded_images(
    binaries: Path, tmp_path: Path, encoding: str, begin: bytes
) -> None:
    from vae_scale.pack import main

    main(["--source=stl10", f"--data={binaries}", f"--out={tmp_path}", f"--encoding={encoding}", "--limit=7"])
    index = manifest(tmp_path)
    header = index["vae_scale"]
    assert (header["encoding"], header["stride"], header["offset"]) == (encoding, None, None)
    assert header["splits"] == dict.fromkeys(header["splits"], 7)
    assert len(header["splits"]) == 3
    for entry in index["shardlist"]:
        content = (tmp_path / entry["url"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        pixels, written = hashlib.sha256(), b""
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for row, label in enumerate(entry["labels"]):
                for kind in ("cls", encoding):
                    info = tar.next()
                    assert info is not None
                    assert info.name == f"{entry['split']}-{row:08d}.{kind}"
                    read = content[info.offset_data : info.offset_data + info.size]
                    written += member(info.name, read)
                    if kind == "cls":
                        assert int(read) == label
                    else:
                        assert read.startswith(begin)
                        pixels.update(np.asarray(Image.open(io.BytesIO(read))).tobytes())
            assert tar.next() is None
        written += bytes(1024)
        assert content == written + bytes(-len(written) % 10_240)
        assert encoding != "png" or pixels.hexdigest() == entry["pixels_sha256"]
