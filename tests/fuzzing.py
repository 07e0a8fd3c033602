"""Strategies and checks for tests with damaged and malicious files."""

import contextlib
import io
import json
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import discs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from vae_scale.data.shards import ShardSet
from vae_scale.errors import UserError
from vae_scale.pack import main as pack

MIB = 2**20
fuzz_settings = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# Values that break parsers of numbers, names and structures.
ODD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "../x", "/etc/passwd", "a\0b", "\ud800"]
    ),
    st.sampled_from(["\x1b[2J", "ü" * 300, [], {}, [[]], {"a": []}, [None], "e" * 5000, "pipe:id", "file:///etc/passwd"]),
    st.integers(),
    st.text(max_size=9),
)


@st.composite
def corrupted(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few bits flipped, or ranges truncated, removed, duplicated or overwritten, often near the beginning."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = max(len(result) - 1, 0)
        begin, size = draw(st.one_of(st.integers(0, end), st.integers(0, min(700, end)))), draw(st.integers(1, 600))
        kind = draw(st.sampled_from(["flip", "flip", "truncate", "remove", "duplicate", "fill", "nines"]))
        if kind == "flip" and result:
            result[begin] ^= 1 << draw(st.integers(0, 7))
        elif kind == "truncate":
            del result[begin:]
        elif kind == "remove":
            del result[begin : begin + size]
        elif kind == "duplicate":
            result[begin:begin] = result[begin : begin + size]
        elif kind == "fill":
            result[begin : begin + size] = bytes([draw(st.integers(0, 255))]) * len(result[begin : begin + size])
        elif kind == "nines":
            result[begin : begin + 11] = b"9" * 11
    return bytes(result)


@st.composite
def mutated_json(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one part replaced or removed."""
    result = json.loads(json.dumps(content))
    node = result
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return result
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and draw(st.integers(0, 3)):
            node = node[key]
            continue
        if draw(st.integers(0, 4)) == 0:
            del node[key]
        else:
            node[key] = draw(ODD_VALUES)
        return result


@contextlib.contextmanager
def allow_user_error(*names: object) -> Iterator[None]:
    """Accepts success, or a `UserError` that contains one of `names`."""
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    assert not message or any(str(name) in message for name in names), message
    assert len(message) < 2000


def expect_user_error(call: Callable[[], object], *parts: object) -> str:
    """Returns the message of the `UserError` that `call` must raise, which must contain all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    return message


def expect_pack_error(capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    """Returns the error lines of a `pack` that must exit with code 2, without control sequences in its output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        pack([str(option) for option in options])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "\x1b[2J" not in output.out + output.err
    return [line for line in output.err.splitlines() if line.startswith("error: ")]


def list_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@contextlib.contextmanager
def limit_memory(max_bytes: int = 64 * MIB) -> Iterator[None]:
    """Fails if the block allocates more than `max_bytes`."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


def read_all(folder: Path) -> np.ndarray:
    shards = ShardSet.open(folder)
    assert len(shards.labels) == len(shards)
    return np.concatenate([shards.read(index) for index in range(len(shards.shards))])


def pack_index(path: Path, *options: str) -> None:
    from vae_scale.data.indexing import index

    index([str(path)], None, 16 if "resize" in options else None, 1)


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """Returns the header of a tar member with any size, even a negative one."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = max(size, 0)
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        raw[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def tar_of(*entries: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for entry, part in entries:
            member = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            if member.isreg():
                member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    return content.getvalue()


def jpeg(size: tuple[int, int] = (32, 32)) -> bytes:
    content = io.BytesIO()
    Image.fromarray(discs(1, 3)[0]).resize(size).save(content, "JPEG")
    return content.getvalue()
