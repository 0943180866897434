"""The page of a run: one file that needs nothing else."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from cluster.errors import FabricError
from cluster.fabric.report.palette import DARK, LIGHT, named_colours
from launcher.goodput.ledger import windows_file
from launcher.jobs.job_record import JobFolder, SupervisorState
from launcher.report import write_report
from megamodel.train.json_lines import append_line
from megamodel.train.run_directory import RunDirectory
from tests.launcher.report.samples import FullStory, full_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    root = tmp_path_factory.mktemp("runs") / "full"
    root.mkdir()
    return full_run(root).run


@pytest.fixture(scope="module")
def page(run: RunDirectory) -> str:
    return write_report(run).path.read_text()


def test_everything_that_is_known_stands_on_the_page(page: str, run: RunDirectory) -> None:
    for said in (
        "<h1>full</h1>",
        '<span class="pill">finished</span>',
        'of 92</span></div><div class="label">steps',
        'label">held-out loss',
        "bits/byte",
        "% of the wall-clock time was spent on steps that count.",
        "steps that were lost with a failure, and made again",
        "waiting for the slowest rank",
        "waiting in the queue",
        "<h3>Loss</h3>",
        "<h3>Throughput</h3>",
        "<h3>Step time</h3>",
        "<h3>Memory</h3>",
        "<h3>Balance of experts</h3>",
        "<h3>Starts</h3>",
        "<h3>Who is late</h3>",
        "stopped by SIGTERM after step 52",
        "rank 1 on n2 died",
        "preflight: all is well",
        "holds the others up",
        "asked to stop: preemption",
        "held out",
    ):
        assert said in page, said
    assert page.startswith("<!doctype html>")
    assert sorted(path.name for path in run.root.glob("*report*")) == ["report.html"]


def test_the_page_needs_nothing_else(page: str) -> None:
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r"<(?:script|link|img|iframe|object)\b|@import|@font-face|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", page))


def test_colours_are_the_pages_own_on_light_and_on_dark_ground(page: str) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert {"--good", "--bad", "--series-5", "--warn"} <= used
    assert used <= named_colours(LIGHT).keys() & named_colours(DARK).keys()
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn)), "colours that do not follow the page"


def test_drawings_are_well_formed_and_their_ids_unique(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 8  # loss; throughput, step time, memory, experts; starts; waits, who is late
    for text in drawn:
        ElementTree.fromstring(text)
    ids = re.findall(r' id="([^"]+)"', "".join(drawn))
    assert len(ids) == len(set(ids))


def test_elsewhere_if_asked(run: RunDirectory, tmp_path: Path) -> None:
    written = write_report(run, tmp_path / "deep" / "x.html")
    assert written.path == tmp_path / "deep" / "x.html"
    assert [path.name for path in written.path.parent.iterdir()] == ["x.html"]
    data = written.as_data()
    assert data["path"] == str(written.path)
    assert data["state"] == "finished"
    assert data["ledger"]["goodput"] == pytest.approx(92 * 2.0 / data["ledger"]["whole_s"], abs=0.02)


def test_a_run_that_has_left_nothing_has_a_page_too(tmp_path: Path) -> None:
    root = tmp_path / "new"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "config.toml").write_text("[train]\nsteps = 5\n")
    written = write_report(RunDirectory(root))
    assert written.ledger is None
    assert written.as_data()["ledger"] is None
    page = written.path.read_text()
    assert "No step has been made yet." in page
    assert "<svg" not in page
    assert "Goodput" not in page


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    story = FullStory(root=tmp_path)
    story.loads()
    story.trains(1)
    assert "<h3>Loss</h3>" in write_report(story.run).path.read_text()


def test_why_a_job_failed_and_which_hosts_are_left_out(tmp_path: Path) -> None:
    story = FullStory(root=tmp_path)
    story.attempts()
    story.loads()
    story.trains(3)
    story.fails()
    folder = JobFolder(story.run)
    append_line(folder.root / "job.json", {"backend": "local", "job_id": None, "submitted": story.began,
                                           "submitted_from": "n1", "nodes": 2, "earlier_job_ids": []})  # fmt: skip
    folder.write_state(
        SupervisorState(
            state="failed",
            host="n1",
            pid=1,
            updated=0.0,
            cause="n2 was lost <twice>",
            excluded_hosts={"n2": "its <disk>"},
        )
    )
    page = write_report(story.run).path.read_text()
    assert '<span class="pill bad">failed</span>' in page
    assert '<p class="cause">n2 was lost &lt;twice&gt;</p>' in page
    assert "n2 is not used any more: its &lt;disk&gt;" in page


def test_damaged_records_break_no_page(tmp_path: Path) -> None:
    story = full_run(tmp_path)
    for path in (story.run.metrics, story.run.events, windows_file(tmp_path), tmp_path / "fabric" / "findings.jsonl"):
        with path.open("ab") as file:
            file.write(
                b'{"time": 1700000100, "step": 7, "event": 5, "loss": [1], "expert_counts": {}}\n[1]\n\xff\n{"ti'
            )
    append_line(windows_file(tmp_path), {"step": 3, "wait_s": {"dp": "x"}, "network_s": {}, "late_s": []})
    append_line(
        story.run.events, {"time": 1.7e9, "event": "preflight", "seconds": "x", "sentences": 3, "attempt": None}
    )
    append_line(story.run.events, {"time": 1.7e9, "event": "attempt", "hosts": 3, "attempt": [], "num_ranks": "x"})
    append_line(story.run.metrics, {"time": 1.7e9, "step": 8, "loss": "x", "step_time_s": "y", "memory_bytes": {}})
    assert "<h2>Events</h2>" in write_report(story.run).path.read_text()


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    odd = '<script>alert("$x$")</script>'
    story = FullStory(root=tmp_path)
    story.event("attempt", attempt=1, hosts=[odd], num_ranks=1)
    story.loads()
    story.trains(4)
    story.event("notice", message=odd)
    story.fails(message=odd)
    page = write_report(story.run).path.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append_line(run.events, {"time": 1.7e9, "event": "start", "step": 0})
    with run.metrics.open("w") as file:
        for step in range(1, 200_001):
            file.write(
                f'{{"time": {1.7e9 + step}, "step": {step}, "loss": {3 + step % 7}, "step_time_s": 0.9, "data_s": 0.1, '
                f'"compute_s": 0.6, "update_s": 0.2, "save_s": 0.0, "tokens_per_s": {1000 + step % 13}, "mfu": 0.4, '
                f'"memory_bytes": {10**9}, "expert_counts": [[1, 2, 3, 4], [4, 3, 2, {step % 9}]]}}\n'
            )
    written = write_report(run)
    assert written.path.stat().st_size < 600_000
    assert written.ledger is not None
    assert written.ledger.starts[0].last_step == 200_000


@pytest.mark.parametrize("steps", [0, 3])
def test_a_missing_matplotlib_is_one_sentence_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    story = FullStory(root=tmp_path)
    story.loads()
    story.trains(steps)
    if not steps:
        write_report(story.run)  # nothing is drawn
        return
    with pytest.raises(
        FabricError, match=r"^a report is drawn by matplotlib, which is not here: pip install 'mega\[report\]'$"
    ):
        write_report(story.run)
    assert not (tmp_path / "report.html").exists()
