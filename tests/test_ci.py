"""`.ci/run` installs what the machine lacks, and lets no test pass by skipping what it has installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
_HOSTS = dict.fromkeys(("ip", "tc", "iptables", "ethtool", "slurmctld", "munged", "dpkg-query"), "")
_MAKE = 'echo "make $*, requires ${MEGA_REQUIRE:-nothing}"\n'


def run_with(tmp_path: Path, programs: dict[str, str]) -> list[str]:
    """What `.ci/run` does on a machine that has these programs (the text of each, for the shell) and few others."""
    for name, text in {"apt-get": 'echo "apt-get $*"\n', **programs}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    command = [shutil.which("bash") or "bash", str(SCRIPT)]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_there_is_not_installed(tmp_path: Path) -> None:
    assert run_with(tmp_path, {"g++": "", "make": _MAKE, "python3": "", **_HOSTS}) == [
        "make setup, requires nothing",
        "make lint, requires nothing",
        "make test, requires compiler,transformers,datasets,accelerate,deepspeed,netns,mpi,slurm",
    ]


@pytest.mark.parametrize(
    ("lacks", "package"),
    [
        ("ensurepip", "python3-venv"),
        ("Python.h", "python3-dev"),
        ("g++", "g++"),
        ("tc", "iproute2"),
        ("iptables", "iptables"),
        ("ethtool", "ethtool"),
        ("slurmctld", "slurm-wlm"),
        ("munged", "munge"),
        ("dpkg-query", "libpmix-dev"),
    ],
)
def test_what_is_missing_is_installed(tmp_path: Path, lacks: str, package: str) -> None:
    python = f'case "$2" in *{lacks}*) exit 1;; esac\n'
    there = {"g++": "", "make": _MAKE, "python3": python, **_HOSTS}
    did = run_with(tmp_path, {name: text for name, text in there.items() if name != lacks})
    assert did[:2] == ["apt-get update -qq", f"apt-get install -y -qq --no-install-recommends {package}"]
