"""`mega fabric simulate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigError
from launcher.output import Output
from launcher.verb import EXIT_REFUSED
from launcher.verbs.fabric.reach import OutputFile, write_json

if TYPE_CHECKING:
    from cluster.fabric.simulation.campaign import SimulationPlan

Hosts = Annotated[int, typer.Option(min=4, help="Hosts of the fabric.")]
TopologyOption = Annotated[str, typer.Option(help="fat-tree, rail (each rail its leaves) or two-leaves.")]
FaultOption = Annotated[str, typer.Option(help="What is wrong: a kind of finding, none, random (one of all) or two.")]
Cases = Annotated[int, typer.Option(min=1, help="How many; each is drawn anew.")]
Seed = Annotated[int, typer.Option(min=0, help="Case n depends on this and on n alone.")]
Oversubscription = Annotated[
    float, typer.Option(min=1.0, help="What hosts can send over what the level above carries.")
]


def simulate(
    out: Output,
    hosts: Hosts = 1024,
    topology: TopologyOption = "fat-tree",
    fault: FaultOption = "random",
    cases: Cases = 10,
    seed: Seed = 0,
    oversubscription: Oversubscription = 1.0,
    output: OutputFile = None,
) -> int:
    """Put faults into simulated fabrics and see whether the same diagnosis finds them. Ends with 3 where one was missed."""
    from cluster.fabric.diagnose import diagnose
    from cluster.fabric.simulation.campaign import SimulatedCase
    from cluster.fabric.simulation.campaign import simulate as simulate_cases

    def tell(case: SimulatedCase) -> None:
        out.say(
            f"case {case.number}: {'right' if case.right else 'WRONG'} in {case.rounds} rounds; was "
            f"{' and '.join(case.expected) or 'healthy'}; said {' and '.join(case.found) or 'healthy'}"
        )

    plan = _plan(hosts, topology, fault, cases, seed, oversubscription)
    result = simulate_cases(plan, diagnose, tell=tell)
    out.say(
        f"{result.right} of {cases} right ({result.share_right:.1%}), at most {result.max_rounds} rounds, "
        f"{sum(case.real_s for case in result.cases) / cases:.2f} s a case"
    )
    write_json(output, result.as_data())
    out.result(result.as_data())
    return 0 if result.right == cases else EXIT_REFUSED


def _plan(hosts: int, topology: str, fault: str, cases: int, seed: int, oversubscription: float) -> SimulationPlan:
    from cluster.fabric.simulation.campaign import FAULT_CHOICES, TOPOLOGIES, SimulationPlan

    if topology not in TOPOLOGIES:
        raise ConfigError(f"--topology {topology}: known are {', '.join(TOPOLOGIES)}")
    if fault not in FAULT_CHOICES:
        raise ConfigError(f"--fault {fault}: known are {', '.join(FAULT_CHOICES)}")
    try:
        return SimulationPlan(
            hosts=hosts, topology=topology, fault=fault, cases=cases, seed=seed, oversubscription=oversubscription
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
