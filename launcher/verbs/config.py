"""`mega config show|schema|check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from launcher.config import RunConfig, load_run_config, resolved_toml
from launcher.config_tree import nearest_key, sections
from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import ConfigFiles, NumRanks, Overrides

KeyPrefix = Annotated[
    str | None, typer.Argument(metavar="SECTION.KEY", help="Only this section or key. Default: all of them.")
]


def show(out: Output, files: ConfigFiles, overrides: Overrides = None) -> int:
    """Print the resolved configuration: every key, and where each one was set that is not a default."""
    loaded = load_run_config(files, overrides or ())
    out.say(resolved_toml(loaded.config, loaded.origins).rstrip("\n"))
    out.result({"config": loaded.config.as_data(), "origins": dict(loaded.origins)})
    return 0


def schema(out: Output, key: KeyPrefix = None) -> int:
    """Explain every key: what it accepts, its default, and what it does. With --json: the JSON Schema."""
    if key is not None and not any(
        _matches(section.key, key) or _keys(section, key) for section in sections(RunConfig)
    ):
        nearest = nearest_key(RunConfig, tuple(key.split(".")))
        raise ConfigError(f"{key}: there is no such section or key" + (f"; did you mean {nearest}?" if nearest else ""))
    for section in sections(RunConfig):
        whole = key is None or _matches(section.key, key)
        settings = section.settings if whole else _keys(section, key)
        if whole:
            out.say(f"[{section.key}]  {_one_line(section.doc)}")
        for setting in settings:
            default = "required" if setting.required else f"default {json.dumps(setting.default)}"
            out.say(f"  {setting.key} ({setting.allowed}; {default})")
            out.say(f"      {_one_line(setting.doc)}")
    out.result(RunConfig.model_json_schema())
    return 0


def check(out: Output, files: ConfigFiles, overrides: Overrides = None, ranks: NumRanks = None) -> int:
    """Check a configuration without starting anything; every problem is reported at once."""
    loaded = load_run_config(files, overrides or (), num_ranks=ranks or 1)
    world = f"{ranks} ranks" if ranks and ranks > 1 else "1 rank"
    num_set = sum(1 for key in loaded.origins)
    out.say(f"{', '.join(map(str, files))}: no problems ({num_set} keys set, for {world})")
    out.result({"ok": True, "run_dir": str(loaded.config.run_directory), "ranks": ranks or 1})
    return 0


VERBS: dict[str, Callable[..., int]] = {"show": show, "schema": schema, "check": check}


def _matches(key: str, wanted: str) -> bool:
    return key == wanted or key.startswith(f"{wanted}.")


def _keys(section, wanted):
    return tuple(setting for setting in section.settings if setting.key == wanted)


def _one_line(text: str) -> str:
    return " ".join(text.split())
