"""The first cause of a failed attempt, in words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.fabric.findings import Finding
from launcher.failure_record import FailureRecord
from launcher.jobs.agents.head import HostLost, RankEnded
from launcher.jobs.supervision.first_failure import (
    Scene,
    StarterEnd,
    first_failure,
    missed_ranks,
    of_absence,
    of_hang,
    of_preflight,
    of_starter,
)
from launcher.jobs.supervision.hang_tail import Hang

_SCENE = Scene(num_ranks=4, logs=Path("logs/attempt-1"), step=41, doing={3: "all_reduce of 4 MB on dp_shard"})
_SILENCE_S = 15.0


def _ended(rank: int, code: int, at: float = 100.0, message: str | None = None, **changes: Any) -> RankEnded:
    record = None
    if message is not None:
        record = FailureRecord(at=at, message=message, exit_code=code, traceback="Traceback ...")
    known = {"last_line": "", "ended_by_us": False, **changes}
    return RankEnded(rank=rank, host=f"n{rank}", code=code, at=at, record=record, **known)


def _lost(host: str, at: float, *, silent: bool = False, ranks: tuple[int, ...] = (2,)) -> HostLost:
    why = "nothing heard for 15 s" if silent else "its agent's connection ended"
    return HostLost(host=host, why=why, silent=silent, at=at, ranks=ranks)


def _first(*events: RankEnded | HostLost, starter: StarterEnd | None = None, scene: Scene = _SCENE) -> Any:
    return first_failure(
        [event for event in events if isinstance(event, RankEnded)],
        [event for event in events if isinstance(event, HostLost)],
        starter,
        scene,
        silence_s=_SILENCE_S,
    )


def test_a_killed_rank_is_told_with_its_host_step_and_collective() -> None:
    failure = _first(_ended(0, 1, message="rank 0 lost the others in a barrier"), _ended(3, -9, at=101.0))
    assert failure.message == (
        "rank 3 of 4 on n3 was killed by SIGKILL; the kernel does this when memory runs out "
        "(after step 41; last seen in all_reduce of 4 MB on dp_shard)"
    )
    assert failure.as_event() == {
        "kind": "signal",
        "at": 101.0,
        "rank": 3,
        "host": "n3",
        "message": failure.message,
        "last_collective": "all_reduce of 4 MB on dp_shard",
        "step": 41,
    }
    assert (failure.exit_code, failure.log) == (1, Path("logs/attempt-1/rank-3.log"))


def test_an_exception_is_told_in_one_line_and_keeps_its_traceback() -> None:
    scene = Scene(num_ranks=4, logs=Path("logs"), step=None, doing={})
    failure = _first(_ended(1, 2, message="2 problems in the configuration:\n  a: b\n  c: d"), scene=scene)
    assert failure.message == (
        "rank 1 of 4 on n1: 2 problems in the configuration: a: b; c: d (before a step was recorded)"
    )
    assert (failure.kind, failure.exit_code, failure.traceback) == ("exception", 2, "Traceback ...")


@pytest.mark.parametrize(("code", "told"), [(5, 1), (2, 2), (3, 3), (127, 1)])
def test_only_exit_codes_with_a_meaning_are_passed_on(code: int, told: int) -> None:
    failure = _first(_ended(1, code, message="no good"))
    assert (failure.kind, failure.exit_code) == ("exception", told)


@pytest.mark.parametrize("code", [5, 2, 3, 127])
def test_an_exit_code_of_which_the_rank_gives_no_account_means_nothing(code: int) -> None:
    failure = _first(_ended(1, code, last_line="no good"))
    assert failure.message == f"rank 1 of 4 on n1 ended with exit code {code}: no good (after step 41)"
    assert (failure.kind, failure.exit_code) == ("exit", 1)


def test_a_lost_host_comes_before_what_it_caused_and_after_what_came_before() -> None:
    killed = _ended(3, -9, at=100.0)
    assert _first(killed, _lost("n2", at=99.0)).kind == "host_lost"
    assert _first(killed, _lost("n2", at=101.0)).kind == "signal"
    lost_peer = _ended(0, 1, at=90.0, message="rank 0 lost the others in a barrier")
    failure = _first(lost_peer, _lost("n2", at=99.0))
    assert failure.message == "host n2 was lost: its agent's connection ended (after step 41)"
    assert (failure.host, failure.lost_hosts, failure.are_missing) == ("n2", ("n2",), False)
    failure = _first(lost_peer, _lost("n3", at=99.0, ranks=(2, 3)))
    assert failure.message.endswith(" (after step 41; last seen in all_reduce of 4 MB on dp_shard)")
    assert failure.last_collective == "all_reduce of 4 MB on dp_shard"


def test_a_host_that_fell_silent_was_lost_when_it_did() -> None:
    silent = _lost("n2", at=112.0, silent=True)
    failure = _first(_ended(3, -9, at=100.0), silent)
    assert (failure.kind, failure.are_missing) == ("host_lost", True)
    assert _first(_ended(3, -9, at=96.0), silent).kind == "signal"


def test_an_agent_without_ranks_is_no_loss() -> None:
    assert _first(_lost("n2", at=1.0, ranks=())) is None


def test_a_starter_that_has_ended_before_its_hosts_were_lost_is_the_cause() -> None:
    starter = StarterEnd(at=99.0, code=-15, words="mpirun: killed", backend="mpi")
    failure = _first(_lost("n2", at=99.5), starter=starter)
    assert failure.kind == "starter"
    assert failure.message.startswith("mpirun was killed by SIGTERM: mpirun: killed (more in ")
    assert _first(_lost("n2", at=98.5), starter=starter).kind == "host_lost"


def test_a_starter_that_complains_of_a_host() -> None:
    words = "ssh: connect to host n3 port 22: No route to host"
    end = StarterEnd(at=1.0, code=255, words=words, backend="slurm")
    failure = of_starter(end, ["n3"], log=Path("logs/attempt-1/agents.log"))
    assert failure.message == f"srun ended with exit code 255: {words} (more in logs/attempt-1/agents.log)"
    assert (failure.lost_hosts, failure.are_missing, failure.host) == (("n3",), True, "n3")


def test_hosts_that_did_not_come_are_named_and_blamed_only_where_others_came() -> None:
    failure = of_absence(["n3"], ["n0", "n3"], seconds=120.0, words="")
    assert failure.message == "host n3 did not come within 120 s"
    assert (failure.kind, failure.lost_hosts, failure.are_missing) == ("never_came", ("n3",), True)
    failure = of_absence(["n0", "n3"], ["n0", "n3"], seconds=120.0, words="no route")
    assert failure.message == "hosts n0, n3 did not come within 120 s; whoever starts them says: no route"
    assert failure.lost_hosts == ()


def test_a_hang_is_told_by_the_finding() -> None:
    finding = Finding(
        kind="missing_rank",
        hosts=("n3",),
        ranks=(3,),
        confidence=0.9,
        evidence={"collective": "all_gather of 1 MB", "axis": "dp_shard"},
        sentence="rank 3 (n3) is stopped.",
    )
    failure = of_hang(Hang(finding=finding, at=50.0), _SCENE)
    assert failure.message == "the run hung (after step 41): rank 3 (n3) is stopped"
    assert (failure.rank, failure.host, failure.at) == (3, "n3", 50.0)
    assert failure.last_collective == "all_gather of 1 MB on dp_shard"


def test_preflight_gives_each_bad_host_its_own_reason() -> None:
    sentences = ["n10 is slow.", "n1 has no disk.", "The clocks differ."]
    reasons = {"n1": "n1 has no disk.", "n10": "n10 is slow."}
    failure = of_preflight(
        {"ok": False, "sentences": sentences, "bad_hosts": ["n1", "n10"], "reasons": reasons}, at=1.0
    )
    assert failure.message == "preflight: n10 is slow. n1 has no disk. The clocks differ."
    assert failure.bad_hosts == reasons
    assert failure.exit_code == 3
    assert not failure.is_unanswered


def test_ranks_that_preflight_only_missed_are_known() -> None:
    missing = {"kind": "missing_rank", "severity": "error", "ranks": [3, 4]}
    warning = {"kind": "package", "severity": "warning", "ranks": [0]}
    assert missed_ranks({"findings": [missing, warning]}) == {3, 4}
    assert missed_ranks({"findings": [missing, {"kind": "disk", "severity": "error", "ranks": [0]}]}) == frozenset()
    assert of_preflight({"findings": [missing], "sentences": ["Rank 3 did not answer."]}, at=1.0).is_unanswered


def test_when_it_happened_is_told() -> None:
    assert _first(_ended(3, -9, at=101.5)).at == 101.5
    record = FailureRecord(at=99.5, message="the disk is full", exit_code=1, traceback="")
    assert _first(replace(_ended(3, 1, at=101.5), record=record)).as_event()["at"] == 99.5
    assert _first(_lost("n2", at=98.5)).at == 98.5
    assert _first(_lost("n2", at=98.5, silent=True)).at == 98.5 - _SILENCE_S
    assert of_preflight({}, at=96.5).at == 96.5
    assert _first(starter=StarterEnd(at=97.5, code=1, words="", backend="mpi")).at == 97.5
