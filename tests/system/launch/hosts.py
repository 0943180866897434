"""Hosts on one switch for jobs without a scheduler."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.system.fabric.hosts import FabricOfHosts
from tests.system.host_processes import ENTER, HostProcesses

# More than a tiny run needs: on a link that is full, words of a few bytes are lost again and again.
_LINK_MBIT = 400.0


class LaunchHosts:
    """A context: hosts h0, h1, ... on one switch. Whatever was started on them is gone at the end."""

    def __init__(self, num_hosts: int) -> None:
        self.fabric = FabricOfHosts(hosts_per_leaf=num_hosts, num_leaves=1, foreign_per_leaf=0, link_mbit=_LINK_MBIT)
        self._processes = HostProcesses(self.fabric)

    def __enter__(self) -> Self:
        self.fabric.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._processes.end()
        finally:
            self.fabric.__exit__(kind, error, trace)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all hosts."""
        return tuple(host.name for host in self.fabric.hosts)

    def start(
        self, host: str, command: Sequence[str], *, output: Path, cwd: Path, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """The command on a host, with what it prints appended to `output`."""
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
        with output.open("ab") as file:
            return self._processes.start(host, command, cwd=cwd, env=environ, stdout=file, stderr=file)

    def entering(self, host: str) -> list[str]:
        """What stands before a command to have it run on a host."""
        return self._processes.entering(host)

    def write_remote_shell(self, path: Path) -> Path:
        """A program `path HOST COMMAND...`, as mpirun expects of ssh."""
        places = "\n".join(f"{host.name}) namespace={host.namespace};;" for host in self.fabric.hosts)
        path.write_text(
            f'#!/bin/sh\nname=$1; shift\ncase "$name" in\n{places}\n*) echo "no host $name" >&2; exit 1;;\nesac\n'
            f'set -- "$namespace" "$name" \'{self.fabric.hosts_file}\' sh -c "$*"\n{ENTER}'
        )
        path.chmod(0o755)
        return path

    def processes(self, host: str, *words: str) -> list[psutil.Process]:
        """Those that run on the host and have all `words` in their command line."""
        return self._processes.on(host, *words)

    def kill(self, host: str) -> None:
        """The host loses its power: all on it is gone, and nobody hears a goodbye."""
        self._processes.set_link(host, "down")
        self._processes.kill_all(host)

    def revive(self, host: str) -> None:
        """Its link is there again."""
        self._processes.set_link(host, "up")
