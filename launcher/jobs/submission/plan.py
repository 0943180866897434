"""What `mega launch` is about to start: the configuration with all that is wrong with it, before anything starts."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config import RunConfig, layout_complaints, load_run_config
from launcher.config_loading import LoadedConfig
from launcher.errors import ConfigError, RunError
from launcher.jobs.backends.mpi import find_mpirun
from launcher.jobs.config import ContainerConfig
from launcher.jobs.host_choice import ranks_on_a_host
from launcher.jobs.hostfile import ListedHost, read_hostfile
from launcher.jobs.job_record import BackendName
from launcher.jobs.slurm.script import render_script
from launcher.jobs.slurm.step import is_image_file
from launcher.jobs.submission.srun_says import SrunSays, srun_says
from launcher.toml_writing import value_to_toml
from megamodel.train.run_directory import RunDirectory

_UNIT_SECONDS = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}
# SLURM looks at time limits now and then only: its warning comes up to 60 s early. And a start takes its time.
_SIGNAL_IS_EARLY_SECONDS = 90
_HOSTS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """A launch that may go ahead, as far as can be told from here."""

    loaded: LoadedConfig[RunConfig]
    """With `launch.nodes` and `launch.ranks_per_node` as they will be, wherever they come from."""
    backend: BackendName
    hosts: tuple[ListedHost, ...]
    """Of the hostfile."""
    doubts: tuple[str, ...]
    """What could not be looked at from here, and what may end badly."""

    @property
    def config(self) -> RunConfig:
        """The configuration that the job runs with."""
        return self.loaded.config

    @property
    def run(self) -> RunDirectory:
        """The run's folder."""
        return RunDirectory(self.config.run_directory)

    @property
    def ranks_per_host(self) -> int:
        """Ranks of each host."""
        return self.config.launch.ranks_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Of the first attempt."""
        return self.config.launch.nodes * self.ranks_per_host

    @property
    def nodes_asked(self) -> int:
        """Hosts, spare ones too."""
        return (self.config.slurm.nodes if self.backend == "slurm" else None) or self.config.launch.nodes


def plan_launch(
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    backend: BackendName,
    environ: Mapping[str, str],
    hostfile: Path | None = None,
) -> LaunchPlan:
    """Checks everything that can be checked without starting anything; writes nothing.

    Raises ConfigError with all problems: of single keys first, then of what does not fit together.
    """
    loaded = load_run_config(files, overrides)
    hosts = () if hostfile is None else read_hostfile(hostfile)
    config = _settled(loaded, backend, environ, hosts)
    slots = _slots_problems(loaded.config.launch.ranks_per_node, hosts)
    loaded = LoadedConfig(config=config, origins=loaded.origins)
    said = srun_says(config.slurm, environ) if backend == "slurm" else SrunSays(problems={}, doubts={})
    doubts = (*_doubts(config, backend), *(f"{key}: {sentence}" for key, sentence in said.doubts.items()))
    plan = LaunchPlan(loaded=loaded, backend=backend, hosts=hosts, doubts=doubts)
    problems = [*_layout_problems(files, overrides, plan), *_launch_problems(plan, environ), *slots]
    for key, sentence in said.problems.items():
        problems.append(_problem(plan, key, getattr(config.slurm, key.removeprefix("slurm.")), sentence))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{count} in the configuration:\n{listing}", tuple(problems))
    return plan


def _settled(
    loaded: LoadedConfig[RunConfig], backend: BackendName, environ: Mapping[str, str], hosts: Sequence[ListedHost]
) -> RunConfig:
    """The configuration with what it leaves open as it is now, so that hosts of another kind change nothing."""
    config = loaded.config
    slots = {host.slots for host in hosts}
    if backend == "slurm":
        ranks = config.launch.ranks_per_node or config.slurm.gpus or 1
    elif config.launch.ranks_per_node is None and len(slots) == 1 and (listed := slots.pop()) is not None:
        ranks = listed
    else:
        ranks = ranks_on_a_host(config, environ)
    nodes = len(hosts) if hosts and "launch.nodes" not in loaded.origins else config.launch.nodes
    launch = config.launch.model_copy(update={"ranks_per_node": ranks, "nodes": nodes})
    slurm = config.slurm.model_copy(update={"container": _without_tildes(config.slurm.container)})
    return config.model_copy(update={"launch": launch, "slurm": slurm})


def _without_tildes(container: ContainerConfig) -> ContainerConfig:
    """`~` is a shell's word: neither pyxis nor Apptainer knows it."""
    image = container.image
    if image is not None and is_image_file(image):
        image = os.path.expanduser(image)
    mounts = tuple(":".join(map(os.path.expanduser, mount.split(":"))) for mount in container.mounts)
    return container.model_copy(update={"image": image, "mounts": mounts})


def _slots_problems(asked: int | None, hosts: Sequence[ListedHost]) -> Iterator[str]:
    """`asked`: `launch.ranks_per_node` as somebody has set it."""
    if asked is None and len({host.slots for host in hosts}) > 1:
        listed = ", ".join(f"{host.name}: {host.slots or 'not said'}" for host in hosts[:_HOSTS_SHOWN])
        yield (
            f"--hostfile: hosts have different numbers of slots ({listed}), and each runs as many ranks as the others; "
            "set launch.ranks_per_node"
        )
    few = [host for host in hosts if asked is not None and host.slots is not None and host.slots < asked]
    if few:
        listed = ", ".join(f"{host.name} slots={host.slots}" for host in few[:_HOSTS_SHOWN])
        yield f"launch.ranks_per_node = {asked}: more than the hostfile allows ({listed}); lower it, or list more slots"


def _layout_problems(files: Sequence[Path], overrides: Sequence[str], plan: LaunchPlan) -> Iterator[str]:
    try:
        load_run_config(files, overrides, num_ranks=plan.num_ranks)
    except ConfigError as error:
        nodes, each = plan.config.launch.nodes, plan.ranks_per_host
        world = f"{nodes} {'host' if nodes == 1 else 'hosts'} with {each} {'rank' if each == 1 else 'ranks'} each"
        yield from (f"{_mend_of_launch(problem)} ({world})" for problem in error.problems or (str(error),))


def _mend_of_launch(problem: str) -> str:
    """The number of ranks is an option of `mega train`, and two keys here."""
    return re.sub(r"--ranks (\d+(?: or \d+)?)", r"\1 ranks in all (launch.nodes times launch.ranks_per_node)", problem)


def _launch_problems(plan: LaunchPlan, environ: Mapping[str, str]) -> Iterator[str]:
    config = plan.config
    yield from _input_problems(plan)
    if plan.backend == "local" and config.launch.nodes > 1:
        yield _problem(
            plan, "launch.nodes", config.launch.nodes, "--on local is this machine alone; set 1, or use another --on"
        )
    if plan.backend == "mpi":
        yield from _mpi_problems(plan, environ)
    if plan.backend == "slurm":
        yield from _slurm_problems(plan)


def _input_problems(plan: LaunchPlan) -> Iterator[str]:
    data = plan.config.data
    if data.source in ("text", "jsonl") and data.path is not None and not Path(data.path).expanduser().exists():
        yield _problem(plan, "data.path", data.path, "no such file or folder")
    tokenizer = data.tokenizer.path
    if tokenizer is not None and not Path(tokenizer).expanduser().exists():
        yield _problem(plan, "data.tokenizer.path", tokenizer, "no such file or folder")


def _mpi_problems(plan: LaunchPlan, environ: Mapping[str, str]) -> Iterator[str]:
    try:
        find_mpirun(environ)
    except RunError as error:
        yield str(error)
    nodes = plan.config.launch.nodes
    have = len(plan.hosts) or 1
    if nodes > have:
        where = f"the hostfile lists {have}" if plan.hosts else "--on mpi without --hostfile is this machine alone"
        yield _problem(plan, "launch.nodes", nodes, f"{where}; list more hosts, or lower it")


def _slurm_problems(plan: LaunchPlan) -> Iterator[str]:
    config = plan.config
    slurm, nodes, ranks = config.slurm, config.launch.nodes, plan.ranks_per_host
    if slurm.nodes is not None and slurm.nodes < nodes:
        yield _problem(
            plan,
            "slurm.nodes",
            slurm.nodes,
            f"fewer than launch.nodes = {nodes}, which train; raise it, or leave it out",
        )
    if slurm.gpus and ranks > slurm.gpus and config.run.device != "cpu":
        yield _problem(
            plan,
            "launch.ranks_per_node",
            ranks,
            f"a GPU serves one rank, and slurm.gpus = {slurm.gpus}; lower it, or raise that",
        )
    if slurm.time is not None and (limit := seconds_of(slurm.time)) <= slurm.signal_seconds:
        yield _problem(
            plan,
            "slurm.signal_seconds",
            slurm.signal_seconds,
            f'must be less than slurm.time = "{slurm.time}", which is {limit} s: the run would be asked to stop at once',
        )
    image = slurm.container.image
    if image is not None and slurm.container.runtime == "apptainer" and "://" in image:
        yield _problem(
            plan,
            "slurm.container.image",
            image,
            "every host would fetch it at each start, and many at once are refused; "
            f"fetch it once, to where all hosts see it: apptainer pull image.sif {shlex.quote(image)}, and name that file",
        )
    if image is not None and is_image_file(image) and not Path(image).exists():
        yield _problem(plan, "slurm.container.image", image, "no such file")
    try:
        render_script(config, ranks_per_node=ranks, working_directory=Path.cwd())
    except ConfigError as error:
        yield from error.problems or (str(error),)


def _doubts(config: RunConfig, backend: BackendName) -> Iterator[str]:
    yield from _doubts_of_fewer_hosts(config)
    if backend == "slurm":
        yield from _slurm_doubts(config)


def _doubts_of_fewer_hosts(config: RunConfig) -> Iterator[str]:
    nodes, fewest = config.launch.nodes, config.launch.fewest_nodes
    if fewest == nodes or any(_fits(config, count) for count in range(nodes - 1, fewest - 1, -1)):
        return
    fitting = [str(count) for count in range(fewest - 1, 0, -1) if _fits(config, count)]
    those = str(fewest) if fewest == nodes - 1 else f"{fewest} to {nodes - 1}"
    mend = f"it could on {', '.join(fitting[:_HOSTS_SHOWN])}" if fitting else "no smaller number works either"
    yield (
        f"launch.min_nodes = {fewest}: the run cannot be laid out on {those} hosts, so it never goes on with fewer than "
        f"launch.nodes = {nodes}; {mend}"
    )


def _fits(config: RunConfig, num_hosts: int) -> bool:
    return not any(layout_complaints(config, num_ranks=num_hosts * (config.launch.ranks_per_node or 1)))


def _slurm_doubts(config: RunConfig) -> Iterator[str]:
    slurm = config.slurm
    # A partition may give GPUs by itself, and `extra_lines` may ask for them.
    if (
        config.run.device == "cuda"
        and not slurm.gpus
        and not any("gpu" in line or "gres" in line for line in slurm.extra_lines)
    ):
        yield 'run.device = "cuda", and slurm.gpus is not set: unless the partition gives GPUs by itself, ranks find none'
    if slurm.time is not None and 0 < seconds_of(slurm.time) - slurm.signal_seconds < _SIGNAL_IS_EARLY_SECONDS:
        yield (
            f'slurm.time = "{slurm.time}" leaves the run {seconds_of(slurm.time) - slurm.signal_seconds} s before it is asked to '
            f"save, slurm.signal_seconds = {slurm.signal_seconds} before its end, and SLURM may ask up to a minute earlier: it "
            f"may get nowhere; set the time to {slurm.signal_seconds + _SIGNAL_IS_EARLY_SECONDS} s or more"
        )
    here = socket.gethostname()
    for mount in config.slurm.container.mounts:
        source = mount.partition(":")[0]
        if not Path(source).exists():
            yield f"slurm.container.mounts: {source} is not there on {here}; every host of the job must have it"


def _problem(plan: LaunchPlan, key: str, value: object, explanation: str) -> str:
    source = plan.loaded.origins.get(key, "defaults")
    return f"{source}: {key} = {value_to_toml(value)}: {explanation}"


def seconds_of(time: str) -> int:
    """A time limit of SLURM in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, has_days, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if has_days else _UNIT_SECONDS[len(numbers)]
    return int(days or 0) * 86_400 + sum(number * unit for number, unit in zip(numbers, units))


def default_backend(environ: Mapping[str, str], *, has_sbatch: bool) -> tuple[BackendName, str]:
    """Where a job starts when nobody says, and why."""
    if has_sbatch and not environ.get("SLURM_JOB_ID"):
        return "slurm", "there is sbatch here"
    if has_sbatch:
        return "local", f"this is within job {environ['SLURM_JOB_ID']} of SLURM"
    return "local", "there is no sbatch here"


def working_directory() -> Path:
    """Of the job: that of `mega launch`, by the name that the user knows it by where the shell tells one."""
    named = os.environ.get("PWD")
    return (
        Path(named)
        if named and os.path.isabs(named) and os.path.exists(named) and os.path.samefile(named, ".")
        else Path.cwd()
    )
