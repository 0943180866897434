"""What only SLURM's own `srun` knows of a configuration: asked before a job is queued. It starts nothing."""

from __future__ import annotations

import asyncio
import difflib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import RunError
from launcher.jobs.config import SlurmConfig
from launcher.jobs.slurm.client import Answer, call, environ_for_sbatch

_TYPO = 0.88
"""Similarity to an option that there is. --container-image, of a plugin, and --container have less."""


@dataclass(frozen=True, kw_only=True)
class SrunSays:
    """Sentences by key of the configuration."""

    problems: Mapping[str, str]
    doubts: Mapping[str, str]


def srun_says(slurm: SlurmConfig, environ: Mapping[str, str]) -> SrunSays:
    """Of `slurm.mpi` and `slurm.srun_options`; nothing where there is no srun, or none that answers."""
    problems: dict[str, str] = {}
    doubts: dict[str, str] = {}
    if slurm.mpi == "pmix" and (kinds := _kinds_of_mpi(environ)) and "pmix" not in kinds:
        problems["slurm.mpi"] = (
            f"srun --mpi=list knows {', '.join(sorted(kinds))} alone here; install SLURM's PMIx plugin"
        )
    if slurm.srun_options and (said := _said_of_options(slurm.srun_options, environ)) is not None:
        (problems if said.is_sure else doubts)["slurm.srun_options"] = said.sentence
    return SrunSays(problems=problems, doubts=doubts)


def _kinds_of_mpi(environ: Mapping[str, str]) -> frozenset[str]:
    answer = _ask(environ, "--mpi=list")
    if answer is None or answer.code:
        return frozenset()
    # Which stream it is, and what stands before the list, depends on the version.
    kinds = frozenset(re.findall(r"^(?:srun: )?\s*([a-z]\w*)\s*$", f"{answer.out}\n{answer.err}", re.MULTILINE))
    return kinds if "none" in kinds else frozenset()


@dataclass(frozen=True, kw_only=True)
class _Said:
    sentence: str
    is_sure: bool


def _said_of_options(options: Sequence[str], environ: Mapping[str, str]) -> _Said | None:
    """srun reads its options in their order, and shows its help when it comes to --help: then all before are good."""
    plain = _ask(environ, "--help")
    if plain is None or plain.code or "--help" not in plain.out:
        return None
    # --test-only: a word that is no option would be the program that it starts.
    answer = _ask(environ, "--test-only", *options, "--help")
    if answer is None or (not answer.code and "--help" in answer.out):
        return None
    if not answer.code or "allocat" in answer.err:
        return _Said(sentence="a word of it is no option of srun, or an option lacks its value", is_sure=True)
    unknown = re.search(r"unrecognized option '(--[^'=]+)", answer.err)
    if unknown is None:
        return _Said(sentence=f"srun refuses it: {answer.complaint}", is_sure=True)
    known = set(re.findall(r"--[a-z][\w-]*", plain.out))
    if close := difflib.get_close_matches(unknown[1], sorted(known), n=1, cutoff=_TYPO):
        return _Said(sentence=f"srun knows no {unknown[1]}; did you mean {close[0]}?", is_sure=True)
    return _Said(
        sentence=f"srun knows no {unknown[1]} here: each step fails unless a plugin of the hosts does", is_sure=False
    )


def _ask(environ: Mapping[str, str], *arguments: str) -> Answer | None:
    srun = shutil.which("srun", path=environ.get("PATH", ""))
    if srun is None:
        return None
    try:
        # Its words in English; and nothing of a job around, in which a step might start.
        return asyncio.run(call(srun, *arguments, environ={**environ_for_sbatch(environ, {}), "LC_ALL": "C"}))
    except RunError:
        return None
