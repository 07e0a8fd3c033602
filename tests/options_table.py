"""The table of options in configs/README.md. Run this file to update it."""

from pathlib import Path

from vae_scale.config.help import format_default, list_options

README = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- options -->", "<!-- end -->"


def format_table() -> str:
    """Returns all options with their defaults and descriptions as a Markdown table."""
    rows = [
        f"| `{name}` | {format_default(option.default)} | {option.description.replace('|', chr(92) + '|')} |"
        for name, option in list_options().items()
    ]
    return "\n".join(["| option | default | |", "| --- | --- | --- |", *rows])


def insert_table(text: str) -> str:
    """Returns the text of a README with the table between its two markers."""
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{format_table()}\n{END}" + text[text.index(END) + len(END) :]


if __name__ == "__main__":
    README.write_text(insert_table(README.read_text()))
