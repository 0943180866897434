"""What a job needs of SLURM: its programs, and the keys by which it asks for hosts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from launcher.config import RunConfig
from launcher.errors import ConfigError
from launcher.toml_writing import value_to_toml

_PROGRAMS = {
    "srun": "starts the hosts' agents",
    "scontrol": "tells the job's hosts, and queues it again",
    "sinfo": "tells which hosts work",
    "squeue": "tells how the job is",
    "scancel": "ends what was started",
}
_KEYS = ("nodes", "gpus", "cpus_per_rank", "memory", "time", "partition", "account", "qos", "constraint", "exclude")


def check_programs(environ: Mapping[str, str], *, may_be_set_up: bool) -> str | None:
    """Raises ConfigError where the job's supervisor would lack a program of SLURM: it has the PATH of who launches. Where the
    script's own lines may bring them (`may_be_set_up`), returns that as a doubt."""
    path = environ.get("PATH", "")
    missing = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if not missing:
        return None
    listed = ", ".join(f"{name}, which {_PROGRAMS[name]}" for name in missing)
    sentence = f"the job's supervisor needs programs of SLURM that are not on PATH here: {listed}"
    if may_be_set_up:
        return f"{sentence}; slurm.setup_lines must bring them"
    raise ConfigError(f"{sentence}; put SLURM's bin folder on PATH")


def asked_by(config: RunConfig, ranks_per_node: int) -> str:
    """The keys by which a job asks for hosts, those that are set, with their values: any of them may be refused."""
    values: dict[str, object] = {
        "launch.nodes": config.launch.nodes,
        "launch.ranks_per_node": ranks_per_node,
        **{f"slurm.{name}": getattr(config.slurm, name) for name in _KEYS},
    }
    listed = ", ".join(f"{key} = {value_to_toml(value)}" for key, value in values.items() if value is not None)
    lines = "" if not config.slurm.extra_lines else " and slurm.extra_lines"
    return f"it is asked for {listed}{lines}; change what the cluster does not have"
