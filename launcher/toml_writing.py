"""Writes plain data as TOML, which the standard library only reads.

Covers what configurations hold: tables, strings, numbers, truth values and lists of these (tables in a list are
written inline). TOML has no null: a key whose value is None is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(data: Mapping[str, Any], *, note: Callable[[tuple[str, ...]], str] = lambda path: "") -> str:
    """`data` as a TOML document. `note(path)` gives a comment to put behind a key, or nothing.

    Raises TypeError for a value that TOML cannot hold.
    """
    lines: list[str] = []
    _write_table(data, (), note, lines)
    return "\n".join(lines).strip("\n") + "\n"


def _write_table(
    table: Mapping[str, Any], path: tuple[str, ...], note: Callable[[tuple[str, ...]], str], lines: list[str]
) -> None:
    values = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    if path and (values or not inner):
        lines += ["", f"[{dotted(path)}]"]
    for key, value in values.items():
        comment = note((*path, key))
        lines.append(f"{dotted((key,))} = {value_to_toml(value)}" + (f"  # {comment}" if comment else ""))
    for key, value in inner.items():
        _write_table(value, (*path, key), note, lines)


def dotted(path: Sequence[str]) -> str:
    """A key path as TOML writes it, with quotes where a name needs them."""
    return ".".join(part if _BARE_KEY.fullmatch(part) else _string(part) for part in path)


def value_to_toml(value: Any) -> str:
    """One value as TOML writes it on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # inf and nan are spelled alike in TOML and Python
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        pairs = (f"{dotted((key,))} = {value_to_toml(inner)}" for key, inner in value.items() if inner is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_to_toml(element) for element in value) + "]"
    raise TypeError(f"TOML cannot hold a {type(value).__name__}: {value!r}")


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
