"""The table of options in configs/README.md, made from the dataclasses: run this file to write it anew."""

import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from vae_scale import config

README = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- options -->", "<!-- end -->"


def described(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says about each attribute."""
    text = inspect.getdoc(kind) or ""
    block = textwrap.dedent(text.split("Attributes:\n")[1])
    entries = re.split(r"\n(?=\w+: )", block.strip())
    texts = {entry.split(":")[0]: " ".join(entry.split(":", 1)[1].split()) for entry in entries}
    return {name: text.replace("|", "\\|") for name, text in texts.items()}


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, (list, tuple)):
        return str(list(value))
    return words.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def table() -> str:
    """Every option with its default and what it does."""
    lines = ["| option | default | |", "| --- | --- | --- |"]
    default = config.Config()
    texts = described(config.Config)
    for part in dataclasses.fields(default):
        value = getattr(default, part.name)
        if not dataclasses.is_dataclass(value):
            lines.append(f"| `{part.name}` | {shown(value)} | {texts[part.name]} |")
            continue
        inner = described(type(value))
        for option in dataclasses.fields(value):
            name = f"{part.name}.{option.name}"
            lines.append(f"| `{name}` | {shown(getattr(value, option.name))} | {inner[option.name]} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A README with the table between its marks."""
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{table()}\n{END}" + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    sys.exit(0 if README.write_text(with_table(README.read_text())) else 1)
