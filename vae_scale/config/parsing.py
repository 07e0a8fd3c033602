"""Parsing and validation of options: preset < YAML files < command line. Nothing here imports torch."""

import argparse
import copy
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vae_scale.config.help import SECTIONS, describe_type, full_help, list_options, short_help
from vae_scale.config.options import PRESETS, Config, VAEConfig
from vae_scale.errors import UserError, one_line

MAX_FILE_BYTES, MAX_FILE_DEPTH = 2**20, 8  # of a configuration file
MAX_LEVELS = 16  # of a network; no option is a longer list


def parse(argv: Sequence[str] | None = None) -> tuple[Config, bool]:
    """Returns the configuration of a command line, and whether it contains `--dry-run`.

    `--help` and `--help-all` print the help and exit.

    Raises:
        UserError: An option is unknown, has an invalid value, or contradicts another one.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for flag in (["-h", "--help"], ["--help-all"], ["--dry-run"]):
        parser.add_argument(*flag, action="store_true", default=False)
    parser.add_argument("--config", action="append", default=[])
    for name in list_options():
        parser.add_argument(f"--{name}")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from None
    options = vars(args)
    files, dry_run = options.pop("config"), options.pop("dry_run")
    help_all, help_short = options.pop("help_all"), options.pop("help")
    if help_all or help_short:
        print(full_help() if help_all else short_help())
        raise SystemExit(0)
    if unknown and unknown[0].startswith("--"):
        raise UserError(_unknown_option(unknown[0][2:].partition("=")[0]))
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; options are given as --NAME VALUE")
    types = {name: option.type for name, option in list_options().items()}
    values: dict[str, Any] = {}
    for name in files:
        values |= _load_file(name, types)
    values |= _convert(options, types, from_text=True)
    config = Config(run=f"runs/{Path(files[-1]).stem}" if files else None)
    preset = PRESETS[values.get("model.preset", config.model.preset)]
    for name, value in ({f"model.{key}": copy.copy(value) for key, value in preset.items()} | values).items():
        section, _, key = name.rpartition(".")
        if (name, value) != ("run", None):
            setattr(getattr(config, section) if section else config, key, value)
    validate(config)
    return config, dry_run


def vae_config_from_dict(values: Any, name: str) -> VAEConfig:
    """Returns the configuration of a network from the untrusted content of the JSON file `name`.

    Raises:
        UserError: The content is not a valid configuration.
    """
    try:
        if not isinstance(values, dict):
            raise UserError(f"expected an object with the options of a network, got {_format_value(values)}")
        config = VAEConfig(**_convert(values, {field.name: field.type for field in dataclasses.fields(VAEConfig)}))
        validate(Config(model=config))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return config


def _load_file(name: str, types: dict[str, Any]) -> dict[str, Any]:
    """Returns the options in an untrusted YAML file."""
    try:
        with Path(name).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"the file has more than {MAX_FILE_BYTES:,} bytes")
        depth = 0
        for event in yaml.parse(content.decode(), yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # nested aliases can expand to more than fits into memory
                raise UserError(f"YAML aliases (*{event.anchor}) are not supported")
            if "\0" in str(getattr(event, "value", "")):  # not allowed in paths
                raise UserError("a value contains a NUL character")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_FILE_DEPTH:
                raise UserError(f"values are nested more than {MAX_FILE_DEPTH} deep")
        sections = yaml.safe_load(content)
        if not isinstance(sections, dict):
            raise UserError("the file contains no options; expected, for example, train: {images: 1000}")
        values: dict[str, Any] = {}
        for key, value in sections.items():
            if key not in SECTIONS:
                values[str(key)] = value
            elif isinstance(value, dict):
                values |= {f"{key}.{name_in_section}": option for name_in_section, option in value.items()}
            else:
                raise UserError(f"{key}: expected a section with options below it, got {_format_value(value)}")
        return _convert(values, types)
    except OSError as error:
        raise UserError(f"--config {name}: {error.strerror}") from None
    except (UserError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {name}: {one_line(error):.400}") from None


def _convert(values: dict[str, Any], types: dict[str, Any], from_text: bool = False) -> dict[str, Any]:
    """Returns `values` converted to the types of their options. With `from_text`, they are strings from the command line."""
    converted = {}
    for name, value in values.items():
        if name not in types:
            raise UserError(_unknown_option(name))
        if isinstance(value, list) and len(value) > MAX_LEVELS:
            raise UserError(f"{name} has {len(value):,} values; the maximum is {MAX_LEVELS}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=types[name])
        try:
            if value is None and type(None) not in get_args(types[name]):  # jsonargparse accepts null for every type
                raise ValueError
            parsed = parser.parse_args([f"--value={value}"]) if from_text else parser.parse_object({"value": value})
        except (ArgumentError, ArithmeticError, RecursionError, TypeError, ValueError):
            message = f"{name}: expected {describe_type(types[name])}, got {_format_value(value)}"
            raise UserError(message) from None
        converted[name] = _to_builtin(parsed.value)
    return converted


def _to_builtin(value: Any) -> Any:
    """Converts restricted number types, which YAML cannot write, to plain numbers."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_builtin, value))
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def _format_value(value: Any) -> str:
    try:
        too_large = abs(float(value)) >= 2**63
    except OverflowError:
        too_large = True
    except (TypeError, ValueError):
        return "null" if value is None else f"{value!r:.80}"
    return f"{value!s:.80}" + ("; numbers must be below 2^63" if too_large else "")


def _unknown_option(name: str) -> str:
    """Returns the message for an unknown option, with the most similar one."""
    options, key = list(list_options()), name.rpartition(".")[2]
    if name in SECTIONS:
        return f"{name} is a section; set its options, such as --{next(o for o in options if o.startswith(f'{name}.'))}"
    keys = {option: option.rpartition(".")[2] for option in options}
    matches = (
        difflib.get_close_matches(name, [option for option in options if keys[option] == key], 1, cutoff=0)
        or difflib.get_close_matches(name, options, 1)
        or [option for option in options if difflib.get_close_matches(key, [keys[option]])]
    )
    hint = f"did you mean {matches[0]}?" if matches else "see --help-all for the options"
    return f"unknown option {name:.80}; {hint}"


def validate(config: Config) -> None:
    """Checks constraints that the types of options do not express.

    Raises:
        UserError: Options contradict each other or have no effect.
    """
    model, data, train = config.model, config.data, config.train
    levels = len(model.channel_mult)
    _require(0 < levels <= MAX_LEVELS, "model.channel_mult", f"has {levels} values; it must have 1 to {MAX_LEVELS}")
    if train.batch_size != "auto":
        divides = train.batch_size % data.streams == 0
        _require(divides, "data.streams", f"is {data.streams}; it must divide train.batch_size ({train.batch_size})")
    _require(bool(data.train_splits), "data.train", "contains no split")
    _require(data.test not in data.train_splits, "data.test", f"is {data.test}, which is also in data.train; use another split")
    if train.compile == "cuda_graphs":
        text = "cuda_graphs requires train.gradient_accumulation_steps 1"
        _require(train.gradient_accumulation_steps == 1, "train.compile", text)
    _require(config.prior.width % 32 == 0, "prior.width", f"is {config.prior.width}; it must be a multiple of 32")
    if model.network == "kl":
        _require(model.latent == "spatial", "model.latent", "vector requires model.network resnet, not kl")
    if model.network == "seed_notebook":
        is_supported = model.likelihood == "mse" and model.latent == "vector"
        _require(is_supported, "model.network", "seed_notebook requires model.latent vector and model.likelihood mse")


def check_batch_size(config: Config, world_size: int) -> None:
    """Checks that a batch can be divided among `world_size` processes.

    Raises:
        UserError: The batch size is not divisible.
    """
    batch_size, steps = config.train.global_batch_size, config.train.gradient_accumulation_steps
    divisor = f"{world_size * steps} ({world_size} processes x train.gradient_accumulation_steps {steps})"
    text = f"is {batch_size}; it must be a multiple of {divisor}"
    _require(batch_size % (world_size * steps) == 0, "train.batch_size", text)


def check_image_shape(config: VAEConfig, shape: tuple[int, int, int]) -> None:
    """Checks that the network supports images of shape [H, W, C].

    Raises:
        UserError: The shape is not supported.
    """
    height, width, channels = shape
    size, factor = f"the images of the shards are {height}x{width}", config.downsampling_factor
    _require(height == width, "data.shards", f"{size}; they must be square")
    _require(channels == 3, "data.shards", f"the images have {channels} channels; they must have 3")
    text = (
        f"{size}, not divisible by f = {factor} (model.patch_size x 2 for each level after the first); "
        "change the levels, or pack the images with another --resolution"
    )
    _require(height % factor == 0, "model.channel_mult", text)


def _require(condition: bool, name: str, text: str) -> None:
    if not condition:
        raise UserError(f"{name} {text}")
