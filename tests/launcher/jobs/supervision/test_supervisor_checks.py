"""A supervisor and what others tell it: findings of the run's watch, preflight's verdict, the starter of agents, rank 0's end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.backends.starter import Starter
from launcher.jobs.supervision import supervisor
from tests.launcher.jobs.made_up_hosts import MadeUpJob, is_running, wait_until

# Preflight on: the first attempt is refused for the reason that `refuse` is given.
_PREFLIGHT = """
def refuse(sentences, bad_hosts, missed=()):
    findings = [{"kind": "missing_rank", "severity": "error", "ranks": list(missed)}] if missed else []
    reasons = {each: sentences[0] for each in bad_hosts}
    verdict = {"ok": False, "sentences": sentences, "findings": findings, "bad_hosts": bad_hosts, "reasons": reasons,
               "seconds": 0.5}
    path = Path(os.environ["MEGA_PREFLIGHT"])
    path.with_suffix(".partial").write_text(json.dumps(verdict))
    path.with_suffix(".partial").rename(path)
    sys.exit(3)
def accept():
    path = Path(os.environ["MEGA_PREFLIGHT"])
    path.with_suffix(".partial").write_text(json.dumps({"ok": True, "sentences": [], "bad_hosts": [], "seconds": 0.5}))
    path.with_suffix(".partial").rename(path)
"""
_ON = "preflight.enabled = true\n"


def test_a_hang_that_the_watch_names_ends_the_attempt_and_a_stopped_rank_is_killed(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b"],
        """
        if attempt == 2:
            finish()
        signal.signal(signal.SIGTERM, lambda *_: None)
        if rank == 0:
            checkpoint(40); step(40); step(41)
            mark("stepped")
            hang()
        wait_for("stepped-0-1")
        evidence = {"collective": "all_gather of 1 MB", "axis": "dp_shard"}
        find("missing_rank", "rank 1 (b) is stopped (by SIGSTOP or a debugger).", **evidence)
        os.kill(os.getpid(), signal.SIGSTOP)
        """,
        launch="nodes = 2\nend_hangs_after_seconds = 0.2",
    )
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert {key: failure[key] for key in ("kind", "rank", "host", "message", "last_collective", "step")} == {
        "kind": "hang",
        "rank": 1,
        "host": "b",
        "message": "the run hung (after step 41): rank 1 (b) is stopped (by SIGSTOP or a debugger)",
        "last_collective": "all_gather of 1 MB on dp_shard",
        "step": 41,
    }
    assert not any(map(is_running, job.pids()))


def test_stragglers_and_what_is_over_end_nothing(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a"],
        """
        find("slow_host", "a is slow.")
        find("missing_rank", "rank 0 is late.")
        step(1)
        mark("told")
        wait_for("go")
        """,
        launch="end_hangs_after_seconds = 2.0",
    )
    seen = []

    async def watch() -> None:
        await job.wait_for("told-0-1")
        for number in range(2, 125):
            job.run.append_metrics({"step": number})
            await asyncio.sleep(0.02)
        seen.append(is_running(job.pid(0)))
        (job.root / "go").touch()

    assert job.supervise(watch).exit_code == 0
    assert (seen, len(job.events("attempt"))) == ([True], 1)


_WATCHED = """
(run / "fabric").mkdir(exist_ok=True)
ranks = [{"rank": 0, "host": host, "state": "waiting", "quiet_s": 1.0, "doing": "all_reduce of 4 MB on dp"}]
(run / "fabric" / "watch.json").write_text(json.dumps({"updated": time.time(), "ended": False, "ranks": ranks}))
"""


def test_where_the_watch_saw_a_rank_last_is_told(tmp_path: Path) -> None:
    script = _WATCHED + "fail('the disk is full')"
    job = MadeUpJob(tmp_path, ["a"], script, launch="max_attempts_without_progress = 1")
    end = job.supervise()
    assert end.cause == (
        "rank 0 of 1 on a: the disk is full (before a step was recorded; last seen in all_reduce of 4 MB on dp); "
        "1 attempt without a new checkpoint"
    )
    assert job.events("failure")[0]["last_collective"] == "all_reduce of 4 MB on dp"


def test_in_which_collective_a_dead_rank_is_missed_the_watch_tells_after_its_end(tmp_path: Path) -> None:
    script = _WATCHED + "os.kill(os.getpid(), signal.SIGUSR2)"
    job = MadeUpJob(tmp_path, ["a"], script, launch="max_attempts_without_progress = 1")

    async def tell() -> None:
        await job.wait_for("pid-0-1")
        await job.until(lambda: not is_running(job.pid(0)))
        evidence = {"state": "dead", "collective": "all_gather of 1 MB", "axis": "dp"}
        finding = {"kind": "missing_rank", "hosts": ["a"], "ranks": [0], "confidence": 1.0, "evidence": evidence}
        with (job.root / "fabric" / "findings.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "sentence": "rank 0 (a) is gone.", **finding}) + "\n")

    end = job.supervise(tell)
    assert end.cause == (
        "rank 0 of 1 on a was killed by SIGUSR2 (before a step was recorded; last seen in all_gather of 1 MB on dp); "
        "1 attempt without a new checkpoint"
    )


def test_a_bad_host_is_excluded_and_a_spare_takes_its_place(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b", "c"],
        _PREFLIGHT
        + """
if attempt == 1 and rank == 0:
    refuse(["b's link is slow.", "The clocks differ."], ["b"])
elif attempt == 1:
    hang()
elif rank == 0:
    accept()
""",
        launch=_ON + "nodes = 2\nmax_attempts_without_progress = 1",
    )
    began = time.time()
    assert job.supervise().exit_code == 0
    assert job.backend.starts == [("a", "b"), ("a", "c")]
    assert job.state().excluded_hosts == {"b": "b's link is slow."}
    assert job.events("exclude")[0]["host"] == "b"
    refused, accepted = job.events("preflight")
    assert (refused["attempt"], refused["ok"], refused["bad_hosts"]) == (1, False, ["b"])
    assert (accepted["attempt"], accepted["ok"], accepted["seconds"]) == (2, True, 0.5)
    (failure,) = job.events("failure")
    assert failure["message"] == "preflight: b's link is slow. The clocks differ."
    assert began < failure["at"] <= failure["time"]
    assert job.state().attempts_without_progress == 0


def _misses_rank_1(does: str, until: str) -> str:
    lines = (
        *("if rank == 1:", f"    {does}"),
        *(f"while not ({until}):", "    time.sleep(0.01)"),
        "refuse(['Rank 1 did not answer.'], ['b' if attempt == 1 else 'c'], [1])",
    )
    return _PREFLIGHT + "\n".join(lines)


def test_a_rank_that_crashes_during_preflight_is_no_fault_of_its_host(tmp_path: Path) -> None:
    gone = "pid.exists() and not Path('/proc', pid.read_text()).exists()"
    script = "pid = run / f'pid-1-{attempt}'\n" + _misses_rank_1("fail('KeyError: nothing')", gone)
    job = MadeUpJob(tmp_path, ["a", "b", "c", "d"], script, launch=_ON + "nodes = 2\nmax_attempts_without_progress = 2")

    end = job.supervise()
    assert end.cause == (
        "rank 1 of 2 on c: KeyError: nothing (before a step was recorded); 2 attempts in a row without a new checkpoint"
    )
    assert (end.exit_code, job.state().excluded_hosts) == (1, {})


def test_a_rank_that_is_silent_during_preflight_is_and_counts(tmp_path: Path) -> None:
    script = _misses_rank_1("mark('silent'); hang()", "(run / f'silent-1-{attempt}').exists()")
    job = MadeUpJob(tmp_path, ["a", "b", "c", "d"], script, launch=_ON + "nodes = 2\nmax_attempts_without_progress = 2")
    assert job.supervise().exit_code == 1
    assert job.state().excluded_hosts == dict.fromkeys("bc", "Rank 1 did not answer.")
    assert job.state().attempts_without_progress == 2


def test_ranks_are_told_their_hosts_in_order(tmp_path: Path) -> None:
    script = "mark('hosts', os.environ['MEGA_RANK_HOSTS'])"
    job = MadeUpJob(tmp_path, ["a", "b"], script, launch="nodes = 2", ranks_per_host=2)
    assert job.supervise().exit_code == 0
    assert (job.root / "hosts-3-1").read_text() == "a,b"


def test_without_a_spare_the_job_is_queued_again_without_the_bad_host_and_nothing_is_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b"],
        _PREFLIGHT + "refuse(['b is slow.'], ['b']) if rank == 0 else hang()",
        launch=_ON + "nodes = 2",
    )
    end = job.supervise()
    assert (end.exit_code, end.requeued) == (75, True)
    assert job.backend.requeues == [{"without": ("b",), "reason": "hosts"}]
    assert job.events("wait_for_hosts") == []
    assert end.cause == (
        "1 host is left, and 2 needed (launch.nodes); not used any more: b: b is slow.; before that: preflight: b is slow."
    )


def test_where_nothing_can_be_queued_a_bad_host_ends_the_job_with_3(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _PREFLIGHT + "refuse(['a is slow.'], ['a'])", launch=_ON)
    job.backend.accepts_requeue = False
    assert job.supervise().exit_code == 3
    assert job.state().state == "failed"


@pytest.mark.parametrize(
    ("launch", "bad_hosts"), [("", []), ('preflight.on_bad_host = "stop"\n', ["a"])], ids=["no host", "stop"]
)
def test_what_no_other_host_would_mend_ends_the_job(tmp_path: Path, launch: str, bad_hosts: list[str]) -> None:
    script = f"refuse(['torch differs.'], {bad_hosts})"
    job = MadeUpJob(tmp_path, ["a", "b"], _PREFLIGHT + script, launch=_ON + launch)
    end = job.supervise()
    assert (end.exit_code, end.cause) == (3, "preflight: torch differs.")
    assert len(job.events("attempt")) == 1


def test_ranks_that_stay_after_rank_0_is_done_are_ended_and_the_run_is_done(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a"],
        """
        if rank == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        if rank == 1:
            hang()
        wait_for("pid-1-1", "pid-2-1")
        try:
            while Path("/proc", (run / "pid-2-1").read_text(), "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
        except OSError:
            pass
        """,
        ranks_per_host=3,
    )
    # Rank 2's failure alone would end all at once.
    job.patience = replace(job.patience, known_cause=60.0, done=0.0)
    end = job.supervise()
    assert (end.exit_code, job.state().state) == (0, "finished")
    assert "rank 1 had not ended 0 s after rank 0 was done, and had to be ended; nothing is lost" in job.said
    assert "rank 2 on a was killed by SIGUSR2, after rank 0 was done; nothing is lost" in job.said
    assert not any(map(is_running, job.pids()))


class _BrokenStart:
    """Agents of which the starter says that it cannot start them."""

    def __init__(self, job: MadeUpJob, script: str) -> None:
        self._start = job.backend.start
        self._script = script
        self.number = 0

    async def __call__(self, start: AgentsStart) -> Agents:
        self.number += 1
        if self.number > 1:
            return await self._start(start)
        return Starter.start(["sh", "-c", self._script], environ=os.environ, output=start.output)


def test_a_starter_that_fails_is_the_cause_and_the_host_that_it_names_is_left_out(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["n1", "n2", "n3"], "", launch="nodes = 2")
    complaint = "ssh: connect to host n1 port 22: No route to host"
    job.backend.start = _BrokenStart(job, f"echo starting; echo {complaint}; exit 255")  # type: ignore[method-assign]
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["host"]) == ("starter", "n1")
    log = job.run.logs / "attempt-1" / "agents.log"
    how = f"ended with exit code 255: {complaint} (more in {log})"
    assert failure["message"] == f"the program that starts the hosts {how}"
    assert job.backend.starts == [("n2", "n3")]


def test_what_cannot_be_started_at_all_is_told(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "", launch="max_attempts_without_progress = 1")

    async def fail(start: AgentsStart) -> Agents:
        raise RunError("there is no mpirun")

    job.backend.start = fail  # type: ignore[method-assign]
    assert job.supervise().cause == "there is no mpirun; 1 attempt without a new checkpoint"


@pytest.mark.parametrize("what", ["starter ends", "starter cannot be started", "no folder"])
def test_what_could_not_begin_is_given_time_to_heal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    job = MadeUpJob(tmp_path, ["a"], "")
    job.patience = replace(job.patience, not_begun=6000.0)
    if what == "starter ends":
        job.backend.start = _BrokenStart(job, "exit 5")  # type: ignore[method-assign]
    elif what == "starter cannot be started":

        def fail(number: int) -> None:
            raise RunError("there is no mpirun")

        job.backend.before_start = fail
    else:
        job.run.logs.mkdir()
        (job.run.logs / "attempt-1").touch()
        monkeypatch.setattr(supervisor, "new_attempt", lambda run: (run.logs / "attempt-1").mkdir())

    async def stop() -> None:
        await job.until(lambda: any(said.endswith("going on from step 0 in 6000 s") for said in job.said))
        os.kill(os.getpid(), signal.SIGTERM)

    assert job.supervise(stop).exit_code == 75


def test_one_agent_a_rank_where_the_backend_wants_that(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "mark('agent', os.getppid())", ranks_per_host=2)
    job.backend.task_per_rank = True
    assert job.supervise().exit_code == 0
    agents = {(job.root / f"agent-{rank}-1").read_text() for rank in (0, 1)}
    assert len(agents) == 2


_DRIVER = """
import sys
from pathlib import Path
from tests.launcher.jobs.made_up_hosts import MadeUpJob
MadeUpJob(Path(sys.argv[1]), ["a", "b"], "mark('training')\\nhang()", launch="nodes = 2").supervise()
"""


def test_no_rank_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(tmp_path)])
    try:
        marks = [tmp_path / "job" / f"training-{rank}-1" for rank in (0, 1)]
        wait_until(lambda: all(mark.exists() for mark in marks) or driver.poll() is not None)
        pids = [int((tmp_path / "job" / f"pid-{rank}-1").read_text()) for rank in (0, 1)]
        assert all(map(is_running, pids))
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_until(lambda: not any(map(is_running, pids)))
    state = json.loads((tmp_path / "job" / "launch" / "state.json").read_text())
    assert (state["state"], state["hosts"]) == ("running", ["a", "b"])


def test_a_first_start_leaves_out_what_earlier_jobs_of_slurm_have_found(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "checkpoint(4)", launch="nodes = 1")
    job.folder.keep_excluded_hosts({"a": "it is slow"})
    job.backend.name = "slurm"
    assert job.supervise().exit_code == 0
    assert job.backend.starts == [("b",)]
    assert job.state().excluded_hosts == {"a": "it is slow"}
