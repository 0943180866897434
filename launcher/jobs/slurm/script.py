"""The batch script of a job, from a jinja2 template: ours, `job.sh.j2`, or one of the user's in its place."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.jobs.job_record import JobFolder
from megamodel.train.run_directory import RunDirectory

_LINES = ("extra_lines", "setup_lines")


def template_text() -> str:
    """Our template."""
    return files("launcher.jobs.slurm").joinpath("job.sh.j2").read_text(encoding="utf-8")


def supervisor_command(run: RunDirectory, python: str = sys.executable) -> tuple[str, ...]:
    """What the batch script becomes. It runs outside of any container: it needs SLURM's programs."""
    return (python, "-m", "launcher", "supervise", str(run.root))


def render_script(
    config: RunConfig, *, ranks_per_node: int, working_directory: Path, also_exclude: Iterable[str] = ()
) -> str:
    """The script of a job. `also_exclude`: hosts that an earlier job of the run has found bad.

    Raises ConfigError for a value that no line can hold, and for a template that cannot be read, names what is not there,
    or leaves the supervisor out.
    """
    _check_values(config)
    run = RunDirectory(config.run_directory)
    supervisor = shlex.join(supervisor_command(run))
    variables = {
        "run_name": config.run.name,
        "job_name": f"mega-{config.run.name}",
        # Percent signs begin what SLURM fills in.
        "output": str(JobFolder(run).output.absolute()).replace("%", "%%"),
        "working_directory": str(working_directory),
        "run_directory": str(run.root),
        "nodes": config.slurm.nodes or config.launch.nodes,
        "ranks_per_node": ranks_per_node,
        "exclude": ",".join(filter(None, [config.slurm.exclude, *sorted(also_exclude)])),
        "supervisor": supervisor,
        "slurm": config.slurm.model_dump(mode="json"),
        "launch": config.launch.model_dump(mode="json"),
    }
    given = config.slurm.template
    script = _render(_read_template(given), variables, f"slurm.template = {given}" if given else "job.sh.j2")
    if given is not None:
        _check_own_script(script, supervisor, given)
    return script


def _read_template(path: str | None) -> str:
    if path is None:
        return template_text()
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"slurm.template = {path}: cannot be read: {reason}") from error


def _render(text: str, variables: Mapping[str, Any], what: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    try:
        return environment.from_string(text).render(variables)
    except jinja2.UndefinedError as error:
        known = ", ".join(sorted(variables))
        raise ConfigError(f"{what}: {error.message}; what a template may name: {known}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{what}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # what a template computes may fail in any way
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error


def _check_values(config: RunConfig) -> None:
    """A line break within a value would begin a line of the script of its own."""
    values = {f"slurm.{key}": value for key, value in config.slurm.model_dump(mode="json").items() if key not in _LINES}
    values["run.directory"] = config.run.directory
    problems = tuple(
        f"{key} = {value!r}: must hold no line break or other control character"
        for key, value in values.items()
        if isinstance(value, str) and not value.isprintable()
    )
    if problems:
        raise ConfigError("\n".join(problems), problems)


def _check_own_script(script: str, supervisor: str, path: str) -> None:
    if not script.startswith("#!"):
        raise ConfigError(f"slurm.template = {path}: must begin with #!, such as #!/bin/bash, or sbatch refuses it")
    lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    if not any(supervisor in line for line in lines):
        raise ConfigError(
            f"slurm.template = {path}: never starts the run: its last line should be `exec {{{{ supervisor }}}}` "
            "(`mega launch --show-template` prints the template that it takes the place of)"
        )
