"""The methods that `quality.py` compares: their training stages and the rows of the table."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from vae_scale.config.parsing import parse
from vae_scale.data.images import Images
from vae_scale.data.shards import ShardSet
from vae_scale.data.transfer import normalize_images
from vae_scale.errors import UserError
from vae_scale.models.vae import DEFAULT_GUIDANCE, Prior, SamplingConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64  # batch size of evaluation
HELD_OUT = "test"  # the split of the held-out images
SHARE = "--share="  # option of a stage in variants
CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT_SAMPLING = SamplingConfig(guidance=DEFAULT_GUIDANCE)  # explicit, since metrics are kept by these settings


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        name: Name in `--variant` and `--stages`.
        options: Options of `vae_scale.train`, or () for pythae's trainer; {earlier} is the run of the earlier stage.
        share: Share of the method's budget.
    """

    name: str
    options: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Row:
    """A row of the table: samples from a prior of a stage, given by its index."""

    name: str
    prior: Prior
    stage: int = 0
    sampling: SamplingConfig = DEFAULT_SAMPLING


@dataclass(frozen=True)
class Method:
    """Stages that are trained one after the other, and the rows of their samples."""

    name: str
    stages: tuple[Stage, ...]
    rows: tuple[Row, ...]


def _config(name: str) -> str:
    return f"--config={CONFIGS / name}"


PEERS = ("notebook", "pythae")
METHODS = (*PEERS, "ours")


def make_method(name: str, side: int) -> Method:
    """Returns one of `METHODS`, for images of `side` pixels."""
    if name == "notebook":
        stage = Stage(name, (_config("seed_notebook.yaml"),))
        return Method(name, (stage,), (Row("seed notebook, N(0, I)", "normal"),))
    if name == "pythae":
        return Method(name, (Stage(name),), (Row("pythae's VAE, its GMM sampler", "gmm"),))
    patch_size = 4 if side >= 64 else 2  # maps of at least 8 x 8 latents
    vae = Stage("vae", (_config("small.yaml"), f"--model.patch_size={patch_size}"), 0.25)
    flow = Stage("flow", (_config("small_prior.yaml"), "--prior.vae={earlier}"), 0.75)
    unguided = Row("ours, flow without guidance", "flow", 1, SamplingConfig(guidance=1))
    return Method(name, (vae, flow), (Row("ours, mixture", "gmm"), unguided, Row("ours, flow", "flow", 1)))


def select_methods(
    names: Sequence[str], variants: Sequence[str], side: int, stages: Sequence[str] | None = None
) -> list[Method]:
    """Returns the methods with these names, followed by the variants of `ours`.

    Args:
        names: Some of `METHODS`.
        variants: Texts "STAGE OPTIONS"; see `parse_variant`.
        side: Height and width of the images.
        stages: Names of the stages to which `ours` and its variants are limited; None for all.

    Raises:
        UserError: A name, a stage or an option is unknown.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods {','.join(unknown)}: unknown; choose from {', '.join(METHODS)}")
    ours = limit_stages(make_method("ours", side), stages)
    methods = [ours if name == "ours" else make_method(name, side) for name in names]
    methods += [parse_variant(text, ours) for text in variants]
    if not methods:
        raise UserError("--methods names no method")
    if len({method.name for method in methods}) < len(methods):
        raise UserError("--methods and --variant name a method twice")
    return methods


def limit_stages(method: Method, names: Sequence[str] | None) -> Method:
    """Returns the method with only its first stages, which must be those with the given names."""
    if names is None:
        return method
    stages = method.stages[: len(names)]
    if not names or tuple(names) != tuple(stage.name for stage in stages):
        available = ",".join(stage.name for stage in method.stages)
        raise UserError(f"--stages {','.join(names)}: must be the first of {available}")
    return dataclasses.replace(method, stages=stages, rows=tuple(row for row in method.rows if row.stage < len(stages)))


def parse_variant(text: str, method: Method) -> Method:
    """Returns a variant of a method, with a single row: samples of its last stage.

    Args:
        text: "STAGE OPTIONS" appends options of `vae_scale.train` to a stage; the option --share=S sets its share of the
            budget, and the other stages get the rest. "sample OPTIONS" changes the sampling from the flow prior.
        method: The method.

    Raises:
        UserError: The stage or an option is unknown.
    """
    try:
        name, *options = shlex.split(text) or [""]
        last = len(method.stages) - 1
        row = dataclasses.replace(next(row for row in reversed(method.rows) if row.stage == last), name=text)
        if name == "sample":
            if row.prior != "flow":
                raise UserError("requires the stage flow")
            return Method(text, method.stages, (dataclasses.replace(row, sampling=parse_sampling(options)),))
        names = [stage.name for stage in method.stages]
        if name not in names:
            raise UserError(f"unknown stage {name!r}; choose from {', '.join([*names, 'sample'])}")
        stages = [*method.stages]
        index = names.index(name)
        shares = [option for option in options if option.startswith(SHARE)]
        stages[index] = stage = dataclasses.replace(
            stages[index], options=(*stages[index].options, *(option for option in options if option not in shares))
        )
        parse(stage.options)
        if shares:
            stages = set_share(stages, index, float(shares[-1].removeprefix(SHARE)))
    except (UserError, ValueError) as error:
        raise UserError(f"--variant {text!r}: {error}") from None
    return Method(text, tuple(stages), (row,))


def set_share(stages: Sequence[Stage], index: int, share: float) -> list[Stage]:
    """Returns the stages with another share of the budget for the one at `index`.

    Raises:
        ValueError: The share is not between 0 and 1, or there are no other stages.
    """
    if not 0 < share < 1 or len(stages) == 1:
        raise ValueError(f"{SHARE}{share:g}: must be between 0 and 1, and requires several stages")
    others = sum(stage.share for stage in stages) - stages[index].share
    shares = [share if i == index else stage.share / others * (1 - share) for i, stage in enumerate(stages)]
    return [dataclasses.replace(stage, share=value) for stage, value in zip(stages, shares, strict=True)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_sampling(options: Sequence[str]) -> SamplingConfig:
    """Returns the options of sampling from the flow prior.

    Raises:
        UserError: An option is unknown or invalid.
    """
    default, parser = DEFAULT_SAMPLING, _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--guidance", type=float, default=default.guidance)
    args = parser.parse_args(options)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    return SamplingConfig(args.steps, guidance=args.guidance)


def training_splits(shards: ShardSet) -> list[str]:
    """Returns the names of all splits except the held-out one."""
    return [name for name in shards.splits if name != HELD_OUT]


def to_batches(images: Images) -> list[Tensor]:
    """Returns batches in [-1, 1] on the device."""
    return [normalize_images(part).to(DEVICE) for part in torch.from_numpy(images).split(BATCH)]
