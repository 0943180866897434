"""Reads a configuration in layers (TOML files left to right, then `--set`) and reports every problem at once.

Works on any tree of pydantic sections; `launcher.config.RunConfig` is the one that runs use.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.config_tree import KeyPath, describe, field_at, nearest_key, section_models, takes_text_only, valid_keys
from launcher.errors import ConfigError
from launcher.toml_writing import value_to_toml

Root = TypeVar("Root", bound=BaseModel)

_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """What a check across sections has to say."""

    keys: tuple[str, ...]
    """The keys involved, the one to change first."""
    message: str


@dataclass(frozen=True, kw_only=True)
class LoadedConfig(Generic[Root]):
    """A valid configuration, and where each key that is not a default was set."""

    config: Root
    origins: Mapping[str, str]
    """Dotted key to the file, or the `--set` argument, that had the last word."""


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """All layers merged: the values, and for each leaf the source of its value."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[str]


def load_config(
    root: type[Root],
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    cross_checks: Callable[[Root], Iterable[Complaint]] = lambda config: (),
) -> LoadedConfig[Root]:
    """The configuration from `files`, later ones over earlier ones, then `overrides` of the form `section.key=value`.

    `cross_checks` looks at what no section can see alone. Where some keys are bad it is run on the rest, and what it
    says about good keys joins the same report.

    Raises ConfigError with one line a problem: source, key, value, what is allowed, and the nearest valid key.
    """
    layers = _merge(root, files, overrides)
    problems = list(layers.problems)
    values, bad_paths = layers.values, set[KeyPath]()
    while True:
        try:
            config = root.model_validate(values)
        except ValidationError as error:
            found = _group_by_path(values, error)
            fresh = {path: details for path, details in found.items() if not _is_echo(path, details, bad_paths, layers)}
            problems += [_describe_problem(root, path, details, layers) for path, details in fresh.items()]
            pruned = _without(values, found)
            bad_paths |= fresh.keys()
            bad_paths |= {tuple(key.split(".")) for path in fresh if (key := nearest_key(root, path))}
            if pruned == values:
                break
            values = pruned
            continue
        problems += [
            f"{_source_of(tuple(complaint.keys[0].split('.')), layers)}: {complaint.message}"
            for complaint in cross_checks(config)
            if not any(_touches(tuple(key.split(".")), bad_paths) for key in complaint.keys)
        ]
        break
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{count} in the configuration:\n{listing}", tuple(problems))
    origins = {".".join(map(str, path)): origin for path, origin in layers.origins.items()}
    return LoadedConfig(config=config, origins=origins)


def _merge(root: type[BaseModel], files: Sequence[Path], overrides: Sequence[str]) -> _Layers:
    layers = _Layers(values={}, origins={}, problems=[])
    for file in files:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            layers.problems.append(f"{file}: no such file{_similar_file(file)}")
        except (OSError, UnicodeDecodeError) as error:
            layers.problems.append(f"{file}: cannot be read: {error}")
        except tomllib.TOMLDecodeError as error:
            layers.problems.append(f"{file}: not valid TOML: {error}")
        else:
            _overlay(layers, table, str(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            layers.problems.append(f"--set {override}: must have the form section.key=value")
            continue
        value: Any = _parse_value(root, path, text.strip())
        for part in reversed(path):
            value = {part: value}
        _overlay(layers, value, f"--set {override}")
    return layers


def _parse_value(root: type[BaseModel], path: KeyPath, text: str) -> Any:
    """`text` as TOML where it is TOML, else as the string that it is; never 2024 where the key wants a name."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    if len(table) > 1 or (not isinstance(value, str) and takes_text_only(root, path)):
        return text
    return value


def _overlay(layers: _Layers, table: Mapping[str, Any], source: str) -> None:
    """Lays `table` over the layers: tables merge key by key, anything else replaces what was there."""

    def lay(into: dict[str, Any], over: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                    forget(here)
                    layers.origins[here] = source
                lay(into[key], value, here)
            else:
                forget(here)
                into[key] = value
                layers.origins[here] = source

    def forget(path: KeyPath) -> None:
        for known in [known for known in layers.origins if known[: len(path)] == path]:
            del layers.origins[known]

    lay(layers.values, table, ())


def _is_echo(path: KeyPath, details: list[ErrorDetails], bad_paths: set[KeyPath], layers: _Layers) -> bool:
    """Whether an error only follows from one that is reported: a default stands in for a bad value, or a key is missing
    that an unreadable file may hold."""
    return _touches(path, bad_paths) or (details[0]["type"] == "missing" and bool(layers.problems))


def _group_by_path(values: Mapping[str, Any], error: ValidationError) -> dict[KeyPath, list[ErrorDetails]]:
    """Errors by the path of the key they are about: a union's members, which pydantic appends to it, are cut off."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        location, at = details["loc"], 0
        here: Any = values
        while at < len(location) and _has(here, location[at]):
            here = here[location[at]]
            at += 1
        if details["type"] == "missing" and at < len(location):
            at += 1
        grouped.setdefault(location[:at], []).append(details)
    return grouped


def _has(container: Any, key: str | int) -> bool:
    if isinstance(container, Mapping):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)


def _describe_problem(root: type[BaseModel], path: KeyPath, details: list[ErrorDetails], layers: _Layers) -> str:
    key = ".".join(map(str, path)) or "the configuration"
    value = _value_at(layers.values, path)
    shown = f"{key} = {_show(value)}" if value is not _ABSENT and not isinstance(value, Mapping) else key
    return f"{_source_of(path, layers)}: {shown}: {_explain(root, path, details)}"


def _explain(root: type[BaseModel], path: KeyPath, details: list[ErrorDetails]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        nearest = nearest_key(root, path)
        mend = f"; did you mean {nearest}?" if nearest else ""
        return f"unknown key{mend} (allowed here: {', '.join(valid_keys(root, path[:-1]))})"
    field = field_at(root, path)
    if kind == "missing":
        about = f" ({describe(field)}): {field.description}" if field and not section_models(root, path) else ""
        return f"must be set{about}"
    if kind in ("model_type", "dict_type") and section_models(root, path):
        return f"must be a table, [{'.'.join(map(str, path))}]"
    if kind == "string_pattern_mismatch" and field is not None and isinstance(field.json_schema_extra, dict):
        return f"must be {field.json_schema_extra['form']}"
    messages = dict.fromkeys(_plain(entry) for entry in details)
    text = " or ".join(messages)
    if kind == "literal_error" and field is not None:
        text += _similar_choice(details[0])
    return text


def _plain(details: ErrorDetails) -> str:
    """Pydantic's message in the words of this report."""
    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.replace("Input should be", "must be").replace("String should", "must")


def _similar_choice(details: ErrorDetails) -> str:
    allowed = details.get("ctx", {}).get("expected", "").replace(" or ", ", ").replace("'", "").split(", ")
    close = difflib.get_close_matches(str(details["input"]), allowed, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def _similar_file(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (there is no directory {file.parent} either)"
    folders = [file.parent, file.parent / "configs"]
    # Without the ending, which makes any two of them similar.
    found = {entry.stem: entry for folder in folders if folder.is_dir() for entry in folder.glob("*.toml")}
    found.pop("pyproject", None)
    close = difflib.get_close_matches(file.stem, found, n=1, cutoff=0.6)
    return f"; did you mean {found[close[0]]}?" if close else ""


def _source_of(path: KeyPath, layers: _Layers) -> str:
    """The layer that set `path`; for a table, those that set keys within it; else those of the table around it."""
    for length in range(len(path), 0, -1):
        prefix = path[:length]
        inside = dict.fromkeys(source for known, source in layers.origins.items() if known[:length] == prefix)
        if inside:
            return ", ".join(inside)
    return "defaults"


def _value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        if not _has(values, part):
            return _ABSENT
        values = values[part]
    return values


def _show(value: Any) -> str:
    try:
        text = value_to_toml(value)
    except TypeError:
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _touches(path: KeyPath, bad_paths: set[KeyPath]) -> bool:
    """Whether `path` is, contains or lies in a path that was reported already."""
    return any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in bad_paths)


def _without(values: Any, paths: Iterable[KeyPath]) -> Any:
    """`values` without what stands at `paths`; a list goes as a whole, since its elements have no names."""
    result = {key: _without(value, ()) if isinstance(value, Mapping) else value for key, value in values.items()}
    for path in paths:
        here: Any = result
        for part in path[:-1]:
            inner = here.get(part) if isinstance(here, dict) else None
            if not isinstance(inner, dict):
                break
            here = inner
        else:
            if path:
                here.pop(path[-1], None)
            continue
        here.pop(part, None)
    return result
