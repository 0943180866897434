"""The files that SLURM on the hosts of one machine reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.system.fabric.hosts import FabricOfHosts

CONTROLLER = "x0"
"""The host of the controller, and of commands that users give."""
GRACE_SECONDS = 4
"""From SIGTERM to SIGKILL of a job of `low` that must make room."""
KILL_SECONDS = 5
"""From SIGTERM to SIGKILL of a job that is cancelled or out of time."""
_CPUS = 4
_MEGABYTES = 2000

_SLURM = """
ClusterName=hosts
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# Requeued jobs wait until credentials of their former start have expired: two minutes by default.
AuthInfo=socket={directory}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/jobcomp.log
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SwitchType=switch/none
TopologyPlugin=topology/tree
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
TmpFS={directory}/tmp/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld-{controller}.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=verbose
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=5
TCPTimeout=1
MessageTimeout=4
InactiveLimit=0
KillWait={kill_seconds}
Waittime=0
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


def write_configuration(directory: Path, fabric: FabricOfHosts, settings: Sequence[str] = ()) -> None:
    """slurm.conf, with `settings` added, and what belongs to it, for the hosts of `fabric`; all state below `directory`."""
    (directory / "state").mkdir()
    for host in fabric.hosts:
        (directory / "spool" / host.name).mkdir(parents=True)
        (directory / "tmp" / host.name).mkdir(parents=True)
    nodes = "\n".join(
        f"NodeName={host.name} NodeHostname={host.name} NodeAddr={host.address} CPUs={_CPUS} RealMemory={_MEGABYTES}"
        for host in fabric.hosts
    )
    controller = fabric.host_named(CONTROLLER)
    (directory / "slurm.conf").write_text(
        _SLURM.format(
            directory=directory,
            controller=controller.name,
            address=controller.address,
            nodes="\n".join([*settings, nodes]),
            kill_seconds=KILL_SECONDS,
            grace=GRACE_SECONDS,
        ).lstrip()
    )
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (directory / "topology.conf").write_text(_topology(fabric))
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def _topology(fabric: FabricOfHosts) -> str:
    leaves = sorted({host.leaf for host in fabric.hosts})
    lines = [
        f"SwitchName=leaf{leaf} Nodes={','.join(host.name for host in fabric.hosts if host.leaf == leaf)}"
        for leaf in leaves
    ]
    if len(leaves) > 1:
        lines.append(f"SwitchName=spine Switches={','.join(f'leaf{leaf}' for leaf in leaves)}")
    return "\n".join(lines) + "\n"
