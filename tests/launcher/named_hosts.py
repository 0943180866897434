"""Ranks on this machine that take themselves for hosts of their own, by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.local_ranks import free_port
from tests.launcher.conftest import Ended


def ranks_on_hosts(
    words: Sequence[str],
    *environs: dict[str, str],
    verdict: Path | None = None,
    program: Sequence[str] = ("-m", "launcher"),
) -> list[Ended]:
    """Runs one rank a host, n0 and so on, each with variables of its own, and waits for all. `verdict`: of preflight."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(len(environs)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **({} if verdict is None else {"MEGA_PREFLIGHT": str(verdict)}),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *program, *words],
            env={**common, "RANK": str(rank), "MEGA_HOST_NAME": f"n{rank}", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, environ in enumerate(environs)
    ]
    try:
        said = [process.communicate(timeout=200) for process in started]
        return [Ended(code=process.returncode, out=out, err=err) for process, (out, err) in zip(started, said)]
    finally:
        for process in started:
            process.kill()
            process.wait()
