"""`mega config show|schema|check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from launcher.config_tree import Section, Setting, nearest_key, sections
from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import ConfigFiles, NumRanks, Overrides

KeyPrefix = Annotated[
    str | None, typer.Argument(metavar="SECTION.KEY", help="Only this section or key. Default: all of them.")
]


def show(out: Output, files: ConfigFiles, overrides: Overrides = None) -> int:
    """Print the resolved configuration: every key, and where each one was set that is not a default."""
    from launcher.config import load_run_config, resolved_toml

    loaded = load_run_config(files, overrides or ())
    out.say(resolved_toml(loaded.config, loaded.origins).rstrip("\n"))
    out.result({"config": loaded.config.as_data(), "origins": dict(loaded.origins)})
    return 0


def schema(out: Output, key: KeyPrefix = None) -> int:
    """Explain every key: what it accepts, its default, and what it does. With --json: the JSON Schema."""
    from launcher.config import RunConfig

    chosen = [(section, _chosen(section, key)) for section in sections(RunConfig)]
    if key is not None and not any(settings for _, settings in chosen):
        nearest = nearest_key(RunConfig, tuple(key.split(".")))
        raise ConfigError(f"{key}: there is no such section or key" + (f"; did you mean {nearest}?" if nearest else ""))
    for section, settings in chosen:
        if settings == section.settings:
            out.say(f"[{section.key}]  {_one_line(section.doc)}")
        for setting in settings:
            default = "required" if setting.required else f"default {json.dumps(setting.default)}"
            out.say(f"  {setting.key} ({setting.allowed}; {default})")
            out.say(f"      {_one_line(setting.doc)}")
    out.result(RunConfig.model_json_schema())
    return 0


def check(out: Output, files: ConfigFiles, overrides: Overrides = None, ranks: NumRanks = None) -> int:
    """Check a configuration without starting anything; every problem is reported at once."""
    from launcher.config import load_run_config
    from launcher.layout_summary import in_words, layout_summary

    loaded = load_run_config(files, overrides or (), num_ranks=ranks or 1)
    summary = layout_summary(loaded.config, ranks or 1)
    world = f"{ranks} ranks ({in_words(summary)['layout']})" if ranks and ranks > 1 else "1 rank"
    out.say(f"{', '.join(map(str, files))}: no problems, for {world}")
    out.result({"ok": True, "run_dir": str(loaded.config.run_directory), "ranks": ranks or 1, **summary})
    return 0


VERBS: dict[str, Callable[..., int]] = {"show": show, "schema": schema, "check": check}


def _chosen(section: Section, key: str | None) -> tuple[Setting, ...]:
    """The settings of a section that `key` names, by themselves or by a section around them."""
    if key is None or f"{section.key}.".startswith(f"{key}."):
        return section.settings
    return tuple(setting for setting in section.settings if setting.key == key)


def _one_line(text: str) -> str:
    return " ".join(text.split())
