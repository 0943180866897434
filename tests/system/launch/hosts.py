"""Processes on the hosts of a made-up fabric: each has its host's network, name and /etc/hosts, and they share all files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.system.fabric.hosts import FabricOfHosts, run_command

# More than a tiny run needs: on a link that is full, words of a few bytes are lost again and again.
_LINK_MBIT = 400.0
_KILL_SECONDS = 30.0
_ENTER = """
namespace=$1 hosts=$3
export ENTER_NAME=$2
shift 3
exec nsenter --net=/var/run/netns/$namespace unshare --uts --mount sh -ec '
hostname "$ENTER_NAME"
mount --bind "$0" /etc/hosts
unset ENTER_NAME
exec "$@"' "$hosts" "$@"
"""
"""Runs a command on a host; it is that very process. As a program of its own it serves mpirun in the place of ssh."""


class LaunchHosts:
    """A context: hosts h0, h1, ... on one switch. Whatever was started on them is gone at the end."""

    def __init__(self, num_hosts: int) -> None:
        self.fabric = FabricOfHosts(hosts_per_leaf=num_hosts, num_leaves=1, foreign_per_leaf=0, link_mbit=_LINK_MBIT)
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.fabric.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for host in self.fabric.hosts:
                self._kill_all(host.name)
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
        with output.open("ab") as file:
            process = subprocess.Popen(
                [*self.entering(host), *command],
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def entering(self, host: str) -> list[str]:
        """What stands before a command to have it run on a host."""
        where = self.fabric.host_named(host)
        return ["sh", "-ec", _ENTER, "enter", where.namespace, where.name, str(self.fabric.hosts_file)]

    def write_remote_shell(self, path: Path) -> Path:
        """A program `path HOST COMMAND...`, as mpirun expects of ssh."""
        places = "\n".join(f"{host.name}) namespace={host.namespace};;" for host in self.fabric.hosts)
        path.write_text(
            f'#!/bin/sh\nname=$1; shift\ncase "$name" in\n{places}\n*) echo "no host $name" >&2; exit 1;;\nesac\n'
            f'set -- "$namespace" "$name" \'{self.fabric.hosts_file}\' sh -c "$*"\n{_ENTER}'
        )
        path.chmod(0o755)
        return path

    def processes(self, host: str, *words: str) -> list[psutil.Process]:
        """Those that run on the host and have all `words` in their command line."""
        found = []
        for number in run_command("ip", "netns", "pids", self.fabric.host_named(host).namespace).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(number))
                if process.status() != psutil.STATUS_ZOMBIE and all(word in process.cmdline() for word in words):
                    found.append(process)
        return found

    def kill(self, host: str) -> None:
        """The host loses its power: all on it is gone, and nobody hears a goodbye."""
        self._set_link(host, "down")
        self._kill_all(host)

    def revive(self, host: str) -> None:
        """Its link is there again."""
        self._set_link(host, "up")

    def _set_link(self, host: str, state: str) -> None:
        run_command("ip", "-n", self.fabric.switches, "link", "set", self.fabric.host_named(host).port, state)

    def _kill_all(self, host: str) -> None:
        # Again and again: one may have been forked between the look and the kill.
        deadline = time.monotonic() + _KILL_SECONDS
        while living := self.processes(host):
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            for started in self._started:
                started.poll()
            assert time.monotonic() < deadline, f"{living} on {host} cannot be killed"
            time.sleep(0.01)
