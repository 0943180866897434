"""`mega fabric`: real ranks on this machine, one JSON object, and exit codes that a script can act upon."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.child_ranks import free_port
from launcher.verbs.fabric.sizes import parse_sizes, words
from tests.launcher.conftest import Ended, Mega
from tests.requirements import mpirun, requires


def started(*arguments: str, **environ: str) -> Ended:
    """The command in a process of its own, which may start ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "fabric", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return Ended(code=done.returncode, out=done.stdout, err=done.stderr)


def test_a_sweep_of_the_world_and_an_axis_feeds_baseline_and_report(tmp_path: Path, mega: Mega) -> None:
    sweep_file = tmp_path / "new" / "sweep.json"
    small = ("--kinds", "all_reduce", "--sizes", "4K,64K", "--iterations", "5")
    ended = started("sweep", "--ranks", "4", "--mesh", "dp=2,tp=2", *small, "--output", str(sweep_file), "--json")
    assert ended.code == 0, ended.err
    rows = ended.json["rows"]
    assert {(row["group"], row["num_bytes"]) for row in rows} == {
        (group, size) for group in ("world", "dp", "tp") for size in (4096, 65536)
    }
    for row in rows:
        factor = 2 * (row["group_size"] - 1) / row["group_size"]
        assert row["algbw_bytes_per_s"] == pytest.approx(row["num_bytes"] / row["times"]["median_s"])
        assert row["busbw_bytes_per_s"] == pytest.approx(row["algbw_bytes_per_s"] * factor)
        assert row["correct"]
    assert json.loads(sweep_file.read_text()) == ended.json

    calm = ended.json  # as if it had been measured on a machine where nothing else runs
    for row in calm["rows"]:
        row["times"]["noise_share"] = 0.01
    sweep_file.write_text(json.dumps(calm))
    store = ("--store", str(tmp_path / "store"), "--cluster", "here")
    saved = mega("fabric", "baseline", "save", str(sweep_file), *store, "--json")
    assert Path(saved.json["path"]).is_file()
    assert mega("fabric", "baseline", "list", *store, "--json").json["names"] == [saved.json["name"]]
    same = mega("fabric", "baseline", "check", str(sweep_file), *store)
    assert same.code == 0, same.out + same.err

    for row in calm["rows"]:  # slower by far more than any noise
        row["times"] |= {key: 1000 * row["times"][key] for key in ("min_s", "median_s", "p99_s")}
        row["algbw_bytes_per_s"] /= 1000
        row["busbw_bytes_per_s"] /= 1000
    slow_file = tmp_path / "slow.json"
    slow_file.write_text(json.dumps(calm))
    slower = mega("fabric", "baseline", "check", str(slow_file), *store)
    assert (slower.code, "busbw of all_reduce on world" in slower.out) == (3, True), slower.out + slower.err

    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    told = mega("fabric", "report", "--sweep", str(sweep_file), "--to", str(page), "--png", str(picture))
    assert told.code == 0, told.err
    assert "all_reduce" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_diagnosis_of_ranks_on_one_host_answers_in_the_promised_form(tmp_path: Path) -> None:
    exclude, verdict = tmp_path / "exclude", tmp_path / "verdict.json"
    files = ("--exclude-file", str(exclude), "--output", str(verdict))
    ended = started("diagnose", "--ranks", "3", "--json", *files)
    # Whatever the noise of a busy machine may look like, the answer has its form.
    assert ended.code == (0 if ended.json["healthy"] else 3), ended.err
    assert ended.json["healthy"] == (ended.json["findings"] == [])
    assert ended.json["beta_s_per_byte"] > 0
    assert ended.json["alpha_s"] > 0
    assert ended.json["seconds"] > 0
    assert json.loads(verdict.read_text()) == ended.json
    assert exclude.exists()


def test_pairs_are_shown_as_a_matrix() -> None:
    ended = started("pairs", "--ranks", "3", "--json")
    assert ended.code == 0, ended.err
    matrix = ended.json["pairs_bytes_per_s"]
    assert [[rate is None for rate in row] for row in matrix] == [
        [row == column for column in range(3)] for row in range(3)
    ]
    assert ended.json["rounds"] == 3


@requires("mpi")
@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_ranks_of_mpirun_measure_and_end_in_good_order(transport: str) -> None:
    started_by = [str(mpirun()), "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    command = [*started_by, sys.executable, "-m", "launcher", "fabric", "pairs", "--transport", transport, "--json"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 1


def test_ranks_that_never_come_are_missing(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    here = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ended = started(
        "diagnose", "--timeout", "2", "--json", "--exclude-file", str(exclude), **here, MASTER_PORT=str(free_port())
    )
    assert ended.code == 3, ended.err
    (finding,) = ended.json["findings"]
    assert (finding["kind"], finding["ranks"]) == ("missing_rank", [1, 2])
    assert finding["hosts"] == []  # nobody has told where they are
    assert exclude.read_text() == ""


def test_hosts_of_ranks_that_never_come_are_known_from_slurm(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
        "SLURM_STEP_NODELIST": "n[3-6]",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ended = started("diagnose", "--timeout", "2", "--json", "--exclude-file", str(exclude), **step)
    assert ended.code == 3, ended.err
    assert ended.json["findings"][0]["hosts"] == ["n4", "n5", "n6"]
    assert exclude.read_text() == "n[4-6]\n"


def test_a_rank_without_a_first_rank_says_so() -> None:
    here = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ended = started("diagnose", "--timeout", "1", **here, MASTER_PORT=str(free_port()))
    assert ended.code == 1
    assert "rank 1 of 2" in ended.err
    assert "start rank 0" in ended.err


def test_a_rank_that_is_stopped_for_good_does_not_hold_the_answer_back() -> None:
    command = [sys.executable, "-m", "launcher", "fabric", "diagnose", "--ranks", "3", "--timeout", "6", "--json"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started_by:
        try:
            ranks: dict[str, psutil.Process] = {}
            deadline = time.monotonic() + 60
            while "2" not in ranks:
                assert time.monotonic() < deadline, "no rank 2 was started within 60 s"
                for child in psutil.Process(started_by.pid).children():
                    with contextlib.suppress(psutil.Error):
                        ranks[child.environ().get("RANK", "")] = child
            ranks["2"].suspend()
            out, err = started_by.communicate(timeout=100)
        finally:
            started_by.kill()
    assert started_by.returncode == 3, err
    assert [(each["kind"], each["ranks"]) for each in json.loads(out)["findings"]] == [("missing_rank", [2])]
    assert not ranks["2"].is_running() or ranks["2"].status() == psutil.STATUS_ZOMBIE


def test_what_is_no_verdict_and_no_run_is_not_reported_as_healthy(mega: Mega, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('{"hosts": ["a", "b"], "rounds": 1}')
    for arguments, message in (
        (["--diagnosis", str(tmp_path / "pairs.json")], "it has no verdict"),
        (["--sweep", str(tmp_path / "pairs.json")], "is not what `mega fabric sweep --output` writes"),
        (["--run", str(tmp_path / "nosuch")], "there is no such run"),
    ):
        ended = mega("fabric", "report", *arguments, "--to", str(tmp_path / "x.html"))
        assert (ended.code, message in ended.err) == (1, True), ended.err
    assert not (tmp_path / "x.html").exists()


def test_a_simulation_feeds_the_same_diagnosis(mega: Mega) -> None:
    ended = mega("fabric", "simulate", "--hosts", "128", "--cases", "3", "--fault", "slow_sender", "--json")
    assert len(ended.json["cases"]) == 3
    assert ended.code == (0 if ended.json["right"] == 3 else 3)
    assert ended.json["right"] >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose"], "one rank alone has no fabric: give --ranks N"),
        (["diagnose", "--ranks", "2", "--transport", "mpi"], "needs ranks that MPI has started"),
        (["sweep", "--ranks", "4", "--mesh", "dp=3"], "these axes make 3 ranks, and there are 4"),
        (["sweep", "--ranks", "2", "--sizes", "big"], "'big' is no size such as 512, 64K or 16M"),
        (["sweep", "--ranks", "2", "--kinds", "all_reduse"], "'all_reduse' is none of all_reduce"),
        (["sweep", "--ranks", "2", "--modes", "alone"], "'alone' is none of isolated"),
        (["simulate", "--topology", "ring"], "--topology ring: known are fat-tree"),
        (["simulate", "--fault", "fire"], "--fault fire: known are"),
        (["report"], "a report of what?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(mega: Mega, arguments: list[str], message: str) -> None:
    ended = mega("fabric", *arguments)
    assert ended.code == 2, ended.err
    assert message in ended.err


def test_a_file_that_is_no_sweep_is_told(mega: Mega, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"rows": 3}')
    ended = mega("fabric", "baseline", "save", str(tmp_path / "x.json"))
    assert (ended.code, "is not what `mega fabric sweep --output` writes" in ended.err) == (1, True)


def test_a_dry_run_measures_nothing(mega: Mega) -> None:
    ended = mega("fabric", "sweep", "--ranks", "8", "--mesh", "dp=2,tp=4", "--dry-run", "--json")
    assert {name: len(groups) for name, groups in ended.json["groups"].items()} == {"world": 1, "dp": 4, "tp": 2}
    assert mega("fabric", "diagnose", "--ranks", "4", "--dry-run", "--json").json == {"ranks": 4}


def test_sizes() -> None:
    assert parse_sizes("1K:16K") == (1024, 2048, 4096, 8192, 16384)
    assert parse_sizes("1k:1MiB:32") == (1024, 32768, 2**20)
    assert parse_sizes("512,4KB,512") == (512, 4096)
    assert words(2**20) == "1 MiB"
    assert words(1000) == "1000 B"
