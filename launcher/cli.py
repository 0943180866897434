"""The command line `mega`. Imports no verb's tools: a verb loads torch and the rest when it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import typer

from launcher import rank_process
from launcher.verb import as_command
from launcher.verbs import (
    agent,
    cancel,
    checkpoint,
    config,
    data,
    doctor,
    export,
    fabric,
    generate,
    init,
    launch,
    logs,
    report,
    smoke,
    status,
    supervise,
    train,
)


def build_app() -> typer.Typer:
    """The command line with all its verbs."""
    app = typer.Typer(
        name="mega",
        help="Train large decoders, from a laptop to thousands of GPUs. The same command continues an interrupted run.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad configuration or arguments, 3 a check said no, "
        "75 stopped early after saving, 130 ended at once by a second Ctrl-C.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("init")(as_command(init.init))
    app.command("doctor")(as_command(doctor.doctor))
    app.add_typer(_group("config", config.VERBS, "Show, explain or check a configuration."))
    app.add_typer(_group("data", data.VERBS, "Prepare a data set, or describe a prepared one."))
    app.command("train")(as_command(train.train))
    app.command("launch")(as_command(launch.launch))
    app.command("status")(as_command(status.status))
    app.command("logs")(as_command(logs.logs))
    app.command("cancel")(as_command(cancel.cancel))
    app.command("report")(as_command(report.report))
    app.add_typer(_group("checkpoint", checkpoint.VERBS, "List a run's checkpoints, verify or copy them."))
    measuring = _group("fabric", fabric.VERBS, "Measure the network between ranks, and name what is wrong with it.")
    measuring.add_typer(_group("baseline", fabric.BASELINE_VERBS, "Keep sweeps, and see what has become slower since."))
    app.add_typer(measuring)
    app.command("generate")(as_command(generate.generate))
    app.command("export")(as_command(export.export))
    app.command("smoke")(as_command(smoke.smoke))
    app.command("supervise", hidden=True)(as_command(supervise.supervise))
    # Not for people: what jobs are made of.
    app.command("agent", hidden=True)(as_command(agent.agent))
    return app


def _group(name: str, verbs: Mapping[str, Callable[..., int]], help_text: str) -> typer.Typer:
    group = typer.Typer(name=name, help=help_text, no_args_is_help=True)
    for verb_name, verb in verbs.items():
        group.command(verb_name)(as_command(verb))
    return group


def main() -> None:
    """Entry point of the console script and of `python -m launcher`."""
    rank_process.enter(os.environ)
    try:
        build_app()()
    except SystemExit as end:
        rank_process.leave(os.environ, end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
