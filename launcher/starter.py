"""The commented configuration that `mega init` writes. Made from the sections' docstrings, so it cannot go stale."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from typing import Any

from launcher.config import RunConfig
from launcher.config_tree import Section, sections
from launcher.toml_writing import dotted, value_to_toml

_WIDTH = 110
_HEAD = """\
Configuration of a run. Check it with `mega config check`, start or continue the run with `mega train`.
A line that starts with `#` and no space after it is a key at its default: remove the `#` to set it.
A table that is commented out, such as `#[model.moe]`, needs its own `#` removed too.
"""

STARTING_POINT = ("model.preset=moe-7m", "data.source=stdlib", "data.tokenizer.vocab_size=4096", "train.steps=1000")
"""What a new file sets: a small decoder on the sources of Python's standard library, which every machine has."""


def starter_toml(config: RunConfig, set_keys: Collection[str]) -> str:
    """`config` as a file with every key, its docstring and what it accepts; all but `set_keys` commented out."""
    values = config.as_data()
    lines = _prose(_HEAD)
    for section in sections(RunConfig):
        lines += ["", *_section(section, _at(values, section.path), set_keys)]
    return "\n".join(lines) + "\n"


def _section(section: Section, values: dict[str, Any] | None, set_keys: Collection[str]) -> list[str]:
    active = not section.optional or any(setting.key in set_keys for setting in section.settings)
    lines = [*_prose(section.doc), f"{'' if active else '#'}[{dotted(section.path)}]"]
    for setting in section.settings:
        value = (values or {}).get(setting.path[-1])
        lines += _prose(f"{setting.doc} ({setting.allowed})")
        if value is None:
            lines.append(f"# {setting.path[-1]} is not set.")
        else:
            mark = "" if setting.key in set_keys else "#"
            lines.append(f"{mark}{setting.path[-1]} = {value_to_toml(value)}")
    return lines


def _prose(text: str) -> list[str]:
    paragraphs = text.strip().splitlines() if text == _HEAD else [" ".join(text.split())]
    return [f"# {line}" for paragraph in paragraphs for line in textwrap.wrap(paragraph, _WIDTH)]


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        values = None if values is None else values.get(part)
    return values
