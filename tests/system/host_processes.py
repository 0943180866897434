"""Processes on the hosts of a made-up fabric: each has its host's network, name and /etc/hosts, and they share all files."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import IO, Any

import psutil

from tests.system.fabric.hosts import FabricOfHosts, run_command

END_SECONDS = 30.0
ENTER = """
namespace=$1
shift
exec nsenter --net=/var/run/netns/$namespace unshare --uts --mount sh -ec '
hostname "$1"
mount --bind "$2" /etc/hosts
exec 9</sys/fs/cgroup
mount -t sysfs sysfs /sys
mount --rbind /proc/self/fd/9 /sys/fs/cgroup
exec 9<&-
shift 2
exec "$@"' host "$@"
"""
"""A shell script for NAMESPACE HOST HOSTS_FILE COMMAND...; the command is that very process. /sys shows the devices of the
namespace it was mounted in, hence anew; control groups stay visible."""


class HostProcesses:
    """What was started on the hosts of a fabric, and all that came of it."""

    def __init__(self, fabric: FabricOfHosts) -> None:
        self._fabric = fabric
        self._started: list[subprocess.Popen[Any]] = []

    def entering(self, host: str) -> list[str]:
        """What stands before a command to have it run on a host."""
        where = self._fabric.host_named(host)
        return ["sh", "-ec", ENTER, "enter", where.namespace, where.name, str(self._fabric.hosts_file)]

    def start(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """The command on a host, leading its own session, to be signalled as it is. `options` are those of Popen."""
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        process = subprocess.Popen([*self.entering(host), *command], **options)
        self._started.append(process)
        return process

    def on(self, host: str, *words: str) -> list[psutil.Process]:
        """Those that run on the host and have all `words` in their command line."""
        found = []
        for number in run_command("ip", "netns", "pids", self._fabric.host_named(host).namespace).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(number))
                if process.status() != psutil.STATUS_ZOMBIE and all(word in process.cmdline() for word in words):
                    found.append(process)
        return found

    def set_link(self, host: str, state: str) -> None:
        """The host's cable, at the switch's end: `up` or `down`."""
        run_command("ip", "-n", self._fabric.switches, "link", "set", self._fabric.host_named(host).port, state)

    def kill_all(self, host: str) -> None:
        """Ends whatever runs on the host."""
        # Again and again: one may have been forked between the look and the kill.
        deadline = time.monotonic() + END_SECONDS
        while living := self.on(host):
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            for started in self._started:
                started.poll()
            assert time.monotonic() < deadline, f"{living} on {host} cannot be killed"
            time.sleep(0.01)

    def end(self) -> None:
        """Ends all on all hosts, and lets go of what was started."""
        for host in reversed(self._fabric.all_hosts):
            self.kill_all(host.name)
        for process in self._started:
            process.wait(timeout=END_SECONDS)
            streams: tuple[IO[Any] | None, ...] = (process.stdout, process.stderr, process.stdin)
            for stream in streams:
                if stream is not None:
                    stream.close()
