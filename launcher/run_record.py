"""A run's folder as the command line sees it: its resolved configuration, its attempts, and finding it again."""

from __future__ import annotations

import difflib
import os
import socket
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from launcher.config import RunConfig, load_run_config, resolved_toml
from launcher.config_loading import LoadedConfig
from launcher.errors import ConfigError, RunError
from launcher.toml_writing import value_to_toml
from megamodel.train.run_directory import RunDirectory

# With checkpoints there, another value of these would make another run of it. (The trainer compares the data's content
# itself, so where the text lies may change.)
_SETTLED = ("model", "data", "run.seed", "train.optimizer.name")
_FREE = ("model.preset", "data.cache_directory", "data.path", "data.file_pattern")


def changes_to_run(loaded: LoadedConfig[RunConfig]) -> list[str]:
    """A line for each key that this configuration changes of the run's last one. Writes nothing.

    Raises ConfigError when the run has checkpoints and the configuration no longer means the same model or data, and
    when the last configuration is damaged.
    """
    config = loaded.config
    directory = RunDirectory(config.run_directory)
    earlier = _flat(_last_config(directory)) if directory.config.exists() else {}
    now = _flat(tomllib.loads(resolved_toml(config)))
    keys = dict.fromkeys((*now, *earlier)) if earlier else {}
    changes = {
        key: (earlier.get(key), now.get(key))
        for key in keys
        # A key that came with an upgrade, and that nobody has set, changes nothing.
        if earlier.get(key) != now.get(key) and not (key not in earlier and _is_default(config, key, earlier))
    }
    settled = [key for key in changes if _within(key, _SETTLED) and not _within(key, _FREE)]
    if settled and any(directory.checkpoints.glob("step-*")):
        problems = tuple(f"{_source(loaded, key)}: {_describe(key, *changes[key])}" for key in settled)
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{directory.root} has checkpoints of another configuration:\n{listing}\n"
            "Put these back to continue it, or start another run with --set run.name=...",
            problems,
        )
    return [_describe(key, *pair) for key, pair in changes.items()]


def record_config(config: RunConfig) -> None:
    """Writes the resolved configuration into the run's folder. Only for one that training has accepted: that of a refused
    start would take the place of what the run was trained with.
    """
    directory = RunDirectory(config.run_directory)
    directory.root.mkdir(parents=True, exist_ok=True)
    partial = directory.config.with_suffix(".toml.partial")
    partial.write_text(
        f"# Resolved configuration of this run: `mega train` with this file repeats it.\n{resolved_toml(config)}"
    )
    os.replace(partial, directory.config)


def record_begin(directory: RunDirectory, *, num_ranks: int, environ: Mapping[str, str]) -> None:
    """The event `begin` of this process, which is the run's first rank: since when it lives, where, with how many ranks."""
    directory.append_event(
        "begin",
        began=psutil.Process().create_time(),
        host=environ.get("MEGA_HOST_NAME") or socket.gethostname(),
        num_ranks=num_ranks,
    )


def new_attempt(directory: RunDirectory) -> Path:
    """A new folder `logs/attempt-K` for the logs of this start of the run."""
    directory.logs.mkdir(parents=True, exist_ok=True)
    names = (path.name.removeprefix("attempt-") for path in directory.logs.glob("attempt-*"))
    taken = [int(name) for name in names if name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        attempt = directory.logs / f"attempt-{number}"
        try:
            attempt.mkdir()
            return attempt
        except FileExistsError:  # another start of the same run, at the same time
            number += 1


def find_run(run: Path, *, below: Path = Path("runs"), launched: bool = False) -> RunDirectory:
    """The run that `run` names: its folder, or its name where it lies `below`. With `launched`, one that waits to begin and
    has no configuration of its own yet is a run too.

    Raises RunError where there is no run, naming the most similar one.
    """
    for candidate in (run, below / run):
        if is_run(candidate, launched=launched):
            return RunDirectory(candidate)
        if is_run(candidate, launched=True):
            raise RunError(f"{candidate}: this run has not begun to train; `mega status {run}` tells its state")
    if run.is_dir():
        raise RunError(f"{run}: is not the folder of a run, which holds config.toml")
    around = run.parent if run.parent != Path() else below
    known = [found.root.name for found in runs_below(around, launched=launched)]
    close = difflib.get_close_matches(run.name, known, n=1, cutoff=0.5)
    looked = " and ".join(dict.fromkeys(str(path.absolute()) for path in (run, below / run)))
    mend = (
        f"did you mean {around / close[0]}?"
        if close
        else f"looked at {looked}; `mega train` and `mega launch` make one"
    )
    raise RunError(f"{run}: there is no such run; {mend}")


def is_run(folder: Path, *, launched: bool = False) -> bool:
    """Whether `folder` is that of a run that has begun; with `launched`, also of one that is to begin."""
    return (folder / "config.toml").is_file() or (launched and (folder / "launch" / "config.toml").is_file())


def runs_below(folder: Path, *, launched: bool = False) -> list[RunDirectory]:
    """The runs in `folder`, by name; none where there is no such folder."""
    return [RunDirectory(path) for path in sorted(folder.glob("*")) if is_run(path, launched=launched)]


def read_config(directory: RunDirectory) -> RunConfig:
    """The resolved configuration of a run, as it would start now. Raises ConfigError where it is damaged."""
    return load_run_config([directory.config]).config


def _last_config(directory: RunDirectory) -> dict[str, Any]:
    try:
        return tomllib.loads(directory.config.read_text(encoding="utf-8"))
    except ValueError as error:  # no TOML, or no text
        raise ConfigError(
            f"{directory.config}: is damaged ({error}); remove it: `mega train` with the run's configuration writes it anew"
        ) from error


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    def leaves(inner: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for key, value in inner.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    return dict(leaves(table, prefix))


def _is_default(config: BaseModel, key: str, earlier: Mapping[str, Any]) -> bool:
    *sections, name = key.split(".")
    at: Any = config
    for depth, section in enumerate(sections, start=1):
        default = type(at).model_fields[section].get_default(call_default_factory=True)
        at = getattr(at, section)
        # A section that may be absent, and was, is more than the defaults of its keys.
        was_there = any(_within(known, (".".join(sections[:depth]),)) for known in earlier)
        if not isinstance(at, BaseModel) or not (was_there or default == at):
            return False
    return bool(getattr(at, name) == type(at).model_fields[name].get_default(call_default_factory=True))


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _source(loaded: LoadedConfig[RunConfig], key: str) -> str:
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((loaded.origins[prefix] for prefix in prefixes if prefix in loaded.origins), "defaults")


def _describe(key: str, before: Any, now: Any) -> str:
    show = [value_to_toml(value) if value is not None else "not set" for value in (before, now)]
    return f"{key} = {show[1]}, but was {show[0]}"
