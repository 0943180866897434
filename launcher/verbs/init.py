"""`mega init`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import Overrides

Target = Annotated[Path, typer.Argument(metavar="FILE.toml", help="File to write; its name becomes the run's name.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")]


def init(out: Output, path: Target = Path("mega.toml"), overrides: Overrides = None, force: Force = False) -> int:
    """Write a configuration to start from, with every key explained; --set chooses values."""
    from launcher.config import load_run_config
    from launcher.starter import STARTING_POINT, starter_toml

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
    chosen = {override.partition("=")[0].strip() for override in overrides or ()}
    # What the user has chosen is not set twice: a complaint about it would name a setting that nobody wrote.
    defaults = (
        setting for setting in (f'run.name="{name}"', *STARTING_POINT) if setting.partition("=")[0] not in chosen
    )
    starting = (*defaults, *(overrides or ()))
    loaded = load_run_config((), starting)
    text = starter_toml(loaded.config, loaded.origins.keys())
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; choose another name, or overwrite it with --force") from None
    out.say(f"Wrote {path}. Next: mega config check {path} && mega train {path} --ranks 2")
    out.result({"path": str(path), "run_dir": str(loaded.config.run_directory)})
    return 0
