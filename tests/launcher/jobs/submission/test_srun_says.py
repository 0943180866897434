"""What srun is asked before a job is queued."""

from __future__ import annotations

import os

import pytest

from launcher.jobs.config import SlurmConfig
from launcher.jobs.submission.srun_says import srun_says
from tests.launcher.jobs.fake_slurm import FakeSlurm

_LIST = """
echo "MPI plugin types are..."
printf "\\t%s\\n" none pmi2 {more}
echo "specific pmix plugin versions available: pmix_v4"
"""
# As srun of SLURM 22.05 and 24.11 has it.
_OPTIONS = """
[ "$1" = --test-only ] && shift
for word; do
    case "$word" in
        --help) echo "      --exclusive  alone\n      --container=dir\n  -h, --help  this"; exit 0;;
        --exclusive|--gres=*) ;;
        --mem=*) echo "srun: error: Invalid --mem specification" >&2; exit 255;;
        --*) [ "$LC_ALL" = C ] || exit 3
             printf "srun: unrecognized option '%s'\\nTry \\"srun --help\\" for more information\\n" "$word" >&2; exit 255;;
        *) echo "srun: Job 1 to start at noon" >&2; exit 0;;
    esac
done
"""


def test_a_plugin_that_is_missing(fake_slurm: FakeSlurm) -> None:
    pmix = SlurmConfig(mpi="pmix")
    fake_slurm.program("srun", _LIST.format(more=""))
    said = srun_says(pmix, os.environ)
    assert said.problems == {"slurm.mpi": "srun --mpi=list knows none, pmi2 alone here; install SLURM's PMIx plugin"}
    fake_slurm.program("srun", _LIST.format(more="pmix"))
    assert srun_says(pmix, os.environ).problems == {}
    fake_slurm.program(
        "srun", _LIST.format(more="").replace("echo ", "echo >&2 srun: ").replace("printf", "printf >&2")
    )
    assert srun_says(pmix, os.environ).problems  # older ones
    for silent in ("", "exit 1"):
        fake_slurm.program("srun", silent)
        assert srun_says(pmix, os.environ).problems == {}  # nobody knows here


@pytest.mark.parametrize(
    ("options", "problem", "doubt"),
    [
        (("--exclusive", "--gres=gpu:1"), None, None),
        (("--exclsive",), "srun knows no --exclsive; did you mean --exclusive?", None),
        (("--container-image=x",), None, "srun knows no --container-image here: each step fails unless a plugin"),
        (("--mem=abc",), "srun refuses it: Invalid --mem specification", None),
        (("exclusive",), "a word of it is no option of srun, or an option lacks its value", None),
    ],
)
def test_options_that_srun_does_not_know(
    fake_slurm: FakeSlurm, options: tuple[str, ...], problem: str | None, doubt: str | None
) -> None:
    slurm = SlurmConfig(srun_options=options)
    fake_slurm.program("srun", _OPTIONS)
    said = srun_says(slurm, os.environ)
    assert said.problems == ({} if problem is None else {"slurm.srun_options": problem})
    assert [words.startswith(doubt or "?") for words in said.doubts.values()] == ([] if doubt is None else [True])
    assert all(call.startswith(("srun --help", "srun --test-only ")) for call in fake_slurm.calls("srun"))
    fake_slurm.program("srun", "exit 1")  # no cluster
    assert srun_says(slurm, os.environ).problems == {}


def test_nobody_is_asked_without_need(fake_slurm: FakeSlurm) -> None:
    srun_says(SlurmConfig(), os.environ)
    assert fake_slurm.calls() == []
    srun_says(SlurmConfig(mpi="pmix", srun_options=("--x",)), {})
