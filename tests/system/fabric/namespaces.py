"""Puts the calling process into a host: its network, its name, and its view of /etc/hosts and /sys."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path

from tests.system.fabric.hosts import Host

_CLONE_NEWNET = 0x40000000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_CGROUPS = Path("/sys/fs/cgroup")


def enter(host: Host, hosts_file: Path) -> None:
    """What this process does from now on, it does on `host`. It must have one thread only. Raises OSError.

    `/sys` is mounted anew, since it shows the devices of the namespace it was mounted in; control groups stay visible.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{host.namespace}", "rb") as namespace:
        _check(libc.setns(namespace.fileno(), _CLONE_NEWNET), "setns")
    _check(libc.unshare(_CLONE_NEWUTS | _CLONE_NEWNS), "unshare")
    socket.sethostname(host.name)
    _mount(libc, "none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount(libc, str(hosts_file), "/etc/hosts", None, _MS_BIND)
    groups = os.open(_CGROUPS, os.O_PATH) if _CGROUPS.is_dir() else None
    _mount(libc, "sysfs", "/sys", "sysfs", 0)
    if groups is not None:
        _mount(libc, f"/proc/self/fd/{groups}", str(_CGROUPS), None, _MS_BIND | _MS_REC)
        os.close(groups)


def favour_this_process() -> None:
    """Lets it run at once when it is woken: a host's other ranks do not share its cores, and here they do.

    Where the machine does not allow it, measurements are as noisy as the machine is busy.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _check(libc.mount(*words, ctypes.c_ulong(flags), None), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
