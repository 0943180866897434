import re
import struct
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.report import ReportData, write_report
from cluster.fabric.report.palette import DARK, LIGHT, named_colours
from tests.cluster.fabric.report import samples


def _page(data: ReportData, folder: Path) -> str:
    write_report(data, folder / "report.html")
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _page(samples.everything(), tmp_path_factory.mktemp("report"))


def test_everything_that_is_known_stands_on_the_page(page: str) -> None:
    for said in (
        "h3 sends slowly: 21.1 Mbit/s out of it",
        "4 findings",
        "RetransSegs +1,510 of 102,400 OutSegs",
        'class="contradicts">port_xmit_wait of mlx5_0:1 +12,345',
        "confidence 99 %",
        "<dt>keeps</dt><dd>44 %</dd>",
        "<dt>peers out rate</dt><dd>48.0 Mbit/s</dd>",
        "Mbit/s, row sends to column",
        ">slow out<",
        ">slow compute<",
        ">bad path<",
        "bus bandwidth in MB/s over size; isolated solid, together dashed",
        "all_to_all",
        ">16 KiB<",
        "busbw of all_reduce on rail 3 is 18 % below",
        "only there: all_to_all on rail 3, isolated",
        "all_gather on tp",
        ">+68 %<",
        "tcp/host/RetransSegs",
        "for which rank the others wait",
        "dashed: the collectives alone, nobody late",
        ">rank 5 since step 120<",
        "swept 2026-11-23T07:00:00+00:00 · torch 2.13.0",
    ):
        assert said in page, said


def test_the_page_needs_nothing_else(page: str) -> None:
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r"<(?:script|link|img|iframe|object)\b|@import|@font-face", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", page))


def test_colours_are_the_pages_own_on_light_and_on_dark_ground(page: str) -> None:
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert {"--ink", "--bad", "--heat-0", "--heat-ink-0", "--series-1"} <= used
    assert used <= named_colours(LIGHT).keys()
    assert named_colours(LIGHT).keys() == named_colours(DARK).keys()
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    left = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
    assert not left, "a drawing has colours that do not follow the page"


def test_drawings_are_well_formed_and_their_ids_unique(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 7  # topology, pairs, compute, two groups of curves, waits, who is late
    for text in drawn:
        ElementTree.fromstring(text)
        assert "aria-label=" in text
    ids = re.findall(r' id="([^"]+)"', "".join(drawn))
    assert len(ids) == len(set(ids))


def test_a_healthy_verdict_says_so(tmp_path: Path) -> None:
    page = _page(ReportData(verdict=samples.verdict(slow_row=None)), tmp_path)
    assert '<span class="pill">healthy</span>' in page
    assert "nothing was found" in page
    assert "Waits in training" not in page
    assert "Counters" not in page


def test_parts_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    page = _page(ReportData(title="Nothing yet"), tmp_path)
    assert "<h1>Nothing yet</h1>" in page
    assert "<h2>" not in page
    assert "pill" not in page.split("</style>")[1]


def test_findings_of_a_run_stand_without_a_diagnosis(tmp_path: Path) -> None:
    # The watch of a run knows findings, and no matrix of pairs.
    verdict: dict[str, Any] = {"healthy": False, "findings": [samples.STRAGGLER]}
    page = _page(ReportData(verdict=verdict, waits=samples.waits()), tmp_path)
    assert "1 finding<" in page
    assert page.count("<svg") == 2


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    odd = '<script>"&$x$'
    found = samples.finding("slow_sender", (odd,), f"{odd} sends slowly.", note=odd)
    verdict = samples.verdict(found)
    verdict["details"]["hosts"][3] = odd
    sweep = samples.sweep()
    sweep["rows"] = [{**row, "group": odd} for row in sweep["rows"]]
    page = _page(ReportData(title=odd, verdict=verdict, sweep=sweep), tmp_path)
    assert "<script" not in page
    topology, pairs, _, curves = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert ElementTree.fromstring(curves).get("aria-label", "").startswith(odd)
    for drawn in (topology, pairs):
        assert odd in [element.text for element in ElementTree.fromstring(drawn).iter()]


def test_wrong_data_is_told(tmp_path: Path) -> None:
    sweep = samples.sweep()
    sweep["rows"][3]["correct"] = False
    size = sweep["rows"][3]["num_bytes"] // 1024
    assert f"Wrong data: all_reduce of {size} KiB on world, isolated" in _page(ReportData(sweep=sweep), tmp_path)


def test_the_overview_is_a_picture(tmp_path: Path) -> None:
    write_report(samples.everything(), tmp_path / "report.html", png=tmp_path / "report.png")
    picture = (tmp_path / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 2480
    assert height > 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


def test_a_missing_library_is_one_sentence_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        FabricError, match=r"a report is drawn by matplotlib, which is not here: pip install 'mega\[report\]'"
    ):
        write_report(samples.everything(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_template_is_part_of_the_package() -> None:
    root = Path(__file__).parents[4]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["package-data"]["cluster.fabric.report"]
    assert set(listed) == {path.name for path in (root / "cluster/fabric/report").glob("*.html")}
