import numpy as np

from cluster.fabric.report import heat_map

GBIT = 1e9 / 8


def test_a_few_hosts_have_numbers_and_the_slow_are_marked() -> None:
    matrix = [[None, 10 * GBIT, 10 * GBIT], [4 * GBIT, None, 4.1 * GBIT], [10 * GBIT, 10.2 * GBIT, None]]
    assert heat_map(matrix, ["a", "b", "node"]).splitlines() == [
        "          a      b   node",
        "   a          10.0   10.0",
        "   b  ▓4.00         ▓4.10",
        "node   10.0   10.2       ",
        "Gbit/s, row sends to column, median 10.0; · from 95 % of it, █ below 30 %",
    ]


def test_many_hosts_have_shades() -> None:
    rates = np.full((20, 20), GBIT)
    np.fill_diagonal(rates, np.nan)
    rates[2] *= 0.2
    lines = heat_map(rates.tolist(), [f"h{number}" for number in range(20)]).splitlines()
    assert lines[2] == " h2  ██ █████████████████"
    assert lines[3] == " h3  ··· ················"
    assert len(lines) == 21


def test_of_very_many_hosts_the_slowest_are_shown() -> None:
    rates = np.full((100, 100), GBIT)
    rates[77] *= 0.5
    lines = heat_map(rates.tolist(), [f"h{number}" for number in range(100)]).splitlines()
    assert len(lines) == 49
    assert "h77  " + "▓" * 48 in lines
    assert lines[-1].endswith("; 48 of 100 hosts, those with the slowest pairs")


def test_nothing_measured_is_said() -> None:
    assert heat_map([[None, None], [None, None]], ["a", "b"]) == "nothing was measured between hosts"
    assert heat_map([], []) == "nothing was measured between hosts"
