"""Peers of the benchmarks from other libraries, some of which may not be installed."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from vae_scale.errors import UserError, one_line

Peer = TypeVar("Peer")
REMEDY = "pip install 'vae_scale[bench]'"
REMEDIES = {"ffcv": "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev; pip install ffcv"}


def create_peers(factories: Mapping[str, Callable[[], list[Peer]]]) -> tuple[list[Peer], dict[str, str]]:
    """Creates the peers of each library.

    Returns:
        The peers, and for each library that is not available, the reason in one line.
    """
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for library, create in factories.items():
        try:
            peers += create()
        except UserError as error:
            missing[library] = str(error)
        except ImportError as error:
            missing[library] = f"{one_line(error)}: {REMEDIES.get(library, REMEDY)}"
    return peers, missing
