"""Less than a core for a process, by the kernel's control groups, version 1 or 2."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

_PERIOD_US = 20_000
"""Short against what is timed, so that each measurement sees the share and not where in a period it began."""
_WEIGHT_V1, _WEIGHT_V2 = 100_000, 10_000
"""It gets its share even on a busy machine: the fault is the quota, not the neighbours."""
_ROUNDS = 20
_ROOT = Path("/sys/fs/cgroup")
_counter = itertools.count()


@contextlib.contextmanager
def compute_quota(process_id: int, keep: float) -> Iterator[None]:
    """All threads of the process together get `keep` of one core. Raises OSError where control groups are not ours.

    Real-time threads would not be bound by it: they are ordinary ones in the meantime.
    """
    first = _ROOT / "cpu" if (_ROOT / "cpu").is_dir() else None
    base = first or _ROOT
    group = base / f"mega-{os.getpid()}-{next(_counter)}"
    quota = int(keep * _PERIOD_US)
    group.mkdir()
    favoured = os.sched_getscheduler(process_id) == os.SCHED_RR
    try:
        if first:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
            (group / "cpu.shares").write_text(str(_WEIGHT_V1))
        else:
            (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
            (group / "cpu.weight").write_text(str(_WEIGHT_V2))
        _schedule_all_threads(process_id, os.SCHED_OTHER, 0)
        (group / "cgroup.procs").write_text(str(process_id))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have been killed in the meantime
            (base / "cgroup.procs").write_text(str(process_id))
        if favoured:
            _schedule_all_threads(process_id, os.SCHED_RR, os.sched_get_priority_min(os.SCHED_RR))
        group.rmdir()


def _schedule_all_threads(process_id: int, policy: int, priority: int) -> None:
    """Until all have the policy: one may start another before its own is changed, and one may end meanwhile."""
    for _ in range(_ROUNDS):
        if all(_policy(thread) in (policy, None) for thread in _threads(process_id)):
            return
        for thread in _threads(process_id):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread, policy, os.sched_param(priority))


def _policy(thread: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getscheduler(thread)
    return None


def _threads(process_id: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(path.name) for path in Path(f"/proc/{process_id}/task").iterdir()]
    return []
