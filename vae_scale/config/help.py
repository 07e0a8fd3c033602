"""Descriptions of the options and the texts of `--help` and `--help-all`."""

import dataclasses
import functools
import json
import textwrap
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from vae_scale.config.options import Config

SECTIONS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)
}
COMMON = [
    "run",
    "data.shards",
    "model.preset",
    "objective.beta",
    "optimizer.lr",
    "train.images",
    "train.batch_size",
    "train.precision",
    "evaluate.every",
    "checkpoint.every",
]
USAGE = """\
usage: python -m vae_scale.train [--config FILE] [--OPTION VALUE ...] [--dry-run]

Trains a VAE or, with --prior.vae, a flow prior. To resume, run the same command again.
Options are taken from the preset, then from YAML files, then from the command line; later ones override.

  --config FILE  read options from a YAML file; may be repeated
  --dry-run      print the configuration, number of parameters, memory and steps, and exit
  --help-all     print all options with their defaults
"""
EXAMPLES = """\
examples:
  python -m vae_scale.train --config configs/demo.yaml
  python -m vae_scale.train --config configs/stl10.yaml --data.shards DIR --train.batch_size 256 --dry-run
  accelerate launch --config_file launch/ddp.yaml --num_processes 8 -m vae_scale.train --config configs/stl10.yaml
"""


class Option(NamedTuple):
    """Type, default and description of an option."""

    type: Any
    default: Any
    description: str

    def format(self, name: str) -> str:
        """Returns the entry of the option in a help text."""
        text = textwrap.fill(self.description, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        return f"  --{name} ({describe_type(self.type)}; default: {format_default(self.default)})\n{text}"


@functools.cache
def list_options() -> dict[str, Option]:
    """Returns all options by their full names, such as train.batch_size."""
    options = {}
    for prefix, kind in {"": Config, **{f"{name}.": kind for name, kind in SECTIONS.items()}}.items():
        entries = textwrap.dedent(kind.__doc__.split("Attributes:\n")[1]).strip().splitlines()
        texts = dict(entry.split(": ", 1) for entry in entries)
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(field.type):
                options[prefix + field.name] = Option(field.type, getattr(kind(), field.name), texts[field.name])
    return options


def describe_type(kind: Any) -> str:
    """Returns the values that a type allows, such as "a positive integer or 'auto'"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, args))
    if origin in (list, tuple):
        return f"a list{f' of {len(args)}' if origin is tuple else ''}, each value {describe_type(args[0])}"
    return {bool: "true or false", str: "a string", type(None): "null"}.get(kind, kind.__name__)


def format_default(value: Any) -> str:
    """Returns a default as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _title(section: str) -> str:
    return SECTIONS[section].__doc__.splitlines()[0]


def short_help() -> str:
    """Returns the text of `--help`."""
    sections = [f"  {name:<12} {_title(name)}" for name in SECTIONS]
    common = [list_options()[name].format(name) for name in COMMON]
    return "\n".join([USAGE, "sections (options are --SECTION.NAME):", *sections, "", "common options:", *common, "", EXAMPLES])


def full_help() -> str:
    """Returns the text of `--help-all`."""
    lines, current = [USAGE], ""
    for name, option in list_options().items():
        section = name.rpartition(".")[0]
        if section != current:
            lines.append(f"\n{section}: {_title(section)}")
            current = section
        lines.append(option.format(name))
    return "\n".join([*lines, "", EXAMPLES])
