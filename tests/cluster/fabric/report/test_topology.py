import xml.etree.ElementTree as ElementTree
from typing import Any

from cluster.fabric.report.canvas import svg
from cluster.fabric.report.topology import HEIGHT, topology
from cluster.fabric.report.views import fabric_of
from tests.cluster.fabric.report.samples import finding

_WIDTH = 800.0


def _texts(*findings: dict[str, Any], num_hosts: int) -> list[tuple[str, float, float]]:
    """Every text of the drawing, with its place from the upper left."""
    hosts = [f"n{number}" for number in range(num_hosts)]
    groups = [hosts[: num_hosts // 2], hosts[num_hosts // 2 :]]
    fabric = fabric_of({"findings": list(findings), "details": {"hosts": hosts, "groups": groups}})
    assert fabric is not None

    def draw(figure: Any, palette: Any) -> None:
        topology(figure.add_axes((0, 0, 1, 1)), fabric, palette, width=_WIDTH)

    root = ElementTree.fromstring(svg(draw, width=_WIDTH, height=HEIGHT, name="t", label="a topology"))
    texts = [element for element in root.iter() if element.tag.endswith("text")]
    return [(text.text or "", float(text.get("x", "0")), float(text.get("y", "0"))) for text in texts]


def test_labels_of_neighbours_do_not_lie_on_one_another() -> None:
    found = [finding("slow_link", (f"n{number}",), "slow") for number in (10, 11, 12)]
    places = [(x, y) for text, x, y in _texts(*found, num_hosts=64) if text in ("n10", "n11", "n12", "slow link")]
    assert len(places) == 6
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[index + 1 :]:
            assert abs(x - other_x) > 50 or abs(y - other_y) > 10


def test_every_label_lies_within_the_drawing() -> None:
    kinds = ("slow_host", "slow_sender", "mismatched_collective", "missing_rank")
    found = [finding(kind, ("n0", "n63"), "wrong") for kind in kinds]
    for text, x, y in _texts(*found, num_hosts=64):
        assert 0 < x < _WIDTH, text
        assert 0 < y < HEIGHT, text


def test_few_hosts_have_their_names_and_many_only_those_with_findings() -> None:
    few = [text for text, _, _ in _texts(num_hosts=8)]
    assert {f"n{number}" for number in range(8)} <= set(few)
    many = [text for text, _, _ in _texts(finding("slow_host", ("n5",), "slow"), num_hosts=64)]
    assert [text for text in many if text.startswith("n")] == ["n5"]
