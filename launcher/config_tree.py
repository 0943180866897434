"""What a tree of pydantic sections allows: its keys, their types, defaults and docstrings.

A path is the tuple of attribute names from the root, which is also the path in a TOML file and on the command line.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath = tuple[str | int, ...]

_TYPE_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "true or false",
    Path: "path",
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key that a configuration may set."""

    path: tuple[str, ...]
    allowed: str
    """Type and bounds in words, for example `integer, > 0`."""
    required: bool
    default: Any
    """The default as plain data; None where the key is required, or may be left out."""
    doc: str

    @property
    def key(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table of a configuration and the settings directly in it."""

    path: tuple[str, ...]
    doc: str
    optional: bool
    """Whether the table may be absent, which means something else than an empty one."""
    settings: tuple[Setting, ...]

    @property
    def key(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


def sections(root: type[BaseModel]) -> Iterator[Section]:
    """All tables below `root` in the order of their declaration, a table before those within it."""
    defaults = _defaults(root)
    for name, field in root.model_fields.items():
        for model in models_in(field.annotation):
            yield from _sections_of(model, (name,), defaults.get(name), field)


def _sections_of(model: type[BaseModel], path: tuple[str, ...], defaults: Any, at: FieldInfo) -> Iterator[Section]:
    known = defaults if isinstance(defaults, dict) else _defaults(model)
    nested = {name: found for name, field in model.model_fields.items() if (found := models_in(field.annotation))}
    settings = tuple(
        Setting(
            path=(*path, name),
            allowed=describe(field),
            required=field.is_required() and name not in known,
            default=known.get(name),
            doc=field.description or "",
        )
        for name, field in model.model_fields.items()
        if name not in nested
    )
    optional = type(None) in typing.get_args(at.annotation)
    yield Section(path=path, doc=at.description or model.__doc__ or "", optional=optional, settings=settings)
    for name, inner_models in nested.items():
        for inner_model in inner_models:
            yield from _sections_of(inner_model, (*path, name), known.get(name), model.model_fields[name])


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Defaults of the fields that have one, as plain data."""
    found = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            continue
        value = field.get_default(call_default_factory=True, validated_data={})
        found[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's annotation names: itself, in a union with None, or as elements of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]


def section_models(root: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that may stand at `path`; empty where a plain value or nothing stands."""
    models = [root]
    for part in path:
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [inner for field in fields for inner in models_in(field.annotation)]
    return models


def field_at(root: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """The declaration of the field at `path`, or None where there is no such field."""
    if not path or not isinstance(path[-1], str):
        return None
    fields = (model.model_fields.get(path[-1]) for model in section_models(root, path[:-1]))
    return next((field for field in fields if field is not None), None)


def takes_text_only(root: type[BaseModel], path: KeyPath) -> bool:
    """Whether the field at `path` wants a string and could not want a number, a truth value or a list."""
    field = field_at(root, path)
    return field is not None and _kinds(field.annotation) <= {str, Path} and _kinds(field.annotation) != set()


def _kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(argument) for argument in typing.get_args(annotation)))
    return set() if annotation is type(None) else {annotation}


def nearest_key(root: type[BaseModel], path: KeyPath) -> str | None:
    """The valid key most like the unknown `path`: in the same section first, then the same name in another one."""
    here, name = path[:-1], str(path[-1])
    siblings = [key for model in section_models(root, here) for key in model.model_fields]
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return ".".join(map(str, (*here, close[0])))
    others = {setting.key: setting.path[-1] for section in sections(root) for setting in section.settings}
    elsewhere = [key for key, leaf in others.items() if leaf == name]
    if elsewhere:
        return min(elsewhere, key=len)
    close = difflib.get_close_matches(name, list(others.values()), n=1, cutoff=0.8)
    return next((key for key, leaf in others.items() if close and leaf == close[0]), None)


def valid_keys(root: type[BaseModel], path: KeyPath) -> list[str]:
    """The names that the section at `path` accepts."""
    return [key for model in section_models(root, path) for key in model.model_fields]


def describe(field: FieldInfo) -> str:
    """What a field accepts, in words."""
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join([_describe_type(field.annotation), *bounds])


def _describe_type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin is typing.Annotated:
        return _describe_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe_type(argument) for argument in arguments if argument is not type(None))
    if origin in (list, tuple, set, frozenset):
        kinds = dict.fromkeys(_describe_type(argument) for argument in arguments if argument is not Ellipsis)
        return f"list of {' | '.join(kinds)}"
    if origin is dict:
        return "table"
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
